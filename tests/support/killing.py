"""Commands that stop at any of their writes: `python tests/support/killing.py` runs them in forks, without Ray, and
with words of score.py it runs that on Ray (see `score_on_ray`).

A command is the one that a user gives, except that its parts are made in its own process. Each time that it makes a
folder, writes to a file or renames one is a point. At the point that a test names it gets SIGKILL, or SIGSTOP: in a
write after half of the bytes are in the file, in a rename before it.

`Forks` is the test's side. It imports the commands once, which takes seconds, and forks a process for each run.
"""

import importlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PART_RECORDS = 2


class Forks:
    """Runs of the commands, one after the other or several at once."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        folder.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def start(self, *words: object, at: int = 0, how: int = signal.SIGKILL, below: Path | None = None) -> "Run":
        """Starts a command. It gets the signal `how` at point `at` of its writes to files in the folder `below`."""
        self._count += 1
        said = self._folder / f"{self._count}.txt"
        asked = {"words": [str(word) for word in words], "said": str(said), "at": at, "how": how, "below": str(below)}
        asked["environment"] = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "TMP"))}
        return Run(self, self.ask(asked)["pid"], said)

    def run(self, *words: object, at: int = 0, below: Path | None = None) -> "Run":
        """Runs a command to its end."""
        run = self.start(*words, at=at, below=below)
        run.wait()
        return run

    def warm(self, *words: object) -> None:
        """Runs a command in the process that forks, so that all has been imported."""
        self.ask({"warm": [str(word) for word in words]})

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


class Run:
    """One run. `status` is the exit status, or the negative signal; None while it runs or is stopped."""

    def __init__(self, forks: Forks, pid: int, said: Path) -> None:
        self.pid, self.status, self._forks, self._said = pid, None, forks, said

    def wait(self) -> int | None:
        """Until it has ended or stopped -> the status."""
        self.status = self._forks.ask({"wait": self.pid})["status"]
        return self.status

    def go_on(self) -> int | None:
        """Continues a run that has stopped, until it ends."""
        os.kill(self.pid, signal.SIGCONT)
        return self.wait()

    @property
    def said(self) -> str:
        """What it wrote to standard output and standard error."""
        return self._said.read_text()

    @property
    def error(self) -> str:
        """Its one line of error; fails where there is a traceback."""
        assert "Traceback" not in self.said, self.said
        (line,) = [line for line in self.said.splitlines() if line.startswith("error: ")]
        return line


# --- in the process that forks, and its children ---------------------------------------------------------------


class Points:
    """Counts writes to files below a folder; at point `at` the process gets a signal."""

    def __init__(self, below: str, at: int, how: int) -> None:
        self._below, self._at, self._how, self._count = below, at, how, 0

    def concerns(self, path: object) -> bool:
        return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self._below)

    def reach(self, first: Callable[[], object] = lambda: None) -> bool:
        """Counts a point; `first` is done before the signal."""
        self._count += 1
        if self._count != self._at:
            return False
        first()
        os.kill(os.getpid(), self._how)
        return True

    def watch(self) -> None:
        """From now on, in this process."""
        mkdir, replace, opened, points = os.mkdir, os.replace, io.open, self

        class Writer(io.BufferedWriter):
            def write(self, content: Any) -> int:
                view, done = memoryview(content).cast("B"), 0

                def half() -> None:
                    nonlocal done
                    done = super(Writer, self).write(view[: len(view) // 2])
                    self.flush()

                points.reach(half)
                return done + super().write(view[done:])

        def watched_mkdir(path: Any, *rest: Any, **options: Any) -> None:
            if points.concerns(path) and not Path(path).exists():
                points.reach()
            mkdir(path, *rest, **options)

        def watched_replace(source: Any, target: Any, **options: Any) -> None:
            if points.concerns(target):
                points.reach()
            replace(source, target, **options)

        def watched_open(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
            if "b" in mode and set("wax") & set(mode) and points.concerns(file):
                return Writer(io.FileIO(file, mode.replace("b", "")))
            return opened(file, mode, *rest, **options)

        os.mkdir, os.replace, io.open = watched_mkdir, watched_replace, watched_open


def make_parts_here(job: Any, args: Any, progress: Any, verb: str, calls_per_actor: int) -> list[str]:
    """As `cohort.make_parts`, in this process."""
    from lsemvae.scoring.parts import Failure, PartMaker

    actor, digests = PartMaker(job), []
    for number in range(len(job.source.parts)):
        part = json.loads(actor({"number": number})["result"])
        if "failure" in part:
            raise Failure(**part).error()
        progress.add(part)
        digests.append(part["sha256"])
    return digests


def make_shards_here(table: Any, tasks: list[Any], job: Any, concurrent_reads: int) -> Iterator[dict[str, Any]]:
    """As `lsemvae.data.ingest.make_shards`, in this process."""
    from lsemvae.data.ingest import make_shard

    for task in tasks:
        yield make_shard(task, table.iloc[task.start : task.stop].to_dict("records"), job)


def commands() -> dict[str, Any]:
    """The commands, without Ray, in small parts, and with short waits for one another."""
    sys.path[:0] = [str(ROOT), str(ROOT / "workflows")]
    import command

    command.quiet_native_code = lambda: None
    found = {name: importlib.import_module(name) for name in ("score", "ingest")}
    importlib.import_module("lsemvae.reports.ingest")
    from lsemvae.scoring import inputs, progress

    inputs.PART_RECORDS, progress.BEAT_S = PART_RECORDS, 60.0  # a beat would be a point that comes at any time
    found["score"].make_parts = make_parts_here
    found["ingest"].make_shards, found["ingest"].start_ray = make_shards_here, lambda: None
    return found


def child(module: Any, asked: dict[str, Any]) -> None:
    said = os.open(asked["said"], os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.environ.update(asked["environment"])
    tempfile.tempdir = None
    Points(asked["below"], asked["at"], asked["how"]).watch()
    os._exit(run(module, asked["words"]))


def run(module: Any, words: list[str]) -> int:
    """The exit status."""
    sys.argv, status = words, 0
    try:
        module.run_command(module.main, module.Args)
    except SystemExit as ended:
        status = ended.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def serve(lines: Iterable[str]) -> None:
    found, answers = commands(), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for line in lines:
        asked = json.loads(line)
        if "wait" in asked:
            _, status = os.waitpid(asked["wait"], os.WUNTRACED)
            answer = {"status": None if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)}
        elif "warm" in asked:
            run(found[asked["warm"][0]], asked["warm"])
            answer = {}
        else:
            pid = os.fork()
            if not pid:
                child(found[asked["words"][0]], asked)
            answer = {"pid": pid}
        print(json.dumps(answer), file=answers, flush=True)


def score_on_ray(words: list[str]) -> None:
    """score.py on Ray. The actor that makes the second part is killed in the middle of its file, and the driver in the
    middle of the first table. The actor is killed once: it notes that in `KILLED`."""
    sys.path[:0] = [str(ROOT), str(ROOT / "workflows")]
    import cohort
    import score

    from lsemvae.scoring import inputs
    from lsemvae.scoring.parts import PartMaker

    inputs.PART_RECORDS = PART_RECORDS
    output, noted = words[words.index("--output") + 1], Path(os.environ["KILLED"])

    class Killed(PartMaker):
        def _finish(self, number: int) -> dict[str, Any]:
            if number == 1 and not noted.exists():
                noted.touch()
                Points(f"{output}/parts/.000001", 1, signal.SIGKILL).watch()
            return super()._finish(number)

    cohort.PartMaker = Killed
    Points(f"{output}/.scores-", 1, signal.SIGKILL).watch()
    sys.argv = ["score.py", *words]
    score.run_command(score.main, score.Args)


if __name__ == "__main__":
    if sys.argv[1:]:
        score_on_ray(sys.argv[1:])
    else:
        serve(sys.stdin)
