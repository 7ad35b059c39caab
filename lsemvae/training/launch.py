"""What a command needs to start a pre-training run on Ray Train: its feeds, its job, its trainer and its resources."""

import contextlib
import hashlib
import json
import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lsemvae import __version__
from lsemvae.bundle import load
from lsemvae.cohorts.withdrawn import NOBODY, Withdrawn
from lsemvae.config import PretrainRecipe
from lsemvae.data.feed import Feed, require_different
from lsemvae.data.shards import ShardedDataset
from lsemvae.errors import LsemvaeError
from lsemvae.fields import as_json
from lsemvae.models import Embeds, Pretrains, architecture_name, build
from lsemvae.storage import Storage
from lsemvae.tracking import Run, fetched
from lsemvae.training.checkpoints import BUNDLE
from lsemvae.training.failures import end_at_once
from lsemvae.training.pretrain import PretrainJob, pretrain_worker
from lsemvae.training.reported import require_checkpoints

if TYPE_CHECKING:
    import ray.train
    from ray.train.torch import TorchTrainer

log = logging.getLogger(__name__)

SETTLE_S = 60.0
"""If an autoscaling cluster gains no machine for this long, no more are expected."""


def parse_workers(text: str) -> tuple[int, int]:
    """`"4"` -> (4, 4), `"2-8"` -> (2, 8)."""
    fewest, _, most = text.partition("-")
    try:
        found = int(fewest), int(most or fewest)
    except ValueError:
        found = (0, 0)
    if not 1 <= found[0] <= found[1]:
        raise LsemvaeError(f"num_workers is {text!r}: give a number such as 4, or a range such as 2-8")
    return found


class Source(NamedTuple):
    """A data set to pre-train on, and how often its records come in an epoch."""

    data: ShardedDataset
    repeats: int = 1


def open_sources(words: Sequence[str], exclude: Sequence[str] = ()) -> list[Source]:
    """`["s3://b/mimic", "own:12"]` -> the data sets, the second with each of its records twelve times an epoch.

    Recordings of subjects who are in a data set of `exclude` are left out: a labelled cohort on which the encoder is to
    be tested. Raises LsemvaeError where there is no data set, one is named twice, the repeats are below 1, or an
    excluded data set has no subject.
    """
    found = []
    for word in words:
        match = re.fullmatch(r"(.+):(\d+)", word)
        if match and re.search(r"[?&]endpoint=\w+://[^:/&]+$", match[1]):  # the number is the endpoint's port
            match = None
        uri, repeats = (match[1], int(match[2])) if match else (word, 1)
        found.append(Source(ShardedDataset.open(uri), repeats))
    require_different(found)
    if not exclude:
        return found
    subjects = _subjects(exclude)
    return [source._replace(data=source.data.without(subjects)) for source in found]


def _subjects(uris: Sequence[str]) -> Withdrawn:
    """The subjects of these data sets. Raises LsemvaeError where one has none."""
    found = NOBODY
    for uri in uris:
        subjects = {str(subject) for subject in ShardedDataset.open(uri).read(["subject_id"])["subject_id"].to_pylist()}
        if not subjects - {"", "None"}:
            raise LsemvaeError(f"--exclude {uri} has no subject: name shards whose recordings have a subject_id")
        found |= Withdrawn.of(subjects)
    return found


def data_digest(sources: Sequence[Source]) -> str:
    """The digest of one data set; of several, one of their digests and repeats."""
    if len(sources) == 1 and sources[0].repeats == 1:
        return sources[0].data.manifest.digest
    text = json.dumps([(source.data.manifest.digest, source.repeats) for source in sources])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def data_uri(sources: Sequence[Source]) -> str:
    """The sources as a command names them."""
    return " ".join(s.data.storage.uri + (f":{s.repeats}" if s.repeats > 1 else "") for s in sources)


class Feeds(NamedTuple):
    """What a run reads. `val` is None where nothing is held out."""

    train: Feed
    val: Feed | None


def make_feeds(
    sources: Sequence[Source],
    recipe: PretrainRecipe,
    everything: bool = False,
    cache: str | None = None,
    packed: bool = False,
) -> Feeds:
    """The feeds of a recipe; with `everything`, all recordings are training data and nothing is held out.

    Held-out records come once, whatever the repeats of their data set. Raises LsemvaeError where the data sets are too
    small for the recipe.
    """
    settings: dict[str, Any] = {
        "on_device": recipe.preprocess_on == "device",
        "cache": cache,
        "packed": packed,
        "batch_size": recipe.optim.batch_size,
        "streams": recipe.streams,
        "buffer": recipe.shuffle_buffer,
        "seed": recipe.optim.seed,
    }
    split, named = "all" if everything else "train", data_uri(sources)
    manifests = [source.data.manifest for source in sources]
    if not everything and not any(m.rows_in("train") for m in manifests) and all(m.subjects == 1 for m in manifests):
        raise LsemvaeError(
            f"{named} has recordings of one subject, who is held out: ingest others too, or give --all to train "
            "without validation"
        )
    _require_rows(sources, split, recipe.optim.batch_size)
    train = Feed.of_several(sources, split, recipe.leads, recipe.preprocess, **settings)
    if everything:
        return Feeds(train, None)
    once = [Source(source.data) for source in sources]
    if not any(m.rows_in("val") for m in manifests):
        raise LsemvaeError(
            f"{named} holds out no subject to validate on: ingest again with --val-share, with recordings of two "
            "subjects at least, or give --all to train without validation"
        )
    _require_rows(once, "val", recipe.streams)
    held_out = Feed.of_several(once, "val", recipe.leads, recipe.preprocess, **settings, shuffle=False)
    return Feeds(train, held_out)


def _require_rows(sources: Sequence[Source], split: str, at_least: int) -> None:
    rows = sum(source.data.manifest.rows_in(split) * source.repeats for source in sources)
    if rows < at_least:
        raise LsemvaeError(f"{data_uri(sources)} has {rows} recordings in {split!r}: {at_least} are needed")


def make_job(sources: Sequence[Source], recipe: PretrainRecipe, feeds: Feeds, run_id: str | None) -> PretrainJob:
    """What the workers are told, with the provenance of the bundle to come.

    Raises LsemvaeError where the recipe's model does not learn from recordings without labels.
    """
    with torch.device("meta"):
        model = build(recipe.model, recipe.leads)
    if not isinstance(model, Pretrains):
        why = "has learned elsewhere" if isinstance(model, Embeds) else "learns from labels alone"
        raise LsemvaeError(f"{architecture_name(recipe.model)} {why}: it cannot be pre-trained")
    changed = {source.data.storage.uri: found for source in sources if (found := source.data.since_ingest)}
    provenance = {
        "recipe": as_json(recipe),
        "data": {
            "uri": data_uri(sources),
            "digest": data_digest(sources),
            "rows": {split: feed.order.records for split, feed in feeds._asdict().items() if feed},
            **({"since_ingest": changed} if changed else {}),
        },
        "mlflow_run": run_id,
        "lsemvae": __version__,
    }
    return PretrainJob(recipe, feeds.train, feeds.val, run_id, provenance, terminal=sys.stderr.isatty())


def train(trainer: "TorchTrainer", require: Callable[[], None] = lambda: None) -> None:
    """Trains to the end, in a thread of its own. Each second it calls `require`, whose error ends the training.

    In the main thread Ray Train would take Ctrl-C over: the command would end with status 1, without a word.
    """
    raised: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=fit, daemon=True, name="fit")
    thread.start()
    while thread.is_alive():
        thread.join(1.0)
        require()
    if raised:
        raise raised[0]


def make_trainer(
    job: PretrainJob,
    storage: Storage,
    name: str,
    workers: tuple[int, int],
    use_gpu: bool,
    max_failures: int,
    callbacks: "list[ray.train.UserCallback] | None" = None,
) -> "TorchTrainer":
    """The trainer of the run `name` in the storage. Its `fit` resumes from the newest checkpoint that is there.

    Raises LsemvaeError where checkpoints of the run are gone.
    """
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    require_checkpoints(storage / name)
    return TorchTrainer(
        pretrain_worker,
        train_loop_config={"job": replace(job, place=storage / name)},
        torch_config=TorchConfig(timeout_s=600),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers[0] if workers[0] == workers[1] else workers, use_gpu=use_gpu
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage.base,
            storage_filesystem=storage.filesystem,
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            failure_config=ray.train.FailureConfig(max_failures=max_failures),
            # The newest, and the one before in case that is damaged; the best epoch is in the run's bundle.
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            callbacks=[end_at_once(), *(callbacks or [])],
        ),
    )


def keep_bundle(place: Storage, run: Run | None = None) -> tuple[str, dict[str, Any]]:
    """Check the best epoch's bundle, which the workers put into `place`, and log it to the run -> digest, metrics.

    The metrics are that epoch's. Raises BundleError where the bundle is not whole.
    """
    with fetched((place / BUNDLE).uri) as found:
        bundle, _ = load(found.folder)
        if run:
            run.bundle(found.folder)
    return bundle.digest, bundle.provenance["metrics"]


def require_resources(workers: int, use_gpu: bool, wait_s: float, drivers: int = 0, wanted: int = 1) -> None:
    """Ask the cluster for the resources of `wanted` runs of `workers` workers, and wait until there is enough for one.

    An autoscaler adds machines only for demand that it sees: the demand is placed while this waits, and withdrawn when
    it ends. Once there is enough for one run, it waits for the others only while machines still arrive. `drivers` are
    the CPUs that something beside the workers needs. Raises LsemvaeError that names what is missing after `wait_s`.
    """
    import ray
    from ray.autoscaler.sdk import request_resources

    worker: dict[str, float] = {"GPU": 1} if use_gpu else {"CPU": 1}
    others: list[dict[str, float]] = [{"CPU": 1}] * (drivers + 1)  # one CPU reads and preprocesses
    least, most = _total([*others, *[worker] * workers]), [*others, *[worker] * (workers * wanted)]
    there, began, said = ray.cluster_resources(), time.monotonic(), False
    if not _missing(_total(most), there):
        return
    request_resources(bundles=most)
    grew_at = began
    try:
        while missing := _missing(_total(most), there):
            enough, now = not _missing(least, there), time.monotonic()
            if enough and now - grew_at >= min(SETTLE_S if _autoscales() else 0.0, wait_s):
                return
            what = ", ".join(f"{there.get(name, 0):g} {name}, {count:g} are needed" for name, count in missing.items())
            if not enough and now - began > wait_s:
                raise LsemvaeError(
                    f"{workers} workers cannot be had: the cluster has {what} (waited {wait_s:g} s, see --wait-s): "
                    "ask for fewer --num-workers, or add machines"
                )
            if not said:
                log.info(
                    f"waiting for machines: the cluster has {what}; its autoscaler, if it has one, was asked for them"
                )
                said = True
            time.sleep(min(5.0, max(wait_s / 10, 0.1)))
            before, there = there, ray.cluster_resources()
            if _total([before]) != _total([there]):
                grew_at = time.monotonic()
    finally:
        request_resources(bundles=[])


def _total(bundles: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """CPUs and GPUs."""
    return {name: sum(bundle.get(name, 0) for bundle in bundles) for name in ("CPU", "GPU")}


def _missing(needed: Mapping[str, float], there: Mapping[str, float]) -> dict[str, float]:
    """What is needed of the resources that are too few."""
    return {name: count for name, count in needed.items() if there.get(name, 0) < count}


def require_writable(place: Storage) -> None:
    """Raises LsemvaeError where the place cannot be written to, before anything expensive starts."""
    try:
        place.write_bytes("writable", b"")
    except (LsemvaeError, OSError) as error:
        raise LsemvaeError(f"--storage {place.uri} cannot be written to: {error}") from None
    with contextlib.suppress(LsemvaeError, OSError):  # permission to write need not include permission to delete
        place.remove("writable")


def _autoscales() -> bool:
    """Whether an autoscaler adds machines to the cluster. One that only watches names each node's type by its id.

    KubeRay starts the second version of Ray's autoscaler, `ray up` the first; each publishes its state in its own way.
    """
    import ray
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.autoscaler.v2.utils import is_autoscaler_v2
    from ray.experimental.internal_kv import _internal_kv_get

    if is_autoscaler_v2():
        found = get_cluster_status(ray.get_runtime_context().gcs_address)
        kinds = [node.ray_node_type_name for node in [*found.active_nodes, *found.idle_nodes]]
    else:
        status = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or "{}")
        kinds = list(((status.get("autoscaler_report") or {}).get("node_type_mapping") or {}).values())
    return any(kind and not kind.startswith("node_") for kind in kinds)
