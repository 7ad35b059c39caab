"""Which model versions a replica answers with: it follows MLflow's aliases, and keeps its version when that fails.

The bundle that answers is also on disk (see `shelf`), so that a replica starts while MLflow is away.
"""

import logging
import tempfile
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from lsemvae.bundle import Scorer
from lsemvae.errors import BundleError, LsemvaeError
from lsemvae.scoring.drift import ScoreBins
from lsemvae.storage import Storage
from lsemvae.tracking import Version, fetch, locate, parse_model
from serve.observed import Metrics
from serve.polling import every
from serve.schema import ModelOut
from serve.shelf import Kept, locked_shelf

log = logging.getLogger("ray.serve")

RETRY_S = 300.0
"""A refused version is fetched again after this time: its files may have been damaged on the way."""


@dataclass(frozen=True)
class Served:
    """One loaded model, its description in answers, and where its bundle was read.

    The bundle may have left its folder since: another version replaces it on the shelf.
    """

    scorer: Scorer
    described: ModelOut
    folder: Path

    @classmethod
    def load(cls, folder: Path, name: str, version: int | None, device: str) -> "Served":
        """Raises BundleError when the folder is not a bundle with a task, or does not reproduce its example's score."""
        scorer = Scorer(folder, device)
        scorer.check_example()
        bundle = scorer.bundle
        assert bundle.task is not None  # as `Scorer` requires
        described = ModelOut(
            name=name,
            version=version,
            digest=bundle.digest,
            preprocess_digest=bundle.preprocess.digest,
            task=bundle.task,
            leads=list(bundle.leads),
            threshold=scorer.threshold,
        )
        return cls(scorer, described, folder)


class Registry:
    """Loads the models that the URIs name, and follows those that are aliases every `poll_s` seconds.

    uris    models:/NAME@alias, models:/NAME/3, a bundle's folder, or s3://…; no two with the same name
    folder  where the bundles that answer are kept
    poll_s  seconds between two looks at MLflow, randomly up to 30 % less; with 0 only `refresh` looks
    metrics where the versions that answer are told

    A model that cannot be loaded is listed in `problems` and tried again at each look; the others answer meanwhile.
    A new version is loaded while the old one answers, so for a while a model is in memory twice. Raises LsemvaeError
    when a URI cannot be read or two URIs have the same name.
    """

    def __init__(
        self, uris: list[str], folder: Path, poll_s: float, device: str = "cpu", metrics: Metrics | None = None
    ) -> None:
        self._uris: dict[str, str] = {}
        for uri in uris:
            name = _name_of(uri)
            if name in self._uris:
                raise LsemvaeError(f"{self._uris[name]} and {uri} are both {name!r}: serve one of them")
            self._uris[name] = uri
        self._folder, self._device = folder, device
        self._served: Mapping[str, Served] = MappingProxyType({})
        self._versions: dict[str, Version] = {}  # of those served by alias or number
        self._wanted: dict[str, int] = {}  # the versions that the URIs named at the last look
        self._metrics = metrics
        self._refused: dict[
            str, tuple[Version, str, float]
        ] = {}  # the version, why, and until when it is not tried again
        self._problems: dict[str, str] = {}
        self._one_at_a_time = threading.Lock()
        self.refresh()
        every(poll_s, self.refresh, "registry")

    @property
    def served(self) -> Mapping[str, Served]:
        """Name -> model, most leads first. The mapping is never changed; another version is another mapping."""
        return self._served

    @property
    def problems(self) -> dict[str, str]:
        """Name -> why the version that its URI names does not answer, and what answers instead."""
        return dict(self._problems)

    @property
    def ready(self) -> bool:
        """Whether there is any model to answer with."""
        return bool(self._served)

    def refresh(self) -> None:
        """Looks at every URI once: a new version is loaded, checked, and then answers. Never raises."""
        # In a thread that ends, so that the threads that OpenMP made for it end too: see `ModelThread`.
        with ThreadPoolExecutor(1, "look") as look:
            look.submit(self._look).result()

    def _look(self) -> None:
        with self._one_at_a_time:
            for name, uri in self._uris.items():
                try:
                    if uri.startswith("models:/"):
                        self._follow(name, uri)
                    elif name not in self._served:
                        self._serve(self._unregistered(name, uri))
                    problem = ""
                except (LsemvaeError, OSError) as error:
                    problem = " ".join(str(error).split())
                except Exception as error:  # the thread goes on, and the loaded models answer, whatever this is
                    problem = type(error).__name__
                self._note(name, problem)
                if self._metrics:
                    served = self._served.get(name)
                    version = served.described.version if served else None
                    self._metrics.looked(name, version, self._wanted.get(name), bool(problem))

    def _unregistered(self, name: str, uri: str) -> Served:
        """A local bundle, used where it is, or one from an object store, which is kept on disk."""
        if Storage.open(uri).is_local:
            return Served.load(fetch(uri, self._folder).folder, name, None, self._device)
        with (
            locked_shelf(self._folder, "unregistered", name) as shelf,
            tempfile.TemporaryDirectory(dir=shelf.folder, prefix="partial-") as temporary,
        ):
            folder = fetch(uri, Path(temporary) / "bundle").folder
            served = Served.load(folder, name, None, self._device)
            return replace(served, folder=shelf.keep_unregistered(folder, served.described.digest))

    def _follow(self, name: str, uri: str) -> None:
        """Loads the version that the URI names now. Raises when that fails, at the start after loading the kept one."""
        try:
            wanted = locate(uri)
            self._wanted[name] = wanted.number
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
                    with locked_shelf(self._folder, "model", name) as shelf:
                        if kept := shelf.kept():
                            self._serve(_load_kept(kept, name, self._device), kept.version)
                except BundleError as other:
                    raise LsemvaeError(f"{error}; {other}") from error
            raise

    def _load(self, name: str, wanted: Version) -> None:
        with locked_shelf(self._folder, "model", name) as shelf:
            kept = shelf.kept()
            if kept and kept.version == wanted:
                try:
                    self._serve(_load_kept(kept, name, self._device), wanted)
                    return
                except BundleError as error:
                    log.warning(f"{name}: the bundle kept on disk is damaged and is fetched again: {error}")
            with shelf.downloaded(wanted) as folder:
                served = Served.load(folder, name, wanted.number, self._device)
                bundle = served.scorer.bundle
                present = self._served[name].scorer.bundle if name in self._served else kept and kept.bundle()
                if present and (bundle.task, bundle.leads) != (present.task, present.leads):
                    raise BundleError(
                        f"models:/{name}/{wanted.number} finds {bundle.task} in {', '.join(bundle.leads)}, and what "
                        f"answers as {name} finds {present.task} in {', '.join(present.leads)}: register it under "
                        "another name"
                    )
                served = replace(served, folder=shelf.keep(folder, wanted, bundle.digest))
            self._serve(served, wanted)

    def _serve(self, served: Served, version: Version | None = None) -> None:
        name = served.described.name
        bins = _score_bins(served)
        if self._metrics:
            self._metrics.loaded(served.described, bins)
        models = {**self._served, name: served}
        # Most leads first: a 12-lead recording goes to the 12-lead model, a 6-lead one to the 6-lead model.
        by_leads = sorted(models.items(), key=lambda item: -len(item[1].described.leads))
        self._served = MappingProxyType(dict(by_leads))
        if version:
            self._versions[name] = version
        log.info(f"serving {name} version {served.described.version} {served.described.digest}")

    def _note(self, name: str, problem: str) -> None:
        """Logs a problem when it begins and when it ends, not at every look."""
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


def _score_bins(served: Served) -> ScoreBins | None:
    """The distribution of its training cohort's scores. Without one, which the log says, drift is not measured."""
    try:
        bins = ScoreBins.read(served.scorer.bundle.provenance)
        reason = "its bundle does not say how its training cohort scored: register it again to have that"
    except LsemvaeError as error:
        bins, reason = None, str(error)
    if bins is None:
        name, version = served.described.name, served.described.version
        log.warning(f"{name} version {version}: the drift of its scores is not measured: {reason}")
    return bins


def _load_kept(kept: Kept, name: str, device: str) -> Served:
    """Raises BundleError when it is no longer what was kept."""
    served = Served.load(kept.folder, name, kept.version.number, device)
    kept.require(served.described.digest)
    return served


def _name_of(uri: str) -> str:
    """The model's name in answers. Raises LsemvaeError when the URI cannot be read."""
    return parse_model(uri)[0] if uri.startswith("models:/") else PurePosixPath(Storage.open(uri).base).name
