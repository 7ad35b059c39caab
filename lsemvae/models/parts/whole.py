"""What encoders that read all leads together share: their input, circular shifts, pooling, and Transformer layers.

Their features belong to no single lead. Every feature is observed where a recording has any lead at all.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsemvae.errors import LsemvaeError
from lsemvae.leads import in_order
from lsemvae.models.contract import Encoder, Features
from lsemvae.models.parts import shifts
from lsemvae.models.parts.fusion import full_precision

POOLED_SHIFTS = 8
"""Circular shifts that pooled features are computed over."""
_REFERENCE_RECORDS = 8


def masked(x_BLT: Tensor, lead_mask_BL: Tensor, leads: Sequence[str], samples: int) -> Tensor:
    """The input with zeros in place of absent leads. Raises LsemvaeError on a shape that these leads do not have."""
    expected = (len(leads), samples)
    if x_BLT.ndim != 3 or x_BLT.shape[1:] != expected or lead_mask_BL.shape != x_BLT.shape[:2]:
        raise LsemvaeError(
            f"the input is {list(x_BLT.shape)} with a mask {list(lead_mask_BL.shape)}: give [batch, "
            f"{expected[0]}, {expected[1]}] and [batch, {expected[0]}] for {', '.join(leads)}"
        )
    return torch.where(lead_mask_BL.unsqueeze(-1), x_BLT, torch.zeros_like(x_BLT))


class WholeEncoder(nn.Module, ABC):
    """Base of these encoders; see `lsemvae.models.contract.Encoder`. A subclass has `embedding_size` and `features`."""

    by_lead: ClassVar[Mapping[str, int]] = {}
    """Parameters with one row for each lead, and the dimension of the rows."""

    def __init__(self, config: Any, leads: Sequence[str]) -> None:
        super().__init__()
        self.config = config
        self.leads = in_order(leads)

    @property
    @abstractmethod
    def embedding_size(self) -> int:
        """F."""

    @abstractmethod
    def features(self, x_BLT: Tensor, lead_mask_BL: Tensor) -> Tensor:
        """h_BF of an input that holds zeros in absent leads."""

    def masked(self, x_BLT: Tensor, lead_mask_BL: Tensor) -> Tensor:
        """The input with zeros in place of absent leads. Raises LsemvaeError on a wrong shape."""
        return masked(x_BLT, lead_mask_BL, self.leads, self.config.samples)

    def embed(self, x_BLT: Tensor, lead_mask_BL: Tensor) -> Tensor:
        """h_BF; zeros for a recording without any lead."""
        h_BF = full_precision(self.features(self.masked(x_BLT, lead_mask_BL), lead_mask_BL))
        return torch.where(lead_mask_BL.any(dim=1, keepdim=True), h_BF, torch.zeros_like(h_BF))

    def observed(self, lead_mask_BL: Tensor) -> Tensor:
        """[B, F] bool: every feature holds something of a recording with any lead."""
        return lead_mask_BL.any(dim=1, keepdim=True).expand(-1, self.embedding_size)

    def embed_shifted(self, x_BLT: Tensor, lead_mask_BL: Tensor, shift_S: Sequence[float]) -> Tensor:
        """As `embed`, of the recording under each circular shift, h_SBF. Shifts are by whole samples of the input."""
        x_BLT = self.masked(x_BLT, lead_mask_BL)
        size_B = shifts.recorded_samples(x_BLT)
        return torch.stack([self.embed(shifts.shifted(x_BLT, size_B, shift), lead_mask_BL) for shift in shift_S])

    def select(self, leads: Sequence[str], **options: Any) -> Self:
        """The encoder of the named leads with the same weights; it shares memory where no row is left out.

        It gives what this encoder gives where the other leads are absent. `options` are the constructor's. Raises
        LsemvaeError on a lead that this encoder does not read.
        """
        leads = in_order(leads)
        absent = [lead for lead in leads if lead not in self.leads]
        if absent:
            raise LsemvaeError(f"no encoder for lead {', '.join(absent)}: this model reads {', '.join(self.leads)}")
        with torch.device("meta"):
            chosen = type(self)(self.config, leads, **options)
        state = self.state_dict()
        if leads != self.leads:
            for name, dim in self.by_lead.items():
                rows = torch.tensor([self.leads.index(lead) for lead in leads], device=state[name].device)
                state[name] = state[name].index_select(dim, rows)
        chosen.load_state_dict({name: state[name] for name in chosen.state_dict()}, assign=True)
        return chosen.train(self.training)


class WholeModel(nn.Module):
    """A model that pre-trains round one `WholeEncoder`: it embeds as its encoder does."""

    encoder: WholeEncoder

    def __init__(self, config: Any, leads: Sequence[str]) -> None:
        super().__init__()
        self.config = config
        self.leads = in_order(leads)

    @property
    def embedding_size(self) -> int:
        """F."""
        return self.encoder.embedding_size

    def embed(self, x_BLT: Tensor, lead_mask_BL: Tensor) -> Tensor:
        """h_BF; zeros for a recording without any lead."""
        return self.encoder.embed(x_BLT, lead_mask_BL)

    def observed(self, lead_mask_BL: Tensor) -> Tensor:
        """[B, F] bool: every feature holds something of a recording with any lead."""
        return self.encoder.observed(lead_mask_BL)


class ShiftPooled(nn.Module):
    """Mean and standard deviation of an encoder's features over even circular shifts: F is twice the encoder's.

    So the features hardly depend on where the beats fall in the window.
    """

    def __init__(self, inner: WholeEncoder) -> None:
        super().__init__()
        self.inner = inner
        self.leads = inner.leads

    @property
    def embedding_size(self) -> int:
        """F."""
        return 2 * self.inner.embedding_size

    def embed(self, x_BLT: Tensor, lead_mask_BL: Tensor) -> Tensor:
        """h_BF: first all means, then all deviations; zeros where nothing was observed."""
        h_SBF = self.inner.embed_shifted(x_BLT, lead_mask_BL, shifts.evenly(POOLED_SHIFTS))
        deviation_BF = (h_SBF.var(dim=0, correction=0) + shifts.LEAST_VARIANCE).sqrt()
        h_BF = torch.cat([h_SBF.mean(dim=0), deviation_BF], dim=1)
        return torch.where(self.observed(lead_mask_BL), h_BF, torch.zeros_like(h_BF))

    def observed(self, lead_mask_BL: Tensor) -> Tensor:
        """Which features hold something of the recording, [B, F] bool."""
        return self.inner.observed(lead_mask_BL).repeat(1, 2)

    def embed_shifted(self, x_BLT: Tensor, lead_mask_BL: Tensor, shift_S: Sequence[float]) -> Tensor:
        """h_SBF, the same for each shift: the features are those of many shifts."""
        return self.embed(x_BLT, lead_mask_BL).expand(len(shift_S), -1, -1)


def as_features(encoder: WholeEncoder, features: Features) -> Encoder:
    """The encoder, as it gives these features. Raises LsemvaeError on `fused`: there is no posterior to fuse."""
    match features:
        case "means":
            return encoder
        case "pooled":
            return ShiftPooled(encoder)
        case "fused":
            raise LsemvaeError(f"{encoder.config.title} gives no fused features: choose means or pooled")


class BatchNorm(nn.BatchNorm1d):
    """Batch norm whose running statistics leave out a batch that is not finite, as `fit` leaves out its step.

    Otherwise one NaN would stay in them for ever.
    """

    def forward(self, input: Tensor) -> Tensor:
        assert self.running_mean is not None and self.running_var is not None
        if not self.training:
            return super().forward(input)
        mean_C, variance_C = self.running_mean.clone(), self.running_var.clone()
        output = F.batch_norm(input, mean_C, variance_C, self.weight, self.bias, True, self.momentum or 0.0, self.eps)
        with torch.no_grad():
            good = mean_C.isfinite().all() & variance_C.isfinite().all()
            self.running_mean.copy_(torch.where(good, mean_C, self.running_mean))
            self.running_var.copy_(torch.where(good, variance_C, self.running_var))
        return output


@torch.no_grad()
def start_batch_norms(encoder: WholeEncoder) -> None:
    """Set the running statistics of all batch norms to those of seeded white noise.

    An untrained encoder then gives features of about the same scale in evaluation as in training. Without this a head
    that is standardised before training (or a classifier on an untrained encoder) would see features of another scale.
    """
    norms = [module for module in encoder.modules() if isinstance(module, BatchNorm)]
    if norms[0].weight.is_meta:
        return
    device = norms[0].weight.device
    shape = (_REFERENCE_RECORDS, len(encoder.leads), encoder.config.samples)
    noise_BLT = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu").to(device)
    encoder.eval()  # without dropout, which would draw from the caller's random numbers
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    encoder.features(noise_BLT, torch.ones(shape[:2], dtype=torch.bool, device=device))
    for norm in norms:
        norm.momentum = 0.1
    encoder.train()


class PreNormLayers(nn.Module):
    """Transformer layers with normalisation before attention and before the two linear maps, and after the last layer.

    h_BNW -> h_BNW. With a mask [B, N], hidden tokens are attended to by none. Hidden tokens' own outputs have no
    meaning, and where all tokens of a record are hidden none of its outputs has.
    """

    def __init__(self, width: int, depth: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, h_BNW: Tensor, hidden_BN: Tensor | None = None) -> Tensor:
        if hidden_BN is not None:  # a softmax over no token at all would be NaN
            hidden_BN = hidden_BN & ~hidden_BN.all(dim=1, keepdim=True)
        for layer in self.layers:
            h_BNW = layer(h_BNW, src_key_padding_mask=hidden_BN)
        return self.norm(h_BNW)


def sine_positions(count: int, width: int) -> Tensor:
    """Fixed position embeddings, [count, width]: sines and cosines of geometric wavelengths (Vaswani et al. 2017)."""
    # On the CPU even while a bundle is built on the meta device, where torch.arange imports for a second and a half.
    at_N1 = torch.arange(count, dtype=torch.float32, device="cpu").unsqueeze(1)
    rate_W = torch.exp(-math.log(10_000.0) / width * torch.arange(0, width, 2, dtype=torch.float32, device="cpu"))
    return torch.stack([torch.sin(at_N1 * rate_W), torch.cos(at_N1 * rate_W)], dim=2).flatten(1)


def require_attention(width: int, depth: int, heads: int) -> None:
    """Raises LsemvaeError where Transformer layers of these sizes cannot be built."""
    if min(width, depth, heads) < 1 or width % (2 * heads):
        raise LsemvaeError(f"width={width}, depth={depth}, heads={heads}: give positive sizes, width an even multiple "
                           "of heads")  # fmt: skip


def require_patches(samples: int, patch: int) -> None:
    """Raises LsemvaeError unless patches of this length fill the window."""
    if patch < 1 or samples < 1 or samples % patch:
        raise LsemvaeError(f"patch is {patch} and samples {samples}: give a patch length that divides samples")
