"""Readers: one module a format. Files are recognised by their content, never by their name.

The same readers serve a folder, an object store and an upload. They access files only through a `Fetch`, which gives
the bytes of a file beside the recording; they open nothing else and never use the network. Malformed input raises
`UnreadableRecording`, which names the file, the value and the mend.
"""

import stat
from pathlib import Path, PurePosixPath
from typing import Protocol

from lsemvae.errors import FileTooLarge, UnreadableRecording
from lsemvae.formats.echonext import ReadRange, is_row, read_row
from lsemvae.formats.listing import SUFFIXES, UNSURE_SUFFIXES, Listing, PassedOver, find_recordings
from lsemvae.formats.readers import READERS, Fetch, Reader, reader_of
from lsemvae.record import Record

__all__ = [
    "MAX_FILE_BYTES",
    "READERS",
    "SUFFIXES",
    "UNSURE_SUFFIXES",
    "Fetch",
    "Listing",
    "PassedOver",
    "ReadBytes",
    "ReadRange",
    "Reader",
    "find_recordings",
    "folder_fetch",
    "read",
    "read_record",
    "read_relative",
]

MAX_FILE_BYTES = 256 * 2**20


class ReadBytes(Protocol):
    """Path below a source and a limit -> the file's bytes, such as `Storage.read_bytes`.

    Raises FileTooLarge before reading a file that is larger, FileNotFoundError when it is absent.
    """

    def __call__(self, path: str, max_bytes: int, /) -> bytes: ...


def read(path: Path | str, *, uv_per_lsb: float | None = None) -> Record:
    """The recording in a local file. A WFDB record is given by its header, or by the path without extension.

    Only files in the same folder are read. Raises UnreadableRecording.
    """
    path = Path(path)
    return read_record(path.name, folder_fetch(path.parent), uv_per_lsb=uv_per_lsb)


def read_relative(
    path: str, read_bytes: ReadBytes, *, uv_per_lsb: float | None = None, read_range: ReadRange | None = None
) -> Record:
    """Like `read`, for a path below the root of `read_bytes`, such as `Storage.read_bytes`.

    With `read_range`, such as `Storage.read_range`, the path may also be a row of EchoNext's waveforms.
    """
    parts = PurePosixPath(path).parts
    if not parts or ".." in parts or path.startswith("/") or "\\" in path or "\0" in path:
        raise UnreadableRecording("unsafe_name", f"{path[:200]!r} points outside of its source: give a path below it")
    if read_range is not None and is_row(path):
        return read_row(path, read_range)
    folder = PurePosixPath(*parts[:-1])

    def fetch(name: str) -> bytes:
        try:
            return read_bytes(str(folder / name), MAX_FILE_BYTES)
        except FileTooLarge as error:
            raise _too_large(name, error.size) from None

    return read_record(parts[-1], fetch, uv_per_lsb=uv_per_lsb)


def read_record(name: str, fetch: Fetch, *, uv_per_lsb: float | None = None) -> Record:
    """The recording whose main file is `name` (or `name.hea`), read through `fetch`.

    `record_id` is the name without its extension. With `uv_per_lsb` the gain and baseline of the file are ignored, and
    a sample is its raw integer times that many microvolts. Raises UnreadableRecording; other errors of `fetch` pass
    through.
    """

    def fetch_sibling(sibling: str) -> bytes:
        content = fetch(_plain(sibling))
        if len(content) > MAX_FILE_BYTES:
            raise _too_large(sibling, len(content))
        return content

    # A name without extension is most likely a WFDB record. Trying its header first spares an object store 800,000
    # requests for files that do not exist.
    candidates = (name, f"{name}.hea") if "." in name else (f"{name}.hea", name)
    for candidate in candidates:
        try:
            content = fetch_sibling(candidate)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            continue
        if (reader := reader_of(content)) is not None:
            return reader(candidate, content, fetch_sibling, uv_per_lsb=uv_per_lsb)
        raise UnreadableRecording(
            "format",
            f"{candidate!r} ({len(content)} bytes) is of no known format: give WFDB (.hea), DICOM, SCP-ECG, "
            "XML (CardioSoft, MUSE, Philips, aECG), AliveCor .atc, Kardia JSON, or CSV or NPY as plain.py describes",
        )
    raise UnreadableRecording("missing_file", f"neither {candidates[0]!r} nor {candidates[1]!r} exists: check the path")


def folder_fetch(folder: Path) -> Fetch:
    """Gives the bytes of regular files in this folder; refuses links that lead out of it."""
    root = folder.resolve()

    def fetch(name: str) -> bytes:
        path = root / _plain(name)
        if stat.S_ISLNK((status := path.lstat()).st_mode):
            path = path.resolve()
            if not path.is_relative_to(root):
                raise UnreadableRecording(
                    "unsafe_name", f"{name!r} is a link that leads out of its folder: put the file itself there"
                )
            status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a folder, a pipe, a device
            raise FileNotFoundError(name)
        if status.st_size > MAX_FILE_BYTES:
            raise _too_large(name, status.st_size)
        return path.read_bytes()

    return fetch


def _plain(name: str) -> str:
    """The name itself; raises UnreadableRecording unless it can only be a file in the same folder."""
    if (
        not name.isprintable()
        or name.startswith(".")
        or any(c in "/\\:" for c in name)
        or not 0 < len(name.encode("utf-8", "replace")) <= 255
    ):
        raise UnreadableRecording(
            "unsafe_name", f"{name[:200]!r} is no plain file name: put the files of a recording into one folder"
        )
    return name


def _too_large(name: str, size: int) -> UnreadableRecording:
    return UnreadableRecording("too_large", f"{name!r} has {size} bytes: {MAX_FILE_BYTES} are the limit")
