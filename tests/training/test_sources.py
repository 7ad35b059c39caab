"""Several data sets in one pre-training run: their names in --data, and the records that the run reads."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.random import default_rng

from lsemvae.data.feed import read_here
from lsemvae.data.shards import Manifest, Shard, ShardedDataset, pack, shard_bytes
from lsemvae.errors import LsemvaeError
from lsemvae.leads import LEADS
from lsemvae.preprocess import PreprocessConfig
from lsemvae.recipes import PRETRAIN
from lsemvae.record import Record
from lsemvae.simulate import EcgParameters, simulate_ecg
from lsemvae.storage import Storage
from lsemvae.training.launch import Source, data_digest, data_uri, make_feeds, make_job, open_sources

RECIPE = replace(
    PRETRAIN["smoke"],
    model=replace(PRETRAIN["smoke"].model, samples=1000),
    optim=replace(PRETRAIN["smoke"].optim, batch_size=4),
    preprocess=PreprocessConfig(rate_hz=100, samples=1000),
    streams=2,
)


def data_set(folder: Path, train: int, val: int, first: int = 0) -> str:
    """Shards of so many recordings in each split; records are numbered from `first`."""
    place, shards = Storage.open(folder), []
    for split, start, count in (("train", first, train), ("val", first + train, val)):
        rows = []
        for number in range(start, start + count):
            signal_mv_LT, _ = simulate_ecg(EcgParameters(), default_rng(number))
            leads = dict(zip(LEADS, signal_mv_LT[:, ::5], strict=True))
            rows.append(pack(Record.from_leads(leads, 100, record_id=f"r{number}", subject_id=f"s{number}")))
        content = shard_bytes(rows, [], {"plan": "p", "rows": len(rows), "unreadable": [], "flags": {}})
        place.write_bytes(f"{split}.parquet", content)
        shards.append(Shard(f"{split}.parquet", split, len(rows), len(content), f"{folder.name}{split}"))
    manifest = Manifest("made up", "folder", "p", train + val, train + val, 0, {}, shards)
    place.write_bytes("manifest.json", manifest.to_json().encode())
    return str(folder)


@pytest.fixture(scope="module")
def uris(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("sets")
    return data_set(folder / "large", 9, 2), data_set(folder / "own", 3, 1, first=100)


def test_each_record_comes_as_often_as_its_data_set_says(uris: tuple[str, str]):
    sources = open_sources([uris[0], f"{uris[1]}:4"])
    assert [source.repeats for source in sources] == [1, 4]
    feeds = make_feeds(sources, RECIPE)
    counts = Counter(int(row) for rows in feeds.train.batches(0, read=read_here) for row in rows["row_B"] if row >= 0)
    assert counts == {**dict.fromkeys(range(9), 1), **dict.fromkeys(range(9, 12), 4)}
    held_out = Counter(int(row) for rows in feeds.val.batches(0, read=read_here) for row in rows["row_B"] if row >= 0)
    assert held_out == dict.fromkeys(range(3), 1)
    data = make_job(sources, RECIPE, feeds, None).provenance["data"]
    assert data["uri"] == f"{uris[0]} {uris[1]}:4" == data_uri(sources)
    assert data["rows"] == {"train": 9 + 4 * 3, "val": 3}


def test_a_bundle_names_the_list_of_who_had_withdrawn(tmp_path: Path):
    uri = data_set(tmp_path / "own", 9, 2)
    assert "since_ingest" not in provenance(uri)
    (tmp_path / "own" / "withdrawn.csv").write_text("s3\n")
    digest = ShardedDataset.open(uri).withdrawn.digest
    assert digest and provenance(uri)["since_ingest"] == {uri: {"withdrawn": digest}}


def provenance(uri: str) -> dict:
    sources = open_sources([uri])
    return make_job(sources, RECIPE, make_feeds(sources, RECIPE), None).provenance["data"]


def test_the_subjects_of_an_excluded_cohort_are_left_out(uris: tuple[str, str], tmp_path: Path):
    """Records 100 and 101 are in both data sets under the same subjects."""
    cohort = data_set(tmp_path / "cohort", 2, 0, first=100)
    sources = open_sources([uris[0], f"{uris[1]}:4"], exclude=[cohort])
    feeds = make_feeds(sources, RECIPE)
    counts = Counter(int(row) for rows in feeds.train.batches(0, read=read_here) for row in rows["row_B"] if row >= 0)
    assert counts == {**dict.fromkeys(range(9), 1), 11: 4}
    changed = make_job(sources, RECIPE, feeds, None).provenance["data"]["since_ingest"]
    assert set(changed) == set(uris) and all(found["withdrawn"] for found in changed.values())
    nobody = data_set(tmp_path / "nobody", 1, 0)
    path = tmp_path / "nobody" / "train.parquet"
    table = pq.read_table(path)
    empty = pa.array([""] * len(table))
    table = table.set_column(table.schema.get_field_index("subject_id"), table.schema.field("subject_id"), empty)
    pq.write_table(table, path)
    manifest = json.loads((path.parent / "manifest.json").read_text())
    manifest["shards"][0]["bytes"] = path.stat().st_size
    (path.parent / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(LsemvaeError, match="nobody has no subject: name shards whose recordings have a subject_id"):
        open_sources([uris[0]], exclude=[nobody])


def test_one_data_set_is_named_as_before(uris: tuple[str, str]):
    (source,) = open_sources([uris[0]])
    assert data_digest([source]) == ShardedDataset.open(uris[0]).manifest.digest
    assert data_uri([source]) == uris[0]
    digests = {data_digest(open_sources(words)) for words in ([uris[0]], [f"{uris[0]}:2"], list(uris))}
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("word", "uri", "repeats"),
    [
        ("s3://b/own", "s3://b/own", 1),
        ("s3://b/own:12", "s3://b/own", 12),
        ("s3://b/own?endpoint=http://minio:9000", "s3://b/own?endpoint=http://minio:9000", 1),
        ("s3://b/own?endpoint=http://minio:9000:12", "s3://b/own?endpoint=http://minio:9000", 12),
        ("s3://b/own?endpoint=http://minio:9000&region=eu:12", "s3://b/own?endpoint=http://minio:9000&region=eu", 12),
    ],
)
def test_the_port_of_an_endpoint_is_no_number_of_repeats(
    word: str, uri: str, repeats: int, uris: tuple[str, str], monkeypatch: pytest.MonkeyPatch
):
    opened, data = [], ShardedDataset.open(uris[0])
    monkeypatch.setattr(ShardedDataset, "open", lambda asked: opened.append(asked) or data)
    (source,) = open_sources([word])
    assert (opened, source.repeats) == ([uri], repeats)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{0}", "{0}:3"], "large is named twice: name it once, with repeats, as in .*large:2"),
        (["{0}:0"], "large is to come 0 times an epoch: give 1 or more"),
        (["{0}", "{0}-absent"], "holds no manifest.json"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], says: str, uris: tuple[str, str]):
    with pytest.raises(LsemvaeError, match=says):
        open_sources([word.format(*uris) for word in words])


def test_too_few_recordings_are_said_with_their_repeats(uris: tuple[str, str]):
    own = ShardedDataset.open(uris[1])
    large = replace(RECIPE, optim=replace(RECIPE.optim, batch_size=8))
    with pytest.raises(LsemvaeError, match=r"own:2 has 6 recordings in 'train': 8 are needed"):
        make_feeds([Source(own, 2)], large)
    with pytest.raises(LsemvaeError, match=r"own has 1 recordings in 'val': 2 are needed"):
        make_feeds([Source(own, 3)], large)
