"""TimesFM 2.5 (Das et al., ICML 2024, arXiv 2310.10688; the 200M weights of 2025): a forecaster's decoder on each lead.

Each lead is a series of its own. A token is a patch of 32 samples, standardised by the mean and the deviation of all
samples up to its end. A residual block embeds it; Transformer layers with root mean square norms around attention and
around the two linear maps follow, with rotary positions, where a token sees itself and earlier ones. The features of a
lead are the mean over its output tokens, so they belong to that lead. What turns tokens into forecasts is left out.

Version 2.5 differs from the paper's: norms of queries and keys, rotary positions, and no input for the frequency.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsemvae.errors import LsemvaeError
from lsemvae.models.contract import Encoder, EncoderConfig, Features
from lsemvae.models.parts import shifts
from lsemvae.models.parts.fusion import full_precision
from lsemvae.models.parts.published import State, layers, require, shape_of
from lsemvae.models.parts.whole import WholeEncoder, as_features, require_attention, require_patches

FLAT = 1e-6
"""A series whose deviation is below this is not divided by it."""
LONGEST_PERIOD = 10_000.0
"""Of the rotary positions, in tokens over 2 pi."""
NORM_EPS = 1e-6


@dataclass(frozen=True)
class TimesFMConfig(EncoderConfig):
    """Sizes of the network. The defaults are those of the published weights, on 9.984 s at 500 Hz."""

    architecture: ClassVar[str] = "timesfm"
    title: ClassVar[str] = "TimesFM"

    samples: int = 4992
    """Time points of a record."""
    patch: int = 32
    """Time points of a token; it divides `samples`."""
    width: int = 1280
    depth: int = 20
    heads: int = 16
    hidden: int = 1280
    """Units between the two linear maps of a layer."""
    hidden_embedding: int = 1280
    """The same of the block that embeds a patch."""

    def __post_init__(self) -> None:
        require_patches(self.samples, self.patch)
        require_attention(self.width, self.depth, self.heads)
        if min(self.hidden, self.hidden_embedding) < 1:
            raise LsemvaeError(
                f"hidden is {self.hidden} and hidden_embedding {self.hidden_embedding}: give positive sizes"
            )

    def embedder(self, leads: Sequence[str], features: Features = "means") -> Encoder:
        """An untrained encoder."""
        return as_features(TimesFM(self, leads), features)


class TimesFM(WholeEncoder):
    """The same network on each lead; it has no weights of single leads. F = L x width, lead by lead."""

    def __init__(self, config: TimesFMConfig, leads: Sequence[str]) -> None:
        super().__init__(config, leads)
        given = 2 * config.patch
        self.hidden = nn.Linear(given, config.hidden_embedding)
        self.output = nn.Linear(config.hidden_embedding, config.width)
        self.residual = nn.Linear(given, config.width)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.depth))

    @property
    def embedding_size(self) -> int:
        """F."""
        return len(self.leads) * self.config.width

    def embedder(self, leads: Sequence[str], features: Features = "means") -> Encoder:
        """The trained encoder on the named leads."""
        return as_features(self.select(leads), features)

    def observed(self, lead_mask_BL: Tensor) -> Tensor:
        """Which features belong to an observed lead, [B, F] bool."""
        return lead_mask_BL.repeat_interleave(self.config.width, dim=1)

    def features(self, x_BLT: Tensor, lead_mask_BL: Tensor) -> Tensor:
        """h_BF: zeros for absent leads. Tokens with zeros that pad a short recording are left out of the mean."""
        kept_B = (shifts.recorded_samples(x_BLT) // self.config.patch).clamp(min=1)
        kept_BN1 = (torch.arange(x_BLT.shape[2] // self.config.patch, device=x_BLT.device) < kept_B[:, None])[..., None]
        means_LBW = []
        for x_BT in x_BLT.unbind(dim=1):  # one after another: the tokens of all leads at once take gigabytes
            kept_BNW = torch.where(kept_BN1, full_precision(self.encode(x_BT)), 0.0)
            means_LBW.append(kept_BNW.sum(dim=1) / kept_B[:, None])
        return torch.where(self.observed(lead_mask_BL), torch.cat(means_LBW, dim=1), 0.0)

    def encode(self, x_BT: Tensor) -> Tensor:
        """Series -> the last layer's tokens, [B, N, W]."""
        patch_BNP = standardised(x_BT.unflatten(1, (-1, self.config.patch)))
        # The second half says which samples are missing: none. No token that is kept holds or sees padding.
        given_BNP = torch.cat([patch_BNP, torch.zeros_like(patch_BNP)], dim=2)
        h_BNW = self.output(F.silu(self.hidden(given_BNP))) + self.residual(given_BNP)
        for layer in self.layers:
            h_BNW = layer(h_BNW)
        return h_BNW


class DecoderLayer(nn.Module):
    """Attention to earlier tokens, and two linear maps; h_BNW -> h_BNW."""

    def __init__(self, config: TimesFMConfig) -> None:
        super().__init__()
        width, head = config.width, config.width // config.heads
        self.heads = config.heads
        self.before_attention, self.after_attention = _norm(width), _norm(width)
        self.before_maps, self.after_maps = _norm(width), _norm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.query_norm, self.key_norm = _norm(head), _norm(head)
        self.query_scale = nn.Parameter(torch.zeros(head))
        self.out = nn.Linear(width, width, bias=False)
        self.first = nn.Linear(width, config.hidden, bias=False)
        self.second = nn.Linear(config.hidden, width, bias=False)

    def forward(self, h_BNW: Tensor) -> Tensor:
        h_BNW = h_BNW + self.after_attention(self.attend(self.before_attention(h_BNW)))
        return h_BNW + self.after_maps(self.second(F.silu(self.first(self.before_maps(h_BNW)))))

    def attend(self, h_BNW: Tensor) -> Tensor:
        """Each token attends to itself and earlier ones."""
        q_BHNE, k_BHNE, v_BHNE = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(h_BNW).chunk(3, dim=2)
        )
        # softplus(0) = ln 2, so a scale of zeros is the usual 1 / sqrt(E).
        scale_E = F.softplus(self.query_scale) / math.log(2) / math.sqrt(len(self.query_scale))
        q_BHNE = self.query_norm(rotated(q_BHNE)) * scale_E
        k_BHNE = self.key_norm(rotated(k_BHNE))
        # Under autocast the norms give float32, the values are of a lower precision.
        seen_BHNE = F.scaled_dot_product_attention(
            q_BHNE.to(v_BHNE.dtype), k_BHNE.to(v_BHNE.dtype), v_BHNE, is_causal=True, scale=1.0
        )
        return self.out(seen_BHNE.transpose(1, 2).flatten(2))


def standardised(x_BNP: Tensor) -> Tensor:
    """Each patch minus the mean of all samples up to its end, by their deviation."""
    x64_BNP = x_BNP.double()  # sums of squares of long series
    patches, samples = x_BNP.shape[1:]
    count_N = samples * torch.arange(1, patches + 1, device=x_BNP.device)
    mean_BN = x64_BNP.sum(dim=2).cumsum(dim=1) / count_N
    square_BN = x64_BNP.square().sum(dim=2).cumsum(dim=1) / count_N
    deviation_BN = (square_BN - mean_BN.square()).clamp(min=0).sqrt()
    unit_BN = torch.where(deviation_BN < FLAT, 1.0, deviation_BN)
    return ((x64_BNP - mean_BN.unsqueeze(2)) / unit_BN.unsqueeze(2)).to(x_BNP.dtype)


def rotated(h_BHNE: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021): number e and number e + E/2 of a token are turned by an angle as a pair.

    The angle is the token's position by a period that grows with e, so that products of two tokens depend on their
    distance alone.
    """
    half = h_BHNE.shape[3] // 2
    period_E = LONGEST_PERIOD ** (torch.arange(half, device=h_BHNE.device) / half)
    angle_NE = torch.arange(h_BHNE.shape[2], device=h_BHNE.device).unsqueeze(1) / period_E
    sine_NE, cosine_NE = angle_NE.sin(), angle_NE.cos()
    one, two = h_BHNE.chunk(2, dim=3)
    return torch.cat([one * cosine_NE - two * sine_NE, two * cosine_NE + one * sine_NE], dim=3)


def _norm(width: int) -> nn.RMSNorm:
    return nn.RMSNorm(width, eps=NORM_EPS)


# --- the published weights -------------------------------------------------------------------------------------

UNUSED = ("output_projection_point.", "output_projection_quantiles.")
"""What turns tokens into forecasts."""
LONGEST_SAMPLES = 5000
"""The window holds as many whole patches as fit into so many samples: 10 s at 500 Hz."""
_EMBEDDING = {
    "hidden": "tokenizer.hidden_layer",
    "output": "tokenizer.output_layer",
    "residual": "tokenizer.residual_layer",
}
_IN_LAYER = {
    "before_attention.weight": "pre_attn_ln.scale",
    "after_attention.weight": "post_attn_ln.scale",
    "before_maps.weight": "pre_ff_ln.scale",
    "after_maps.weight": "post_ff_ln.scale",
    "qkv.weight": "attn.qkv_proj.weight",
    "query_norm.weight": "attn.query_ln.scale",
    "key_norm.weight": "attn.key_ln.scale",
    "query_scale": "attn.per_dim_scale.per_dim_scale",
    "out.weight": "attn.out.weight",
    "first.weight": "ff0.weight",
    "second.weight": "ff1.weight",
}


def from_published(state: State) -> tuple[TimesFMConfig, dict[str, Tensor]]:
    """A state dict as the package timesfm names its tensors -> the configuration of these shapes, and weights for it.

    Raises LsemvaeError naming tensors that are missing, unexpected or of the wrong shape.
    """
    hidden_embedding, given = shape_of(state, "tokenizer.hidden_layer.weight", 2)
    width, _ = shape_of(state, "tokenizer.output_layer.weight", 2)
    (head,) = shape_of(state, "stacked_xf.0.attn.query_ln.scale", 1)
    hidden, _ = shape_of(state, "stacked_xf.0.ff0.weight", 2)
    patch = given // 2
    config = TimesFMConfig(
        samples=LONGEST_SAMPLES // max(patch, 1) * patch,
        patch=patch,
        width=width,
        depth=layers(state, "stacked_xf"),
        heads=width // max(head, 1),
        hidden=hidden,
        hidden_embedding=hidden_embedding,
    )
    with torch.device("meta"):
        ours = TimesFM(config, ("I",)).state_dict()
    names = {name: _published_name(name) for name in ours}
    require(state, {names[name]: tensor.shape for name, tensor in ours.items()}, UNUSED)
    return config, {name: state[theirs] for name, theirs in names.items()}


def _published_name(name: str) -> str:
    """`layers.3.qkv.weight` -> `stacked_xf.3.attn.qkv_proj.weight`."""
    first, _, rest = name.partition(".")
    if first in _EMBEDDING:
        return f"{_EMBEDDING[first]}.{rest}"
    number, _, rest = rest.partition(".")
    return f"stacked_xf.{number}.{_IN_LAYER[rest]}"
