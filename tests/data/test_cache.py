"""The cache gives back what it was given or nothing, and leaves room on its disk."""

import logging
import os
import shutil
import time
import zlib
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lsemvae.data import cache as caching
from lsemvae.data.cache import IN_USE_S, USED, Cache, require_room
from lsemvae.errors import LsemvaeError

MB = 10**6


def rows_of(records: int = 8, samples: int = 1000, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "x_BLT": rng.normal(size=(records, 12, samples)).astype(np.float32),
        "lead_mask_BL": rng.random((records, 12)) < 0.1,
        "weight_B": np.ones(records, dtype=np.float32),
    }


def assert_same(found: dict[str, np.ndarray] | None, wanted: dict[str, np.ndarray]) -> None:
    assert found is not None and found.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name], values)


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(caching, "_given_up", set())
    monkeypatch.setattr(caching, "_checked", {})
    monkeypatch.setattr(caching, "_said_used_s", {})


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Give the disk of tmp_path a size: the free space is the size minus the files that are there."""

    def of_size(total: int) -> None:
        def usage(folder: Path) -> tuple:
            assert Path(folder).is_relative_to(tmp_path)
            used = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
            return namedtuple("Usage", "total used free")(total, used, total - used)

        monkeypatch.setattr(shutil, "disk_usage", usage)

    return of_size


def filled(cache: Cache, megabytes: int, used_s_ago: float = 0.0) -> Cache:
    """Puts row groups of a megabyte into the cache; it was last used so long ago."""
    for group in range(megabytes):
        cache.put("shard", group, {"x_B": np.zeros(MB // 4, dtype=np.float32)})
    os.utime(cache.folder / USED, times=(time.time() - used_s_ago,) * 2)
    return cache


def megabytes_in(cache: Cache) -> int:
    return len(list(cache.folder.glob("*.npy")))


def test_it_gives_back_what_it_was_given(tmp_path: Path):
    cache, rows = Cache(tmp_path, "one way"), rows_of()
    assert cache.get("shard", 3) is None
    cache.put("shard", 3, rows)
    assert_same(cache.get("shard", 3), rows)
    assert_same({name: np.load(cache.path("shard", 3))[name] for name in rows}, rows)
    assert Cache(tmp_path, "another way").get("shard", 3) is None
    assert cache.get("shard", 4) is None and cache.get("another shard", 3) is None


@pytest.mark.parametrize("place", [0, 20, 64, 150, 5_000, 200_000, 384_200, -5, -1])
def test_one_flipped_bit_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture, place: int):
    """In the header, in each of the arrays, and in the checksum itself."""
    cache, rows = Cache(tmp_path, "one way"), rows_of()
    cache.put("shard", 0, rows)
    path = cache.path("shard", 0)
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)
    assert cache.get("shard", 0) is None
    assert f"{path} is damaged and is made again" in caplog.text
    assert not path.exists()
    cache.put("shard", 0, rows)
    assert_same(cache.get("shard", 0), rows)


@pytest.mark.parametrize("length", [0, 3, 100, 200_000, -1])
def test_a_cut_file_is_noticed(tmp_path: Path, length: int):
    cache = Cache(tmp_path, "one way")
    cache.put("shard", 0, rows_of())
    path = cache.path("shard", 0)
    path.write_bytes(path.read_bytes()[:length])
    assert cache.get("shard", 0) is None
    assert not path.exists()


def test_a_file_is_checked_once_by_a_process_and_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cache = Cache(tmp_path, "one way")
    for group in range(2):
        cache.put("shard", group, rows_of(seed=group))
    caching._checked.clear()
    summed = []
    crc32 = zlib.crc32
    monkeypatch.setattr(zlib, "crc32", lambda content: summed.append(len(content)) or crc32(content))
    for _ in range(3):
        for group in range(2):
            assert_same(cache.get("shard", group), rows_of(seed=group))
    assert len(summed) == 2
    os.utime(cache.path("shard", 0), ns=(1, 1))
    assert_same(cache.get("shard", 0), rows_of(seed=0))
    assert len(summed) == 3


def test_only_the_files_of_a_data_set_count_as_its_own(tmp_path: Path, disk: Callable[[int], None]):
    disk(caching.SPARE_BYTES + 25 * MB)
    filled(Cache(tmp_path, "another data set"), 20)
    own = filled(Cache(tmp_path, "own"), 2)
    require_room(tmp_path, {own: 4 * MB})  # 2 MB are there, 3 are free
    with pytest.raises(
        LsemvaeError, match=r"needs 0\.0 GB for this data set, 0\.0 of them .* another --cache, or none"
    ):
        require_room(tmp_path, {own: 6 * MB})
    two = {own: 4 * MB, Cache(tmp_path, "own too"): 3 * MB}
    with pytest.raises(LsemvaeError, match="for this data set"):  # 5 MB are missing, and 3 are free
        require_room(tmp_path, two)


def test_the_least_recently_used_folders_go_first_and_none_that_is_in_use(
    tmp_path: Path, disk: Callable[[int], None], caplog: pytest.LogCaptureFixture
):
    disk(caching.SPARE_BYTES + 13 * MB)
    older = filled(Cache(tmp_path, "older"), 3, used_s_ago=3 * IN_USE_S)
    old = filled(Cache(tmp_path, "old"), 3, used_s_ago=2 * IN_USE_S)
    alive = filled(Cache(tmp_path, "alive"), 3, used_s_ago=IN_USE_S / 2)
    mine = tmp_path / "0123456789abcdef"  # named like a folder of the cache; what is not the cache's stays
    mine.mkdir()
    (mine / "thesis.npy").write_bytes(b"mine")
    os.utime(mine, times=(0, 0))
    own = Cache(tmp_path, "own")
    with caplog.at_level(logging.INFO):
        require_room(tmp_path, {own: 5 * MB})
    assert [megabytes_in(cache) for cache in (older, old, alive)] == [0, 3, 3]
    assert f"removed {older.folder} from the cache" in caplog.text
    require_room(tmp_path, {own: 9 * MB})
    assert [megabytes_in(cache) for cache in (older, old, alive)] == [0, 0, 3]
    assert not old.folder.exists()
    with pytest.raises(LsemvaeError, match="give another --cache, or none"):
        require_room(tmp_path, {own: 12 * MB})
    assert megabytes_in(alive) == 3
    assert (mine / "thesis.npy").read_bytes() == b"mine"


def test_files_of_the_first_version_are_removed_too(tmp_path: Path, disk: Callable[[int], None]):
    disk(caching.SPARE_BYTES + 3 * MB)
    first = tmp_path / "3f" / f"{'3f' * 16}-00007.npy"
    first.parent.mkdir()
    first.write_bytes(bytes(2 * MB))
    os.utime(first.parent, times=(1, 1))
    require_room(tmp_path, {Cache(tmp_path, "own"): 2 * MB})
    assert not first.parent.exists()


def test_putting_removes_what_is_old_and_leaves_the_spare_room(
    tmp_path: Path, disk: Callable[[int], None], caplog: pytest.LogCaptureFixture
):
    disk(caching.SPARE_BYTES + 7 * MB)
    old = filled(Cache(tmp_path, "old"), 3, used_s_ago=2 * IN_USE_S)
    own = filled(Cache(tmp_path, "own"), 10)
    assert megabytes_in(old) == 0
    assert megabytes_in(own) == 6  # the seventh would take a few bytes of the spare room
    assert caplog.text.count("takes no more (its disk has less than 1.1 GB to spare): going on without") == 1


def test_two_processes_may_remove_the_same_folder(tmp_path: Path):
    assert caching._remove(tmp_path / ("0" * 16)) == 0  # as where the other one was quicker


def test_reading_marks_a_folder_as_used(tmp_path: Path):
    cache = filled(Cache(tmp_path, "own"), 1, used_s_ago=5 * IN_USE_S)
    caching._said_used_s.clear()
    assert cache.get("shard", 0) is not None
    assert time.time() - (cache.folder / USED).stat().st_mtime < IN_USE_S


def test_what_killed_processes_left_is_removed_after_a_day(tmp_path: Path):
    cache = filled(Cache(tmp_path, "own"), 1)
    partial = [cache.folder / f".{cache.path('shard', 1).name}.{number}.partial" for number in (1, 2)]
    for path in partial:
        path.write_bytes(b"begun")
    os.utime(partial[0], times=(1, 1))
    require_room(tmp_path, {cache: MB})
    assert [path.exists() for path in partial] == [False, True]
    assert megabytes_in(cache) == 1
