"""Two workers against one: gradients in bf16, AdamW's state spread over them, and runs that resume with another number.

The workers are processes with gloo, without Ray.
"""

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.losses import Losses
from torch import Tensor

from lsemvae.config import OptimConfig
from lsemvae.leads import LEADS
from lsemvae.models import build
from lsemvae.models.lsemvae import LSEMVAE, LSEMVAEConfig
from lsemvae.training.checkpoints import load_optimizer, save_optimizer
from lsemvae.training.fit import fit, make_optimizer
from lsemvae.training.several import collect, exchange_gradients

TINY = LSEMVAEConfig(samples=64, latent=3, channels=(2, 2, 2))
OPTIM = OptimConfig(epochs=2, batch_size=8, learning_rate=0.1, accumulate=2)
STEPS = 4
WAYS = {
    "plain": OPTIM,
    "bf16": replace(OPTIM, gradient_exchange="bf16"),
    "sharded": replace(OPTIM, shard_optimizer=True),
    "both": replace(OPTIM, gradient_exchange="bf16", shard_optimizer=True),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model_of() -> LSEMVAE:
    torch.manual_seed(0)
    return build(TINY, LEADS)


def batches_of(epoch: int, rows: slice) -> list[dict[str, Tensor]]:
    """These rows of four batches of eight records."""
    generator = torch.Generator().manual_seed(epoch)
    x_SBLT = torch.randn(STEPS, 8, 12, 64, generator=generator)
    mask_SBL = torch.rand(STEPS, 8, 12, generator=generator) > 0.2
    noise_SBD = torch.randn(STEPS, 8, TINY.latent, generator=generator)
    return [
        {"x_BLT": x[rows], "lead_mask_BL": mask[rows], "noise_BD": noise[rows]}
        for x, mask, noise in zip(x_SBLT, mask_SBL, noise_SBD, strict=True)
    ]


def train(model: LSEMVAE, optimizer: torch.optim.Optimizer, config: OptimConfig, epochs: Sequence[int]) -> list[float]:
    """Train on this worker's half of each batch -> the losses of the steps."""
    rows, shared = slice(None), model
    if torch.distributed.is_initialized():
        rank = torch.distributed.get_rank()
        rows = slice(4 * rank, 4 * rank + 4)
        shared = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        exchange_gradients(shared, config)
    losses = Losses()
    given = iter(epochs)
    fit(shared, optimizer, replace(config, epochs=len(epochs)), lambda _: batches_of(next(given), rows), losses)
    return losses.found


def save(model: LSEMVAE, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    collect(optimizer)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        folder.mkdir()
        save_file(model.state_dict(), folder / "model.safetensors")
        save_optimizer(optimizer, folder)


def resume(folder: Path, config: OptimConfig) -> list[float]:
    """The losses of the second epoch, from the checkpoint of the first."""
    model = model_of()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    optimizer = make_optimizer(model, config)
    load_optimizer(optimizer, folder)
    return train(model, optimizer, config, [1])


def _worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for way, config in WAYS.items():
        model = model_of()
        optimizer = make_optimizer(model, config)
        losses = train(model, optimizer, config, [0])
        save(model, optimizer, folder / way)
        found[way] = torch.tensor(losses + train(model, optimizer, config, [1])).double()
        own = getattr(optimizer, "optim", optimizer).state
        found[f"{way} kept"] = torch.tensor(sum(state["exp_avg"].numel() for state in own.values()))
        found[f"{way} resumed from one"] = torch.tensor(resume(folder / "one", config)).double()
    save_file(found, folder / f"{rank}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """One worker's losses, and a folder that holds its checkpoint after the first epoch."""
    folder = tmp_path_factory.mktemp("workers")
    model = model_of()
    optimizer = make_optimizer(model, WAYS["both"])  # which one worker does not need: nothing changes
    assert type(optimizer) is torch.optim.AdamW
    losses = train(model, optimizer, WAYS["both"], [0])
    save(model, optimizer, folder / "one")
    return folder, losses + train(model, optimizer, WAYS["both"], [1])


@pytest.fixture(scope="module")
def two(one: tuple[Path, list[float]]) -> list[dict[str, Tensor]]:
    """What two workers found, beside their checkpoints."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_worker, args=(rank, one[0])) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return [load_file(one[0] / f"{rank}.safetensors") for rank in range(2)]


TOLERANCE = {"plain": 1e-4, "sharded": 1e-4, "bf16": 1e-3, "both": 1e-3}
"""Of a loss, as a share of what the losses of one worker fall by. A gradient in bf16 has eight bits."""


@pytest.mark.parametrize("way", WAYS)
def test_two_workers_have_the_losses_of_one(way: str, one: tuple[Path, list[float]], two: list[dict[str, Tensor]]):
    losses = one[1]
    tolerance = TOLERANCE[way] * (max(losses) - min(losses))
    for found in two:
        assert found[way].tolist() == pytest.approx(losses, rel=0, abs=tolerance)
        assert found[f"{way} resumed from one"].tolist() == pytest.approx(losses[STEPS:], rel=0, abs=tolerance)
    assert torch.equal(two[0][way], two[0]["plain"]) == (TOLERANCE[way] < 1e-3)  # that bf16 was exchanged at all


@pytest.mark.parametrize("way", WAYS)
def test_one_worker_continues_the_run_of_two(way: str, one: tuple[Path, list[float]], two: list[dict[str, Tensor]]):
    losses = two[0][way].tolist()
    tolerance = TOLERANCE[way] * (max(losses) - min(losses))
    assert resume(one[0] / way, OPTIM) == pytest.approx(losses[STEPS:], rel=0, abs=tolerance)


def test_each_worker_keeps_a_part_of_the_moments(two: list[dict[str, Tensor]]):
    total = sum(parameter.numel() for parameter in model_of().parameters())
    for way in ("plain", "bf16"):
        assert [int(found[f"{way} kept"]) for found in two] == [total, total]
    for way in ("sharded", "both"):
        kept = [int(found[f"{way} kept"]) for found in two]
        assert sum(kept) == total and max(kept) < 0.6 * total
