"""Bundles kept on disk, so that a replica starts with the last good one while MLflow is away.

Each model has a folder, `model-NAME`, and the encoder has one, `encoder-NAME`. The replicas of one machine share them
under a lock:

    lock
    last.json          the version that passed its checks last, replaced in one step
    VERSION-DIGEST/    its bundle

A bundle from s3://… has no version and is fetched again at each start. It is kept as `unregistered-NAME/DIGEST`, from
where the process that explains loads it.
"""

import fcntl
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote

from lsemvae.bundle import Bundle, describe
from lsemvae.errors import BundleError
from lsemvae.storage import Storage
from lsemvae.tracking import Version, download


@dataclass(frozen=True)
class Kept:
    """A version on disk."""

    folder: Path
    version: Version
    digest: str

    def bundle(self) -> Bundle | None:
        """Its description, None when that cannot be read."""
        try:
            return describe(self.folder)
        except BundleError:
            return None

    def require(self, digest: str) -> None:
        """Raises BundleError when the loaded bundle has another digest than the one that was kept."""
        if digest != self.digest:
            raise BundleError(f"{self.folder} has digest {digest}, was kept with {self.digest}")


@dataclass(frozen=True)
class Shelf:
    """One model's folder on disk, to be used under its lock."""

    folder: Path

    @contextmanager
    def downloaded(self, version: Version) -> Iterator[Path]:
        """The version's bundle in a folder that goes when the block ends, unless `keep` has moved it.

        A BundleError within the block names the version instead of the folder.
        """
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="partial-") as temporary:
            folder = Path(temporary) / "bundle"
            try:
                download(version, folder)
                yield folder
            except BundleError as error:
                named = str(error).replace(str(folder), f"models:/{version.name}/{version.number}")
                raise BundleError(named) from None

    def kept(self) -> Kept | None:
        """The version that was kept last; None where there is none, or where its record cannot be read."""
        try:
            last = json.loads((self.folder / "last.json").read_bytes())
            version, digest = Version(**last["version"]), last["digest"]
            return Kept(self.folder / f"{version.number}-{digest}", version, digest)
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None

    def keep(self, bundle: Path, version: Version, digest: str) -> Path:
        """Moves the bundle here, records it as the last one, and removes all others -> its new place."""
        target = self.folder / f"{version.number}-{digest}"
        shutil.rmtree(target, ignore_errors=True)
        bundle.rename(target)
        last = {"version": asdict(version), "digest": digest}
        Storage.open(self.folder).write_bytes("last.json", json.dumps(last).encode())
        self._remove_all_but(target, bundle.parent)
        return target

    def keep_unregistered(self, bundle: Path, digest: str) -> Path:
        """Moves a bundle without a version here and removes all others -> its new place."""
        target = self.folder / digest
        shutil.rmtree(target, ignore_errors=True)
        bundle.rename(target)
        self._remove_all_but(target, bundle.parent)
        return target

    def _remove_all_but(self, *kept: Path) -> None:
        for other in self.folder.iterdir():
            if other.is_dir() and other not in kept:
                shutil.rmtree(other, ignore_errors=True)


@contextmanager
def locked_shelf(folder: Path, kind: str, name: str) -> Iterator[Shelf]:
    """The shelf `folder`/KIND-NAME while no other process uses it."""
    shelf = Shelf(folder / f"{kind}-{quote(name, safe='')}")
    shelf.folder.mkdir(parents=True, exist_ok=True)
    with (shelf.folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, also by the end of the process
        yield shelf
