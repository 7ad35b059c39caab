"""The ingest report: its figures are the data set's, it names nobody, and it needs nothing but itself."""

import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from lsemvae.data.shards import LABEL_PREFIX, Manifest, Shard, ShardedDataset, pack, shard_bytes
from lsemvae.formats import read
from lsemvae.leads import LEADS
from lsemvae.quality import quality_flags
from lsemvae.record import Record
from lsemvae.reports import ingest as report
from lsemvae.reports.ingest import ingest_report
from lsemvae.simulate import EcgParameters, simulate_ecg
from lsemvae.storage import Storage


class Page(HTMLParser):
    """Tables as rows of texts, recordings drawn by section, and what was opened and not closed."""

    EMPTY = ("meta", "img", "path", "rect")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.tags, self.tables, self.sections = [], [], {}, {}
        self.text, self.attributes, self.section = "", [], ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)
        if tag == "table":
            self.rows = []
        elif tag == "tr":
            self.rows.append([])
        elif tag == "svg":
            self.sections[self.section][-1].append(dict(attrs)["aria-label"])
        self.here = ""

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self.rows[-1].append(self.here)
        elif tag == "caption":
            self.caption = self.here
        elif tag == "table":
            self.tables[self.caption.split(",")[0].split(";")[0]] = {row[0]: row[1:] for row in self.rows[1:]}
            self.rows = []
        elif tag == "h2":
            self.section = self.here
            self.sections[self.section] = []
        elif tag == "h3":
            self.sections[self.section].append([self.here])
        elif tag == "li":
            self.sections[self.section][-1].append(self.here)

    def handle_data(self, data: str) -> None:
        self.here = getattr(self, "here", "") + data
        self.text += data


def data_set(folder: Path, shards: dict[str, list[Record]], labels: dict[str, list[float]] | None = None):
    """A data set as ingest writes it; `labels` has one value a recording, in the order of the shards."""
    storage, written, values = Storage.open(folder), [], {name: iter(column) for name, column in (labels or {}).items()}
    for path, records in shards.items():
        rows = [pack(record, path=f"secret-path/{record.record_id}", flags=quality_flags(record)) for record in records]
        for row in rows:
            row |= {LABEL_PREFIX + name: next(column) for name, column in values.items()}
        content = shard_bytes(rows, list(values), {})
        storage.write_bytes(path, content)
        written.append(Shard(path, path.split("-")[0], len(rows), len(content), path))
    records = sum(len(part) for part in shards.values())
    counts = {
        name: {"0": column.count(0.0), "1": column.count(1.0), "other": 0, "null": sum(v != v for v in column)}
        for name, column in (labels or {}).items()
    }
    manifest = Manifest("s3://bucket/<source>", "folder", "plan", records, records - 1, 3, counts, written)
    storage.write_bytes("manifest.json", manifest.to_json().encode())
    return ShardedDataset.open(str(folder))


def simulated(number: int, rate_hz: float = 500.0) -> Record:
    """Each has its own rate, by which its picture is known."""
    signal_mv_LT, _ = simulate_ecg(EcgParameters(), np.random.default_rng(number))
    record = Record.from_leads(dict(zip(LEADS, signal_mv_LT, strict=True)), rate_hz)
    return replace(record, record_id=f"secret-record-{number}", subject_id=f"secret-subject-{number}")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[ShardedDataset, dict[tuple[str, int], Record]]:
    shards = {"train-00000.parquet": [simulated(number, 501.0 + number) for number in range(14)]}
    shards["train-00001.parquet"] = [simulated(number) for number in range(14, 16)]
    shards["val-00000.parquet"] = [simulated(number, 501.0 + number) for number in range(16, 20)]
    flat, gaps = (record.signal_mv_LT.copy() for record in shards["val-00000.parquet"][1:3])
    flat[6:] = 0
    gaps[[0, 11], 100:300] = np.nan
    for row, signal_mv_LT in ((1, flat), (2, gaps)):
        shards["val-00000.parquet"][row] = replace(shards["val-00000.parquet"][row], signal_mv_LT=signal_mv_LT)
    labels = {"ph": [1.0] * 5 + [0.0] * 10 + [np.nan] * 5, "<b>rare</b>": [np.nan] * 20}
    data = data_set(tmp_path_factory.mktemp("shards"), shards, labels)
    return data, {(path, row): r for path, records in shards.items() for row, r in enumerate(records)}


UNREADABLE = [
    {"path": "secret-path/a.hea", "code": "missing_file", "reason": "secret-path/a.hea: there is no a.dat"},
    {"path": "secret-path/b.hea", "code": "missing_file", "reason": "secret-path/b.hea: there is no b.dat"},
    {"path": "secret-path/c.hea", "code": "<script>", "reason": "secret-path/c.hea"},
]


@pytest.fixture(scope="module")
def html(made: tuple) -> str:
    return ingest_report(made[0], UNREADABLE)


def test_the_figures_are_those_of_the_data_set(made: tuple, html: str) -> None:
    tables = Page(html).tables
    counts = tables["What is in the shards"]
    assert {name: cells[0].split()[0] for name, cells in counts.items()} == {
        "recordings": "20", "to train on": "16", "to validate": "4", "subjects": "19", "with a flag": "18",
        "unreadable": "3", "shards": "3",
    }  # fmt: skip
    assert tables["Why recordings could not be read"] == {"missing file": ["2"], "<script>": ["1"]}
    expected = Counter()
    for record in made[1].values():
        expected.update({flag.split(":")[0] for flag in quality_flags(record)})
    assert {"flat": 1, "nan": 1, "rate": 18}.items() <= expected.items()
    assert {kind: int(cells[0]) for kind, cells in tables["Flags"].items()} == expected
    assert tables["Flags"]["flat"][3] == "V1 1, V2 1, V3 1, V4 1, V5 1, V6 1"
    assert tables["Flags"]["nan"][1] == "5.0 %" and tables["Flags"]["nan"][3] == "I 1, V6 1"
    assert tables["Labels"] == {
        "ph": ["33.3 %", "5", "10", "0", "5"],
        "<b>rare</b>": ["–", "0", "0", "0", "20"],
    }
    amplitude = tables["Amplitude by lead"]
    sizes = [np.ptp(record.signal_mv_LT[6]) for record in made[1].values()]
    assert amplitude["V1"] == ["20", *(f"{value:.2f}" for value in np.quantile(sizes, [0.5, 0.05, 0.95]))]


def test_examples_are_the_rows_that_they_name(made: tuple, html: str) -> None:
    sections = Page(html).sections
    assert len(sections["Examples"]) == 12 and len(sections["Most flagged"]) == 12
    for where, label, *flags in sections["Examples"] + sections["Most flagged"]:
        path, row = re.fullmatch(r"(\S+), row (\d+)", where).groups()
        record = made[1][path, int(row)]
        assert f" {record.rate_hz:g} Hz" in label
        assert tuple(flags) == quality_flags(record)
    assert [figure[0] for figure in sections["Most flagged"][:2]] == [
        "val-00000.parquet, row 1",
        "val-00000.parquet, row 2",
    ]
    assert len({where for where, *_ in sections["Examples"]}) == 12


def test_the_page_names_nobody_and_needs_nothing(html: str) -> None:
    page = Page(html)
    assert "secret" not in html
    assert "script" not in page.tags and "link" not in page.tags and "iframe" not in page.tags
    for tag, attributes in page.attributes:
        assert not any(name.startswith("on") for name in attributes), tag
        assert attributes.get("src", "data:").startswith("data:") and "href" not in attributes, tag
    assert set(re.findall(r"https?://[^\"'\s<]+", html)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in html and "url(" not in html and "@import" not in html
    assert len(html.encode()) < 6e6


def test_the_page_can_be_heard(html: str) -> None:
    page = Page(html)
    assert '<html lang="en">' in html and page.tags.count("h1") == 1
    for tag, attributes in page.attributes:
        if tag == "img":
            assert len(attributes["alt"]) > 20
        elif tag == "svg":
            assert attributes["role"] == "img" and "mm/mV" in attributes["aria-label"]
        elif tag == "th":
            assert attributes["scope"] in ("col", "row")
    assert page.tags.count("caption") == page.tags.count("table") == 5
    assert "An estimate" in page.text and "Of all recordings." in page.text


def test_the_same_data_give_the_same_page(made: tuple, html: str) -> None:
    assert ingest_report(made[0], UNREADABLE) == html
    assert ingest_report(made[0], UNREADABLE, seed=1) != html


def test_many_recordings_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts are still of all, the sample is whole row groups, and each is read once."""
    monkeypatch.setattr(report, "SAMPLE", 150)
    monkeypatch.setattr(report, "GROUPS", 8)
    one = simulated(0)
    short = replace(one, signal_mv_LT=one.signal_mv_LT[:, :50])
    data = data_set(tmp_path, {"train-00000.parquet": [short] * 100, "train-00001.parquet": [short] * 90})
    page = Page(ingest_report(data, []))
    assert page.tables["Flags"]["length"][0] == "190"
    sampled = int(re.search(r"a random sample of (\d+) recordings", page.text).group(1))
    assert sampled in {64 * a + 36 * b + 26 * c for a in (0, 1, 2) for b in (0, 1) for c in (0, 1)} - {0}
    assert "No heart rate can be estimated." in page.text
    assert "Every recording of the source could be read." in page.text
    assert "The data set has no labels." in page.text


def test_one_recording_without_flags(tmp_path: Path) -> None:
    page = Page(ingest_report(data_set(tmp_path, {"train-00000.parquet": [simulated(0)]}), []))
    assert len(page.sections["Examples"]) == 1 and not page.sections["Most flagged"]
    assert page.text.count("No recording has a flag.") == 2


@pytest.mark.shared_data
def test_real_recordings(shared_data: Path, tmp_path: Path) -> None:
    paths = sorted((shared_data / "ptbxl500/records500").rglob("*.hea"))[:24]
    odd = [read(shared_data / "odd" / name) for name in ("1111554", "JS11438")]
    page = Page(ingest_report(data_set(tmp_path, {"train-00000.parquet": [*map(read, paths), *odd]}), []))
    assert page.sections["Most flagged"][0][0] == "train-00000.parquet, row 24"
    assert "cut off at 10 mV: all leads" in page.sections["Most flagged"][0][1]
    median = int(re.search(r"Heart rate: median (\d+) a minute", page.text).group(1))
    assert 50 < median < 90


def test_signals_that_are_no_millivolts_are_said_to_be_none(made: tuple, html: str, tmp_path: Path) -> None:
    assert "no millivolts" not in html
    record = replace(simulated(0), flags=("no_millivolts",))
    data = data_set(tmp_path, {"train-00000.parquet": [record], "val-00000.parquet": [simulated(1)]})
    page = ingest_report(replace(data, manifest=replace(data.manifest, flagged={"no_millivolts": 1})), [])
    assert "<p>1 recordings are no millivolts" in page
    assert Page(page).tables["Flags"]["no_millivolts"][0] == "1"
