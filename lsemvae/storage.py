"""Files in a folder or in an object store, behind one small interface.

`file://`, plain paths and `s3://bucket/prefix` are understood. S3 requests are signed with what the AWS tools
would use (environment, profile, role) and go to `AWS_ENDPOINT_URL` where that is set. One URI can say otherwise:
`s3://physionet-open/mimic-iv-ecg/1.0?anonymous=true&endpoint=https://s3.amazonaws.com&region=us-east-1` reads a
public bucket without credentials, wherever the other buckets are.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pyarrow as pa
from pyarrow import fs as pafs

from lsemvae.errors import LsemvaeError


@dataclass(frozen=True)
class Storage:
    """A folder-like place. Cheap to make and to send to another process; connections are made on first use."""

    uri: str

    @classmethod
    def open(cls, uri: str | Path) -> "Storage":
        """Checks only the form of the URI; raises LsemvaeError when no such kind of place is known."""
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
        return _s3_filesystem(
            asked.get("anonymous", "false").lower() in ("1", "true"),
            asked.get("endpoint") or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"),
            asked.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
        )

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

    def read_bytes(self, relative: str) -> bytes:
        """Raises FileNotFoundError when it is absent, LsemvaeError when the place cannot be reached."""
        if self.is_local:
            return Path(self.path(relative)).read_bytes()
        with self._explained(), self.filesystem.open_input_file(self.path(relative)) as stream:
            return stream.read()

    def write_bytes(self, relative: str, content: bytes) -> None:
        """Whole or not at all: a reader never sees a part of it."""
        with self._explained():
            if self.is_local:
                target = Path(self.path(relative))
                target.parent.mkdir(parents=True, exist_ok=True)
                partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
                partial.write_bytes(content)
                partial.replace(target)
            else:  # an S3 object appears when its upload is complete
                with self.filesystem.open_output_stream(self.path(relative)) as stream:
                    stream.write(content)

    def exists(self, relative: str = "") -> bool:
        with self._explained():
            return self.filesystem.get_file_info(self.path(relative)).type != pafs.FileType.NotFound

    def list(self, prefix: str = "", suffix: str | None = None) -> Iterator[str]:
        """Relative paths of the files below `prefix`, sorted; only those ending in `suffix` if given."""
        selector = pafs.FileSelector(self.path(prefix), recursive=True, allow_not_found=True)
        with self._explained():
            infos = self.filesystem.get_file_info(selector)
        start = len(self.base) + 1
        paths = (info.path[start:] for info in infos if info.type == pafs.FileType.File)
        yield from sorted(path for path in paths if suffix is None or path.endswith(suffix))

    def require(self) -> "Storage":
        """Itself; raises LsemvaeError when nothing is there."""
        if not self.exists():
            raise LsemvaeError(f"{self.uri} does not exist: check the path or URI")
        return self

    def _explained(self) -> "_Explained":
        return _Explained(self.uri)


class _Explained:
    """Turns an object store's own error into one line that names the place and the mend."""

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, OSError | pa.ArrowException) or isinstance(error, FileNotFoundError):
            return
        text = " ".join(str(error).split())
        if "ACCESS_DENIED" in text or "403" in text or "SignatureDoesNotMatch" in text:
            mend = "access denied: check the credentials, or add ?anonymous=true for a public bucket"
        elif "NO_SUCH_BUCKET" in text or "bucket does not exist" in text.lower():
            mend = "there is no such bucket"
        elif isinstance(error, PermissionError):
            mend = "permission denied"
        else:
            mend = text[:200]
        raise LsemvaeError(f"{self._uri}: {mend}") from error


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
    return pafs.S3FileSystem(
        anonymous=anonymous,
        connect_timeout=10,
        request_timeout=60,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=5),
        **where,
    )
