"""Files in a folder or in an object store, behind one small interface.

A place is a plain path, `file://` or `s3://bucket/prefix`. S3 requests are signed with the credentials that the AWS
tools would use (environment, profile, role) and go to `AWS_ENDPOINT_URL` where that is set. A URI can override this:

- `?endpoint=https://…` sends the requests of this URI there, and `&region=…` signs them for that region.
- `?anonymous=true` reads a public bucket without credentials. Such a bucket is at AWS: without `endpoint=` the requests
  go to AWS, whatever `AWS_ENDPOINT_URL` is. So `s3://physionet-open/mimic-iv-ecg/1.0?anonymous=true&region=us-east-1`
  reads PhysioNet while all other URIs use your own store.

Passing faults (503, a connection that is reset, cut or silent) are tried again, AWS_MAX_ATTEMPTS times (7) in all, with
growing random pauses: half a minute. Lasting faults (403, 404) fail at once.
"""

import json
import os
import secrets
import shutil
import tempfile
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any
from urllib.parse import parse_qs, urlsplit

import pyarrow as pa
from pyarrow import fs as pafs

from lsemvae.errors import DamagedFile, FileTooLarge, LsemvaeError, StorageError
from lsemvae.temporary import FULL, needing_room

CONNECT_TIMEOUT_S = 10
REQUEST_TIMEOUT_S = 30
"""A server that sends nothing for this long counts as silent."""
MAX_ATTEMPTS = 7
AWS_ENDPOINT = "https://s3.amazonaws.com"


@dataclass(frozen=True)
class Storage:
    """A folder, or a prefix of a bucket. Cheap to make and to send to another process; it connects on first use."""

    uri: str

    @classmethod
    def open(cls, uri: str | Path) -> "Storage":
        """Checks only the form of the URI. Raises LsemvaeError when it is neither a folder nor S3."""
        text = str(uri)
        scheme = urlsplit(text).scheme
        if scheme == "s3":
            if not urlsplit(text).netloc:
                raise LsemvaeError(f"{text!r} names no bucket: write s3://bucket/prefix")
            unknown = parse_qs(urlsplit(text).query).keys() - {"anonymous", "endpoint", "region"}
            if unknown:
                raise LsemvaeError(f"{text!r}: {', '.join(unknown)} is none of anonymous, endpoint and region")
            return cls(text.rstrip("/"))
        if scheme in ("", "file"):
            path = Path(urlsplit(text).path if scheme else text).expanduser()
            return cls(str(path.absolute()))
        raise LsemvaeError(f"{text!r}: only folders, file:// and s3:// can be used")

    @property
    def is_local(self) -> bool:
        return not self.uri.startswith("s3://")

    @property
    def filesystem(self) -> pafs.FileSystem:
        if self.is_local:
            return _local_filesystem()
        asked = {name: values[0] for name, values in parse_qs(urlsplit(self.uri).query).items()}
        anonymous, endpoint = asked.get("anonymous", "false").lower() in ("1", "true"), asked.get("endpoint")
        if endpoint is None:
            own = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
            endpoint = own if not anonymous else AWS_ENDPOINT if own else None
        region = asked.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        return _s3_filesystem(anonymous, endpoint, region)

    @property
    def base(self) -> str:
        """The path that `filesystem` understands."""
        if self.is_local:
            return self.uri
        parts = urlsplit(self.uri)
        return f"{parts.netloc}{parts.path}".rstrip("/")

    def path(self, relative: str) -> str:
        return f"{self.base}/{relative}" if relative else self.base

    def __truediv__(self, relative: str) -> "Storage":
        if self.is_local:
            return Storage(f"{self.uri}/{relative}")
        parts = urlsplit(self.uri)
        query = f"?{parts.query}" if parts.query else ""
        return Storage(f"s3://{parts.netloc}{parts.path.rstrip('/')}/{relative}{query}")

    def read_bytes(self, relative: str, max_bytes: int | None = None) -> bytes:
        """The whole file. One that has more than `max_bytes` is not read: FileTooLarge is raised.

        Raises FileNotFoundError when it is absent, StorageError when the place fails.
        """
        with explained(self._shown(relative)):
            if self.is_local:
                with Path(self.path(relative)).open("rb") as file:
                    self._require_size(relative, os.fstat(file.fileno()).st_size, max_bytes)
                    return file.read()
            with self.filesystem.open_input_file(self.path(relative)) as stream:
                self._require_size(relative, stream.size(), max_bytes)
                return stream.read()

    def read_json(self, relative: str, mend: str, needs: Collection[str] = ()) -> dict[str, Any]:
        """A file that holds one JSON object with at least the keys `needs`.

        Raises DamagedFile, which ends with `mend`, where the file is cut or garbled; otherwise as `read_bytes`.
        """
        content = self.read_bytes(relative)
        try:
            found = json.loads(content)
        except (UnicodeDecodeError, json.JSONDecodeError):
            found = None
        if not isinstance(found, dict):
            raise DamagedFile(f"{self._shown(relative)} is damaged: it is not JSON. {mend}")
        if absent := sorted(set(needs) - found.keys()):
            raise DamagedFile(f"{self._shown(relative)} is damaged: it lacks {', '.join(absent)}. {mend}")
        return found

    def head(self, relative: str, n_bytes: int) -> bytes:
        """The first `n_bytes` of the file, or all of it if it is shorter; no more is read. Raises as `read_bytes`."""
        return self.read_range(relative, 0, n_bytes)

    def read_range(self, relative: str, start: int, n_bytes: int) -> bytes:
        """`n_bytes` from byte `start`, or fewer where the file ends; no more is read. Raises as `read_bytes`."""
        with self.reading(relative) as stream:
            stream.seek(start)
            return stream.read(n_bytes)

    def size(self, relative: str) -> int:
        """How many bytes the file has. Raises as `read_bytes`."""
        with self.reading(relative) as stream:
            return stream.seek(0, os.SEEK_END)

    @contextmanager
    def reading(self, relative: str) -> Iterator[IO[bytes]]:
        """A stream of a file too large for the memory; it can be sought in. Raises as `read_bytes`."""
        with explained(self._shown(relative), reads=True):
            if self.is_local:
                with Path(self.path(relative)).open("rb") as file:
                    yield file
            else:
                with self.filesystem.open_input_file(self.path(relative)) as stream:
                    yield stream

    def _require_size(self, relative: str, size: int, max_bytes: int | None) -> None:
        if max_bytes is not None and size > max_bytes:
            raise FileTooLarge(self._shown(relative), size, max_bytes)

    def write_bytes(self, relative: str, content: bytes) -> None:
        """Writes the file whole or not at all: a reader never sees a part of it. Raises StorageError."""
        with explained(self._shown(relative)):
            if self.is_local:
                with whole_file(Path(self.path(relative))) as stream:
                    stream.write(content)
            else:  # an S3 object appears when its upload is complete
                with self.filesystem.open_output_stream(self.path(relative)) as stream:
                    stream.write(content)

    @contextmanager
    def writing(self, relative: str) -> Iterator[IO[bytes]]:
        """A stream for a large file that appears in one step, when the block ends without an error.

        It is spooled to a temporary file first: an error inside the block must not complete an upload.
        """
        with needing_room(Path(tempfile.gettempdir())), tempfile.TemporaryFile() as spool:
            yield spool
            spool.seek(0)
            with explained(self._shown(relative)):
                path = self.path(relative)
                target = whole_file(Path(path)) if self.is_local else self.filesystem.open_output_stream(path)
                with target as stream:
                    shutil.copyfileobj(spool, stream, 2**20)

    def remove(self, relative: str) -> None:
        """Deletes a file, and then its folder if that is empty. Raises StorageError."""
        with explained(self._shown(relative)):
            self.filesystem.delete_file(self.path(relative))
            if self.is_local:
                with suppress(OSError):  # it holds other files
                    Path(self.path(relative)).parent.rmdir()

    def exists(self, relative: str = "") -> bool:
        with explained(self._shown(relative)):
            return self.filesystem.get_file_info(self.path(relative)).type != pafs.FileType.NotFound

    def list(self, prefix: str = "", suffix: str | None = None) -> Iterator[str]:
        """Relative paths of the files below `prefix`, sorted; only those ending in `suffix` if given.

        A file that is reached by several symbolic links is listed once.
        """
        if self.is_local:
            with explained(self._shown(prefix)):
                yield from sorted(_local_files(Path(self.base), prefix, suffix or ""))
            return
        selector = pafs.FileSelector(self.path(prefix), recursive=True, allow_not_found=True)
        with explained(self._shown(prefix)):
            infos = self.filesystem.get_file_info(selector)
        start = len(self.base) + 1
        paths = (info.path[start:] for info in infos if info.type == pafs.FileType.File)
        yield from sorted(path for path in paths if suffix is None or path.endswith(suffix))

    def _shown(self, relative: str) -> str:
        return self.path(relative) if self.is_local else f"s3://{self.path(relative)}"

    def require(self) -> "Storage":
        """Itself; raises LsemvaeError when nothing is there."""
        if not self.exists():
            raise LsemvaeError(f"{self.uri} does not exist: check the path or URI")
        return self


@contextmanager
def explained(path: str, reads: bool = False) -> Iterator[None]:
    """Turns an error of the storage into a StorageError: one line that names the place and what to do.

    A full disk is not explained where the block only `reads` from the path: it writes what it reads somewhere else.
    """
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise
    except (OSError, pa.ArrowException) as error:
        if reads and getattr(error, "errno", None) in FULL:
            raise
        text = " ".join(str(error).split())
        mend = next((mend for signs, mend in _MENDS if any(sign in text for sign in signs)), text[:300])
        overloaded = mend == _OVERLOADED
        raise StorageError(f"{path}: {mend}", passing=mend not in _LASTING, overloaded=overloaded) from error


_OVERLOADED = "the object store is overloaded: give the same command again later, or with fewer --threads"
_MENDS = [
    (
        # Some servers answer 400 without a body to a request without credentials.
        ("ACCESS_DENIED", "HTTP status 403", "SIGNATURE_DOES_NOT_MATCH", "INVALID_ACCESS_KEY_ID", "HTTP status 400"),
        "access denied: check the credentials (AWS_ACCESS_KEY_ID, …), which may have expired, or add ?anonymous=true "
        "for a public bucket",
    ),
    (("NO_SUCH_BUCKET",), "there is no such bucket: check the name, or create it"),
    (
        ("NETWORK_CONNECTION", "REQUEST_TIMEOUT"),
        "the object store does not answer, or breaks off: check the endpoint (AWS_ENDPOINT_URL) and the network",
    ),
    (
        ("SLOW_DOWN", "SERVICE_UNAVAILABLE", "HTTP status 503", "INTERNAL_FAILURE", "HTTP status 500"),
        _OVERLOADED,
    ),
    (("Permission denied",), "permission denied: check who may read and write it"),
    (("No space left on device",), "No space left on device: make room there"),
    (("Disk quota exceeded", "QuotaExceeded"), "its quota is exceeded: make room there"),
]
_LASTING = {mend for signs, mend in _MENDS if not {"NETWORK_CONNECTION", "SLOW_DOWN"} & set(signs)}


@contextmanager
def whole_file(target: Path, *, durable: bool = True) -> Iterator[IO[bytes]]:
    """A stream into a local file that appears in one step, when the block ends without an error.

    Without `durable` the file may be empty after a power cut.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("wb") as stream:
            yield stream
            if durable:
                stream.flush()
                os.fsync(stream.fileno())  # without it, a power cut may keep the name and lose the content
        partial.replace(target)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def _local_files(base: Path, prefix: str, suffix: str) -> Iterator[str]:
    """Relative paths of the files below base/prefix that end in `suffix`, each file once.

    Real files come first, links are followed afterwards, and a link to what was listed before is skipped. So of
    `a.hea`, `copy.hea -> a.hea` and `again -> .` only a.hea is listed. A link into a hidden folder counts: tools such
    as git-annex keep the content there, and the link has the name that was meant.
    """
    top = str(base / prefix) if prefix else str(base)
    real_top, start = os.path.realpath(top), len(str(base).rstrip("/")) + 1
    listed = {real_top}  # folders whose files are listed, and single files outside of these folders
    followed: set[str] = set()  # the same of hidden ones, which are listed once more under the name of a link
    folders, links = deque([(top, real_top, listed)]), deque[str]()
    while folders or links:
        if not folders:
            link = links.popleft()
            real = os.path.realpath(link)
            hidden = "/." in real.removeprefix(real_top)
            known = followed if hidden else listed
            is_file = Path(real).is_file()
            if real in known or (is_file and not hidden and str(Path(real).parent) in listed):
                continue
            known.add(real)
            if not is_file:
                folders.append((link, real, known))
            elif link.endswith(suffix):
                yield link[start:]
            continue
        folder, real, known = folders.popleft()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):  # there is no such folder, or it was removed meanwhile
            continue
        for entry in entries:
            if entry.is_symlink():
                links.append(entry.path)
            elif entry.is_dir():
                if (inner := f"{real}/{entry.name}") not in known:
                    known.add(inner)
                    folders.append((entry.path, inner, known))
            elif entry.is_file() and entry.name.endswith(suffix):
                yield entry.path[start:]


@lru_cache
def _local_filesystem() -> pafs.LocalFileSystem:
    return pafs.LocalFileSystem()


@lru_cache
def _s3_filesystem(anonymous: bool, endpoint: str | None, region: str | None) -> pafs.S3FileSystem:
    where = {}
    if endpoint:
        parts = urlsplit(endpoint)
        where = {"endpoint_override": parts.netloc or parts.path, "scheme": parts.scheme or "https"}
    if region or endpoint:
        where["region"] = region or "us-east-1"
    if endpoint:  # Ceph and others do not support the trailing checksums that the AWS client sends by default
        os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    return pafs.S3FileSystem(
        anonymous=anonymous,
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=REQUEST_TIMEOUT_S,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(int(os.environ.get("AWS_MAX_ATTEMPTS", MAX_ATTEMPTS))),
        # With True, an upload that cannot begin would be closed, and so completed with the rest of the buffer.
        allow_delayed_open=False,
        **where,
    )
