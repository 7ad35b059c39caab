"""What all workflows share: the environment, the command line, logging, Ray, and how a user's mistake is reported."""

import atexit
import fcntl
import json
import logging
import os
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import options
import tyro
from servers import free_port

from lsemvae.errors import LsemvaeError
from lsemvae.progress import Bar
from lsemvae.tracking import shown, tracking_uri

Args = TypeVar("Args")

log = logging.getLogger(__name__)

LEAST_OBJECT_STORE_BYTES = 2 * 2**30
NATIVE_NOISE = (b"has constructor arguments in the object store and max_restarts > 0",)
"""Ray's core says this of every actor of Ray Data. Their arguments live as long as the command, so it never applies."""
INTERRUPTED = "interrupted: give the same command again to go on"
_interrupted = threading.Event()
_writing_stderr = threading.Lock()

# Settings that make Ray and MLflow quieter and quicker on small runs, as measured. What the user has set wins.
DEFAULTS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_DATA_USE_DATASOURCE_V2": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_DATA_LOG_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints boxes even with verbose=0
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends a command at once
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # mlflow sets its level when it is first imported
    # glibc keeps freed memory in one pool: each training step allocates its gradients again, and returning them to the
    # kernel costs a third of the step in page faults. Pools of single threads would be returned whatever else is set.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**31),
}

# The variables that a driver passes to its workers. None may hold a secret, because Ray's dashboard shows them; the
# nodes have their own credentials.
WORKERS_NEED = (
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
    "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT",
    "MLFLOW_DISABLE_TELEMETRY",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_MAX_ATTEMPTS",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
)


def _say_interrupted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ctrl-C while a program imports what it needs, which takes seconds: one line, too."""
    if issubclass(kind, KeyboardInterrupt):
        print(INTERRUPTED, file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _say_interrupted


def prepare_environment() -> None:
    """Set `DEFAULTS` where the user has set nothing. Call it before Ray is imported: Ray reads some of them then."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    if _is_local():  # nobody preempts the user's own machine
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")


def run_command(main: Callable[[Args], None], args_type: type[Args], default: Args | None = None) -> None:
    """Parse `sys.argv` into `args_type` and call `main`; a user's mistake is one line and exit status 2."""
    prepare_environment()
    quiet_native_code()
    _quiet_logs()
    try:  # a recipe refuses values while the command line is read
        main(_parse(args_type, default, sys.modules[main.__module__].__doc__))
    except LsemvaeError as error:
        _say_and_exit(error)
    except KeyboardInterrupt:
        with _writing_stderr:  # what Ray's core says of the tasks that Ctrl-C ends would follow, and hide, this line
            _interrupted.set()
        print(INTERRUPTED, file=sys.stderr)
        raise SystemExit(130) from None


def _parse(args_type: type[Args], default: Args | None, description: str | None) -> Args:
    words = sys.argv[1:]
    if options.ALL in words:
        return tyro.cli(args_type, prog=program(), default=default, description=description, args=["--help"])
    if not options.HELP & set(words):
        return tyro.cli(args_type, prog=program(), default=default, description=description)
    shown, shown_default = options.common(args_type, default)
    try:
        return tyro.cli(shown, prog=program(), default=shown_default, description=description)
    finally:  # it prints the help and exits
        print(options.others(args_type, default))


def program() -> str:
    """What the user typed: a script's path, or `lsemvae ingest`, which lsemvae/cli.py puts in the place of the name."""
    name = Path(sys.argv[0]).name
    return name if name.startswith("lsemvae ") else sys.argv[0]


def _say_and_exit(error: LsemvaeError) -> NoReturn:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    raise SystemExit(2) from None


def run_recipe_command(
    main: Callable[[Args], None], args_type: type[Args], recipes: Mapping[str, Any], **fixed: Any
) -> None:
    """Like `run_command`, with a recipe as the first word: `COMMAND RECIPE [--field value …]`.

    The recipe is one of the names in `recipes`, or the path or s3:// URI of a recipe's JSON file. `fixed` are the
    defaults of the other arguments.
    """
    names = ", ".join(recipes)
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in (*options.HELP, options.ALL, ""):
        print(f"{sys.modules[main.__module__].__doc__}\nRecipes: {names}, or the path of a recipe's .json file\n")
        print(f"usage: {program()} RECIPE [options]      options: {program()} RECIPE --help")
        raise SystemExit(0 if name else 2)
    try:
        if name.endswith(".json"):
            from lsemvae.recipes import read_recipe  # imports torch, which other commands do not need

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
    """Join the cluster that `RAY_ADDRESS` names (in a Ray job: the job's cluster), or start a local one.

    A local cluster gets at least four logical CPUs. Training workers and the data tasks that feed them need one each;
    with two CPUs they would wait for each other for ever.
    """
    import ray
    import ray.data

    if ray.is_initialized():
        return
    if _is_local():  # workers inherit this variable; without it each would make a SQLite file in its own folder
        os.environ["MLFLOW_TRACKING_URI"] = tracking_uri()
    environment = workers_environment()
    where: dict[str, Any] = {}
    if _is_local():
        # Without an address Ray would join any cluster that has left its address on this machine.
        where = {"address": "local", "num_cpus": max(cpus, os.cpu_count() or 1)}
        where |= {"object_store_memory": _object_store_bytes()}
        # Ray Train's clean-up looks for the cluster by itself, and would find another one that runs on this machine.
        os.environ["RAY_GCS_SERVER_PORT"] = str(free_port())
        environment["RAY_ADDRESS"] = f"127.0.0.1:{os.environ['RAY_GCS_SERVER_PORT']}"
    try:
        with Bar(None, "start Ray"):
            ray.init(logging_level="ERROR", runtime_env={"env_vars": environment}, **where)
    except ConnectionError as error:
        raise LsemvaeError(
            f"no Ray cluster answers at RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}: check the address, and set "
            "RAY_AUTH_MODE=token and the token if the cluster requires one"
        ) from error
    ray.data.DataContext.get_current().enable_progress_bars = False


def workers_environment() -> dict[str, str]:
    """The variables of `WORKERS_NEED` that this driver passes to its workers, without secrets.

    A tracking URI with a user or password is left out: Ray's dashboard and state API show what is passed. Workers
    then use the `MLFLOW_TRACKING_URI` of their own node, which on a local cluster is the driver's.
    """
    # Ray refuses a variable that the job's own runtime environment sets too, even to the same value.
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env") or {}
    passed = set(WORKERS_NEED) - set(job.get("env_vars") or {})
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if shown(uri) != uri:
        passed.discard("MLFLOW_TRACKING_URI")
        if not _is_local():
            log.warning(
                "MLFLOW_TRACKING_URI holds a password, so it is not passed to Ray: each worker uses the "
                "MLFLOW_TRACKING_URI of its node. Or give the URI without it and set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD on the nodes."
            )
    return {name: value for name, value in os.environ.items() if name in passed}


def _is_local() -> bool:
    return os.environ.get("RAY_ADDRESS", "local") in ("", "local")


def _object_store_bytes() -> int:
    """A twelfth of the memory: with 2 GiB on a machine of many cores, most tasks would wait for room."""
    from ray._common.utils import get_system_memory  # in a container: its limit

    try:
        free_bytes = shutil.disk_usage("/dev/shm").free  # Ray puts what exceeds it on a disk
    except FileNotFoundError:  # only Linux has /dev/shm
        return LEAST_OBJECT_STORE_BYTES
    return max(LEAST_OBJECT_STORE_BYTES, min(get_system_memory() // 12, free_bytes))


def quiet_native_code() -> None:
    """Drop the lines of `NATIVE_NOISE` from what native code writes to standard error, and all lines after Ctrl-C.

    Ray's core has no other switch than one that hides its errors, too. Python's own standard error stays what it was,
    so a terminal is still recognised. Nothing is done where it is not the process's, as in tests.
    """
    if sys.stderr is not sys.__stderr__ or sys.stderr is None or sys.stderr.fileno() != 2:
        return
    sys.stderr.flush()
    kept = os.dup(2)
    sys.stderr = os.fdopen(kept, "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace")
    reading, writing = os.pipe()
    if hasattr(fcntl, "F_SETPIPE_SZ"):  # Linux; native code that writes must not wait for the thread that reads
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 2**20)
    os.dup2(writing, 2)
    os.close(writing)
    passing = threading.Thread(target=_pass_on, args=(reading, kept), daemon=True, name="stderr")
    passing.start()

    def restore() -> None:
        after = os.open(os.devnull, os.O_WRONLY) if _interrupted.is_set() else kept
        os.dup2(after, 2)  # closes the pipe, unless another process has it
        passing.join(timeout=1)

    atexit.register(restore)


def _pass_on(reading: int, to: int) -> None:
    """A line at a time, except those of `NATIVE_NOISE` and those after Ctrl-C."""

    def write(line: bytes) -> None:
        with _writing_stderr:
            if not (_interrupted.is_set() or any(noise in line for noise in NATIVE_NOISE)):
                os.write(to, line)

    with os.fdopen(reading, "rb", buffering=0) as pipe:
        rest = b""
        while part := pipe.read(2**16):
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                write(line + b"\n")
        write(rest)


def _quiet_logs() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    for noisy in ("mlflow", "alembic", "httpx", "urllib3", "botocore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)
