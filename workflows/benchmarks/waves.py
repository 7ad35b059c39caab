"""How far the edges of waves are from LUDB's expert annotations, beside NeuroKit2's.

Only beats within the stretch that LUDB annotates are counted; a wave is found if its peak is within 150 ms of the
annotated one. In `lsemvae.explain.beats`, the constants of onsets and offsets were chosen on the odd-numbered
recordings, the threshold of QRS on all.
"""

import argparse
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import wfdb

from benchmarks.measure import Row, less_is_better, more_is_better
from lsemvae.cohorts.ludb import UV_PER_LSB
from lsemvae.errors import LsemvaeError
from lsemvae.explain.waves import delineate
from lsemvae.formats import read
from lsemvae.leads import LEADS, LIMB_LEADS
from lsemvae.preprocess import PreprocessConfig, preprocess

RECORDED_HZ = 500
LEAD_SETS = {"12 leads": LEADS, "6 limb leads": LIMB_LEADS, "lead I": ("I",)}
EDGES = ("onset", "peak", "offset")
SYMBOLS = {"p": "P", "N": "QRS", "t": "T"}
SAME_WAVE_MS, SAME_BEAT_MS = 150, 75
TOLERANCE_MS = {("P", "onset"): 10.2, ("P", "offset"): 12.7, ("QRS", "onset"): 6.5, ("QRS", "offset"): 11.6}
TOLERANCE_MS |= {("T", "offset"): 30.6}
"""Largest standard deviation of a program's errors that the CSE Working Party tolerates: two standard deviations of the
differences between its experts (Eur Heart J 1985, 6:815)."""

Marks = Mapping[
    str, Mapping[str, np.ndarray]
]  # lead -> wave -> samples [N, 3] of onset, peak and offset, NaN if absent
Beats = dict[str, np.ndarray]  # wave -> ms [N, 3]


@dataclass(frozen=True)
class Annotated:
    """One recording as model input of these leads, and its marks at 500 Hz."""

    x_LT: np.ndarray
    lead_mask_L: np.ndarray
    marks: Marks


class Errors(NamedTuple):
    """Of one wave: shares of annotated waves that are found and of found ones that are annotated, and [3] errors."""

    sensitivity: float
    predictive_value: float
    mean_ms: np.ndarray
    sd_ms: np.ndarray
    waves: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this case."""
    parser.add_argument("--data", type=Path, required=True, help="folder of LUDB 1.0.1, with ludb.csv and data/")
    parser.add_argument("--records", choices=("even", "odd", "all"), default="even", help="by their numbers")
    parser.add_argument("--limit", type=int, help="only the first so many of them")
    parser.add_argument("--rate", type=int, default=500, help="Hz of the model's input")
    parser.add_argument("--method", default="prominence", help="NeuroKit2's: prominence, dwt, cwt or peak")


def bench_waves(args: argparse.Namespace) -> list[Row]:
    """Ours and NeuroKit2's errors for each set of leads and each wave."""
    numbers = [
        number for number in range(1, 201) if args.records == "all" or (number % 2 == 0) == (args.records == "even")
    ]
    rows: list[Row] = []
    for name, leads in LEAD_SETS.items():
        records = read_ludb(args.data, [str(number) for number in numbers[: args.limit]], leads, args.rate)
        truth = [reference(record.marks, leads) for record in records]
        sides = []
        for side, find in (("ours", found_beats), (f"NeuroKit2 {args.method}", NeuroKit(args.method))):
            start = time.process_time()
            found = [find(record.x_LT, record.lead_mask_L, leads, args.rate) for record in records]
            ms = 1000 * (time.process_time() - start) / len(records)
            scores = {wave: score([one and one[wave] for one in found], truth, wave) for wave in SYMBOLS.values()}
            _show(f"{name}, {side}", scores, sum(one is None for one in found), len(records), ms)
            sides.append((scores, ms))
        (ours, ours_ms), (theirs, theirs_ms) = sides
        rows.append(less_is_better(f"{name}, time of a recording", ours_ms, theirs_ms, "ms"))
        for wave in ours:
            rows += _rows(f"{name}, {wave}", ours[wave], theirs[wave])
    return rows


def _rows(case: str, ours: Errors, theirs: Errors) -> list[Row]:
    rows = [
        more_is_better(f"{case} sensitivity", ours.sensitivity, theirs.sensitivity or np.nan, "share"),
        more_is_better(f"{case} predictive value", ours.predictive_value, theirs.predictive_value or np.nan, "share"),
    ]
    for edge, our_sd_ms, their_sd_ms in zip(EDGES, ours.sd_ms, theirs.sd_ms, strict=True):
        rows.append(less_is_better(f"{case} {edge}, SD of the error", float(our_sd_ms), float(their_sd_ms), "ms"))
    return rows


def _show(title: str, scores: Mapping[str, Errors], failed: int, records: int, ms: float) -> None:
    print(f"{title}: no beat in {failed} of {records} recordings, {ms:.0f} ms a recording")
    for wave, one in scores.items():
        errors = []
        for edge, mean_ms, sd_ms in zip(EDGES, one.mean_ms, one.sd_ms, strict=True):
            limit = f" (tolerance {TOLERANCE_MS[wave, edge]})" if (wave, edge) in TOLERANCE_MS else ""
            errors.append(f"{edge} {mean_ms:+.1f} ± {sd_ms:.1f}{limit}")
        shares = f"sensitivity {100 * one.sensitivity:.1f} %, predictive value {100 * one.predictive_value:.1f} %"
        print(f"  {wave:<3} of {one.waves}: {shares}, {', '.join(errors)} ms", flush=True)


def read_ludb(folder: Path, names: Sequence[str], leads: Sequence[str], rate_hz: int = RECORDED_HZ) -> list[Annotated]:
    """Recordings with the annotations of these leads. Raises LsemvaeError where the folder is not LUDB's."""
    data = folder / "data"
    if not (data / f"{names[0]}.hea").is_file():
        raise LsemvaeError(f"{data} has no {names[0]}.hea: --data is the folder of LUDB, which has a folder data")
    records = [read(data / f"{name}.hea", uv_per_lsb=UV_PER_LSB) for name in names]
    prepared = preprocess(records, leads, PreprocessConfig(rate_hz=rate_hz, samples=10 * rate_hz))
    marks = [{lead: _marks(data / name, lead) for lead in leads} for name in names]
    return [Annotated(*one) for one in zip(prepared.x_BLT, prepared.lead_mask_BL, marks, strict=True)]


def _marks(path: Path, lead: str) -> dict[str, np.ndarray]:
    """The waves of one lead, and `all`: its first and its last mark."""
    annotation = wfdb.rdann(str(path), lead.lower())
    symbols, at = ["", *annotation.symbol, ""], np.pad(annotation.sample.astype(float), 1, constant_values=np.nan)
    waves: dict[str, list[tuple[float, float, float]]] = {wave: [] for wave in SYMBOLS.values()}
    for mark, symbol in enumerate(symbols):
        if symbol in SYMBOLS:
            onset = at[mark - 1] if symbols[mark - 1] == "(" else np.nan
            offset = at[mark + 1] if symbols[mark + 1] == ")" else np.nan
            waves[SYMBOLS[symbol]].append((onset, at[mark], offset))
    found = {wave: np.array(rows, dtype=float).reshape(-1, 3) for wave, rows in waves.items()}
    return found | {"all": np.array([np.nanmin(at), np.nanmax(at)])}


def reference(marks: Marks, leads: Sequence[str]) -> Beats:
    """What is annotated in these leads together, in ms; `all` is the stretch that is annotated.

    A wave is one that at least half of the leads have, with peaks within 75 ms of the next. Its onset is the earliest
    and its offset the latest of the leads; of four or more leads the second, so that no single lead decides.
    """
    found: Beats = {}
    for wave in SYMBOLS.values():
        rows_N3 = np.concatenate([marks[lead][wave] for lead in leads]) * 1000 / RECORDED_HZ
        rows_N3 = rows_N3[np.argsort(rows_N3[:, 1])]
        groups = np.split(rows_N3, np.flatnonzero(np.diff(rows_N3[:, 1]) > SAME_BEAT_MS) + 1)
        kept = [_together(group) for group in groups if len(group) and 2 * len(group) >= len(leads)]
        found[wave] = np.array(kept, dtype=float).reshape(-1, 3)
    stretch = np.stack([marks[lead]["all"] for lead in leads]) * 1000 / RECORDED_HZ
    return found | {"all": np.array([stretch[:, 0].min(), stretch[:, 1].max()])}


def _together(group_N3: np.ndarray) -> tuple[float, float, float]:
    onsets, offsets = (np.sort(edge[~np.isnan(edge)]) for edge in (group_N3[:, 0], group_N3[:, 2]))
    onset = onsets[1 if len(onsets) >= 4 else 0] if len(onsets) else np.nan
    offset = offsets[-2 if len(offsets) >= 4 else -1] if len(offsets) else np.nan
    return float(onset), float(np.median(group_N3[:, 1])), float(offset)


def found_beats(
    x_LT: np.ndarray, lead_mask_L: np.ndarray, leads: Sequence[str], rate_hz: int = RECORDED_HZ
) -> Beats | None:
    """What `delineate` finds, in ms; None where it finds no beat."""
    waves = delineate(x_LT, lead_mask_L, leads, rate_hz)
    return {wave: edges_N3 * 1000 / rate_hz for wave, edges_N3 in waves.edges.items()} if waves.beats else None


def score(found: Sequence[np.ndarray | None], truth: Sequence[Beats], wave: str) -> Errors:
    """Pair found and annotated waves of each recording, the nearest peaks first come first served."""
    hit, missed, extra = 0, 0, 0
    errors: list[np.ndarray] = []
    for one, beats in zip(found, truth, strict=True):
        found_N3 = np.zeros((0, 3)) if one is None else one[~np.isnan(one[:, 1])]
        free_N = np.ones(len(found_N3), dtype=bool)
        for row in beats[wave]:
            distance_N = np.where(free_N, np.abs(found_N3[:, 1] - row[1]), np.inf)
            if len(distance_N) and distance_N.min() <= SAME_WAVE_MS:
                nearest = int(distance_N.argmin())
                free_N[nearest] = False
                errors.append(found_N3[nearest] - row)
                hit += 1
            else:
                missed += 1
        first, last = beats["all"]
        extra += int(np.count_nonzero(free_N & (found_N3[:, 1] >= first) & (found_N3[:, 1] <= last)))
    error_N3 = np.array(errors) if errors else np.full((1, 3), np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # an edge that is never found has no mean
        mean_ms, sd_ms = np.nanmean(error_N3, axis=0), np.nanstd(error_N3, axis=0)
    return Errors(hit / max(hit + missed, 1), hit / max(hit + extra, 1), mean_ms, sd_ms, hit + missed)


class NeuroKit:
    """NeuroKit2 as it comes: R peaks on the root mean square of the leads, then each lead.

    Peaks are the medians over leads. Onsets are the first quartile and offsets the third.
    """

    def __init__(self, method: str) -> None:
        import neurokit2

        self.neurokit2, self.method = neurokit2, method

    def __call__(self, x_LT: np.ndarray, lead_mask_L: np.ndarray, leads: Sequence[str], rate_hz: int) -> Beats | None:
        present_LT = x_LT[lead_mask_L].astype(float)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            together_T = np.sqrt(np.mean(present_LT**2, axis=0))
            r_N = self.neurokit2.ecg_peaks(together_T, sampling_rate=rate_hz)[1]["ECG_R_Peaks"]
            of_leads = [found for x_T in present_LT if (found := self._lead(x_T, r_N, rate_hz)) is not None]
            if not of_leads:
                return None
            found: Beats = {}
            for wave in SYMBOLS.values():
                each = np.stack([one[wave] for one in of_leads])
                edges = (np.nanpercentile(each[:, :, k], share, axis=0) for k, share in enumerate((25, 50, 75)))
                found[wave] = np.stack(list(edges), axis=1) * 1000 / rate_hz
        return found

    def _lead(self, x_T: np.ndarray, r_N: np.ndarray, rate_hz: int) -> Beats | None:
        try:
            _, marks = self.neurokit2.ecg_delineate(x_T, r_N, sampling_rate=rate_hz, method=self.method)
        except Exception:  # it raises many things for leads without a clear wave
            return None
        found = {}
        for wave, name in (("P", "P"), ("QRS", "R"), ("T", "T")):
            columns = [marks.get(f"ECG_{name}_{mark}", []) for mark in ("Onsets", "Peaks", "Offsets")]
            if wave == "QRS":
                columns[1] = r_N
            filled = [column if len(column) == len(r_N) else [np.nan] * len(r_N) for column in columns]
            found[wave] = np.array(filled, dtype=float).T
        return found
