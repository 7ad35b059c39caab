"""What a data set holds, as one page for the person who ingested it and for colleagues.

The page names no recording, subject or file of the source, so it may be mailed. A recording is identified by its shard
and row, so that the owner of the data can find it. Counts are of all recordings; heart rates and amplitudes are of a
seeded sample where there are many. Memory stays flat: shards are read one by one, and signals only of the sample.
"""

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from html import escape
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from lsemvae.data.shards import SCHEMA, UNREADABLE, Shard, ShardedDataset, flag_kind, unpack
from lsemvae.leads import LEADS
from lsemvae.plots.curves import histogram
from lsemvae.plots.ecg_paper import ecg_paper
from lsemvae.quality import FLAGS, heart_rate_bpm
from lsemvae.record import Record
from lsemvae.reports.page import chart, page, share, table
from lsemvae.storage import Storage

EXAMPLES = 12
SAMPLE = 4096
"""With more recordings than this, distributions are of about this many, from row groups drawn at random."""
GROUPS = 64
THREADS = 8


class _Place(NamedTuple):
    shard: str
    row: int
    flags: list[str]


def ingest_report(data: ShardedDataset, unreadable: Sequence[Mapping[str, str]], *, seed: int = 0) -> str:
    """A data set and what could not be read (rows with `code`) -> HTML; the same data and seed, the same page."""
    manifest = data.manifest
    shards = manifest.of_split("all")
    with ThreadPoolExecutor(THREADS) as pool:
        scans = list(pool.map(lambda shard: _scan(data.storage, shard), shards))
    flags = sum((counts for counts, _, _ in scans), Counter())
    flagged = sum(number for _, number, _ in scans)
    worst = heapq.nlargest(EXAMPLES, (place for _, _, places in scans for place in places), key=_number_of_flags)

    rng = np.random.default_rng(seed)
    rows = sorted(rng.choice(manifest.records, min(EXAMPLES, manifest.records), replace=False).tolist())
    examples = list(_located(shards, rows))
    sampled, rates_bpm, sizes_mv = _distributions(data.storage, shards, rng)

    title = f"{manifest.records:,} recordings of {manifest.subjects:,} subjects"
    of = "all recordings" if sampled == manifest.records else f"a random sample of {sampled:,} recordings"
    parts = [
        f"<h1>{title}</h1>",
        f"<p>Cohort {escape(manifest.cohort)} from <code>{escape(manifest.source)}</code>, data set "
        f"<code>{manifest.digest}</code>. This page names no recording and no subject. For research, not for "
        "patient care.</p>",
        "<h2>Counts</h2>",
        _counts(data, flagged),
        "<h2>Unreadable</h2>",
        _unreadable(unreadable),
        "<h2>Flags</h2>",
        "<p>A flag marks a doubt. No recording is left out at ingest because of a flag; the preprocessing of a model "
        "decides what that model refuses. A recording can have several flags; counts are of recordings.</p>",
        _flags(flags, manifest.records),
        "<h2>Labels</h2>",
        _labels(manifest.labels),
        "<h2>Heart rate and amplitude</h2>",
        f"<p>Of {of}.</p>",
        _standardised(manifest.flagged.get("no_millivolts", 0)),
        _heart_rates(rates_bpm),
        _amplitudes(sizes_mv),
        "<h2>Examples</h2>",
        f"<p>{len(examples)} recordings drawn at random, as they were recorded. A row is counted from 0 in its "
        "shard.</p>",
        *(_figure(data.storage, place) for place in examples),
        "<h2>Most flagged</h2>",
        "<p>The recordings with most flags.</p>" if worst else "<p>No recording has a flag.</p>",
        *(_figure(data.storage, place) for place in worst),
    ]
    return page(f"Ingest: {title}", parts)


# --- reading -------------------------------------------------------------------------------------------------


def _number_of_flags(place: _Place) -> int:
    return len(place.flags)


def _scan(storage: Storage, shard: Shard) -> tuple[Counter[tuple[str, str]], int, list[_Place]]:
    """How many recordings have each kind of flag, (kind, ""), and each flag; how many have any; those with most."""
    counts: Counter[tuple[str, str]] = Counter()
    flagged, worst = 0, []
    with storage.filesystem.open_input_file(storage.path(shard.path)) as stream:
        column = pq.read_table(stream, columns=["flags"]).column("flags")
    for row, flags in enumerate(column.to_pylist()):
        if flags:
            counts.update({(flag_kind(flag), "") for flag in flags} | {(flag_kind(flag), flag) for flag in flags})
            flagged += 1
            worst.append(_Place(shard.path, row, flags))
    return counts, flagged, heapq.nlargest(EXAMPLES, worst, key=_number_of_flags)


def _located(shards: Sequence[Shard], rows: Sequence[int]) -> Iterator[_Place]:
    """Rows counted through all shards, ascending -> where they are; their flags are read with their signal."""
    ends = np.cumsum([shard.rows for shard in shards])
    for row in rows:
        number = int(np.searchsorted(ends, row, side="right"))
        yield _Place(shards[number].path, int(row - ends[number] + shards[number].rows), [])


def _row_group(storage: Storage, shard: str, row: int) -> tuple[list[dict[str, Any]], int]:
    """The rows that a reader must take together with `row`, and where in its shard they begin."""
    with storage.filesystem.open_input_file(storage.path(shard)) as stream:
        file, start = pq.ParquetFile(stream), 0
        for group in range(file.num_row_groups):
            if row < start + file.metadata.row_group(group).num_rows:
                return file.read_row_group(group, columns=SCHEMA.names).to_pylist(), start
            start += file.metadata.row_group(group).num_rows
    raise AssertionError(f"{shard} has {start} rows, the manifest says more")


def _sample(storage: Storage, shards: Sequence[Shard], rng: np.random.Generator) -> Iterator[Record]:
    total = sum(shard.rows for shard in shards)
    rows = range(total) if total <= SAMPLE else sorted(rng.choice(total, GROUPS, replace=False).tolist())
    read_to = ("", 0)
    for place in _located(shards, rows):
        if place.shard == read_to[0] and place.row < read_to[1]:
            continue
        group, start = _row_group(storage, place.shard, place.row)
        read_to = (place.shard, start + len(group))
        yield from map(unpack, group)


def _distributions(
    storage: Storage, shards: Sequence[Shard], rng: np.random.Generator
) -> tuple[int, np.ndarray, dict[str, np.ndarray]]:
    """Size of the sample, heart rates (NaN where none can be estimated), peak to peak of each measured lead in mV."""
    rates_bpm: list[float] = []
    sizes_mv: dict[str, list[float]] = {lead: [] for lead in LEADS}
    for record in _sample(storage, shards, rng):
        rates_bpm.append(heart_rate_bpm(record))
        high_mv_L = np.fmax.reduce(record.signal_mv_LT, axis=1)
        low_mv_L = np.fmin.reduce(record.signal_mv_LT, axis=1)
        for lead, size_mv in zip(record.leads, high_mv_L - low_mv_L, strict=True):
            if lead not in record.derived and np.isfinite(size_mv):
                sizes_mv[lead].append(size_mv)
    return len(rates_bpm), np.array(rates_bpm), {lead: np.array(sizes) for lead, sizes in sizes_mv.items() if sizes}


# --- writing -------------------------------------------------------------------------------------------------


def _counts(data: ShardedDataset, flagged: int) -> str:
    manifest = data.manifest
    megabytes = sum(shard.bytes for shard in manifest.shards) / 1e6
    rows = [
        ("recordings", f"{manifest.records:,}"),
        ("to train on", f"{manifest.rows_in('train'):,}"),
        ("to validate", f"{manifest.rows_in('val'):,}"),
        ("subjects", f"{manifest.subjects:,}"),
        ("with a flag", f"{flagged:,} ({share(flagged, manifest.records)})"),
        ("unreadable", f"{manifest.unreadable:,}"),
        ("shards", f"{len(manifest.shards):,} ({megabytes:,.1f} MB)"),
    ]
    return table("What is in the shards", ["what", "count"], rows)


def _unreadable(unreadable: Sequence[Mapping[str, str]]) -> str:
    if not unreadable:
        return "<p>Every recording of the source could be read.</p>"
    reasons = Counter(row["code"] for row in unreadable).most_common()
    rows = [(escape(code.replace("_", " ")), f"{count:,}") for code, count in reasons]
    return (
        table("Why recordings could not be read", ["reason", "recordings"], rows)
        + f"<p>Which they are, and the reason in full: {UNREADABLE} beside the shards.</p>"
    )


def _flags(counts: Counter[tuple[str, str]], records: int) -> str:
    if not counts:
        return "<p>No recording has a flag.</p>"
    kinds = {kind for kind, _ in counts}
    rows = []
    for kind in [*(kind for kind in FLAGS if kind in kinds), *sorted(kinds - FLAGS.keys())]:
        number = counts[kind, ""]
        of_leads = {
            flag.removeprefix(f"{kind}:"): n for (k, flag), n in counts.items() if k == kind and flag not in ("", kind)
        }
        leads = ", ".join(f"{lead} {n:,}" for lead, n in sorted(of_leads.items(), key=_by_lead))
        meaning = FLAGS.get(kind, "Noticed by the reader.")
        rows.append((escape(kind), f"{number:,}", share(number, records), escape(meaning), escape(leads)))
    return table("Flags", ["flag", "recordings", "share", "meaning", "by lead"], rows)


def _by_lead(item: tuple[str, int]) -> int:
    return LEADS.index(item[0]) if item[0] in LEADS else len(LEADS)


def _labels(labels: Mapping[str, Mapping[str, int]]) -> str:
    if not labels:
        return "<p>The data set has no labels.</p>"
    rows = []
    for name, counts in labels.items():
        binary = counts["0"] + counts["1"] if not counts["other"] else 0
        numbers = [f"{counts[key]:,}" for key in ("1", "0", "other", "null")]
        rows.append((escape(name), share(counts["1"], binary), *numbers))
    header = ["label", "prevalence", "at 1", "at 0", "other values", "absent"]
    return table("Labels; the prevalence is of the recordings that have the label", header, rows)


def _standardised(records: int) -> str:
    if not records:
        return ""
    return (
        f"<p>{records:,} recordings are no millivolts: their source standardised them. In them 0.15 mV, here and in "
        "the pictures, stands for one standard deviation of the data set.</p>"
    )


def _spread(values: np.ndarray, digits: int) -> list[str]:
    return [f"{value:.{digits}f}" for value in np.quantile(values, [0.5, 0.05, 0.95])]


def _heart_rates(rates_bpm: np.ndarray) -> str:
    known = rates_bpm[np.isfinite(rates_bpm)]
    if not known.size:
        return "<p>No heart rate can be estimated.</p>"
    middle, low, high = _spread(known, 0)
    words = f"Heart rate: median {middle} a minute, 5 to 95 % of the recordings from {low} to {high}"
    return chart(
        histogram(known, np.arange(20, 221, 5.0), "heart rate, a minute (estimate)"),
        f"{words}. An estimate from the steepness of all leads, not a measurement; "
        f"{len(rates_bpm) - len(known):,} recordings give none.",
    )


def _amplitudes(sizes_mv: Mapping[str, np.ndarray]) -> str:
    if not sizes_mv:
        return "<p>No lead has values.</p>"
    together_mv = np.concatenate(list(sizes_mv.values()))
    middle, low, high = _spread(together_mv, 2)
    words = f"Amplitude of a lead, peak to peak: median {middle} mV, 5 to 95 % of the leads from {low} to {high} mV."
    rows = [(lead, f"{len(sizes):,}", *_spread(sizes, 2)) for lead, sizes in sizes_mv.items()]
    header = ["lead", "recordings", "median, mV", "5 %", "95 %"]
    return chart(
        histogram(together_mv, np.arange(0, 8.01, 0.2), "peak to peak, mV (the last bar: and more)"), words
    ) + table("Amplitude by lead, peak to peak, of measured leads", header, rows)


def _figure(storage: Storage, place: _Place) -> str:
    group, start = _row_group(storage, place.shard, place.row)
    row = group[place.row - start]
    where = f"{place.shard}, row {place.row}"
    flags = "".join(f"<li>{escape(flag)}</li>" for flag in row["flags"])
    return (
        f'<figure><h3>{escape(where)}</h3><div class="wide" role="region" tabindex="0" aria-label="{escape(where)}">'
        f"{ecg_paper(unpack(row))}</div><figcaption>"
        + (f'Flags: <ul class="flags">{flags}</ul>' if flags else "No flags.")
        + "</figcaption></figure>"
    )
