"""The training loop: whole batches, parts of them, several workers and a restart give the same result."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lsemvae.config import OptimConfig
from lsemvae.errors import BundleError, LsemvaeError
from lsemvae.leads import LEADS
from lsemvae.models import build
from lsemvae.models.lsemvae import LSEMVAE, LSEMVAEConfig
from lsemvae.models.parts.head import Head
from lsemvae.models.parts.objectives import NonFiniteBatch
from lsemvae.recipes import PRETRAIN
from lsemvae.training.checkpoints import OPTIMIZER, STATE, load_optimizer, read_state, save_optimizer
from lsemvae.training.fit import MAX_SKIPPED_STEPS, Epoch, Start, Step, Watcher, fit, learning_rate, make_optimizer
from lsemvae.training.pretrain import kl_scale
from lsemvae.training.validation import validate

TINY = LSEMVAEConfig(samples=64, latent=3, channels=(2, 2, 2))
OPTIM = OptimConfig(epochs=3, batch_size=10, learning_rate=1e-2)
STEPS = 3


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other are most of the time of a model as small as this."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model_of(seed: int = 0) -> LSEMVAE:
    torch.manual_seed(seed)
    return build(TINY, LEADS)


def batches_of(epoch: int, start: int = 0) -> list[dict[str, Tensor]]:
    """24 records in batches of 10, 10 and 4; in each, the second counts nothing and the third less."""
    generator = torch.Generator().manual_seed(epoch)
    x_BLT = torch.randn(24, 12, 64, generator=generator)
    mask_BL = torch.rand(24, 12, generator=generator) > 0.2
    weight_B = torch.ones(24)
    weight_B[1::10], weight_B[2::10] = 0, 0.5
    columns = zip(*(tensor.split(10) for tensor in (x_BLT, mask_BL, weight_B)), strict=True)
    return [{"x_BLT": x, "lead_mask_BL": m, "weight_B": w} for x, m, w in columns][start:]


def without_noise(batches: Callable[[int], list[dict[str, Tensor]]]) -> Callable[[int], list[dict[str, Tensor]]]:
    """A model without noise, which would differ between halves of a batch: it decodes the posterior's mean."""

    def given(epoch: int) -> list[dict[str, Tensor]]:
        return [{**batch, "noise_BD": torch.zeros(len(batch["x_BLT"]), TINY.latent)} for batch in batches(epoch)]

    return given


class Seen(Watcher):
    """Keeps what it is told, and hands it on to functions of the test's."""

    def __init__(self, **also: Callable) -> None:
        self.epochs: list[Epoch] = []
        self.steps: list[Step] = []
        self._also = also

    def on_step(self, step: Step) -> None:
        self.steps.append(step)
        self._also.get("on_step", lambda step: None)(step)

    def wants_checkpoint(self) -> bool:
        return self._also.get("wants_checkpoint", lambda: False)()

    def on_checkpoint(self, epoch: int, step: int, sums: dict[str, float]) -> None:
        self._also["on_checkpoint"](epoch, step, sums)

    def on_epoch(self, epoch: Epoch) -> bool | None:
        self.epochs.append(epoch)
        return self._also.get("on_epoch", lambda epoch: None)(epoch)


def train(model: torch.nn.Module, config: OptimConfig = OPTIM, **changes) -> Seen:
    told = {
        name: changes.pop(name)
        for name in ("on_step", "wants_checkpoint", "on_checkpoint", "on_epoch")
        if name in changes
    }
    settings = {"steps_per_epoch": STEPS} | changes
    batches = settings.pop("batches", batches_of)
    if settings.pop("noise", True) is True:
        batches = without_noise(batches)
    optimizer = settings.pop("optimizer", None) or make_optimizer(model, config)
    seen = Seen(**told)
    fit(model, optimizer, config, batches, seen, **settings)
    return seen


def assert_same(one: torch.nn.Module, other: torch.nn.Module, **tolerance: float) -> None:
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, **tolerance)


def test_parts_of_a_batch_are_one_step():
    whole, parts = model_of(), model_of()
    expected = train(whole).epochs
    for accumulate in (2, 3):
        parts = model_of()
        config = OptimConfig(epochs=3, batch_size=10, learning_rate=1e-2, accumulate=accumulate)
        found = train(parts, config).epochs
        for one, other in zip(expected, found, strict=True):
            assert one.terms == pytest.approx(other.terms, rel=1e-4)
        assert_same(whole, parts, rtol=1e-3, atol=1e-5)


def test_a_record_of_weight_zero_takes_no_part_and_half_a_weight_counts_half():
    whole, left_out = model_of(), model_of()

    def without_them(epoch: int) -> list[dict[str, Tensor]]:
        kept = [(batch, batch["weight_B"] > 0) for batch in batches_of(epoch)]
        return [{name: values[there] for name, values in batch.items()} for batch, there in kept]

    expected = train(whole).epochs[0].terms
    assert expected == pytest.approx(train(left_out, batches=without_them).epochs[0].terms, rel=1e-5)
    assert_same(whole, left_out, rtol=1e-4, atol=1e-6)

    class Constant(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, batch: dict[str, Tensor], *, check: bool) -> dict[str, Tensor]:
            loss = (batch["value"] * batch["share_B"]).sum() + 0 * self.weight
            return {"loss": loss, "good_B": batch["value"].isfinite()}

    given = [
        {"value": torch.tensor([1.0, 2.0, 5.0]), "weight_B": torch.tensor([1.0, 1.0, 2.0])},
        {"value": torch.tensor([10.0, 99.0]), "weight_B": torch.tensor([1.0, 0.0])},
    ]
    (epoch,) = train(Constant(), OptimConfig(1, 3), batches=lambda _: given, noise=False).epochs
    assert epoch.terms["loss"] == pytest.approx((1 + 2 + 2 * 5 + 10) / 5)
    assert epoch.records == 5


def _worker(rank: int, workers: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=workers)
    model = model_of()
    ddp = torch.nn.parallel.DistributedDataParallel(model)

    def mine(epoch: int) -> list[dict[str, Tensor]]:
        # Uneven on purpose: the last batch has four records, of which the second worker gets none that counts.
        parts = []
        for batch in batches_of(epoch):
            size = len(batch["x_BLT"])
            rows = torch.arange(size)[: size - 2] if rank == 0 else torch.arange(size)[size - 2 :]
            part = {name: values[rows] for name, values in batch.items()}
            parts.append(part if rank == 0 or size == 10 else part | {"weight_B": torch.zeros(2)})
        return parts

    config = OptimConfig(epochs=3, batch_size=10, learning_rate=1e-2, accumulate=2)
    taken: list[tuple[int, int]] = []
    seen = train(
        ddp, config, batches=mine, wants_checkpoint=lambda: rank == 1,
        on_checkpoint=lambda epoch, step, sums: taken.append((epoch, step)),
    )  # fmt: skip
    # All workers take a checkpoint that one asks for, after the same step; the end of an epoch has one of its own.
    assert taken == [(epoch, 1) for epoch in range(3)]
    epochs, steps = seen.epochs, seen.steps
    values, _ = validate(model, mine(0))
    del ddp  # else it outlives the process group, and now and then aborts this process at its end
    torch.distributed.destroy_process_group()
    if rank == 0:
        from safetensors.torch import save_file

        save_file(model.state_dict(), f"{folder}/model.safetensors")
        numbers = torch.tensor([epochs[-1].terms["loss"], epochs[-1].records, values["loss"], values["records"]])
        losses = torch.tensor([step.terms["loss"] for step in steps])
        save_file({"numbers": numbers.double(), "losses": losses.double()}, f"{folder}/numbers.safetensors")


def test_workers_with_uneven_parts_equal_one_process(tmp_path: Path):
    from safetensors.torch import load_file

    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_worker, args=(rank, 2, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0

    def together(epoch: int) -> list[dict[str, Tensor]]:
        batches = batches_of(epoch)
        batches[-1]["weight_B"][2:] = 0
        return batches

    alone = model_of()
    seen = train(alone, batches=together)
    epochs, steps = seen.epochs, seen.steps
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        torch.testing.assert_close(tensor, alone.state_dict()[name], rtol=1e-3, atol=1e-5)
    found = load_file(tmp_path / "numbers.safetensors")
    # A step's loss is that of its records, not of those that the first worker has.
    assert found["losses"].tolist() == pytest.approx([step.terms["loss"] for step in steps], rel=1e-4)
    loss, records, val_loss, val_records = found["numbers"].tolist()
    assert loss == pytest.approx(epochs[-1].terms["loss"], rel=1e-4)
    assert records == epochs[-1].records
    values, _ = validate(alone, together(0))
    # The noise of the two processes is not that of one: the loss is near, the count is the same.
    assert val_loss == pytest.approx(values["loss"], rel=0.05)
    assert val_records == values["records"] == sum(int((b["weight_B"] > 0).sum()) for b in together(0))


@pytest.mark.parametrize("at", [(1, 0), (1, 2), (2, 1)])
def test_a_run_goes_on_from_any_step_as_if_nothing_had_happened(at: tuple[int, int], tmp_path: Path):
    config = OptimConfig(epochs=3, batch_size=10, learning_rate=1e-2, schedule="cosine", warmup_steps=2)
    whole = model_of()
    losses: dict[tuple[int, int], float] = {}

    def keep(step: Step) -> None:
        losses[step.epoch, step.index] = step.terms["loss"]

    epochs = train(whole, config, on_step=keep).epochs
    expected, losses = losses, {}

    stopped = model_of()
    optimizer = make_optimizer(stopped, config)

    class Killed(Exception):
        pass

    def save(epoch: int, step: int, sums: dict[str, float]) -> None:
        if (epoch, step + 1) == at:
            save_optimizer(optimizer, tmp_path, epoch=epoch, step=step + 1, sums=sums)
            raise Killed

    def save_epoch(epoch: Epoch) -> None:
        if (epoch.index + 1, 0) == at:
            save_optimizer(optimizer, tmp_path, epoch=epoch.index + 1, step=0, sums={})
            raise Killed

    with pytest.raises(Killed):
        train(
            stopped, config, optimizer=optimizer, on_epoch=save_epoch, on_step=keep, checkpoint_every=1,
            on_checkpoint=save,
        )  # fmt: skip
    state = read_state(tmp_path)
    assert (state["epoch"], state["step"]) == at
    continued = model_of(seed=5)
    continued.load_state_dict(stopped.state_dict())
    optimizer = make_optimizer(continued, config)
    load_optimizer(optimizer, tmp_path)
    rest = train(
        continued, config, optimizer=optimizer, start=Start(*at, state["sums"]), on_step=keep,
        batches=lambda epoch: batches_of(epoch, at[1] if epoch == at[0] else 0),
    ).epochs  # fmt: skip
    assert losses == pytest.approx(expected, rel=1e-6)
    for one, other in zip(rest, epochs[at[0] :], strict=True):  # the whole epoch, not what was left of it
        assert one.terms == pytest.approx(other.terms, rel=1e-6) and one.records == other.records
    assert_same(whole, continued, rtol=1e-6, atol=1e-7)


def test_every_step_is_told_once_in_order():
    seen = train(model_of())
    epochs, steps = seen.epochs, seen.steps
    assert [(step.epoch, step.index) for step in steps] == [(e, s) for e in range(3) for s in range(STEPS)]
    assert [step.records for step in steps[:3]] == [8, 8, 2]  # what 10, 10 and 4 records weigh, in whole numbers
    of_first = sum(step.terms["loss"] * step.records for step in steps[:3]) / sum(step.records for step in steps[:3])
    assert epochs[0].terms["loss"] == pytest.approx(of_first)


def damaged(what: str, at: tuple[int, ...] = (1,)) -> Callable[[int], list[dict[str, Tensor]]]:
    """Batches of which those `at` these steps have a bad record at position 4."""

    def batches(epoch: int) -> list[dict[str, Tensor]]:
        found = batches_of(epoch)
        for step in at:
            batch = found[step]
            row = min(4, len(batch["x_BLT"]) - 1)
            if what == "no lead":
                batch["lead_mask_BL"][row] = False
                batch["x_BLT"][row] = float("nan")
                batch["lead_mask_BL"][row, 0] = True
            else:
                batch["lead_mask_BL"][row, 3] = True
                batch["x_BLT"][row, 3, 7] = float(what)
        return found

    return batches


@pytest.mark.parametrize("what", ["nan", "inf", "no lead"])
def test_a_step_with_a_bad_record_is_left_out_and_counted(what: str, caplog: pytest.LogCaptureFixture):
    """The run continues with the weights that it would have without that batch."""
    model, good = model_of(), model_of()
    seen = train(model, batches=damaged(what))
    assert [epoch.skipped for epoch in seen.epochs] == [1, 1, 1]
    assert [epoch.records for epoch in seen.epochs] == [8 + 2] * 3
    assert [(step.epoch, step.index) for step in seen.steps] == [(e, s) for e in range(3) for s in (0, 2)]
    assert "epoch 0, step 1" in caplog.text and "at position 4" in caplog.text
    train(good, batches=lambda epoch: [batches_of(epoch)[step] for step in (0, 2)], steps_per_epoch=None)
    assert_same(good, model, rtol=1e-6, atol=1e-7)


def test_too_many_bad_steps_end_the_run_with_the_weights_of_the_last_good_one(monkeypatch: pytest.MonkeyPatch):
    assert MAX_SKIPPED_STEPS == 10
    monkeypatch.setattr("lsemvae.training.fit.MAX_SKIPPED_STEPS", 1)
    model, good = model_of(), model_of()
    with pytest.raises(NonFiniteBatch, match=r"epoch 0, step 2.*2 steps.*lower the learning rate") as caught:
        train(model, batches=damaged("nan", at=(1, 2)))
    assert caught.value.positions == (3,)
    train(good, OptimConfig(epochs=1, batch_size=10, learning_rate=1e-2), batches=lambda epoch: batches_of(0)[:1])
    assert_same(good, model, rtol=0, atol=0)


@pytest.mark.parametrize("clip_norm", [0.0, 1.0, 600.0, 1e6])
def test_clipping_in_the_optimiser_is_clipping_before_it(clip_norm: float):
    """Twelve steps equal those of clip_grad_norm_ and AdamW; a norm of 600 clips some of them, 1e6 none."""
    config = OptimConfig(epochs=4, batch_size=10, learning_rate=1e-2, clip_norm=clip_norm)
    model, other = model_of(), model_of()
    seen = train(model, config)
    optimizer, norms = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=config.weight_decay), []
    for batch in (batch for epoch in range(4) for batch in without_noise(batches_of)(epoch)):
        optimizer.zero_grad()
        weight_B = batch["weight_B"]
        other(batch | {"share_B": weight_B / weight_B.sum()})["loss"].backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(other.parameters(), clip_norm or float("inf"))))
        optimizer.step()
    assert [step.terms["grad_norm"] for step in seen.steps] == pytest.approx(norms, rel=1e-4)
    assert min(norms) < 600 < max(norms)
    assert_same(other, model, rtol=1e-4, atol=1e-6)


def test_cuda_graphs_need_a_compiled_model_and_whole_batches():
    assert OptimConfig(1, 2, compile=True, cuda_graphs=True).cuda_graphs
    for wrong in ({"compile": False}, {"compile": True, "accumulate": 2}):
        with pytest.raises(LsemvaeError, match="cuda_graphs needs compile and accumulate=1"):
            OptimConfig(1, 2, cuda_graphs=True, **wrong)


class HalfFinite(torch.nn.Module):
    """A loss with a term that has no gradient: where it is infinite, the gradient of the rest is finite."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, batch: dict[str, Tensor], *, check: bool) -> dict[str, Tensor]:
        loss = (self.weight * batch["value"] * batch["share_B"]).sum() + batch["extra"]
        return {"loss": loss, "good_B": batch["value"].isfinite()}


def with_extra(*extras: float) -> list[dict[str, Tensor]]:
    return [{"value": torch.ones(2), "extra": torch.tensor(extra)} for extra in extras]


def test_a_step_whose_loss_alone_is_not_finite_moves_no_weight():
    model, good, config = HalfFinite(), HalfFinite(), OptimConfig(1, 2, learning_rate=0.1)
    seen = train(model, config, batches=lambda _: with_extra(0.0, float("inf"), 0.0), noise=False)
    assert seen.epochs[0].skipped == 1 and [step.index for step in seen.steps] == [0, 2]
    train(good, config, batches=lambda _: with_extra(0.0, 0.0), noise=False, steps_per_epoch=None)
    assert model.weight.item() == good.weight.item()


def test_a_run_that_diverges_ends_after_a_few_steps_in_a_row():
    """Three of six may be left out one after another; a good step in between begins the count anew."""
    inf, config = float("inf"), OptimConfig(1, 2, learning_rate=0.1)
    survives = with_extra(inf, inf, inf, 0.0, inf, inf, inf)
    seen = train(HalfFinite(), config, batches=lambda _: survives, noise=False, steps_per_epoch=None)
    assert seen.epochs[0].skipped == 6
    with pytest.raises(NonFiniteBatch, match=r"epoch 0, step 4: .*4 steps.*3 in a row: lower the learning rate"):
        train(
            HalfFinite(), config, batches=lambda _: with_extra(0.0, inf, inf, inf, inf, 0.0), noise=False,
            steps_per_epoch=None,
        )  # fmt: skip


def test_an_epoch_of_bad_steps_alone_ends_the_run():
    with pytest.raises(NonFiniteBatch, match="epoch 0, step 2"):
        train(model_of(), batches=damaged("inf", at=(0, 1, 2)))


def test_the_head_is_trained_by_the_same_loop():
    generator = torch.Generator().manual_seed(0)
    h_BF = torch.randn(60, 6, generator=generator)
    y_B = (h_BF[:, 0] > 0).long()
    torch.manual_seed(0)
    head, config = Head(6, dropout=0.0), OptimConfig(epochs=30, batch_size=60, learning_rate=1e-2)
    epochs = train(head, config, batches=lambda epoch: [{"h_BF": h_BF, "y_B": y_B}], noise=False).epochs
    assert epochs[-1].terms["loss"] < 0.3 * epochs[0].terms["loss"]


def test_the_learning_rate_rises_and_falls():
    constant = OptimConfig(epochs=1, batch_size=1, learning_rate=0.4, warmup_steps=4)
    assert [learning_rate(constant, step, 10) for step in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    cosine = OptimConfig(epochs=1, batch_size=1, learning_rate=0.4, schedule="cosine")
    assert [learning_rate(cosine, step, 8) for step in (0, 4, 8)] == pytest.approx([0.4, 0.2, 0.0], abs=1e-9)
    seen: list[float] = []
    model = model_of()
    config = OptimConfig(epochs=1, batch_size=10, learning_rate=0.4, schedule="cosine")
    optimizer = make_optimizer(model, config)
    train(model, config, optimizer=optimizer, on_step=lambda step: seen.append(optimizer.param_groups[0]["lr"]))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(learning_rate(config, STEPS - 1, STEPS))
    for needs in (config, constant):
        with pytest.raises(LsemvaeError, match="steps_per_epoch"):
            train(model_of(), needs, steps_per_epoch=None)


def test_an_epoch_can_end_the_run_and_needs_records():
    ends: list[int] = []

    def stop_after_second(epoch: Epoch) -> bool:
        ends.append(epoch.index)
        return epoch.index == 1

    train(model_of(), on_epoch=stop_after_second)
    assert ends == [0, 1]
    with pytest.raises(LsemvaeError, match="no training recordings"):
        train(model_of(), batches=lambda epoch: [])


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no state", "half a state"])
def test_a_part_of_a_checkpoint_is_no_checkpoint(damage: str, tmp_path: Path):
    model = model_of()
    optimizer = make_optimizer(model, OPTIM)
    train(model, optimizer=optimizer)
    save_optimizer(optimizer, tmp_path, epoch=2)
    assert read_state(tmp_path)["epoch"] == 2
    content = (tmp_path / OPTIMIZER).read_bytes()
    match damage:
        case "truncated":
            (tmp_path / OPTIMIZER).write_bytes(content[:-20])
        case "flipped":
            (tmp_path / OPTIMIZER).write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
        case "no state":
            (tmp_path / STATE).unlink()
        case "half a state":
            (tmp_path / STATE).write_text((tmp_path / STATE).read_text()[:9])
    with pytest.raises(BundleError, match=str(tmp_path)):
        read_state(tmp_path)


def test_beta_rises_by_step_and_stays():
    recipe = PRETRAIN["smoke"]  # two epochs of warm-up
    scales = [kl_scale(recipe, epoch, step, steps=4) for epoch in range(4) for step in range(4)]
    assert scales[:8] == [n / 8 for n in range(8)]
    assert scales[8:] == [1.0] * 8
    np.testing.assert_array_less(np.diff(scales[:9]), 0.13)
