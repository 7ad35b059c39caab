"""A batch that does not fit the memory, for real: the system refuses the allocation."""

import re
import subprocess
import sys

import pytest
import torch

from lsemvae.errors import LsemvaeError, StorageError
from lsemvae.training.failures import raise_lasting
from lsemvae.training.out_of_memory import OutOfMemory

TRAINS = """
import re, resource, sys
import torch
from lsemvae.config import OptimConfig
from lsemvae.leads import LEADS
from lsemvae.models import build
from lsemvae.models.lsemvae import LSEMVAEConfig
from lsemvae.training.fit import fit, make_optimizer
from lsemvae.training.out_of_memory import OutOfMemory

torch.set_num_threads(1)

def train(records, accumulate):
    torch.manual_seed(0)
    config = OptimConfig(epochs=1, batch_size=records, accumulate=accumulate)
    model = build(LSEMVAEConfig(samples=1000, latent=8, channels=(16, 16, 16)), LEADS)
    batch = {"x_BLT": torch.randn(records, 12, 1000), "lead_mask_BL": torch.ones(records, 12, dtype=torch.bool)}
    batch["noise_BD"] = torch.randn(records, model.noise_size)
    fit(model, make_optimizer(model, config), config, lambda epoch: [batch], steps_per_epoch=1)

train(2, 1)  # what the libraries load and keep
used_bytes = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used_bytes + int(sys.argv[1]) * 2**20, resource.RLIM_INFINITY))
try:
    train(256, 1)
except OutOfMemory as error:
    print(error)
    train(256, int(re.search(r"--optim.accumulate (\\d+)", str(error))[1]))
    print("trained")
"""


def test_the_batch_that_fits_is_named_and_fits():
    """The process's address space is limited to 220 MiB more than it has: a step of 256 records needs 420 MB."""
    done = subprocess.run([sys.executable, "-c", TRAINS, "220"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said, trained = done.stdout.splitlines()
    found = re.search(r"256 records at once do not fit the memory of cpu \(.*\), (\d+) do: give --optim", said)
    assert found and 1 <= int(found[1]) <= 128 and trained == "trained"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to"),
        MemoryError("Unable to allocate 3 GiB"),
        OutOfMemory("256 records at once do not fit"),
    ],
)
def test_it_is_not_tried_again_unchanged(error: Exception):
    with pytest.raises(LsemvaeError, match=r"records at once do not fit|give a smaller --optim\.batch-size"):
        raise_lasting([StorageError("may pass"), error])
