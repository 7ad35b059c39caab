"""Circular shifts in time: where the beats fall in a window is chance, so features should not depend on it.

A shift is a share of the recording's length, from 0 to below 1: at 0.25 the recording begins a quarter later and its
first quarter follows its end. Only the recorded part is shifted: the zeros that pad a short recording stay at the end.
"""

import torch
from torch import Tensor

LEAST_VARIANCE = 1e-6
"""Added to a variance over shifts, so that its root has a gradient where a feature does not vary."""


def recorded_samples(x_BLT: Tensor) -> Tensor:
    """Samples before the zeros that pad a short recording, [B]; the whole window where there is no signal at all.

    Preprocessing writes exact zeros after a short recording and in absent leads. A filtered signal holds none, but for
    chance: so the last sample that is not zero in every lead is the last recorded one.
    """
    samples = x_BLT.shape[-1]
    signal_BT = (x_BLT != 0).any(dim=1)
    last_B = samples - signal_BT.flip(1).to(torch.uint8).argmax(dim=1)
    return torch.where(signal_BT.any(dim=1), last_B, samples)


def each_shifted(x_BLT: Tensor, shift_B: Tensor) -> Tensor:
    """Each record under its own circular shift, by whole samples. Nothing has to wait for the device."""
    size_B1 = recorded_samples(x_BLT).unsqueeze(1)
    at_1T = torch.arange(x_BLT.shape[-1], device=x_BLT.device).unsqueeze(0)
    from_BT = (at_1T + (shift_B.unsqueeze(1) * size_B1).long()) % size_B1
    from_BT = torch.where(at_1T < size_B1, from_BT, at_1T)
    return x_BLT.gather(2, from_BT.unsqueeze(1).expand_as(x_BLT))


def shifted(h: Tensor, size_B: Tensor, shift: float) -> Tensor:
    """[…, B, C, P] shifted circularly along P within the first size_B positions of each record.

    For a shift of 0.25, position p holds what was at p + size / 4. Records of one size are shifted together.
    """
    positions = h.shape[-1]
    sizes = size_B.unique().tolist()
    if sizes == [positions]:
        return torch.roll(h, -int(shift * positions), dims=-1)
    result = h.clone()
    for size in sizes:
        rows = size_B == size
        result[..., rows, :, :size] = torch.roll(h[..., rows, :, :size], -int(shift * size), dims=-1)
    return result


def evenly(count: int) -> list[float]:
    """So many shifts, evenly over the recording; the first is none."""
    return [number / count for number in range(count)]
