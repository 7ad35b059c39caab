"""MLflow: runs, metrics, pictures, bundles as model versions, aliases. No other file imports it.

A model version is the bundle's two files and those that make it an MLflow model (see `mlmodel`), stored as an artefact
of the run; nothing is pickled. Training continues when the tracking server is down: it warns once and drops what it
cannot log. Registering and promoting raise an error.

Functions import mlflow when they run, not this module: the import reads MLFLOW_DISABLE_TELEMETRY, which a command sets
first.
"""

import hashlib
import json
import logging
import math
import os
import re
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from lsemvae.errors import BundleError, LsemvaeError
from lsemvae.storage import Storage
from lsemvae.temporary import temporary_folder

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    from lsemvae.data.shards import ShardedDataset

log = logging.getLogger(__name__)

CANDIDATE, CHAMPION = "candidate", "champion"
BUNDLE_FOLDER = "bundle"

_PLACE = "lsemvae.place"  # the tag that holds the digest of the folder that belongs to a run
# The codes of what MLflow does not have. It answers the second of a run that was deleted.
_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
_EXISTS = "RESOURCE_ALREADY_EXISTS"
_DESCRIPTION = 5000  # characters that MLflow's database holds of a version's description
_METRICS_A_CALL = 1000  # MLflow accepts no more in one request
_OUTBOX = 100_000  # metrics that wait at most
_PAUSE_S = 10.0  # before the next attempt after a failure

# By default MLflow retries for minutes; a user should learn sooner that the server does not answer.
_SHORT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}
_TRANSFER_TIMEOUT_S = 600
_TRANSFER_RETRIES = 5
_DOWNLOADS = 3  # attempts: MLflow does not repeat a download whose connection breaks in mid-file


def tracking_uri() -> str:
    """`MLFLOW_TRACKING_URI`, or a SQLite file in the current folder where it is not set."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


def shown(text: str) -> str:
    """The text without the user and password of any URL in it: for messages and logs."""
    return re.sub(r"//[^/@\s]*@", "//", text)


def _client() -> "MlflowClient":
    from mlflow import MlflowClient

    for name, value in _SHORT.items():
        os.environ.setdefault(name, value)
    return MlflowClient(tracking_uri=tracking_uri(), registry_uri=tracking_uri())


@contextmanager
def _explained(what: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise LsemvaeError(shown(f"{what} failed at {tracking_uri()}: {str(error).splitlines()[0][:200]}")) from error


class _Transfers:
    """While a file travels to or from MLflow, its requests have long timeouts and more retries.

    The server answers an upload after it has written the whole file to its own store, and a download after it has read
    it from there: minutes for a gigabyte. MLflow reads both settings from the environment at each request, so other
    threads have them too meanwhile. `MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT`, in seconds, replaces the timeout.
    """

    def __init__(self) -> None:
        self._lock, self._running = threading.Lock(), 0
        self._before: dict[str, str | None] = {}

    def __enter__(self) -> None:
        with self._lock:
            self._running += 1
            if self._running == 1:
                timeout = os.environ.get("MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT") or max(
                    _TRANSFER_TIMEOUT_S, int(os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT", 0))
                )
                retries = max(_TRANSFER_RETRIES, int(os.environ.get("MLFLOW_HTTP_REQUEST_MAX_RETRIES", 0)))
                long = {"MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries)}
                self._before = {name: os.environ.get(name) for name in long}
                os.environ.update(long)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._running -= 1
            if self._running == 0:
                for name, value in self._before.items():
                    if value is None:
                        os.environ.pop(name, None)
                    else:
                        os.environ[name] = value


_transfers = _Transfers()


class Run:
    """One MLflow run. One process writes to it at a time; another process can continue it by its id."""

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
        place: str | None = None,
    ) -> "Run":
        """Start a new run, or reopen the run with the id `resume` if it still exists.

        `parent` is the id of the run below which MLflow shows this one. `place` is the URI of the folder that belongs
        to this run alone: empty runs of that place, whose ids did not arrive when they were made, are deleted. Raises
        LsemvaeError where MLflow does not answer, or fails: only a run that is gone is replaced by a new one.
        """
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        client = _client()
        with _explained("starting an MLflow run"):
            if resume:
                try:
                    client.update_run(resume, status="RUNNING")
                    return cls(resume)
                except MlflowException as error:
                    if error.error_code not in _ABSENT:
                        raise
                    log.warning(f"MLflow run {resume} is gone: starting a new one")
            experiment_id = _experiment(client, experiment)
            tags = {"mlflow.parentRunId": parent} if parent else {}
            tags |= {_PLACE: _place_digest(place)} if place else {}
            run = client.create_run(experiment_id, run_name=name, tags=tags)
            if place:
                _delete_empty_runs(client, experiment_id, place, run.info.run_id)
            # A batch takes at most 100 parameters, each at most 6,000 characters.
            entries = [Param(key, str(value)[:500]) for key, value in flatten(params).items()]
            for start in range(0, len(entries), 100):
                client.log_batch(run.info.run_id, params=entries[start : start + 100])
        return cls(run.info.run_id)

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Queue the finite values; NaN means not measured and is skipped. A thread sends them in batches.

        The caller never waits. While the server is down, up to 100,000 values stay in the queue.
        """
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._outbox += [Metric(key, float(v), now, step) for key, v in values.items() if math.isfinite(float(v))]
        while len(self._outbox) > _OUTBOX:
            self._outbox.popleft()
        if self._sender is None or not self._sender.is_alive():
            self._sender = threading.Thread(target=self._send, daemon=True, name="mlflow")
            self._sender.start()

    def _send(self) -> None:
        """Send the queue until it is empty or a request fails; the next value to be queued tries again."""
        if time.monotonic() < self._not_before:
            return
        while self._outbox:
            entries = [self._outbox.popleft() for _ in range(min(len(self._outbox), _METRICS_A_CALL))]
            if not self._try(partial(self._client.log_batch, self.run_id, metrics=entries)):
                self._outbox.extendleft(reversed(entries))
                self._not_before = time.monotonic() + _PAUSE_S
                return

    def flush(self) -> None:
        """Send the queue now, and drop what the server does not accept."""
        if self._sender is not None:
            self._sender.join()
        self._not_before = 0.0
        self._send()
        if self._outbox:
            log.warning(f"MLflow does not answer: {len(self._outbox)} metric values of run {self.run_id} are lost")
            self._outbox.clear()

    def tags(self, values: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self._try(lambda: self._client.log_batch(self.run_id, tags=[RunTag(k, str(v)) for k, v in values.items()]))

    def status(self, status: str) -> None:
        """Set RUNNING or SCHEDULED; `end` sets a final status."""
        self._try(lambda: self._client.update_run(self.run_id, status))

    def reads(self, data: "ShardedDataset", context: str = "training") -> None:
        """Note a data set as an input of the run: MLflow's page shows its place, digest, columns and counts."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        schema = [{"name": name, "type": kind, "required": True} for name, kind in data.columns.items()]
        manifest = data.manifest
        profile = {"records": manifest.records, "subjects": manifest.subjects, "labels": manifest.labels}
        dataset = Dataset(
            name=data.storage.base.rstrip("/").rsplit("/", 1)[-1],
            digest=manifest.digest,
            source_type="local" if data.storage.is_local else "s3",
            source=json.dumps({"uri": data.storage.uri}),
            schema=json.dumps({"mlflow_colspec": schema}),
            profile=json.dumps(profile | data.since_ingest),
        )
        entry = DatasetInput(dataset, [InputTag("mlflow.data.context", context)])
        self._try(lambda: self._client.log_inputs(self.run_id, [entry]))

    def table(self, name: str, columns: Mapping[str, Sequence[Any]]) -> None:
        """Store a table, such as `results.json`, that MLflow's page shows beside those of other runs.

        It replaces the table of that name that an interrupted command may have stored.
        """
        self._try(partial(self._table, name, columns))

    def _table(self, name: str, columns: Mapping[str, Sequence[Any]]) -> None:
        from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

        # In the form of MLflow's own `log_table`, which adds rows to a table that is there. NaN is no JSON.
        rows = [[None if value != value else value for value in row] for row in zip(*columns.values(), strict=True)]
        self._client.log_dict(self.run_id, {"columns": list(columns), "data": rows}, name)
        known = json.loads(self._client.get_run(self.run_id).data.tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]"))
        entry = {"path": name, "type": "table"}
        if entry not in known:
            self._client.set_tag(self.run_id, MLFLOW_LOGGED_ARTIFACTS, json.dumps([*known, entry]))

    def file(self, path: Path, folder: str = "") -> None:
        """Store a small file, such as a picture. Training waits for it, so it does not wait as long as `bundle`."""
        self._try(lambda: self._client.log_artifact(self.run_id, str(path), folder or None))

    def bundle(self, folder: Path) -> None:
        """Store the bundle and the files that make it an MLflow model. Raises BundleError where there is no bundle."""
        from lsemvae.bundle import CONFIG, WEIGHTS, describe  # imports torch, which promotion does not need
        from lsemvae.mlmodel import write_model

        bundle = describe(folder)
        with tempfile.TemporaryDirectory() as name, _explained("storing the bundle"), _transfers:
            write_model(bundle, Path(name))
            for path in (folder / CONFIG, folder / WEIGHTS, *sorted(Path(name).iterdir())):
                self._client.log_artifact(self.run_id, str(path), BUNDLE_FOLDER)

    def register(
        self,
        name: str,
        tags: Mapping[str, str],
        alias: str | None = CANDIDATE,
        description: str | None = None,
        *,
        encoder: Mapping[str, str] | None = None,
    ) -> int:
        """Register the run's bundle as a new version of the model `name`, with `alias` -> the version's number.

        `description` is Markdown, such as the model card; of a longer one MLflow gets the first 5,000 characters.
        `encoder` are URI and digest of the encoder that the model was made from: the version and the run link to it. A
        bundle of this run that is registered already, by its `digest` in the tags, is not registered again.
        """
        with _explained(f"registering {name}"):
            _require_model(self._client, name)
            source = f"{self._client.get_run(self.run_id).info.artifact_uri}/{BUNDLE_FOLDER}"
            made_from = ""
            if encoder:
                found = self._versions_with(encoder["digest"]) or [shown(encoder["uri"])]
                made_from = f"Encoder: {', '.join(map(_as_link, found))}, digest {encoder['digest']}"
                tags = {**tags, "encoder": found[0], "encoder_digest": encoder["digest"]}
                self._client.set_tag(self.run_id, "mlflow.note.content", made_from)
            text = "\n\n".join(filter(None, (made_from, description))) or None
            number = self._registered(name, tags.get("digest"))
            if number is None:
                made = self._client.create_model_version(
                    name, source, run_id=self.run_id, tags=dict(tags), description=_fitting(text)
                )
                # The lowest: the client repeats a request whose answer is lost, and each makes a version.
                number = self._registered(name, tags.get("digest")) or int(made.version)
            if alias:
                self._client.set_registered_model_alias(name, alias, str(number))
        return number

    def _registered(self, name: str, digest: str | None) -> int | None:
        """The number of this run's version of the model with this digest: an earlier command may have made it."""
        if digest is None:
            return None
        found = self._client.search_model_versions(f"name = '{name}' and run_id = '{self.run_id}'", max_results=1000)
        numbers = sorted(int(version.version) for version in found if version.tags.get("digest") == digest)
        for extra in numbers[1:]:
            self._client.delete_model_version(name, str(extra))
        return numbers[0] if numbers else None

    def _versions_with(self, digest: str) -> list[str]:
        """The registered versions of a bundle, as `models:/NAME/3`. An alias in a URI moves; the digest does not."""
        found = self._client.search_model_versions(f"tags.digest = '{digest}'", max_results=100)
        return [f"models:/{version.name}/{version.version}" for version in found]

    def end(self, status: str = "FINISHED") -> None:
        self.flush()
        self._try(lambda: self._client.set_terminated(self.run_id, status))

    @property
    def url(self) -> str:
        """The address of the run's page, or the run's id and the server where there is no page or no answer."""
        from mlflow.exceptions import MlflowException

        uri = shown(tracking_uri())
        if uri.startswith("http"):
            with suppress(MlflowException):
                experiment_id = self._client.get_run(self.run_id).info.experiment_id
                return f"{uri}/#/experiments/{experiment_id}/runs/{self.run_id}"
        return f"run {self.run_id} in {uri}"

    def _try(self, call: Callable[[], Any]) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            call()
        except (MlflowException, OSError) as error:
            if not self._quiet:
                log.warning(f"cannot write to MLflow, continuing without it: {shown(str(error).splitlines()[0][:200])}")
            self._quiet = True
            return False
        self._quiet = False
        return True


@contextmanager
def system_metrics(run_id: str) -> Iterator[None]:
    """Log this machine's CPU, memory, disk, network and GPU use to the run, with MLflow's own monitor."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    logging.getLogger("mlflow.system_metrics").setLevel(logging.WARNING)  # its lines would break up a progress bar
    monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=tracking_uri())
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


def _as_link(uri: str) -> str:
    """A version as a link to its page, in Markdown; any other URI as it is."""
    if not uri.startswith("models:/"):
        return uri
    name, _, number = parse_model(uri)
    return f"[{uri}](#/models/{quote(name)}/versions/{number})" if number else uri


def _fitting(description: str | None) -> str | None:
    """The description, cut after a line where it is too long for MLflow's database."""
    if description is None or len(description) <= _DESCRIPTION:
        return description
    note = "\n\n… The rest is in `config.json` of the bundle: `provenance.model_card`.\n"
    return description[: _DESCRIPTION - len(note)].rpartition("\n")[0] + note


def _experiment(client: "MlflowClient", name: str) -> str:
    """The id of the experiment of this name, which is made if there is none."""
    from mlflow.exceptions import MlflowException

    if found := client.get_experiment_by_name(name):
        return found.experiment_id
    uri, where = tracking_uri(), None
    if uri.startswith("sqlite:///"):  # by default MLflow would put artefacts below its current folder
        where = (Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlruns").as_uri()
    try:
        return client.create_experiment(name, artifact_location=where)
    except MlflowException as error:
        found = client.get_experiment_by_name(name) if error.error_code == _EXISTS else None
        if found is None:
            raise
        return found.experiment_id  # another command has made it meanwhile, or the first answer was lost


def _require_model(client: "MlflowClient", name: str) -> None:
    """Make the registered model if there is none."""
    from mlflow.exceptions import MlflowException

    if client.search_registered_models(filter_string=f"name='{name}'"):
        return
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != _EXISTS:
            raise


def _place_digest(place: str) -> str:
    return hashlib.sha256(place.encode()).hexdigest()[:16]


def _delete_empty_runs(client: "MlflowClient", experiment_id: str, place: str, but: str) -> None:
    """Delete runs of this place that hold nothing: MLflow's client repeats a request whose answer is lost."""
    wanted = f"tags.`{_PLACE}` = '{_place_digest(place)}' and attributes.status = 'RUNNING'"
    for run in client.search_runs([experiment_id], wanted):
        if run.info.run_id != but and not run.data.metrics and not run.data.params:
            client.delete_run(run.info.run_id)


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
    """A bundle's folder on this machine, with the registered name and version if it came from MLflow."""

    folder: Path
    name: str | None = None
    version: int | None = None


@dataclass(frozen=True)
class Version:
    """A registered version.

    `source` is the address of its files; it is unique across MLflow servers, which the number is not. `digest` is the
    bundle's digest at registration, or None if something other than `Run.register` registered it.
    """

    name: str
    number: int
    source: str
    digest: str | None = None


class NoSuchVersion(LsemvaeError):
    """MLflow answers, and has no such model, version or alias."""


def parse_model(model: str) -> tuple[str, str | None, int | None]:
    """`models:/NAME@alias` or `models:/NAME/3` -> (name, alias or None, number or None); raises LsemvaeError."""
    reference = model.removeprefix("models:/")
    name, _, alias = reference.rpartition("@")
    if name and alias:
        return name, alias, None
    name, _, number = reference.partition("/")
    if not name or not number.isdecimal():
        raise LsemvaeError(f"{model!r} does not name a model: write models:/NAME@alias or models:/NAME/VERSION")
    return name, None, int(number)


def locate(model: str) -> Version:
    """Look up `models:/NAME@alias` or `models:/NAME/3`; raises LsemvaeError that names what does not exist."""
    from mlflow.exceptions import MlflowException

    name, alias, number = parse_model(model)
    client = _client()
    try:
        found = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, str(number))
    except MlflowException as error:
        if error.error_code not in _ABSENT:
            with _explained(f"looking up {model}"):
                raise
        if alias:
            raise NoSuchVersion(
                f"{shown(tracking_uri())} has no model {name!r} with alias {alias!r}: fine-tune it, then "
                f"`python workflows/promote.py --name {name}`, or set the alias in the MLflow UI"
            ) from None
        raise NoSuchVersion(f"{shown(tracking_uri())} has no version {number} of model {name!r}") from None
    return Version(name, int(found.version), found.source or "", found.tags.get("digest"))


def resolve(model: str) -> tuple[str, int]:
    """`models:/NAME@alias` or `models:/NAME/3` -> (name, version); raises LsemvaeError like `locate`."""
    version = locate(model)
    return version.name, version.number


def download(version: Version, folder: Path) -> Path:
    """Download the version's bundle, two files and no other, into `folder`; where that fails, neither is left.

    Raises BundleError before it downloads anything if the version holds something that no version of this project
    does, such as a pickle; and after the download if the digest is not the registered one.
    """
    from mlflow.artifacts import list_artifacts

    from lsemvae.bundle import CONFIG, WEIGHTS, describe  # imports torch, which promotion does not need
    from lsemvae.mlmodel import FILES

    what = f"models:/{version.name}/{version.number}"
    with _explained(f"fetching {what}"):
        source = _client().get_model_version_download_uri(version.name, str(version.number))
        files = {item.path.rsplit("/", 1)[-1] for item in list_artifacts(source, tracking_uri=tracking_uri())}
        if not {CONFIG, WEIGHTS} <= files <= FILES:
            raise BundleError(
                f"{what} is no bundle: it holds {', '.join(sorted(files)[:10]) or 'nothing'}, must hold {CONFIG} and "
                f"{WEIGHTS}, and beside them only the files of an MLflow model from code"
            )
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _explained(f"fetching {what}"), _transfers:
            for name in (CONFIG, WEIGHTS):
                _download_file(f"{source}/{name}", folder)
        digest = describe(folder).digest
        if version.digest not in (None, digest):
            raise BundleError(
                f"{what} has digest {digest} but was registered with {version.digest}: its {CONFIG} was altered"
            )
    except BaseException:
        _remove(folder)
        raise
    return folder


def _download_file(uri: str, folder: Path) -> None:
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    for attempt in range(1, _DOWNLOADS + 1):
        try:
            download_artifacts(uri, dst_path=str(folder), tracking_uri=tracking_uri())
            return
        except (MlflowException, OSError) as error:
            if attempt == _DOWNLOADS:
                raise
            log.warning(f"{shown(uri)}: {shown(str(error).splitlines()[0][:200])}; trying again")
            time.sleep(attempt)


def _remove(folder: Path) -> None:
    """The bundle's files, and the folder if nothing else is in it."""
    from lsemvae.bundle import CONFIG, WEIGHTS

    for name in (CONFIG, WEIGHTS):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def fetch(model: str, folder: Path) -> FetchedBundle:
    """Make the bundle `models:/NAME@alias`, `models:/NAME/3` or `s3://…` available as a folder on this machine.

    A local folder is used where it is; of everything else the bundle's two files are downloaded into `folder`, about 1
    GB at full size, which the caller removes (see `fetched`). Raises LsemvaeError if the bundle does not exist; then it
    leaves nothing in `folder`.
    """
    if model.startswith("models:/"):
        version = locate(model)
        return FetchedBundle(download(version, folder), version.name, version.number)
    from lsemvae.bundle import CONFIG, WEIGHTS

    storage = Storage.open(model).require()
    if storage.is_local:
        return FetchedBundle(Path(storage.base))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for name in (CONFIG, WEIGHTS):
            if not storage.exists(name):
                raise BundleError(f"{storage.uri} is no bundle: it has no {name}")
            with storage.reading(name) as source, (folder / name).open("wb") as target:
                shutil.copyfileobj(source, target, 2**20)
    except BaseException:
        _remove(folder)
        raise
    return FetchedBundle(folder)


@contextmanager
def fetched(model: str, within: Path | None = None) -> Iterator[FetchedBundle]:
    """`fetch`, into a temporary folder, in the folder `within` if it is given, that is gone after the block."""
    with temporary_folder(within) as folder:
        yield fetch(model, folder / "bundle")


def promote(name: str, source: str = CANDIDATE, target: str = CHAMPION) -> tuple[int, int | None]:
    """Point the alias `target` at the version `source` (an alias or a number) -> (version, previous version)."""
    reference = f"models:/{name}/{source}" if source.isdigit() else f"models:/{name}@{source}"
    _, version = resolve(reference)
    try:
        before: int | None = resolve(f"models:/{name}@{target}")[1]
    except NoSuchVersion:
        before = None
    with _explained(f"promoting {name}"):
        _client().set_registered_model_alias(name, target, str(version))
    return version, before


def made_from(data_digests: Iterable[str], bundle_digests: Iterable[str]) -> tuple[list[str], list[str]]:
    """Ids of the runs that read one of these data sets, and `models:/NAME/3` for their versions and these bundles'."""
    client, versions = _client(), dict[str, None]()
    with _explained("looking for runs"):
        experiments = [one.experiment_id for one in _all_pages(client.search_experiments)]
        read = [f"{name} = '{digest}'" for digest in data_digests for name in ("dataset.digest", "tags.data_digest")]
        runs = dict.fromkeys(
            run.info.run_id
            for condition in read
            for run in _all_pages(partial(client.search_runs, experiments, condition))
        )
        of_runs, of_bundles = (
            (f"run_id = '{run}'" for run in runs),
            (f"tags.digest = '{one}'" for one in bundle_digests),
        )
        for condition in (*of_runs, *of_bundles):
            for version in _all_pages(partial(client.search_model_versions, condition)):
                versions[f"models:/{version.name}/{version.version}"] = None
    return list(runs), list(versions)


def _all_pages(search: Callable[..., Any]) -> Iterator[Any]:
    """Everything that a search of MLflow's client finds."""
    token = None
    while True:
        page = search(page_token=token)
        yield from page
        if not (token := page.token):
            return
