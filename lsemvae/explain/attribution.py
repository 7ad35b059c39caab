"""Integrated gradients of the score with respect to the model's input (Sundararajan et al. 2017, arXiv 1703.01365).

What is explained is the logit of the score that is served: mean over the classifier's circular shifts, through the
pooling of features where there is one. An attribution is in units of the logit: those of a record sum to the difference
between its logit and that of the baseline. What is left of that difference is the convergence delta.

The integral over the straight path from the baseline to the recording is computed by captum with Gauss-Legendre points.
Where its delta is too large, the path is cut: the logits at both ends of a piece give the delta of that piece alone, so
only the pieces with the largest deltas are halved. Worked example with 32 points, a bound of 0.01 and a difference of
2: the whole path is 0.05 off, more than 0.02. Its halves are 0.002 and 0.03 off: the second is halved again. Its
quarters are 0.001 and 0.004 off, so 0.007 in all is left, after 32 x 5 = 160 points.

A model that standardises its own input (TimesFM, and ECG-FM except for weak signals) does not depend on the amplitude.
From a zero baseline its attributions sum to almost nothing. The baseline "expected" explains it better.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from captum.attr import IntegratedGradients
from torch import Tensor

from lsemvae.errors import LsemvaeError
from lsemvae.models.parts.shifts import recorded_samples

Item = TypeVar("Item")
Baseline = Literal["zero", "mean-beat", "expected"]
"""zero: no signal. mean-beat: the mean beat of reference recordings at each beat of the recording. expected: the mean
over reference recordings as baselines (expected gradients, Erion et al. 2021)."""

START = 1e-4
"""The logit of a baseline is extrapolated from those after this share of its path and after twice as much. There the
zeros that pad a short recording can be told from it. At zeros alone models take the padding for signal, and the logit
jumps."""
LEAST, LEAST_SHARE = 0.1, 0.1
"""The bound is relative to the logit's difference from the baseline. Where the difference is small it is relative to
0.1, or to a tenth of the sum of all absolute attributions if that is more. So with a bound of 0.01 the missing part is
at most 1 % of the difference, or 0.001, or a thousandth of what the shares of leads and waves are shares of."""
SHORTEST = 2**-12
"""The share of a path that is not halved again: there the logit jumps, which no number of points resolves."""
SAVED_BYTES = {"cpu": 2**30, "cuda": 2**33}
"""What a pass over several points may keep in memory for its gradient."""
POINTS = {"cpu": 64, "cuda": 512}
"""The points of a pass where memory allows more. See docs/performance.md."""


@dataclass(frozen=True)
class Settings:
    """How attributions are computed.

    steps       points on the way from the baseline to the recording; more are taken until `bound` holds
    bound       largest convergence delta, as a share of the logit's difference from the baseline; see `limit`
    most_steps  where the bound does not hold with so many, the delta that is left is reported
    references  "expected": how many reference recordings are drawn; they share the steps
    seed        of that drawing
    """

    baseline: Baseline = "zero"
    steps: int = 16
    bound: float = 0.01
    most_steps: int = 512
    references: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= self.most_steps or self.references < 1:
            raise LsemvaeError(
                f"steps is {self.steps}, most_steps {self.most_steps} and references {self.references}: give 1 or "
                "more, and most_steps no smaller than steps"
            )
        if not self.bound > 0:
            raise LsemvaeError(f"bound is {self.bound}: give a number above 0, as 0.01")

    def limit(self, difference: float, total: float) -> float:
        """The largest delta of a record whose logit differs so much from its baseline's.

        `total` is the sum of all its absolute attributions. See `LEAST`.
        """
        return self.bound * max(abs(difference), LEAST, LEAST_SHARE * total)


class Attributions(NamedTuple):
    """values_BLT in units of the logit, exactly 0 in absent leads; and for each record how they were computed.

    delta_B is the sum of the values less (logit_B - baseline_logit_B), and steps_B the points that were taken. With
    several baselines, baseline_logit_B is the mean of their logits.
    """

    values_BLT: np.ndarray
    logit_B: np.ndarray
    baseline_logit_B: np.ndarray
    delta_B: np.ndarray
    steps_B: np.ndarray


def attribute(
    model: Any, x_BLT: Tensor, lead_mask_BL: Tensor, settings: Settings, baseline: Tensor | None = None
) -> Attributions:
    """Attributions of `model.logit`, for a model in evaluation mode; the model is not changed.

    `baseline` is what `settings.baseline` asks for: [B, L, T]; or [R, B, L, T], and the attributions are then the means
    over R paths; None is zeros. It counts as zero in absent leads and in the padding of short recordings.

    Raises LsemvaeError where the model gives no gradient.
    """
    assert not model.training, "call eval() first: dropout would change the score from point to point"
    with torch.inference_mode(False):
        paths = _Paths(model, x_BLT, lead_mask_BL, baseline)
        points = max(1, min(settings.steps, settings.most_steps) // len(paths.start_RBLT))
        records = [_Record(row, paths, settings) for row in range(len(x_BLT))]
        todo = [piece for record in records for piece in record.whole()]
        while todo:
            for piece, values_LT in paths.integrated(todo, points):
                records[piece.row].keep(piece, values_LT, points)
            todo = [piece for record in records for piece in record.to_halve(points)]
            paths.evaluate(todo)
    values_BLT = np.stack([record.values_LT() for record in records]) if records else np.zeros(x_BLT.shape, np.float32)
    difference_B = paths.logit_B - paths.start_logit_B
    return Attributions(
        values_BLT,
        paths.logit_B.astype(np.float32),
        paths.start_logit_B.astype(np.float32),
        (values_BLT.sum(axis=(1, 2), dtype=np.float64) - difference_B).astype(np.float32),
        np.array([record.steps for record in records], dtype=int),
    )


@torch.inference_mode()
def logits(model: Any, x_BLT: Tensor, lead_mask_BL: Tensor) -> np.ndarray:
    """logit_B in float64, with a bounded number of records in one pass."""
    size = POINTS.get(x_BLT.device.type, POINTS["cpu"])
    parts = zip(x_BLT.split(size), lead_mask_BL.split(size), strict=True)
    found = [model.logit(x, mask).double().cpu().numpy() for x, mask in parts if len(x)]
    return np.concatenate(found) if found else np.zeros(0)


class _Piece(NamedTuple):
    """Of the path from baseline `path` to record `row`, what lies between two shares of its length."""

    row: int
    path: int
    low: float
    high: float

    def halves(self) -> tuple["_Piece", "_Piece"]:
        middle = (self.low + self.high) / 2
        return self._replace(high=middle), self._replace(low=middle)


class _Paths:
    """The straight paths from R baselines to each record, and the logits at the ends of their pieces."""

    def __init__(self, model: Any, x_BLT: Tensor, lead_mask_BL: Tensor, baseline: Tensor | None) -> None:
        self.mask_BL, self._model = lead_mask_BL.clone(), model
        self.x_BLT = torch.where(self.mask_BL.unsqueeze(2), x_BLT, 0.0)  # an absent lead may hold NaN
        at_T = torch.arange(x_BLT.shape[2], device=x_BLT.device)
        recorded_BLT = self.mask_BL.unsqueeze(2) & (at_T < recorded_samples(self.x_BLT)[:, None])[:, None]
        start_RBLT = torch.zeros_like(self.x_BLT) if baseline is None else torch.where(recorded_BLT, baseline, 0.0)
        self.start_RBLT = start_RBLT if start_RBLT.ndim == 4 else start_RBLT.unsqueeze(0)
        self._method = IntegratedGradients(model.logit)
        self._method.gradient_func = _gradient
        self._size = _points_at_once(model, self.x_BLT[:1], self.mask_BL[:1])
        self.logit_B = logits(model, self.x_BLT, self.mask_BL)
        start_logit_RB = np.stack([self._start_logit(model, start_BLT) for start_BLT in self.start_RBLT])
        self.start_logit_B = start_logit_RB.mean(axis=0)
        self._logit = {(row, r, 0.0): value for (r, row), value in np.ndenumerate(start_logit_RB)}
        self._logit |= {(row, r, 1.0): self.logit_B[row] for r, row in np.ndindex(start_logit_RB.shape)}

    def _start_logit(self, model: Any, start_BLT: Tensor) -> np.ndarray:
        near_B, far_B = (logits(model, start_BLT.lerp(self.x_BLT, share), self.mask_BL) for share in (START, 2 * START))
        return 2 * near_B - far_B

    def difference(self, piece: _Piece) -> float:
        """How much the logit rises along the piece."""
        return float(self._logit[piece.row, piece.path, piece.high] - self._logit[piece.row, piece.path, piece.low])

    def evaluate(self, pieces: Sequence[_Piece]) -> None:
        """Computes the logits at the ends of these pieces that are not known yet."""
        ends = [(piece.row, piece.path, at) for piece in pieces for at in (piece.low, piece.high)]
        ends = [end for end in dict.fromkeys(ends) if end not in self._logit]
        for some in _groups(ends, self._size):
            x_BLT = torch.stack([self._at(*end) for end in some])
            mask_BL = self.mask_BL[[row for row, _, _ in some]]
            self._logit.update(zip(some, logits(self._model, x_BLT, mask_BL), strict=True))

    def integrated(self, pieces: Sequence[_Piece], points: int) -> Iterator[tuple[_Piece, Tensor]]:
        """Each piece with its attributions, [L, T] on the CPU, from so many points."""
        for some in _groups(pieces, self._size):
            low_BLT = torch.stack([self._at(piece.row, piece.path, piece.low) for piece in some])
            high_BLT = torch.stack([self._at(piece.row, piece.path, piece.high) for piece in some])
            values_BLT = self._method.attribute(
                high_BLT,
                low_BLT,
                additional_forward_args=(self.mask_BL[[piece.row for piece in some]],),
                n_steps=points,
                internal_batch_size=self._size,
            )
            yield from zip(some, values_BLT.detach().float().cpu(), strict=True)

    def _at(self, row: int, path: int, share: float) -> Tensor:
        x_LT = self.x_BLT[row]
        return x_LT if share == 1 else self.start_RBLT[path, row].lerp(x_LT, share)


class _Record:
    """The pieces of one record's paths: what is found so far, and what must be halved."""

    def __init__(self, row: int, paths: _Paths, settings: Settings) -> None:
        self.steps = 0
        self._row, self._paths, self._settings = row, paths, settings
        self._found: dict[_Piece, tuple[Tensor, float]] = {}
        self._difference = float(paths.logit_B[row] - paths.start_logit_B[row])

    def whole(self) -> list[_Piece]:
        """Each path in one piece."""
        return [_Piece(self._row, path, 0.0, 1.0) for path in range(len(self._paths.start_RBLT))]

    def keep(self, piece: _Piece, values_LT: Tensor, points: int) -> None:
        """Adds a piece; its delta is known from the logits at its ends."""
        delta = float(values_LT.sum(dtype=torch.float64)) - self._paths.difference(piece)
        self._found[piece] = (values_LT, delta / len(self._paths.start_RBLT))
        self.steps += points

    def to_halve(self, points: int) -> list[_Piece]:
        """The halves of the pieces with the largest deltas, as many as `most_steps` allows; none where the bound holds.

        A piece is halved where its delta is more than an even share of the limit. Where the bound does not hold there
        is such a piece.
        """
        deltas = {piece: delta for piece, (_, delta) in self._found.items()}
        limit = self._settings.limit(self._difference, float(np.abs(self.values_LT()).sum()))
        if abs(sum(deltas.values())) <= limit:
            return []
        too_large = [
            piece
            for piece, delta in deltas.items()
            if abs(delta) * len(deltas) > limit and piece.high - piece.low > SHORTEST
        ]
        too_large.sort(key=lambda piece: -abs(deltas[piece]))
        worst = too_large[: max(0, self._settings.most_steps - self.steps) // (2 * points)]
        for piece in worst:
            del self._found[piece]
        return [half for piece in worst for half in piece.halves()]

    def values_LT(self) -> np.ndarray:
        """The sum over pieces, and mean over paths, in float32."""
        total_LT = torch.stack([values_LT for values_LT, _ in self._found.values()]).sum(dim=0)
        return (total_LT / len(self._paths.start_RBLT)).numpy()


def _gradient(
    forward_fn: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    target_ind: object = None,
    additional_forward_args: tuple[Tensor, ...] = (),
) -> tuple[Tensor, ...]:
    """What captum calls for gradients: those of the inputs alone, and an error where there are none."""
    with torch.enable_grad():
        logit_B = forward_fn(*inputs, *additional_forward_args)
        found: Sequence[Tensor | None] = [None]
        if logit_B.requires_grad:
            found = torch.autograd.grad(logit_B.sum(), inputs, allow_unused=True)
    gradients = tuple(gradient for gradient in found if gradient is not None)
    if len(gradients) < len(inputs):
        raise LsemvaeError(
            "the model gives no gradient with respect to its input: integrated gradients cannot be computed. Occlusion "
            "(lsemvae.explain.occlusion) needs none"
        )
    return gradients


def _points_at_once(model: Any, x_BLT: Tensor, lead_mask_BL: Tensor) -> int:
    """How many points a pass may hold, from what one point keeps for its gradient."""
    device = x_BLT.device.type if x_BLT.device.type in POINTS else "cpu"
    if not len(x_BLT):
        return POINTS[device]
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _gradient(model.logit, (x_BLT.clone().requires_grad_(),), additional_forward_args=(lead_mask_BL,))
    return min(POINTS[device], max(1, SAVED_BYTES[device] // max(1, sum(kept.values()))))


def _groups(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
