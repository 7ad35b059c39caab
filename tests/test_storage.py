"""Folders and S3 behind one interface: whole files or none, and errors in one line."""

import os
from pathlib import Path

import boto3
import pytest

from lsemvae.errors import FileTooLarge, LsemvaeError
from lsemvae.storage import Storage


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.server)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return Storage.open(tmp_path / "place")
    request.getfixturevalue("s3")
    return Storage.open(f"s3://ecg/storage/{tmp_path.name}")


def test_what_is_written_is_read_and_listed(place: Storage):
    assert not place.exists("a/b.bin")
    with pytest.raises(FileNotFoundError):
        place.read_bytes("a/b.bin")
    place.write_bytes("a/b.bin", b"one")
    place.write_bytes("a/b.bin", b"two")
    place.write_bytes("c.txt", b"")
    assert place.read_bytes("a/b.bin") == (place / "a").read_bytes("b.bin") == b"two"
    assert list(place.list()) == ["a/b.bin", "c.txt"]
    assert list(place.list("a", suffix=".bin")) == ["a/b.bin"]
    assert list(place.list("nothing")) == []
    assert place.require() is place
    place.remove("a/b.bin")
    assert list(place.list()) == ["c.txt"]
    place.remove("c.txt")
    assert list(place.list()) == []
    with pytest.raises(FileNotFoundError):
        place.remove("c.txt")


def test_a_file_is_listed_once_whatever_links_lead_to_it(tmp_path: Path):
    root, outside = tmp_path / "data", tmp_path / "outside"
    for path in ("data/1.hea", "data/a/2.hea", "data/a/3.hea", "outside/9.hea", "data/.annex/x/KEY.hea"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(path)
    (root / "again").symlink_to(".")
    (root / "a" / "up").symlink_to("../..")  # leads to data and to outside
    (root / "copy.hea").symlink_to("1.hea")
    (root / "broken.hea").symlink_to("nothing")
    (root / "elsewhere").symlink_to(outside)
    (root / "one").mkdir()
    (root / "one" / "9.hea").symlink_to(outside / "9.hea")
    (root / "annexed.hea").symlink_to(".annex/x/KEY.hea")
    listed = list(Storage.open(root).list())
    assert [path for path in listed if not path.startswith(".")] == [
        "1.hea", "a/2.hea", "a/3.hea", "annexed.hea", "elsewhere/9.hea"
    ]  # fmt: skip
    assert list(Storage.open(root).list("a", ".hea"))[:2] == ["a/2.hea", "a/3.hea"]
    assert list(Storage.open(root / "again").list()) == listed


def test_an_anonymous_uri_goes_to_aws_and_not_to_ones_own_store(s3: str, monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr("lsemvae.storage._s3_filesystem", lambda *which: asked.append(which))
    for query in ("", "?anonymous=true", f"?anonymous=true&endpoint={s3}"):
        _ = Storage.open(f"s3://physionet-open/x{query}").filesystem
    assert asked == [
        (False, s3, "us-east-1"), (True, "https://s3.amazonaws.com", "us-east-1"), (True, s3, "us-east-1")
    ]  # fmt: skip


def test_a_listing_longer_than_one_page_is_whole(s3: str):
    client = boto3.client("s3")
    for number in range(1003):
        client.put_object(Bucket="ecg", Key=f"many/{number:04d}", Body=b"")
    assert len(list(Storage.open("s3://ecg/many").list())) == 1003


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = Storage.open(tmp_path)
    place.write_bytes("x", b"old")

    def fail(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(LsemvaeError, match="No space left"):
        place.write_bytes("x", b"new")
    assert place.read_bytes("x") == b"old"


@pytest.mark.parametrize("uri", ["ftp://x/y", "gs://bucket/x", "s3://", "s3:///x", "s3://bucket/x?anon=true"])
def test_uris_that_mean_nothing_are_refused(uri: str):
    with pytest.raises(LsemvaeError):
        Storage.open(uri)


def test_places_that_are_not_there(s3: str, tmp_path: Path):
    with pytest.raises(LsemvaeError, match="does not exist"):
        Storage.open(tmp_path / "nowhere").require()
    with pytest.raises(LsemvaeError, match="does not exist"):
        Storage.open("s3://ecg/nowhere").require()
    with pytest.raises(LsemvaeError, match="nobody"):
        Storage.open("s3://nobody").write_bytes("x", b"")


def test_one_uri_may_name_its_own_endpoint(s3: str, monkeypatch: pytest.MonkeyPatch):
    Storage.open("s3://ecg/own").write_bytes("x", b"here")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert Storage.open(f"s3://ecg/own?endpoint={s3}&region=us-east-1").read_bytes("x") == b"here"
    assert os.environ["AWS_ENDPOINT_URL"] != s3


def test_a_folder_uri_is_the_folder(tmp_path: Path):
    assert Storage.open(f"file://{tmp_path}") == Storage.open(str(tmp_path)) == Storage.open(tmp_path)


def test_the_beginning_of_a_file_and_a_limit_on_its_size(place: Storage):
    place.write_bytes("a.bin", b"0123456789")
    assert place.head("a.bin", 4) == b"0123"
    assert place.head("a.bin", 40) == b"0123456789"
    assert place.read_bytes("a.bin", 10) == b"0123456789"
    with pytest.raises(FileTooLarge, match="10 bytes: 9 are the limit"):
        place.read_bytes("a.bin", 9)
    with pytest.raises(FileNotFoundError):
        place.head("b.bin", 4)
