"""Time two implementations in turn, and turn the results into rows."""

import contextlib
import ctypes
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lsemvae.errors import LsemvaeError


@dataclass(frozen=True)
class Row:
    """One line of the table. A `ratio` above 1 means that ours is better, whatever the unit."""

    case: str
    ours: float
    baseline: float
    ratio: float
    unit: str


def machine(device: str) -> dict[str, str | int]:
    """The machine and versions of a measurement."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    facts = {"cpu": name, "cores": os.cpu_count() or 0, "threads": torch.get_num_threads()}
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    return facts | {"python": platform.python_version(), "torch": torch.__version__}


def less_is_better(case: str, ours: float, baseline: float, unit: str) -> Row:
    """A row for times or memory."""
    return Row(case, ours, baseline, baseline / ours, unit)


def more_is_better(case: str, ours: float, baseline: float, unit: str) -> Row:
    """A row for rates, or for shares of the machine's peaks."""
    return Row(case, ours, baseline, ours / baseline, unit)


def alternate(
    ours: Callable[[], object], baseline: Callable[[], object], rounds: int, device: str
) -> tuple[float, float]:
    """Median seconds of a call of each. Calls alternate, so that other load on the machine affects both."""
    for call in (ours, baseline):  # compilation, first allocations
        call()
        call()
    seconds = [(timed(ours, device), timed(baseline, device)) for _ in range(rounds)]
    return statistics.median(pair[0] for pair in seconds), statistics.median(pair[1] for pair in seconds)


def timed(call: Callable[[], object], device: str) -> float:
    """Seconds until the device has finished the call."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    """Wait until the device has finished its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def roofs(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """The measured peaks of this machine: matrix products in FLOP/s at `dtype`, and copies in byte/s."""
    size = 8192 if device == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    product = torch.empty_like(a)
    values = torch.ones(2**28 if device == "cuda" else 2**25, device=device)
    copy = torch.empty_like(values)
    product_s = min(timed(lambda: torch.mm(a, a, out=product), device) for _ in range(30))
    copy_s = min(timed(lambda: copy.copy_(values), device) for _ in range(30))
    return 2 * size**3 / product_s, 2 * values.nbytes / copy_s


def peak_bytes(call: Callable[[], object], static: int, device: str) -> int:
    """Peak memory of a call in bytes; `static` is the size of its weights and optimiser state."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before + static
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    call()
    return _resident_bytes("VmHWM") - before + static


def _resident_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise LsemvaeError(f"/proc/self/status has no {key}: memory can be measured only on Linux")
