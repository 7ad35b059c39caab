"""Encoders of all leads at once, and the decoder they share.

The first dimension of every encoder parameter is the lead. So one grouped convolution or one batched matrix
product serves all leads, and the encoders of some leads are rows of a tensor.
"""

import importlib.util
import math
from collections.abc import Sequence
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsemvae.errors import LsemvaeError
from lsemvae.leads import in_order
from lsemvae.models.parts import shifts
from lsemvae.models.parts.fusion import full_precision
from lsemvae.models.parts.whole import masked

STRIDE = 8
"""Samples in one position of the convolutions' output."""


def require_sizes(samples: int, latent: int, channels: tuple[int, int, int]) -> None:
    """Raises LsemvaeError where three halving convolutions, and what follows them, cannot have these sizes."""
    if samples < STRIDE or samples % STRIDE:
        raise LsemvaeError(f"samples is {samples}: give a positive multiple of {STRIDE}")
    if latent < 1 or len(channels) != 3 or min(channels) < 1:
        raise LsemvaeError(f"latent is {latent} and channels {channels}: give one positive size and three")


def _uniform(shape: tuple[int, ...], fan_in: int) -> nn.Parameter:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): what nn.Conv1d and nn.Linear draw for one lead."""
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def _halving(x: Tensor, weight: Tensor, bias: Tensor, groups: int = 1) -> Tensor:
    """The encoder's convolution: kernel 3, stride 2, padding 1, which halves the time points."""
    return F.conv1d(x, weight, bias, stride=2, padding=1, groups=groups)


class LeadConv(nn.Module):
    """A Conv1d a lead: the parameters of all leads, and all of them in one call."""

    def __init__(self, leads: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = _uniform((leads, outputs, inputs, 3), fan_in=inputs * 3)
        self.bias = _uniform((leads, outputs), fan_in=inputs * 3)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L * inputs, T] -> [B, L * outputs, T / 2]."""
        weight, bias = self.weight.flatten(0, 1), self.bias.flatten()
        return _halving(x, weight, bias, groups=len(self.weight))


class LeadLinear(nn.Module):
    """A linear map a lead: [L, B, F] -> [L, B, D] in one batched matrix product.

    The weight is [L, F, D], the transpose of nn.Linear's. The batched product then gives its gradient, and that of
    the input, in their own layout; with nn.Linear's layout each step would copy a gigabyte.
    """

    def __init__(self, leads: int, features: int, outputs: int) -> None:
        super().__init__()
        self.weight = _uniform((leads, features, outputs), fan_in=features)
        self.bias = _uniform((leads, outputs), fan_in=features)

    def forward(self, h_LBF: Tensor) -> Tensor:
        return torch.baddbmm(self.bias.unsqueeze(1), h_LBF, self.weight)


class LeadEncoders(nn.Module):
    """q(z given one lead) for each lead: three convolutions, then a mean and a log-variance (the paper's section 2.1).

    x_BLT -> mu_BLD, logvar_BLD. The leads are `leads`, in that order. `log_variance=False` leaves out the
    log-variance heads, half of the parameters: the embedding needs the means alone.
    """

    fused = False
    """Whether the convolutions run as one kernel, see `fuse`."""

    def __init__(
        self,
        leads: Sequence[str],
        *,
        samples: int,
        latent: int,
        channels: tuple[int, int, int],
        log_variance: bool = True,
    ) -> None:
        super().__init__()
        self.leads = tuple(leads)
        self.samples, self.latent, self.channels = samples, latent, channels
        count, features = len(self.leads), channels[2] * samples // STRIDE
        self.conv1 = LeadConv(count, 1, channels[0])
        self.conv2 = LeadConv(count, channels[0], channels[1])
        self.conv3 = LeadConv(count, channels[1], channels[2])
        self.fc_mu = LeadLinear(count, features, latent)
        self.fc_logvar = LeadLinear(count, features, latent) if log_variance else None

    def features(self, x_BLT: Tensor) -> Tensor:
        """The input of the heads, [L, B, F]: F = last channels x T / 8, channel by channel."""
        if self.fused and not x_BLT.requires_grad and x_BLT.dtype == torch.float32:
            from lsemvae.models.parts.fused import convolutions

            convs = (self.conv1, self.conv2, self.conv3)
            return convolutions(x_BLT, [parameter for conv in convs for parameter in (conv.weight, conv.bias)])
        return self._lead_by_lead(x_BLT) if x_BLT.device.type == "cpu" else self._grouped(x_BLT)

    def _grouped(self, x_BLT: Tensor) -> Tensor:
        h = x_BLT
        for conv in (self.conv1, self.conv2, self.conv3):
            h = F.relu(conv(h), inplace=True)
        return h.view(len(x_BLT), len(self.leads), -1).transpose(0, 1)

    def _lead_by_lead(self, x_BLT: Tensor) -> Tensor:
        """The same numbers as `_grouped`, whose backward pass takes three times as long on a CPU."""
        convs = (self.conv1, self.conv2, self.conv3)
        kernels = [zip(conv.weight.unbind(), conv.bias.unbind(), strict=True) for conv in convs]
        outputs = []
        for row, (first, second, third) in enumerate(zip(*kernels, strict=True)):
            h = F.relu(_halving(x_BLT[:, row : row + 1], *first), inplace=True)
            h = F.relu(_halving(h, *second), inplace=True)
            outputs.append(_halving(h, *third))
        # The last ReLU comes after stacking: before it, the backward pass would keep the stack and its parts.
        return F.relu(torch.stack(outputs), inplace=True).flatten(2)

    @property
    def embedding_size(self) -> int:
        """F = L x D."""
        return len(self.leads) * self.latent

    def embed(self, x_BLT: Tensor, lead_mask_BL: Tensor) -> Tensor:
        """h_BF: the lead means mu_i one after another, zeros for an absent lead. Computes no log-variance."""
        return self.embedding(self.features(self.masked(x_BLT, lead_mask_BL)), lead_mask_BL)

    def embed_shifted(self, x_BLT: Tensor, lead_mask_BL: Tensor, shift_S: Sequence[float]) -> Tensor:
        """As `embed`, of the recording under each circular shift, h_SBF. Shifts are by whole strides of 8 samples.

        The convolutions run once: shifting their output is shifting their input, except for the 15 samples round the
        recording's two ends, which keep the zero padding that they have without a shift.
        """
        x_BLT = self.masked(x_BLT, lead_mask_BL)
        size_B = shifts.recorded_samples(x_BLT) // STRIDE
        h_LBCP = self.features(x_BLT).unflatten(2, (self.channels[2], -1))
        return torch.stack(
            [self.embedding(shifts.shifted(h_LBCP, size_B, shift).flatten(2), lead_mask_BL) for shift in shift_S]
        )

    def embedding(self, h_LBF: Tensor, lead_mask_BL: Tensor) -> Tensor:
        """What `features` gives -> h_BF."""
        mu_BLD = full_precision(self.fc_mu(h_LBF)).transpose(0, 1)
        return torch.where(lead_mask_BL.unsqueeze(-1), mu_BLD, torch.zeros_like(mu_BLD)).flatten(1)

    def observed(self, lead_mask_BL: Tensor) -> Tensor:
        """Which features belong to an observed lead: the mask, repeated over each lead's D features, [B, F]."""
        return lead_mask_BL.repeat_interleave(self.latent, dim=1)

    def masked(self, x_BLT: Tensor, lead_mask_BL: Tensor) -> Tensor:
        """The input with zeros in place of absent leads. Raises LsemvaeError on a shape that the encoders do not read.

        Without this a NaN in an absent lead would reach the gradient of its encoder's weights.
        """
        return masked(x_BLT, lead_mask_BL, self.leads, self.samples)

    def forward(self, x_BLT: Tensor) -> tuple[Tensor, Tensor]:
        """x_BLT -> mu_BLD, logvar_BLD."""
        assert self.fc_logvar is not None, "built without log-variance heads: only embed() can be computed"
        h_LBF = self.features(x_BLT)
        return self.fc_mu(h_LBF).transpose(0, 1), self.fc_logvar(h_LBF).transpose(0, 1)

    def select(self, leads: Sequence[str], *, log_variance: bool | None = None) -> Self:
        """The encoders of the named leads, in the fixed order I … V6, with the same weights.

        Shares memory with these encoders where the named leads lie next to each other (the six limb leads),
        and copies otherwise. Raises LsemvaeError on a lead without an encoder.
        """
        leads = in_order(leads)
        absent = [lead for lead in leads if lead not in self.leads]
        if absent:
            raise LsemvaeError(f"no encoder for lead {', '.join(absent)}: this model reads {', '.join(self.leads)}")
        keep = (self.fc_logvar is not None) if log_variance is None else log_variance
        assert not keep or self.fc_logvar is not None, "log-variance heads that were never built"
        rows = [self.leads.index(lead) for lead in leads]
        adjacent = rows == list(range(rows[0], rows[0] + len(rows)))
        with torch.device("meta"):
            chosen = type(self)(
                leads,
                samples=self.samples,
                latent=self.latent,
                channels=self.channels,
                log_variance=keep,
            )
        wanted = chosen.state_dict()
        chosen.load_state_dict(
            {
                name: values[rows[0] : rows[0] + len(rows)] if adjacent else values[rows]
                for name, values in self.state_dict().items()
                if name in wanted
            },
            assign=True,
        )
        return chosen.train(self.training)


def fuse(model: nn.Module, device: torch.device) -> str:
    """Let a model's lead encoders run their convolutions as one Triton kernel (`lsemvae.models.parts.fused`) on a GPU.

    Elsewhere they keep their plain form, which defines the result. Says in a sentence which form it is.
    """
    encoders = [module for module in model.modules() if isinstance(module, LeadEncoders)]
    if not encoders:
        return "the model has no lead encoders: there is nothing to fuse"
    plain = "the lead encoders' convolutions keep their plain form: "
    if device.type != "cuda":
        return f"{plain}the fused kernel runs on a GPU, not on {device}"
    if importlib.util.find_spec("triton") is None:
        return f"{plain}Triton is not installed"
    for encoder in encoders:
        encoder.fused = True
    return f"the lead encoders' convolutions run as one fused kernel on {device}"


class Decoder(nn.Module):
    """z_BD -> x_BLT for all leads in one pass: a linear map and three transposed convolutions.

    `kind="paper"`: the last convolution has one output, and every lead gets the same tensor.
    `kind="lead"`: it has one output a lead. The leads of an ECG are, to a good approximation, fixed linear
    projections of a few cardiac sources. The last convolution is such a projection: all leads share its inputs, and
    the lead's name selects its row. That costs 65 parameters a lead, and one pass serves all leads.
    """

    def __init__(
        self,
        leads: Sequence[str],
        *,
        samples: int,
        latent: int,
        channels: tuple[int, int, int],
        kind: Literal["lead", "paper"],
    ) -> None:
        super().__init__()
        self.leads = tuple(leads)
        self.channels = channels
        self.fc = nn.Linear(latent, channels[2] * samples // STRIDE)
        self.convtrans1 = nn.ConvTranspose1d(channels[2], channels[1], 4, stride=2, padding=1)
        self.convtrans2 = nn.ConvTranspose1d(channels[1], channels[0], 4, stride=2, padding=1)
        outputs = len(self.leads) if kind == "lead" else 1
        self.convtrans3 = nn.ConvTranspose1d(channels[0], outputs, 4, stride=2, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """z_BD, or z_BLD with a code for each lead alone -> x_BLT, leads in the order of `leads`."""
        if z.ndim == 3:
            return self._each_from_its_own(z)
        return self.convtrans3(self._trunk(z)).expand(-1, len(self.leads), -1)

    def _trunk(self, z_BD: Tensor) -> Tensor:
        h = self.fc(z_BD).view(len(z_BD), self.channels[2], -1)
        h = F.relu(self.convtrans1(h), inplace=True)
        return F.relu(self.convtrans2(h), inplace=True)

    def _each_from_its_own(self, z_BLD: Tensor) -> Tensor:
        """Lead i from code i. One lead after another, which on a CPU takes two thirds of the time of all at once."""
        weight, bias = self.convtrans3.weight, self.convtrans3.bias
        assert bias is not None and len(bias) == len(self.leads), "a decoder of kind lead"
        rows = [
            F.conv_transpose1d(self._trunk(z_BD), weight[:, i : i + 1], bias[i : i + 1], stride=2, padding=1)
            for i, z_BD in enumerate(z_BLD.unbind(1))
        ]
        return torch.cat(rows, dim=1)
