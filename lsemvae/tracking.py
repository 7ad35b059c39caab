"""MLflow, and nothing else: runs, metrics, pictures, bundles as model versions, aliases. Only this file imports it.

A model version is the bundle's directory, stored as the run's artefact; nothing is pickled. Training never dies
because tracking is down: what cannot be logged is said once and left out. Registering and promoting do fail.
"""

import logging
import math
import os
import re
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts, list_artifacts
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from lsemvae.errors import BundleError, LsemvaeError
from lsemvae.storage import Storage

log = logging.getLogger(__name__)

CANDIDATE, CHAMPION = "candidate", "champion"
BUNDLE_FOLDER = "bundle"

_METRICS_A_CALL = 1000  # what a server takes at once
_OUTBOX = 100_000
_PAUSE_S = 10.0  # before a server that was away is tried again


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, or a SQLite file in the current folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


def shown(text: str) -> str:
    """The text, for people and logs, without the user and password of a URL in it."""
    return re.sub(r"//[^/@\s]*@", "//", text)


def _client() -> MlflowClient:
    # MLflow itself tries for minutes by default; a user should hear sooner that no server is there.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    return MlflowClient(tracking_uri=tracking_uri(), registry_uri=tracking_uri())


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except MlflowException as error:
        raise LsemvaeError(shown(f"{what} failed at {tracking_uri()}: {str(error).splitlines()[0][:200]}")) from error


class Run:
    """One MLflow run, written to by one process at a time; its id travels to whoever continues it."""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self._client = _client()
        self._quiet = False
        self._outbox: deque[Metric] = deque()
        self._sender: threading.Thread | None = None
        self._not_before = 0.0

    @classmethod
    def start(
        cls,
        experiment: str,
        name: str,
        params: Mapping[str, Any],
        *,
        resume: str | None = None,
        parent: str | None = None,
    ) -> "Run":
        """A new run, or the unfinished or finished one with the id `resume` if it is still there.

        It is shown below the run with the id `parent`.
        """
        client = _client()
        with _explained("starting an MLflow run"):
            if resume:
                try:
                    client.update_run(resume, status="RUNNING")
                    return cls(resume)
                except MlflowException:
                    log.warning(f"MLflow run {resume} is gone: starting a new one")
            found = client.get_experiment_by_name(experiment)
            experiment_id = found.experiment_id if found else _create_experiment(client, experiment)
            tags = {"mlflow.parentRunId": parent} if parent else {}
            run = client.create_run(experiment_id, run_name=name, tags=tags)
            # A batch takes at most 100 parameters, each at most 6,000 characters.
            entries = [Param(key, str(value)[:500]) for key, value in flatten(params).items()]
            for start in range(0, len(entries), 100):
                client.log_batch(run.info.run_id, params=entries[start : start + 100])
        return cls(run.info.run_id)

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Finite numbers only; NaN means not measured and is left out. They are sent by a thread, in batches.

        While the server is away up to a hundred thousand numbers wait for it, and nobody waits for them.
        """
        now = int(time.time() * 1000)
        self._outbox += [Metric(key, float(v), now, step) for key, v in values.items() if math.isfinite(float(v))]
        while len(self._outbox) > _OUTBOX:
            self._outbox.popleft()
        if self._sender is None or not self._sender.is_alive():
            self._sender = threading.Thread(target=self._send, daemon=True, name="mlflow")
            self._sender.start()

    def _send(self) -> None:
        """What waits, until nothing waits or the server cannot be written to; the next number tries again."""
        if time.monotonic() < self._not_before:
            return
        while self._outbox:
            entries = [self._outbox.popleft() for _ in range(min(len(self._outbox), _METRICS_A_CALL))]
            if not self._try(lambda entries=entries: self._client.log_batch(self.run_id, metrics=entries)):
                self._outbox.extendleft(reversed(entries))
                self._not_before = time.monotonic() + _PAUSE_S
                return

    def flush(self) -> None:
        """Send what waits, as far as the server takes it."""
        if self._sender is not None:
            self._sender.join()
        self._not_before = 0.0
        self._send()
        if self._outbox:
            log.warning(f"MLflow is away: {len(self._outbox)} numbers of run {self.run_id} are lost")
            self._outbox.clear()

    def tags(self, values: Mapping[str, str]) -> None:
        self._try(lambda: self._client.log_batch(self.run_id, tags=[RunTag(k, str(v)) for k, v in values.items()]))

    def status(self, status: str) -> None:
        """RUNNING, SCHEDULED …; for those that end a run see `end`."""
        self._try(lambda: self._client.update_run(self.run_id, status))

    def file(self, path: Path, folder: str = "") -> None:
        self._try(lambda: self._client.log_artifact(self.run_id, str(path), folder or None))

    def bundle(self, folder: Path) -> None:
        with _explained("storing the bundle"):
            self._client.log_artifacts(self.run_id, str(folder), BUNDLE_FOLDER)

    def register(self, name: str, tags: Mapping[str, str], alias: str | None = CANDIDATE) -> int:
        """The run's bundle as a new version of the model `name` -> its number; `alias` points to it."""
        with _explained(f"registering {name}"):
            if not self._client.search_registered_models(filter_string=f"name='{name}'"):
                self._client.create_registered_model(name)
            source = f"{self._client.get_run(self.run_id).info.artifact_uri}/{BUNDLE_FOLDER}"
            version = self._client.create_model_version(name, source, run_id=self.run_id, tags=dict(tags))
            if alias:
                self._client.set_registered_model_alias(name, alias, version.version)
        return int(version.version)

    def end(self, status: str = "FINISHED") -> None:
        self.flush()
        self._try(lambda: self._client.set_terminated(self.run_id, status))

    @property
    def url(self) -> str:
        uri = shown(tracking_uri())
        if not uri.startswith("http"):
            return f"run {self.run_id} in {uri}"
        experiment_id = self._client.get_run(self.run_id).info.experiment_id
        return f"{uri}/#/experiments/{experiment_id}/runs/{self.run_id}"

    def _try(self, call: Callable[[], Any]) -> bool:
        try:
            call()
        except (MlflowException, OSError) as error:
            if not self._quiet:
                log.warning(f"MLflow cannot be written to, going on without: {shown(str(error).splitlines()[0][:200])}")
            self._quiet = True
            return False
        self._quiet = False
        return True


@contextmanager
def system_metrics(run_id: str) -> Iterator[None]:
    """MLflow's own record of processors, memory, disk, network and GPUs of this machine, while the block runs."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    logging.getLogger("mlflow.system_metrics").setLevel(logging.WARNING)  # a line of its own would cut a progress bar
    monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=tracking_uri())
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


def _create_experiment(client: MlflowClient, name: str) -> str:
    uri = tracking_uri()
    if uri.startswith("sqlite:///"):  # else MLflow would put artefacts below whatever folder it runs in
        place = Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlruns"
        return client.create_experiment(name, artifact_location=place.as_uri())
    return client.create_experiment(name)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"model": {"latent": 16}}` -> `{"model.latent": 16}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


@dataclass(frozen=True)
class FetchedBundle:
    """A bundle on this machine, and the registered version it is, if it came from MLflow."""

    folder: Path
    name: str | None = None
    version: int | None = None


@dataclass(frozen=True)
class Version:
    """A registered version. `source` is where its files are: unlike the number, no other server has the same.

    `digest` is what it was registered with, None where that was not by `Run.register`.
    """

    name: str
    number: int
    source: str
    digest: str | None = None


def parse_model(model: str) -> tuple[str, str | None, int | None]:
    """`models:/NAME@alias` or `models:/NAME/3` -> (name, alias or None, number or None); raises LsemvaeError."""
    reference = model.removeprefix("models:/")
    name, _, alias = reference.rpartition("@")
    if name and alias:
        return name, alias, None
    name, _, number = reference.partition("/")
    if not name or not number.isdecimal():
        raise LsemvaeError(f"{model!r} is no model: write models:/NAME@alias or models:/NAME/VERSION")
    return name, None, int(number)


def locate(model: str) -> Version:
    """The version that `models:/NAME@alias` or `models:/NAME/3` is now; raises LsemvaeError naming what is absent."""
    name, alias, number = parse_model(model)
    client = _client()
    try:
        found = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, str(number))
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            with _explained(f"looking up {model}"):
                raise
        if alias:
            raise LsemvaeError(
                f"{shown(tracking_uri())} has no model {name!r} with alias {alias!r}: fine-tune it, then "
                f"`python workflows/promote.py --name {name}`, or set the alias in the MLflow UI"
            ) from None
        raise LsemvaeError(f"{shown(tracking_uri())} has no version {number} of model {name!r}") from None
    return Version(name, int(found.version), found.source, found.tags.get("digest"))


def resolve(model: str) -> tuple[str, int]:
    """`models:/NAME@alias` or `models:/NAME/3` -> (name, version); raises LsemvaeError naming what is absent."""
    version = locate(model)
    return version.name, version.number


def download(version: Version, folder: Path) -> Path:
    """The version's bundle, in `folder`.

    Raises BundleError, before anything is fetched, when the version is not exactly the two files of a bundle: what
    else is there, pickles for one, is never on this machine. And when its digest is not what was registered.
    """
    from lsemvae.bundle import CONFIG, WEIGHTS, describe  # torch, which promoting needs not

    what = f"models:/{version.name}/{version.number}"
    with _explained(f"fetching {what}"):
        source = _client().get_model_version_download_uri(version.name, str(version.number))
        files = {item.path.rsplit("/", 1)[-1] for item in list_artifacts(source, tracking_uri=tracking_uri())}
        if files != {CONFIG, WEIGHTS}:
            raise BundleError(
                f"{what} is no bundle: it holds {', '.join(sorted(files)[:10]) or 'nothing'}, must hold {CONFIG} and "
                f"{WEIGHTS} and nothing else"
            )
        folder.mkdir(parents=True, exist_ok=True)
        for name in (CONFIG, WEIGHTS):
            download_artifacts(f"{source}/{name}", dst_path=str(folder), tracking_uri=tracking_uri())
    digest = describe(folder).digest
    if version.digest not in (None, digest):
        raise BundleError(f"{what} has digest {digest}, was registered with {version.digest}: its {CONFIG} was altered")
    return folder


def fetch(model: str, folder: Path | None = None) -> FetchedBundle:
    """A bundle from `models:/NAME@alias`, `models:/NAME/3`, a folder or an s3:// URI; downloaded if need be.

    `folder` is where to download to (by default a temporary folder). Raises LsemvaeError when it is not there.
    """
    if not model.startswith("models:/"):
        storage = Storage.open(model).require()
        if storage.is_local:
            return FetchedBundle(Path(storage.base))
        target = folder or Path(tempfile.mkdtemp(prefix="lsemvae-"))
        for path in storage.list():
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            (target / path).write_bytes(storage.read_bytes(path))
        return FetchedBundle(target)
    version = locate(model)
    return FetchedBundle(
        download(version, folder or Path(tempfile.mkdtemp(prefix="lsemvae-"))), version.name, version.number
    )


def promote(name: str, source: str = CANDIDATE, target: str = CHAMPION) -> tuple[int, int | None]:
    """Points `target` at the version that `source` (an alias or a number) names -> (version, the one before)."""
    reference = f"models:/{name}/{source}" if source.isdigit() else f"models:/{name}@{source}"
    _, version = resolve(reference)
    try:
        before: int | None = resolve(f"models:/{name}@{target}")[1]
    except LsemvaeError:
        before = None
    with _explained(f"promoting {name}"):
        _client().set_registered_model_alias(name, target, str(version))
    return version, before
