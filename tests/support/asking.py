"""A program that asks a cluster for machines, as commands do, and writes a line of JSON for each time it asked.

The cluster is the one that `RAY_ADDRESS` names. It is a process of its own because the test's may have joined another.
"""

import json
import logging
import sys
from typing import Any

import ray
import tune
from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.experimental.internal_kv import _internal_kv_get

from lsemvae.errors import LsemvaeError
from lsemvae.recipes import PRETRAIN
from lsemvae.training import launch


def ask(what: str, wanted: int = 1, **options: Any) -> dict[str, Any]:
    """`what` is "require" for `require_resources`, or "trials" for tune's `trials_at_once`."""
    came: dict[str, Any] = {"before": ray.cluster_resources().get("CPU", 0)}
    try:
        if what == "trials":
            args = tune.Args(PRETRAIN["smoke"], "data", "storage", ("beta=1,2",), num_workers=1, **options)
            came["trials"] = tune.trials_at_once(args, wanted)
        else:
            launch.require_resources(1, **options)
    except LsemvaeError as error:
        came["error"] = str(error)
    return came | {"after": ray.cluster_resources().get("CPU", 0), "demand": demand(), "grows": launch._autoscales()}


def demand() -> list[Any]:
    """What the autoscaler was asked for, and was not yet told to forget."""
    if is_autoscaler_v2():
        asked = get_cluster_status(ray.get_runtime_context().gcs_address).resource_demands.cluster_constraint_demand
        return [bundles for one in asked for bundles in one.bundles_by_count]
    return json.loads(_internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL) or "[]")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    ray.init(logging_level="ERROR", log_to_driver=False)
    for options in json.loads(sys.argv[1]):
        sys.stdout.write(json.dumps(ask(**options), default=str) + "\n")
