"""Which versions a replica answers with: it follows MLflow's aliases, and keeps what it has when that goes wrong.

The bundle that answers is also on disk, so that a replica starts while MLflow is away. Each model has a folder there,
which the replicas of one machine share under a lock:

    model-NAME/lock
    model-NAME/last.json          the version that passed its checks last; replaced in one step
    model-NAME/VERSION-DIGEST/    its bundle
"""

import fcntl
import json
import logging
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from urllib.parse import quote

from lsemvae.bundle import Bundle, Scorer, describe
from lsemvae.errors import BundleError, LsemvaeError
from lsemvae.storage import Storage
from lsemvae.tracking import Version, download, fetch, locate, parse_model
from serve.schema import ModelOut

log = logging.getLogger("ray.serve")

RETRY_S = 300.0
"""A version that was refused is tried again after so long: what came may have been damaged on the way."""


@dataclass(frozen=True)
class Served:
    """One loaded model and how answers name it."""

    scorer: Scorer
    described: ModelOut

    @classmethod
    def load(cls, folder: Path, name: str, version: int | None, device: str) -> "Served":
        """Raises BundleError when the folder is no bundle with a task, or fails its own example."""
        scorer = Scorer(folder, device)
        scorer.check_example()
        bundle = scorer.bundle
        described = ModelOut(
            name=name,
            version=version,
            digest=bundle.digest,
            preprocess_digest=bundle.preprocess.digest,
            task=bundle.task,
            leads=list(bundle.leads),
            threshold=scorer.threshold,
        )
        return cls(scorer, described)


class Registry:
    """Loads the models that the URIs name, and follows those that are aliases every `poll_s` seconds.

    uris    models:/NAME@alias, models:/NAME/3, a bundle's folder, or s3://…; each has another name
    folder  where the bundles that answer are kept
    poll_s  seconds between two looks at MLflow, at random a little less; with 0 only `refresh` looks

    A model that cannot be loaded is in `problems` and tried again at each look; the others answer meanwhile. Loading
    goes on beside answering, so for a while a model is twice in memory. Raises LsemvaeError when a URI makes no sense
    or two have the same name.
    """

    def __init__(self, uris: list[str], folder: Path, poll_s: float, device: str = "cpu") -> None:
        self._uris: dict[str, str] = {}
        for uri in uris:
            name = _name_of(uri)
            if name in self._uris:
                raise LsemvaeError(f"{self._uris[name]} and {uri} are both {name!r}: serve one of them")
            self._uris[name] = uri
        self._folder, self._device = folder, device
        self._served: Mapping[str, Served] = MappingProxyType({})
        self._versions: dict[str, Version] = {}  # of those served by alias or number
        self._refused: dict[str, tuple[Version, str, float]] = {}  # which, why, and until when it is not tried again
        self._problems: dict[str, str] = {}
        self._one_at_a_time = threading.Lock()
        self.refresh()
        if poll_s:
            threading.Thread(target=self._poll, args=(poll_s,), daemon=True, name="registry").start()

    @property
    def served(self) -> Mapping[str, Served]:
        """Name -> model, most leads first. It never changes: with another version it is another mapping."""
        return self._served

    @property
    def problems(self) -> dict[str, str]:
        """Name -> why what its URI names does not answer, and what does."""
        return dict(self._problems)

    @property
    def ready(self) -> bool:
        """Whether there is any model to answer with."""
        return bool(self._served)

    def refresh(self) -> None:
        """One look at every URI: what is new is loaded, checked, and then answers. Never raises."""
        # In a thread that ends, and with it the threads that OpenMP has made for it: see `scoring.TORCH`.
        with ThreadPoolExecutor(1, "look") as look:
            look.submit(self._look).result()

    def _look(self) -> None:
        with self._one_at_a_time:
            for name, uri in self._uris.items():
                try:
                    if uri.startswith("models:/"):
                        self._follow(name, uri)
                    elif name not in self._served:
                        with tempfile.TemporaryDirectory() as temporary:
                            folder = fetch(uri, Path(temporary)).folder
                            self._serve(Served.load(folder, name, None, self._device))
                    problem = ""
                except (LsemvaeError, OSError) as error:
                    problem = " ".join(str(error).split())
                except Exception as error:  # the thread lives on: what is loaded answers, whatever this is
                    problem = type(error).__name__
                self._note(name, problem)

    def _poll(self, poll_s: float) -> None:
        while True:
            time.sleep(poll_s * random.uniform(0.7, 1))  # replicas that started together do not all ask at once
            self.refresh()

    def _follow(self, name: str, uri: str) -> None:
        """Makes the version that the URI names now the one that answers, or raises; at the start the one on disk."""
        try:
            wanted = locate(uri)
            if wanted == self._versions.get(name):
                return
            refused, why, until = self._refused.get(name, (None, "", 0.0))
            if wanted == refused and time.monotonic() < until:
                raise BundleError(why)
            try:
                self._load(name, wanted)
            except BundleError as error:
                self._refused[name] = (wanted, str(error), time.monotonic() + RETRY_S)
                raise
        except Exception as error:
            if name not in self._served:
                try:
                    with self._locked(name) as shelf:
                        if kept := shelf.kept():
                            self._serve(kept.load(name, self._device), kept.version)
                except BundleError as other:
                    raise LsemvaeError(f"{error}; {other}") from error
            raise

    def _load(self, name: str, wanted: Version) -> None:
        with self._locked(name) as shelf:
            kept = shelf.kept()
            if kept and kept.version == wanted:
                try:
                    self._serve(kept.load(name, self._device), wanted)
                    return
                except BundleError as error:
                    log.warning(f"{name}: what was kept on disk is damaged and is fetched again: {error}")
            with tempfile.TemporaryDirectory(dir=shelf.folder, prefix="partial-") as temporary:
                folder = Path(temporary) / "bundle"
                try:
                    download(wanted, folder)
                    served = Served.load(folder, name, wanted.number, self._device)
                except BundleError as error:
                    raise BundleError(str(error).replace(str(folder), f"models:/{name}/{wanted.number}")) from None
                bundle = served.scorer.bundle
                present = self._served[name].scorer.bundle if name in self._served else kept and kept.bundle()
                if present and (bundle.task, bundle.leads) != (present.task, present.leads):
                    raise BundleError(
                        f"models:/{name}/{wanted.number} finds {bundle.task} in {', '.join(bundle.leads)}, and what "
                        f"answers as {name} finds {present.task} in {', '.join(present.leads)}: register it under "
                        "another name"
                    )
                shelf.keep(folder, wanted, bundle.digest)
            self._serve(served, wanted)

    def _serve(self, served: Served, version: Version | None = None) -> None:
        name = served.described.name
        models = {**self._served, name: served}
        # Most leads first: a 12-lead recording goes to the 12-lead model, a 6-lead one to the 6-lead model.
        by_leads = sorted(models.items(), key=lambda item: -len(item[1].described.leads))
        self._served = MappingProxyType(dict(by_leads))
        if version:
            self._versions[name] = version
        log.info(f"serving {name} version {served.described.version} {served.described.digest}")

    def _note(self, name: str, problem: str) -> None:
        """Says a problem when it comes and when it goes, not at every look."""
        if problem:
            served = self._served.get(name)
            problem += f"; version {served.described.version} answers" if served else "; nothing answers in its place"
        if problem == self._problems.get(name, ""):
            return
        self._problems = {n: text for n, text in (self._problems | {name: problem}).items() if text}
        if problem:
            log.error(f"{name}: {problem}")
        else:
            log.info(f"{name}: the problem is gone")

    @contextmanager
    def _locked(self, name: str) -> Iterator["Shelf"]:
        shelf = Shelf(self._folder / f"model-{quote(name, safe='')}")
        shelf.folder.mkdir(parents=True, exist_ok=True)
        with (shelf.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # let go when it is closed, by the end of the process too
            yield shelf


@dataclass(frozen=True)
class Kept:
    """A version on disk."""

    folder: Path
    version: Version
    digest: str

    def bundle(self) -> Bundle | None:
        try:
            return describe(self.folder)
        except BundleError:
            return None

    def load(self, name: str, device: str) -> Served:
        """Raises BundleError when it is no longer what was kept."""
        served = Served.load(self.folder, name, self.version.number, device)
        if served.described.digest != self.digest:
            raise BundleError(f"{self.folder} has digest {served.described.digest}, was kept with {self.digest}")
        return served


@dataclass(frozen=True)
class Shelf:
    """One model's folder on disk. To be used under its lock."""

    folder: Path

    def kept(self) -> Kept | None:
        """The version that was served last; None where there is none, or what is written of it makes no sense."""
        try:
            last = json.loads((self.folder / "last.json").read_bytes())
            version, digest = Version(**last["version"]), last["digest"]
            return Kept(self.folder / f"{version.number}-{digest}", version, digest)
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None

    def keep(self, bundle: Path, version: Version, digest: str) -> None:
        """Moves the bundle here, makes it the last one, and removes all others."""
        target = self.folder / f"{version.number}-{digest}"
        shutil.rmtree(target, ignore_errors=True)
        bundle.rename(target)
        last = {"version": asdict(version), "digest": digest}
        Storage.open(self.folder).write_bytes("last.json", json.dumps(last).encode())
        for other in self.folder.iterdir():
            if other.is_dir() and other != target and other != bundle.parent:
                shutil.rmtree(other, ignore_errors=True)


def _name_of(uri: str) -> str:
    """The name that answers give; raises LsemvaeError when the URI makes no sense."""
    return parse_model(uri)[0] if uri.startswith("models:/") else PurePosixPath(Storage.open(uri).base).name
