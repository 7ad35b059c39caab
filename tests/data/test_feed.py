"""An epoch has every record as often as asked, in an order that seed and epoch alone decide, for any workers."""

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command import start_ray
from hypothesis import given, settings
from hypothesis import strategies as st

from lsemvae.cohorts.withdrawn import WITHDRAWN
from lsemvae.data.feed import DAMAGED, NOBODY, Feed, read_here, require_room
from lsemvae.data.order import Block, Order, Piece
from lsemvae.data.row_groups import footer
from lsemvae.data.shards import (
    MANIFEST,
    SIGNAL_COLUMNS,
    Manifest,
    Shard,
    ShardedDataset,
    pack,
    shard_bytes,
    signals_mv,
)
from lsemvae.errors import LsemvaeError
from lsemvae.leads import LEADS, LIMB_LEADS
from lsemvae.preprocess import PreprocessConfig, preprocess_signals
from lsemvae.preprocess.on_device import DeviceFinish
from lsemvae.record import Record
from lsemvae.training.resident import Resident
from lsemvae.training.resident import widened as widened_on_device

CONFIG = PreprocessConfig(samples=1000, min_seconds=1)
ROWS = (70, 3, 129)  # two row groups, one small, three


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ShardedDataset:
    """202 recordings; every ninth is flat, and so refused."""
    folder, rng = tmp_path_factory.mktemp("feed"), np.random.default_rng(0)
    shards, number = [], 0
    for index, count in enumerate(ROWS):
        rows = []
        for _ in range(count):
            signal_mv = {lead: rng.integers(-400, 400, 1000) / 200 * (number % 9 > 0) for lead in LEADS}
            rows.append(pack(Record.from_leads(signal_mv, 500, record_id=f"r{number}")))
            number += 1
        content = shard_bytes(rows, [], {"plan": "x"})
        path = f"train-{index:05d}.parquet"
        (folder / path).write_bytes(content)
        shards.append(Shard(path, "train", count, len(content), "0"))
    (folder / MANIFEST).write_text(Manifest("here", "folder", "x", number, number, 0, {}, shards).to_json())
    return ShardedDataset.open(str(folder))


def copied(data: ShardedDataset, folder: Path) -> ShardedDataset:
    folder.mkdir(exist_ok=True)
    for path in Path(data.storage.base).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return ShardedDataset.open(str(folder))


def feed_of(data: ShardedDataset, packed: bool = False, **order) -> Feed:
    feed = Feed.of(data, "train", LIMB_LEADS, CONFIG, **{"batch_size": 16, "streams": 4, "buffer": 64} | order)
    return in_int16(feed) if packed else feed


def in_int16(feed: Feed) -> Feed:
    """The feed with the batches that it would give with a cache."""
    return replace(feed, layout=replace(feed.layout, packed=True))


def widened(feed: Feed, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    tensors = {name: torch.from_numpy(values) for name, values in batch.items()}
    return {name: tensor.numpy() for name, tensor in widened_on_device(feed.layout, tensors).items()}


def order_of(
    shards: list[tuple[int, int]], repeated: bool, streams: int, per_stream: int, buffer: int, seed: int, shuffle: bool
) -> Order:
    rows, repeats = zip(*shards, strict=True)
    return Order(rows, streams * per_stream, streams, buffer, seed, shuffle, repeats if repeated else ())


orders = st.builds(
    order_of,
    shards=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 5)), min_size=1, max_size=6).filter(
        lambda shards: sum(rows for rows, _ in shards) >= 8
    ),
    repeated=st.booleans(),
    streams=st.integers(1, 8),
    per_stream=st.integers(1, 20),
    buffer=st.integers(1, 400),
    seed=st.integers(0, 5),
    shuffle=st.booleans(),
)


@settings(max_examples=80, deadline=None)
@given(order=orders, epoch=st.integers(0, 3))
def test_the_streams_hold_every_record_as_often_as_asked_and_are_equally_long(order: Order, epoch: int):
    seen, lengths = [], []
    for stream in range(order.streams):
        blocks = order.blocks(epoch, stream)
        lengths.append(sum(block.records for block in blocks))
        for block in blocks:
            assert sorted(order.permutation(block)) == list(range(block.records))
            seen += [(p.shard, p.group * 64 + row) for p in block.pieces for row in range(p.start, p.stop)]
    repeats = order.repeats or (1,) * len(order.rows)
    wanted = {(shard, row): repeats[shard] for shard, rows in enumerate(order.rows) for row in range(rows)}
    assert Counter(seen) == wanted
    assert order.records == len(seen)
    assert max(lengths) - min(lengths) <= 1
    assert order.steps == -(-max(lengths) // order.per_stream)


@settings(max_examples=40, deadline=None)
@given(order=orders, epoch=st.integers(0, 3))
def test_repeats_of_one_give_the_order_without_repeats(order: Order, epoch: int):
    once, plain = replace(order, repeats=(1,) * len(order.rows)), replace(order, repeats=())
    for stream in range(order.streams):
        assert once.blocks(epoch, stream) == plain.blocks(epoch, stream)


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_copies_of_a_record_are_far_apart(epoch: int):
    """30,000 recordings and 700 that come 12 times: copies are never in one batch, nor closer than 1/36 of an epoch."""
    order = Order((30_000, 700), 256, streams=8, buffer=4096, seed=epoch, repeats=(1, 12))
    steps: dict[int, list[int]] = {}
    for stream in range(order.streams):
        place = 0
        for block in order.blocks(epoch, stream):
            for piece in block.pieces:
                if piece.shard == 1:
                    steps.setdefault(piece.group, []).append(place // order.per_stream)
                place += piece.stop - piece.start
    apart = [np.diff(sorted(set(at))).min() for at in steps.values()]
    assert min(apart) > order.steps / 12 / 3


def test_the_worked_examples_are_right():
    """Those of the docstrings of lsemvae.data.order."""
    five = Order((64,) * 5, batch_size=16, streams=2)
    assert five.steps == 20
    for stream in range(2):
        blocks = five.blocks(0, stream)
        assert sum(block.records for block in blocks) == 160
    first, last = (Order((64,) * 5, 16, streams=2).blocks(0, stream) for stream in range(2))
    assert first[-1].pieces[-1].stop == last[0].pieces[0].start == 32
    staggered = Order((64,) * 64, batch_size=16, streams=2, buffer=1024)
    ends = [np.cumsum([block.records for block in staggered.blocks(0, stream)])[:3].tolist() for stream in range(2)]
    assert ends == [[256, 768, 1280], [512, 1024, 1536]]

    class Given(Order):
        def blocks(self, epoch: int, stream: int) -> list[Block]:
            sizes = [(64, 128), (128, 64)][stream]
            return [Block(stream, (number,), (Piece(0, number, 0, size),)) for number, size in enumerate(sizes)]

    demand = Given((384,), batch_size=16, streams=2).demand(0, [0, 1], start_step=9)
    assert [(block.stream, *block.seed, skipped) for block, skipped in demand] == [(0, 1, 8), (1, 0, 72), (1, 1, 0)]


@settings(max_examples=80, deadline=None)
@given(order=orders, data=st.data())
def test_what_is_asked_for_is_what_is_left(order: Order, data: st.DataObject):
    """From any step on, the demanded blocks hold exactly the records that earlier steps have not taken."""
    start = data.draw(st.integers(0, order.steps))
    workers = data.draw(st.integers(1, order.streams))
    left = 0
    for worker in range(workers):
        demanded = order.demand(1, order.streams_of(worker, workers), start)
        left += sum(block.records - skipped for block, skipped in demanded)
        assert all(0 <= skipped < block.records for block, skipped in demanded)
    lengths = [sum(block.records for block in order.blocks(1, stream)) for stream in range(order.streams)]
    assert left == sum(max(length - start * order.per_stream, 0) for length in lengths)


@pytest.mark.parametrize("workers", [1, 2])
def test_streams_need_their_next_blocks_at_different_steps(workers: int):
    """If all streams needed their blocks at the same step, a device would wait for eight blocks at once."""
    order = Order((256,) * 160, batch_size=128, streams=8, buffer=4096)
    begins = []  # the step at which a block is wanted
    for stream in order.streams_of(0, workers):
        records = [block.records for block in order.blocks(3, stream)]
        begins += (np.cumsum(records)[:-1] // order.per_stream).tolist()
    assert len(begins) >= 8 * len(order.streams_of(0, workers))
    assert max(np.bincount(begins)) == 1


def steps_of(feed: Feed, epoch: int, workers: int, start: int = 0) -> list[list[int]]:
    """The records of each step, over all workers, as a sorted list."""
    parts = [[b["row_B"] for b in feed.batches(epoch, w, workers, start, read_here)] for w in range(workers)]
    return [sorted(int(row) for part in step for row in part if row != NOBODY) for step in zip(*parts, strict=True)]


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_a_step_has_the_same_records_for_any_number_of_workers(data: ShardedDataset, workers: int):
    feed = feed_of(data)
    alone = steps_of(feed, 0, 1)
    assert len(alone) == feed.order.steps
    assert sorted(row for step in alone for row in step) == list(range(202))
    assert [len(step) for step in alone] == [16] * 12 + [10]
    assert steps_of(feed, 0, workers) == alone


def test_a_run_goes_on_in_mid_epoch_with_another_number_of_workers(data: ShardedDataset):
    feed = feed_of(data)
    whole = steps_of(feed, 2, 3)
    assert steps_of(feed, 2, 3)[:5] + steps_of(feed, 2, 2, start=5) == whole
    assert steps_of(feed, 2, 4, start=feed.order.steps) == []


def test_epochs_and_seeds_differ_and_validation_does_not(data: ShardedDataset):
    first = steps_of(feed_of(data), 0, 1)
    assert steps_of(feed_of(data), 0, 1) == first
    assert steps_of(feed_of(data), 1, 1) != first
    assert steps_of(feed_of(data, seed=1), 0, 1) != first
    mixed = np.mean([np.ptp(step) for step in first])
    assert mixed > 100  # a batch comes from all over the data set
    still = feed_of(data, shuffle=False)
    assert steps_of(still, 0, 1) == steps_of(still, 3, 1)


@pytest.fixture(scope="module")
def few(data: ShardedDataset, tmp_path_factory: pytest.TempPathFactory) -> ShardedDataset:
    """The first of the data set's shards as a data set of its own: 70 recordings."""
    folder = tmp_path_factory.mktemp("few")
    (folder / "train-00000.parquet").write_bytes((Path(data.storage.base) / "train-00000.parquet").read_bytes())
    shards = data.manifest.shards[:1]
    (folder / MANIFEST).write_text(Manifest("there", "folder", "x", 70, 70, 0, {}, shards).to_json())
    return ShardedDataset.open(str(folder))


def several(data: list[tuple[ShardedDataset, int]], **settings) -> Feed:
    return Feed.of_several(
        data, "train", LIMB_LEADS, CONFIG, **{"batch_size": 16, "streams": 4, "buffer": 64} | settings
    )


@pytest.mark.parametrize("workers", [2, 3])
def test_several_data_sets_each_with_its_repeats(data: ShardedDataset, few: ShardedDataset, workers: int):
    """The 70 of the second are numbered after the 202 of the first, and come three times."""
    feed = several([(data, 1), (few, 3)])
    whole = steps_of(feed, 1, 1)
    assert Counter(row for step in whole for row in step) == {row: 1 if row < 202 else 3 for row in range(272)}
    assert len(whole) == feed.order.steps == -(-(202 + 3 * 70) // 16)
    assert steps_of(feed, 1, workers) == whole
    assert steps_of(feed, 1, workers)[:7] + steps_of(feed, 1, 4, start=7) == whole
    wanted_x_BLT = x_of(data)
    for batch in feed.batches(0, read=read_here):
        for x_LT, row in zip(batch["x_BLT"], batch["row_B"], strict=True):
            if row >= 0:
                np.testing.assert_array_equal(x_LT, wanted_x_BLT[row - 202 if row >= 202 else row])


def test_subjects_who_have_withdrawn_are_left_out(data: ShardedDataset, few: ShardedDataset, tmp_path: Path):
    """Their places stay empty, so that every other record stays in its step."""
    gone = {3, 69, 70, 200}
    beside = copied(data, tmp_path / "shards")
    (tmp_path / "shards" / WITHDRAWN).write_text("subject_id\n" + "".join(f"r{row}\n" for row in sorted(gone)))
    less = ShardedDataset.open(beside.storage.uri)
    whole = steps_of(feed_of(data), 1, 1)
    assert steps_of(feed_of(less), 1, 2) == [[row for row in step if row not in gone] for step in whole]
    kept = feed_of(less, cache=tmp_path / "cache")
    for batch in (widened(kept, batch) for batch in kept.batches(1, read=read_here)):
        nobody = batch["row_B"] == NOBODY
        assert not batch["weight_B"][nobody].any() and not batch["x_BLT"][nobody].any()
    rows = [row for step in steps_of(several([(few, 2), (less, 1)]), 0, 1) for row in step]
    assert Counter(rows) == {row: 2 if row < 70 else 1 for row in range(272) if row - 70 not in gone}


def test_one_data_set_once_is_what_it_was(data: ShardedDataset):
    assert several([(data, 1)]) == feed_of(data)
    assert several([(data, 1)]).order.repeats == ()
    assert several([(data, 2)], shuffle=False).order.records == 404


def test_each_data_set_has_a_cache_of_its_own(data: ShardedDataset, few: ShardedDataset, tmp_path: Path):
    plain, kept = in_int16(several([(data, 1), (few, 3)])), several([(data, 1), (few, 3)], cache=tmp_path)
    assert_same(list(kept.batches(0, read=read_here)), list(plain.batches(0, read=read_here)))
    assert len(list(tmp_path.iterdir())) == 2
    assert sorted(kept.cache_bytes().values()) == [70 * plain.record_bytes, 202 * plain.record_bytes]
    require_room(kept)
    alone = feed_of(few, cache=tmp_path)
    assert all(alone.is_cached(block) for stream in range(4) for block in alone.order.blocks(0, stream))


@pytest.mark.parametrize(
    ("repeats", "says"), [((1, 0), "is to come 0 times an epoch: give 1 or more"), ((-2, 1), "is to come -2 times")]
)
def test_repeats_below_one(data: ShardedDataset, few: ShardedDataset, repeats: tuple[int, int], says: str):
    with pytest.raises(LsemvaeError, match=says):
        several(list(zip((data, few), repeats, strict=True)))


def test_a_data_set_named_twice(data: ShardedDataset, few: ShardedDataset):
    with pytest.raises(LsemvaeError, match=r"is named twice: name it once, with repeats, as in .*:2"):
        several([(data, 1), (few, 2), (data, 1)])


def x_of(data: ShardedDataset) -> np.ndarray:
    columns = data.read(SIGNAL_COLUMNS).to_pydict()
    return preprocess_signals(signals_mv(columns, LIMB_LEADS), columns["rate_hz"], LIMB_LEADS, CONFIG).x_BLT


def test_rows_are_what_the_one_definition_makes_of_them(data: ShardedDataset):
    columns = data.read(SIGNAL_COLUMNS).to_pydict()
    wanted = preprocess_signals(signals_mv(columns, LIMB_LEADS), columns["rate_hz"], LIMB_LEADS, CONFIG)
    refused = 0
    for batch in feed_of(data).batches(0, read=read_here):
        assert batch["x_BLT"].shape == (16, 6, 1000)  # the same size at the end too
        for x_LT, mask_L, weight, row in zip(
            *(batch[n] for n in ("x_BLT", "lead_mask_BL", "weight_B", "row_B")), strict=True
        ):
            if weight:
                np.testing.assert_array_equal(x_LT, wanted.x_BLT[row])
                np.testing.assert_array_equal(mask_L, wanted.lead_mask_BL[row])
            else:
                assert row == NOBODY or row % 9 == 0
                assert mask_L.all() and not x_LT.any()
                refused += row != NOBODY
    assert refused == len(range(0, 202, 9))


def damage(folder: Path) -> None:
    shard = folder / "train-00002.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    shard.write_bytes(content)


def test_a_damaged_row_group_is_counted_and_left_out(data: ShardedDataset, tmp_path: Path, caplog):
    feed = feed_of(copied(data, tmp_path))
    damage(tmp_path)
    with caplog.at_level(logging.ERROR):
        rows = np.concatenate([batch["row_B"] for batch in feed.batches(0, read=read_here)])
    assert (rows == DAMAGED).sum() == 64
    assert len(set(rows[rows >= 0])) == 202 - 64
    assert "train-00002.parquet, row group 1, is damaged" in caplog.text


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"batch_size": 18}, "no multiple of streams=4"),
        ({"streams": 300, "batch_size": 300}, "202 recordings for 300 streams"),
    ],
)
def test_mistakes(data: ShardedDataset, settings: dict, says: str):
    with pytest.raises(LsemvaeError, match=says):
        feed_of(data, **settings)


def test_more_workers_than_streams(data: ShardedDataset):
    with pytest.raises(LsemvaeError, match="5 workers and 4 streams"):
        next(feed_of(data).batches(0, 4, 5, read=read_here))


def assert_same(found: list[dict], wanted: list[dict]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_a_device_finishes_windows_to_the_same_batches(data: ShardedDataset):
    finish = DeviceFinish(CONFIG, LIMB_LEADS, "cpu")
    windows = feed_of(data, on_device=True).batches(0, read=read_here)
    for found, wanted in zip(windows, feed_of(data).batches(0, read=read_here), strict=True):
        batch = finish.batch({name: torch.from_numpy(values) for name, values in found.items()})
        assert batch.keys() == wanted.keys()
        for name in ("lead_mask_BL", "weight_B", "row_B"):
            np.testing.assert_array_equal(batch[name], wanted[name], err_msg=name)
        np.testing.assert_allclose(batch["x_BLT"], wanted["x_BLT"], atol=1e-4)


@pytest.mark.parametrize("on_device", [False, True])
def test_packed_batches_are_the_same_within_half_a_step(data: ShardedDataset, on_device: bool):
    """A step is 1/65,534 of a lead's range. Zeros stay zeros, and all other arrays are equal."""
    plain, packed = feed_of(data, on_device=on_device), feed_of(data, on_device=on_device, packed=True)
    assert packed.record_bytes < 0.51 * plain.record_bytes
    for found, wanted in zip(packed.batches(1, read=read_here), plain.batches(1, read=read_here), strict=True):
        wide = widened(packed, found)
        assert wide.keys() == wanted.keys()
        for name in wanted.keys() - {plain.layout.signal}:
            np.testing.assert_array_equal(wide[name], wanted[name], err_msg=name)
        x_BLT, x_wide_BLT = wanted[plain.layout.signal], wide[plain.layout.signal]
        range_BL = x_BLT.max(axis=2) - x_BLT.min(axis=2)
        assert (np.abs(x_wide_BLT - x_BLT) <= 0.51 / 65_534 * range_BL[..., None]).all()
        assert (x_wide_BLT[x_BLT == 0] == 0).all() and x_wide_BLT.dtype == np.float32


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_a_device_that_holds_all_records_gives_the_same_batches(
    data: ShardedDataset, few: ShardedDataset, tmp_path: Path, cached: bool, on_device: bool
):
    """With a damaged row group, a subject who has withdrawn, and records that come twice."""
    whole = copied(data, tmp_path / "shards")
    (tmp_path / "shards" / "withdrawn.csv").write_text("r75\nr140\n")
    damage(tmp_path / "shards")
    sources = [(ShardedDataset.open(whole.storage.uri), 1), (few, 2)]
    feed = in_int16(several(sources, on_device=on_device, cache=tmp_path / "cache" if cached else None))
    held = Resident(feed, torch.device("cpu"), read=read_here)
    for epoch, worker, workers, start in ((0, 0, 1, 0), (1, 1, 2, 3)):
        wanted = list(feed.batches(epoch, worker, workers, start, read_here))
        found = []
        for rows in held.rows(epoch, worker, workers, start):
            arrays = held.take(torch.from_numpy(rows["at_B"]))
            found.append({name: values.numpy() for name, values in arrays.items()} | {"row_B": rows["row_B"]})
        assert_same(found, wanted)
    assert (np.concatenate([batch["row_B"] for batch in wanted]) == DAMAGED).any()


@pytest.mark.parametrize("on_device", [False, True])
def test_after_one_epoch_the_cache_has_every_epoch(data: ShardedDataset, tmp_path: Path, on_device: bool):
    plain = feed_of(data, on_device=on_device, packed=True)
    kept = feed_of(copied(data, tmp_path / "shards"), on_device=on_device, cache=tmp_path / "cache")
    assert_same(list(kept.batches(0, read=read_here)), list(plain.batches(0, read=read_here)))
    for shard in (tmp_path / "shards").glob("*.parquet"):
        shard.unlink()
    for epoch in (0, 1):
        for worker in range(3):
            wanted = list(plain.batches(epoch, worker, 3, 2, read_here))
            assert_same(list(kept.batches(epoch, worker, 3, 2, read_here)), wanted)
            assert_same(list(kept.batches(epoch, worker, 3, 2)), wanted)  # Ray is not asked for what is here


@pytest.mark.ray
@pytest.mark.parametrize("cached", [False, True])
def test_ray_data_brings_the_same(data: ShardedDataset, tmp_path: Path, ray_cluster, cached: bool):
    """Also where a part of it is in the cache."""
    start_ray()
    wanted = list(feed_of(data, packed=cached).batches(3, 1, 2, 1, read_here))
    feed = feed_of(data, cache=tmp_path if cached else None)
    assert_same(list(feed.batches(3, 1, 2, 1)), wanted)
    if cached:
        paths = sorted(tmp_path.glob("*/*.npy"))
        assert len(paths) > 2
        for path in paths[::2]:
            path.unlink()
        assert_same(list(feed.batches(3, 1, 2, 1)), wanted)
        assert sorted(tmp_path.glob("*/*.npy")) == paths


def test_a_cache_is_made_again_where_it_is_cut_or_means_something_else(
    data: ShardedDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    def files() -> set[Path]:
        return set(tmp_path.glob("*/*.npy"))

    feed = feed_of(data, cache=tmp_path)
    wanted = list(feed.batches(0, read=read_here))
    first = files()
    cut = min(first)
    content = cut.read_bytes()
    cut.write_bytes(content[:1000])
    assert_same(list(feed.batches(0, read=read_here)), wanted)
    assert cut.read_bytes() == content
    assert f"{cut} is damaged and is made again" in caplog.text
    list(feed_of(data, cache=tmp_path, on_device=True).batches(0, read=read_here))
    second = files()
    assert len(second) == 2 * len(first)
    list(Feed.of(data, "train", LEADS, CONFIG, batch_size=16, cache=tmp_path).batches(0, read=read_here))
    assert len(files()) == 3 * len(first)


def test_what_is_damaged_is_not_cached(data: ShardedDataset, tmp_path: Path):
    feed = feed_of(copied(data, tmp_path / "shards"), cache=tmp_path / "cache")
    damage(tmp_path / "shards")
    rows = np.concatenate([batch["row_B"] for batch in feed.batches(0, read=read_here)])
    assert (rows == DAMAGED).sum() == 64
    copied(data, tmp_path / "shards")
    footer.cache_clear()
    assert_same(list(feed.batches(0, read=read_here)), list(feed_of(data, packed=True).batches(0, read=read_here)))


def test_a_run_goes_on_where_the_cache_has_no_room(data: ShardedDataset, tmp_path: Path, caplog):
    (tmp_path / "file").write_text("")
    feed = feed_of(data, cache=tmp_path / "file")
    assert_same(list(feed.batches(0, read=read_here)), list(feed_of(data, packed=True).batches(0, read=read_here)))
    assert caplog.text.count("takes no more (Not a directory): going on without") == 1
    with pytest.raises(LsemvaeError, match="cannot be written to"):
        require_room(feed)


@pytest.mark.parametrize("cached", [False, True])
def test_who_withdraws_after_ingest_is_in_no_step_and_moves_nobody(data: ShardedDataset, tmp_path: Path, cached: bool):
    """Also where the cache was filled before: the order stays, so a run that was interrupted continues in it."""
    cache = tmp_path / "cache" if cached else None
    whole = copied(data, tmp_path / "shards")
    before = list(feed_of(whole, cache=cache).batches(1, read=read_here))
    gone = {1, 75, 140}
    (tmp_path / "shards" / "withdrawn.csv").write_text("".join(f"r{row}\n" for row in gone))
    after = list(feed_of(ShardedDataset.open(whole.storage.uri), cache=cache).batches(1, read=read_here))
    for was, now in zip(before, after, strict=True):
        is_gone_B = np.isin(was["row_B"], list(gone))
        assert (now["weight_B"][is_gone_B] == 0).all() and (now["row_B"][is_gone_B] == NOBODY).all()
        for name in was:
            np.testing.assert_array_equal(now[name][~is_gone_B], was[name][~is_gone_B])
    assert not gone & {row for batch in after for row in batch["row_B"].tolist()}
    assert sum(batch["weight_B"].sum() for batch in before) - sum(batch["weight_B"].sum() for batch in after) == 3
