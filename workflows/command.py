"""What every workflow does the same way: parse, log, and turn a user's mistake into one line and status 2."""

import json
import logging
import os
import shutil
import socket
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

import tyro

from lsemvae.errors import LsemvaeError
from lsemvae.recipes import read_recipe

Args = TypeVar("Args")

# Quieter and quicker Ray, where the user has not said otherwise; measured on small runs.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
if os.environ.get("RAY_ADDRESS", "local") in ("", "local"):  # on one machine of one's own nothing is preempted
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
os.environ.setdefault("RAY_DATA_USE_DATASOURCE_V2", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one prints boxes even when told to be silent
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C ends a command, at once
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# Have glibc keep freed memory: every step allocates its gradients anew, and the page faults are a third of it. In one
# pool, for those that threads have of their own are given back whatever else is set.
os.environ.setdefault("MALLOC_ARENA_MAX", "1")
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**30))
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**31))


LEAST_OBJECT_STORE_BYTES = 2 * 2**30


def run_command(main: Callable[[Args], None], args_type: type[Args], default: Args | None = None) -> None:
    """Parse `sys.argv` into `args_type` and call `main`; exits with status 2 on a user's mistake."""
    _quiet_logs()
    args = tyro.cli(args_type, default=default, description=sys.modules[main.__module__].__doc__)
    try:
        main(args)
    except LsemvaeError as error:
        _say_and_exit(error)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _say_and_exit(error: LsemvaeError) -> NoReturn:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    raise SystemExit(2) from None


def run_recipe_command(
    main: Callable[[Args], None], args_type: type[Args], recipes: Mapping[str, Any], **fixed: Any
) -> None:
    """Like `run_command`, with the recipe as the first word: `COMMAND RECIPE [--field value …]`.

    It is a recipe's name, or the path or s3:// URI of a recipe's JSON file.
    """
    names = ", ".join(recipes)
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help", ""):
        print(f"{sys.modules[main.__module__].__doc__}\nRecipes: {names}, or the path of a recipe's .json file\n")
        print(f"usage: {sys.argv[0]} RECIPE [options]      options: {sys.argv[0]} RECIPE --help")
        raise SystemExit(0 if name else 2)
    try:
        if name.endswith(".json"):
            recipe = read_recipe(name, type(next(iter(recipes.values()))))
        elif name in recipes:
            recipe = recipes[name]
        else:
            raise LsemvaeError(f"there is no recipe {name!r}: choose one of {names}, or give a recipe's .json file")
    except LsemvaeError as error:
        _say_and_exit(error)
    del sys.argv[1]
    sys.argv[0] += f" {name}"
    default = args_type(recipe=recipe, **{"data": tyro.MISSING, **fixed})
    run_command(main, args_type, default)


def start_ray(cpus: int = 4) -> None:
    """Joins the cluster that `RAY_ADDRESS` names (inside a Ray job: its own), or starts a local one.

    A local one gets at least four logical CPUs: training workers and the data tasks that feed them each need
    one, and on two they would wait for each other for ever.
    """
    import ray
    import ray.data

    from lsemvae.tracking import tracking_uri

    if ray.is_initialized():
        return
    # What the job's own environment holds already must not be given again, Ray refuses even equal values.
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env") or {}
    needed = set(_WORKERS_NEED) - set(job.get("env_vars") or {})
    runtime_env = {"env_vars": {key: value for key, value in os.environ.items() if key in needed}}
    where: dict[str, Any] = {}
    if os.environ.get("RAY_ADDRESS", "local") in ("", "local"):
        # Said outright, else Ray would join whatever cluster it finds traces of on this machine.
        where = {"address": "local", "num_cpus": max(cpus, os.cpu_count() or 1)}
        where |= {"object_store_memory": _object_store_bytes()}
        # Ray Train's clean-up looks for the cluster itself, and would find another one that runs on this machine.
        os.environ["RAY_GCS_SERVER_PORT"] = str(_free_port())
        runtime_env["env_vars"]["RAY_ADDRESS"] = f"127.0.0.1:{os.environ['RAY_GCS_SERVER_PORT']}"
        # Workers have folders of their own, and would each make a file of MLflow's there.
        runtime_env["env_vars"]["MLFLOW_TRACKING_URI"] = tracking_uri()
    try:
        ray.init(logging_level="ERROR", runtime_env=runtime_env, **where)
    except ConnectionError as error:
        raise LsemvaeError(
            f"no Ray cluster answers at RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}: check the address, and "
            "RAY_AUTH_MODE=token with the token if it wants one"
        ) from error
    ray.data.DataContext.get_current().enable_progress_bars = False


def _object_store_bytes() -> int:
    """A twelfth of the memory: on a machine of many cores 2 GiB hold what a few tasks give, and the others wait."""
    from ray._common.utils import get_system_memory  # a container's, where it has less than its machine

    try:
        free_bytes = shutil.disk_usage("/dev/shm").free  # what is beyond it Ray would put on a disk
    except FileNotFoundError:  # Linux alone has it
        return LEAST_OBJECT_STORE_BYTES
    return max(LEAST_OBJECT_STORE_BYTES, min(get_system_memory() // 12, free_bytes))


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return found.getsockname()[1]


# No secret is among them: a job's environment is shown in Ray's dashboard. Nodes hold their own credentials.
_WORKERS_NEED = (
    "MALLOC_ARENA_MAX",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER",
    "RAY_DATA_USE_DATASOURCE_V2",
    "RAY_DATA_LOG_LEVEL",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT",
    "RAY_TRAIN_ENABLE_PRINT_PATCH",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_DISABLE_TELEMETRY",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_MAX_ATTEMPTS",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
)


def _quiet_logs() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    for noisy in ("mlflow", "alembic", "httpx", "urllib3", "botocore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)
