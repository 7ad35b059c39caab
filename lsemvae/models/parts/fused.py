"""The three convolutions of all lead encoders as one Triton kernel, whose activations between them are never stored.

`LeadEncoders._grouped` and `_lead_by_lead` define what this computes; tests compare them. The kernel reads the input
once and writes the heads' input; the backward pass reads both, and the gradient, and computes the rest again.

How it is tiled. A row is one output position p of one record; a program takes tiles of ROWS rows of one lead. A row
needs three positions of the second convolution, 2p + a for a = -1, 0, 1. Each of them needs three of the first, the
slots 4p + 2a - 1, 4p + 2a, 4p + 2a + 1, and those seven samples, 8p + 4a - 3 … 8p + 4a + 3. For p = 2:

    a = -1:  samples  5 … 11  ->  slots  5,  6,  7  ->  second 3  \\
    a =  0:  samples  9 … 15  ->  slots  7,  8,  9  ->  second 4   ->  third 2
    a =  1:  samples 13 … 19  ->  slots  9, 10, 11  ->  second 5  /

So a row needs nothing of its neighbours, and everything is a product of matrices:

    window [ROWS, 16] · first [16, 4 C1] -> slots · second [4 C1, C2] -> s_a;   third = sum over a of s_a · third_a

`first` holds the taps of each slot beside their samples: slot t has its three taps in the rows 2t, 2t + 1, 2t + 2. The
window's column 7 is 1, and row 7 of `first` holds the biases. It also sets one number of the spare fourth slot to 1, so
that the row of `second` for that number holds the second biases. The same three products run backwards. What two rows
share is computed twice, and its gradient is the sum of what both give: 15,360 multiplications a row where 9,408 would
do at full size. Positions before the recording exist only where p = 0; they are zeros there, as padding is.

Each program sums the weight gradients of its rows in registers and writes them once; torch adds the programs', always
in the same order.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 64
"""Rows of a tile."""
PROGRAMS = 528
"""About how many programs share the work: four for each of an H100's 132 multiprocessors."""
FORWARD_WARPS, BACKWARD_WARPS = 4, 8


def convolutions(x_BLT: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The input of the heads, [L, B, F], in autocast's precision. There is no gradient of x_BLT.

    `parameters`: weights [L, outputs, inputs, 3] and biases [L, outputs] of the three convolutions, in turn.
    """
    kind = x_BLT.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_BLT.dtype
    channels = parameters[4].shape[1]
    return _convolutions(x_BLT.to(dtype).contiguous(), *_matrices(parameters), channels).flatten(2)


def _matrices(parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """first [L, 16, 4 P1], second [L, 4 P1, P2], third [L, 3, P2, P3] and its bias [L, P3], filled up with zeros.

    P: the number of channels, as a power of two that is 16 at least, as the sides of a product must be.
    """
    w1, b1, w2, b2, w3, b3 = parameters
    c1, c2, c3 = (weight.shape[1] for weight in (w1, w2, w3))
    p1, p2, p3 = (max(16, triton.next_power_of_2(channels)) for channels in (c1, c2, c3))
    leads = len(w1)
    first = w1.new_zeros(leads, 16, 4, p1)
    for slot in range(3):
        first[:, 2 * slot : 2 * slot + 3, slot, :c1] = w1[:, :, 0].transpose(1, 2)
        first[:, 7, slot, :c1] = b1
    first[:, 7, 3, 0] = 1
    second = w2.new_zeros(leads, 4, p1, p2)
    second[:, :3, :c1, :c2] = w2.permute(0, 3, 2, 1)
    second[:, 3, 0, :c2] = b2
    third = w3.new_zeros(leads, 3, p2, p3)
    third[:, :, :c2, :c3] = w3.permute(0, 3, 2, 1)
    bias = b3.new_zeros(leads, p3)
    bias[:, :c3] = b3
    return first.flatten(2), second.flatten(1, 2), third, bias


@torch.library.custom_op("lsemvae::lead_convolutions", mutates_args=())
def _convolutions(x_BLT: Tensor, first: Tensor, second: Tensor, third: Tensor, bias: Tensor, channels: int) -> Tensor:
    h_LBCP = _empty(x_BLT, first, second, third, bias, channels)
    _forward[_grid(x_BLT)](
        x_BLT, first, second, third, bias, h_LBCP, **_sizes(x_BLT, first, third, channels), num_warps=FORWARD_WARPS
    )
    return h_LBCP


@_convolutions.register_fake
def _empty(x_BLT: Tensor, first: Tensor, second: Tensor, third: Tensor, bias: Tensor, channels: int) -> Tensor:
    records, leads, samples = x_BLT.shape
    return x_BLT.new_empty(leads, records, channels, samples // 8)


@torch.library.custom_op("lsemvae::lead_convolutions_backward", mutates_args=())
def _gradients(
    x_BLT: Tensor, first: Tensor, second: Tensor, third: Tensor, bias: Tensor, h_LBCP: Tensor, dh_LBCP: Tensor
) -> list[Tensor]:
    grid = _grid(x_BLT)
    matrices = (first, second, third, bias)
    parts = [torch.empty(len(m), grid[1], *m.shape[1:], dtype=torch.float32, device=m.device) for m in matrices]
    _backward[grid](
        x_BLT, first, second, third, h_LBCP, dh_LBCP.contiguous(), *parts,
        **_sizes(x_BLT, first, third, h_LBCP.shape[2]), num_warps=BACKWARD_WARPS,
    )  # fmt: skip
    return [part.sum(dim=1).to(matrix.dtype) for part, matrix in zip(parts, matrices, strict=True)]


@_gradients.register_fake
def _empty_gradients(
    x_BLT: Tensor, first: Tensor, second: Tensor, third: Tensor, bias: Tensor, h_LBCP: Tensor, dh_LBCP: Tensor
) -> list[Tensor]:
    return [torch.empty_like(matrix) for matrix in (first, second, third, bias)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5], output)


def _differentiate(ctx: Any, dh_LBCP: Tensor) -> tuple[Tensor | None, ...]:
    return None, *_gradients(*ctx.saved_tensors, dh_LBCP), None


_convolutions.register_autograd(_differentiate, setup_context=_keep)


def _grid(x_BLT: Tensor) -> tuple[int, int]:
    """Programs: a lead, and a part of its tiles."""
    records, leads, samples = x_BLT.shape
    return leads, max(1, min(triton.cdiv(records * samples // 8, ROWS), triton.cdiv(PROGRAMS, leads)))


def _sizes(x_BLT: Tensor, first: Tensor, third: Tensor, channels: int) -> dict[str, int]:
    records, leads, samples = x_BLT.shape
    sizes = {"SLOTS": first.shape[2], "P2": third.shape[2], "P3": third.shape[3], "C3": channels, "ROWS": ROWS}
    return {"records": records, "leads": leads, "positions": samples // 8} | sizes


# The kernels. R: the rows of a tile; J: the window; K: slots; M, N: channels of the second and the third convolution.

# Triton's interpreter multiplies the bits of bf16 numbers, and cuts float32 to bf16 off where a GPU rounds.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _rounded(value: tl.tensor, like: tl.tensor) -> tl.tensor:
    """The float32 numbers in the type of `like`, to the nearest."""
    if _INTERPRETED and like.dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        value = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return value.to(like.dtype)


@triton.jit
def _product(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    if _INTERPRETED:  # in float32 the products of bf16 numbers are exact, as in a tensor core
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")  # float32 stays float32: by default Triton would round to TF32


@triton.jit
def _rectified(value: tl.tensor, like: tl.tensor) -> tl.tensor:
    # A NaN stays a NaN, as in torch: the loss of a damaged record must not be finite.
    return _rounded(tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL), like)


@triton.jit
def _through(gradient: tl.tensor, output: tl.tensor) -> tl.tensor:
    """A gradient back through the ReLU that gave `output`."""
    return _rounded(tl.where(output > 0, gradient, 0.0), output)


@triton.jit
def _matrix(pointer: tl.tensor, at: tl.tensor, M: tl.constexpr, N: tl.constexpr) -> tl.tensor:
    """The places of matrix number `at` of those at the pointer, [M, N]."""
    return pointer + at * (M * N) + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]


@triton.jit
def _rows(
    tile: tl.tensor, lead: tl.tensor, records: tl.tensor, leads: tl.tensor, positions: tl.tensor, ROWS: tl.constexpr
) -> tl.tensor:
    """Record and position of each row of a tile, whether it exists, and where its recording of the lead begins."""
    row_R = tile * ROWS + tl.arange(0, ROWS)
    record_R = (row_R // positions).to(tl.int64)
    return record_R, row_R % positions, row_R < records * positions, (record_R * leads + lead) * (8 * positions)


@triton.jit
def _first_two(
    x_ptr: tl.tensor, first_ptr: tl.tensor, second_ptr: tl.tensor, lead: tl.tensor, SLOTS: tl.constexpr,
    P2: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """An element of the input's type, and the matrices of the lead's first two convolutions in that type."""
    like = tl.zeros([1], x_ptr.dtype.element_ty)
    first_JK = _rounded(tl.load(_matrix(first_ptr, lead, 16, SLOTS)), like)
    return like, first_JK, _rounded(tl.load(_matrix(second_ptr, lead, SLOTS, P2)), like)


@triton.jit
def _second(
    x_ptr: tl.tensor, start_R: tl.tensor, position_R: tl.tensor, there_R: tl.tensor, first_JK: tl.tensor,
    second_KM: tl.tensor, a: tl.constexpr, SLOTS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The window, the slots and the second convolution at 2p + a. `start`: where a row's recording begins."""
    at_J = tl.arange(0, 16)[None, :]
    sample_RJ = 8 * position_R[:, None] + (4 * a - 3) + at_J
    inside_RJ = there_R[:, None] & (at_J < 7) & (sample_RJ >= 0)
    x_RJ = tl.load(x_ptr + start_R[:, None] + sample_RJ, mask=inside_RJ, other=0.0)
    zero = tl.zeros([1, 1], x_RJ.dtype)
    x_RJ = tl.where(at_J == 7, (zero.to(tl.float32) + 1.0).to(x_RJ.dtype), x_RJ)
    later_R1 = (position_R > 0)[:, None]
    slot_RK = _rectified(_product(x_RJ, first_JK), x_RJ)
    if a == 0:  # the slot at 4p - 1
        slot_RK = tl.where(later_R1 | (tl.arange(0, SLOTS) >= SLOTS // 4)[None, :], slot_RK, zero)
    s_RM = _rectified(_product(slot_RK, second_KM), x_RJ)
    if a < 0:  # the second convolution at 2p - 1
        s_RM = tl.where(later_R1, s_RM, zero)
    return x_RJ, slot_RK, s_RM


@triton.jit
def _output(
    lead: tl.tensor, record_R: tl.tensor, position_R: tl.tensor, there_R: tl.tensor, records: tl.tensor,
    positions: tl.tensor, C3: tl.constexpr, P3: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Where a tile's outputs are in [L, B, C, P], and which exist."""
    at_N = tl.arange(0, P3)[None, :]
    start_R = (lead * records + record_R) * (C3 * positions) + position_R
    return start_R[:, None] + at_N * positions, there_R[:, None] & (at_N < C3)


@triton.jit
def _forward(
    x_ptr: tl.tensor, first_ptr: tl.tensor, second_ptr: tl.tensor, third_ptr: tl.tensor, bias_ptr: tl.tensor,
    h_ptr: tl.tensor, records: tl.tensor, leads: tl.tensor, positions: tl.tensor,
    SLOTS: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr, C3: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    lead = tl.program_id(0)
    like, first_JK, second_KM = _first_two(x_ptr, first_ptr, second_ptr, lead, SLOTS, P2)
    bias_N = tl.load(bias_ptr + lead * P3 + tl.arange(0, P3))
    for tile in range(tl.program_id(1), tl.cdiv(records * positions, ROWS), tl.num_programs(1)):
        record_R, position_R, there_R, start_R = _rows(tile, lead, records, leads, positions, ROWS)
        sum_RN = tl.zeros([ROWS, P3], tl.float32) + bias_N[None, :]
        for a in tl.static_range(-1, 2):
            _, _, s_RM = _second(x_ptr, start_R, position_R, there_R, first_JK, second_KM, a, SLOTS)
            third_MN = _rounded(tl.load(_matrix(third_ptr, 3 * lead + a + 1, P2, P3)), like)
            sum_RN += _product(s_RM, third_MN)
        place_RN, inside_RN = _output(lead, record_R, position_R, there_R, records, positions, C3, P3)
        tl.store(h_ptr + place_RN, _rectified(sum_RN, like), mask=inside_RN)


@triton.jit
def _backward(
    x_ptr: tl.tensor, first_ptr: tl.tensor, second_ptr: tl.tensor, third_ptr: tl.tensor, h_ptr: tl.tensor,
    dh_ptr: tl.tensor, dfirst_ptr: tl.tensor, dsecond_ptr: tl.tensor, dthird_ptr: tl.tensor, dbias_ptr: tl.tensor,
    records: tl.tensor, leads: tl.tensor, positions: tl.tensor,
    SLOTS: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr, C3: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    lead = tl.program_id(0)
    like, first_JK, second_KM = _first_two(x_ptr, first_ptr, second_ptr, lead, SLOTS, P2)
    dfirst_JK, dsecond_KM = tl.zeros([16, SLOTS], tl.float32), tl.zeros([SLOTS, P2], tl.float32)
    before_MN = tl.zeros([P2, P3], tl.float32)  # of `third`: a = -1, 0, 1
    at_MN = tl.zeros([P2, P3], tl.float32)
    after_MN = tl.zeros([P2, P3], tl.float32)
    dbias_N = tl.zeros([P3], tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(records * positions, ROWS), tl.num_programs(1)):
        record_R, position_R, there_R, start_R = _rows(tile, lead, records, leads, positions, ROWS)
        place_RN, inside_RN = _output(lead, record_R, position_R, there_R, records, positions, C3, P3)
        h_RN = tl.load(h_ptr + place_RN, mask=inside_RN, other=0.0)
        g_RN = _through(tl.load(dh_ptr + place_RN, mask=inside_RN, other=0.0).to(tl.float32), h_RN)
        dbias_N += tl.sum(g_RN.to(tl.float32), axis=0)
        for a in tl.static_range(-1, 2):
            x_RJ, slot_RK, s_RM = _second(x_ptr, start_R, position_R, there_R, first_JK, second_KM, a, SLOTS)
            dthird_MN = _product(tl.trans(s_RM), g_RN)
            if a == -1:
                before_MN += dthird_MN
            elif a == 0:
                at_MN += dthird_MN
            else:
                after_MN += dthird_MN
            third_MN = _rounded(tl.load(_matrix(third_ptr, 3 * lead + a + 1, P2, P3)), like)
            ds_RM = _through(_product(g_RN, tl.trans(third_MN)), s_RM)
            dsecond_KM += _product(tl.trans(slot_RK), ds_RM)
            dslot_RK = _through(_product(ds_RM, tl.trans(second_KM)), slot_RK)
            dfirst_JK += _product(tl.trans(x_RJ), dslot_RK)

    part = lead * tl.num_programs(1) + tl.program_id(1)
    tl.store(_matrix(dfirst_ptr, part, 16, SLOTS), dfirst_JK)
    tl.store(_matrix(dsecond_ptr, part, SLOTS, P2), dsecond_KM)
    tl.store(_matrix(dthird_ptr, 3 * part, P2, P3), before_MN)
    tl.store(_matrix(dthird_ptr, 3 * part + 1, P2, P3), at_MN)
    tl.store(_matrix(dthird_ptr, 3 * part + 2, P2, P3), after_MN)
    tl.store(dbias_ptr + part * P3 + tl.arange(0, P3), dbias_N)
