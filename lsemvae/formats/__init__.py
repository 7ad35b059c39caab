"""Readers: one file a format, each recognised by what the file holds, never by its name.

The same readers serve a folder, an object store and an upload: what they need of the outside is a `Fetch`,
which gives the bytes of a file beside the recording. Nothing else is opened, no network is touched. Malformed
input raises `UnreadableRecording`, which names the file, the value and the mend.
"""

import stat
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Protocol

from lsemvae.errors import UnreadableRecording
from lsemvae.formats import alivecor, cardiosoft, clinical, dicom, plain, wfdb
from lsemvae.record import Record

Fetch = Callable[[str], bytes]
"""Plain file name -> its bytes, from one folder; raises FileNotFoundError when it is absent."""

MAX_FILE_BYTES = 256 * 2**20


class Reader(Protocol):
    """`content` is what the file `name` holds; `uv_per_lsb` overrides its scale where that is known wrong."""

    def __call__(self, name: str, content: bytes, fetch: Fetch, *, uv_per_lsb: float | None = None) -> Record: ...


# In this order: the first that recognises the beginning of the file reads it. The surest signs come first.
READERS: list[tuple[Callable[[bytes], bool], Reader]] = [
    (alivecor.recognise_atc, alivecor.read_atc),
    (plain.recognise_npy, plain.read_npy),
    (dicom.recognise, dicom.read),
    (cardiosoft.recognise, cardiosoft.read),
    (clinical.recognise, clinical.read),
    (alivecor.recognise_kardia, alivecor.read_kardia),
    (wfdb.recognise, wfdb.read),
    (plain.recognise_csv, plain.read_csv),
]
_HEAD_BYTES = 4096

SUFFIXES = (".hea", ".xml", ".dcm", ".scp", ".atc", ".npy")
"""How the main files of recordings end: where to look in a listing. What they are, their content says."""
UNSURE_SUFFIXES = (".csv", ".json")
"""How some recordings end, and tables, labels and side files too."""


def main_files(paths: Iterable[str], read_bytes: Fetch) -> list[str]:
    """Of a listing, the main files of recordings, in its order.

    Files that end in `SUFFIXES` are, whether or not they can be read. Of those in `UNSURE_SUFFIXES`, which are
    few beside other recordings, the content decides, which `read_bytes` gives (32 at a time).
    """
    named = [path for path in paths if path.lower().endswith(SUFFIXES + UNSURE_SUFFIXES)]

    def is_main(path: str) -> bool:
        if path.lower().endswith(SUFFIXES):
            return True
        head = read_bytes(path)[:_HEAD_BYTES]
        return any(recognise(head) for recognise, _ in READERS)

    with ThreadPoolExecutor(32) as pool:
        return [path for path, main in zip(named, pool.map(is_main, named), strict=True) if main]


def read(path: Path | str, *, uv_per_lsb: float | None = None) -> Record:
    """The recording in a local file; a WFDB record is named by its header, or by the path without extension.

    Only files of the same folder (or below it) are read. Raises UnreadableRecording.
    """
    path = Path(path)
    return read_record(path.name, folder_fetch(path.parent), uv_per_lsb=uv_per_lsb)


def read_relative(path: str, read_bytes: Fetch, *, uv_per_lsb: float | None = None) -> Record:
    """Like `read`, for a path below a root that `read_bytes` reads from, such as `Storage.read_bytes`."""
    parts = PurePosixPath(path).parts
    if not parts or ".." in parts or path.startswith("/") or "\\" in path or "\0" in path:
        raise UnreadableRecording("unsafe_name", f"{path[:200]!r} leads out of its source: give a path below it")
    folder = PurePosixPath(*parts[:-1])
    return read_record(parts[-1], lambda name: read_bytes(str(folder / name)), uv_per_lsb=uv_per_lsb)


def read_record(name: str, fetch: Fetch, *, uv_per_lsb: float | None = None) -> Record:
    """The recording whose main file is `name` (or `name.hea`), with what `fetch` gives.

    `record_id` is the name without its extension. `uv_per_lsb` replaces gain and baseline of the file: its
    raw integers times that many microvolts. Raises UnreadableRecording; other errors of `fetch` pass through.
    """

    def fetch_sibling(sibling: str) -> bytes:
        content = fetch(_plain(sibling))
        if len(content) > MAX_FILE_BYTES:
            raise _too_large(sibling, len(content))
        return content

    # A name without extension is most likely a WFDB record: its header first, so that an object store is not
    # asked 800,000 times for what is not there.
    candidates = (name, f"{name}.hea") if "." in name else (f"{name}.hea", name)
    for candidate in candidates:
        try:
            content = fetch_sibling(candidate)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            continue
        for recognise, reader in READERS:
            if recognise(content[:_HEAD_BYTES]):
                return reader(candidate, content, fetch_sibling, uv_per_lsb=uv_per_lsb)
        raise UnreadableRecording(
            "format",
            f"{candidate!r} ({len(content)} bytes) is of no known format: give WFDB (.hea), DICOM, SCP-ECG, "
            "XML (CardioSoft, MUSE, Philips, aECG), AliveCor .atc, Kardia JSON, or CSV or NPY as plain.py describes",
        )
    raise UnreadableRecording("missing_file", f"neither {candidates[0]!r} nor {candidates[1]!r} exists: check the path")


def folder_fetch(folder: Path) -> Fetch:
    """Bytes of regular files of this folder; a link that leads out of it is refused."""
    root = folder.resolve()

    def fetch(name: str) -> bytes:
        path = root / _plain(name)
        if stat.S_ISLNK((status := path.lstat()).st_mode):
            path = path.resolve()
            if not path.is_relative_to(root):
                raise UnreadableRecording(
                    "unsafe_name", f"{name!r} is a link out of its folder: put the file itself there"
                )
            status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a folder, a pipe, a device
            raise FileNotFoundError(name)
        if status.st_size > MAX_FILE_BYTES:
            raise _too_large(name, status.st_size)
        return path.read_bytes()

    return fetch


def _plain(name: str) -> str:
    """The name itself; raises UnreadableRecording unless it names a file of the folder it is used in."""
    if (
        not name.isprintable()
        or name.startswith(".")
        or any(c in "/\\:" for c in name)
        or not 0 < len(name.encode("utf-8", "replace")) <= 255
    ):
        raise UnreadableRecording(
            "unsafe_name", f"{name[:200]!r} is no plain file name: a recording's files lie beside each other"
        )
    return name


def _too_large(name: str, size: int) -> UnreadableRecording:
    return UnreadableRecording("too_large", f"{name!r} has {size} bytes: {MAX_FILE_BYTES} are the limit")
