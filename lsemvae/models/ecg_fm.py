"""ECG-FM (McKeen et al. 2024, arXiv 2408.05178): wav2vec 2.0 (Baevski et al. 2020) on 12 leads, with published weights.

Strided convolutions over all leads make one token of 16 samples. Tokens get their position from a convolution over
their neighbours and pass through Transformer layers that normalise after each addition. The features are the mean over
the tokens. It reads segments of 5 s; a longer window is cut into them, and the mean is over the tokens of all segments.

It was pre-trained elsewhere, with leads masked at random by zeros: an absent lead is zeros here, too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsemvae.errors import LsemvaeError
from lsemvae.leads import LEADS
from lsemvae.models.contract import Encoder, EncoderConfig, Features
from lsemvae.models.parts import shifts
from lsemvae.models.parts.fusion import full_precision
from lsemvae.models.parts.published import State, layers, require, shape_of
from lsemvae.models.parts.whole import WholeEncoder, as_features, require_attention


@dataclass(frozen=True)
class ECGFMConfig(EncoderConfig):
    """Sizes of the network. The defaults are those of the published weights."""

    architecture: ClassVar[str] = "ecg-fm"
    title: ClassVar[str] = "ECG-FM"

    samples: int = 5000
    """Time points of a record."""
    segment: int = 2500
    """Time points that are read together; it divides `samples`."""
    convolutions: int = 4
    channels: int = 256
    kernel: int = 2
    """Time points of each convolution, and its stride."""
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    """Units between the two linear maps of a layer."""
    position_kernel: int = 128
    """Tokens that the convolution for the position reads."""
    position_groups: int = 16

    def __post_init__(self) -> None:
        require_attention(self.width, self.depth, self.heads)
        if min(self.convolutions, self.channels, self.kernel, self.hidden, self.position_kernel) < 1:
            raise LsemvaeError(
                f"convolutions={self.convolutions}, channels={self.channels}, kernel={self.kernel}, "
                f"hidden={self.hidden}, position_kernel={self.position_kernel}: give positive sizes"
            )
        if self.position_groups < 1 or self.width % self.position_groups:
            raise LsemvaeError(f"position_groups is {self.position_groups}: it must divide width, {self.width}")
        if self.segment < self.stride or self.samples < 1 or self.samples % self.segment:
            raise LsemvaeError(
                f"segment is {self.segment} and samples {self.samples}: give a segment of {self.stride} samples or "
                "more that divides samples"
            )

    @property
    def stride(self) -> int:
        """Time points of a token."""
        return self.kernel**self.convolutions

    @property
    def tokens(self) -> int:
        """N, the tokens of a segment."""
        return self.segment // self.stride

    def embedder(self, leads: Sequence[str], features: Features = "means") -> Encoder:
        """An untrained encoder."""
        return as_features(ECGFM(self, leads), features)


class ECGFM(WholeEncoder):
    """The network without what its pre-training alone needs. F is the width."""

    by_lead: ClassVar[Mapping[str, int]] = {"convolutions.0.weight": 1}

    def __init__(self, config: ECGFMConfig, leads: Sequence[str]) -> None:
        super().__init__(config, leads)
        channels, width, kernel = config.channels, config.width, config.kernel
        self.convolutions = nn.ModuleList(
            nn.Conv1d(channels if number else len(self.leads), channels, kernel, stride=kernel, bias=False)
            for number in range(config.convolutions)
        )
        self.channel_norm = nn.GroupNorm(channels, channels)
        self.token_norm = nn.LayerNorm(channels)
        self.project = nn.Linear(channels, width)
        reach = config.position_kernel
        self.position = nn.Conv1d(width, width, reach, padding=reach // 2, groups=config.position_groups)
        self.first_norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, config.heads, config.hidden, dropout=0.0, activation="gelu", batch_first=True
            )
            for _ in range(config.depth)
        )

    @property
    def embedding_size(self) -> int:
        """F."""
        return self.config.width

    def embedder(self, leads: Sequence[str], features: Features = "means") -> Encoder:
        """The trained encoder that reads the named leads."""
        return as_features(self.select(leads), features)

    def features(self, x_BLT: Tensor, lead_mask_BL: Tensor) -> Tensor:
        """h_BF: the mean over the tokens of the recording, without those of the zeros that pad a short one."""
        segment, stride, tokens = self.config.segment, self.config.stride, self.config.tokens
        x_BSLT = x_BLT.unflatten(2, (-1, segment)).transpose(1, 2)
        starts_S = torch.arange(0, x_BLT.shape[2], segment, device=x_BLT.device)
        recorded_BS = (shifts.recorded_samples(x_BLT).unsqueeze(1) - starts_S).clamp(0, segment) // stride
        kept_BSN = torch.arange(tokens, device=x_BLT.device) < recorded_BS.unsqueeze(2)
        h_BSNW = self.encode(x_BSLT.flatten(0, 1), kept_BSN.flatten(0, 1)).unflatten(0, recorded_BS.shape)
        kept_BSNW = torch.where(kept_BSN.unsqueeze(3), full_precision(h_BSNW), 0.0)
        return kept_BSNW.sum(dim=(1, 2)) / recorded_BS.sum(dim=1, keepdim=True).clamp(min=1)

    def encode(self, x_BLT: Tensor, kept_BN: Tensor) -> Tensor:
        """The tokens of segments, [B, N, W]. Tokens that are not kept are attended to by none."""
        h_BNW = self.embed_tokens(x_BLT)
        h_BNW = self.first_norm(torch.where(kept_BN.unsqueeze(2), h_BNW, 0.0))
        hidden_BN = ~kept_BN & kept_BN.any(dim=1, keepdim=True)  # a softmax over no token at all would be NaN
        for layer in self.layers:
            h_BNW = layer(h_BNW, src_key_padding_mask=hidden_BN)
        return h_BNW

    def embed_tokens(self, x_BLT: Tensor) -> Tensor:
        """The convolutions, and the tokens' positions: what the first layer reads before normalisation, [B, N, W]."""
        h_BCT = x_BLT
        for number, convolution in enumerate(self.convolutions):
            h_BCT = convolution(h_BCT)
            h_BCT = F.gelu(h_BCT if number else self.channel_norm(h_BCT))
        h_BNW = self.project(self.token_norm(h_BCT.transpose(1, 2)))
        position_BWN = F.gelu(self.position(h_BNW.transpose(1, 2))[:, :, : h_BNW.shape[1]])
        return h_BNW + position_BWN.transpose(1, 2)


# --- the published weights -------------------------------------------------------------------------------------

HEADS = 12
"""No tensor's shape tells the number of heads; this is the published encoder's."""
UNUSED = ("mask_emb", "quantizer.", "project_q.", "final_proj.")
"""What only the pre-training needed."""
_POSITION = "conv_pos.pos_conv.0"
_NEWER = {
    f"{_POSITION}.parametrizations.weight.original0": f"{_POSITION}.weight_g",
    f"{_POSITION}.parametrizations.weight.original1": f"{_POSITION}.weight_v",
}
"""Names that torch has given to the two parts of a normalised weight since 2023."""
_PLAIN = {
    "feature_extractor.conv_layers.0.2": "channel_norm",
    "layer_norm": "token_norm",
    "post_extract_proj": "project",
    "encoder.layer_norm": "first_norm",
}
_IN_LAYER = {
    "self_attn.out_proj": "self_attn.out_proj",
    "self_attn_layer_norm": "norm1",
    "fc1": "linear1",
    "fc2": "linear2",
    "final_layer_norm": "norm2",
}
_QKV = ("q_proj", "k_proj", "v_proj")


def from_published(state: State) -> tuple[ECGFMConfig, dict[str, Tensor]]:
    """A state dict as fairseq-signals names its tensors -> the configuration of these shapes, and weights for it.

    Raises LsemvaeError naming tensors that are missing, unexpected or of the wrong shape.
    """
    state = {_NEWER.get(name, name): tensor for name, tensor in state.items()}
    channels, leads, kernel = shape_of(state, "feature_extractor.conv_layers.0.0.weight", 3)
    if leads != len(LEADS):
        raise LsemvaeError(f"the weights read {leads} leads: they must read {len(LEADS)}")
    width, in_group, reach = shape_of(state, f"{_POSITION}.weight_v", 3)
    hidden, _ = shape_of(state, "encoder.layers.0.fc1.weight", 2)
    config = ECGFMConfig(
        convolutions=layers(state, "feature_extractor.conv_layers"),
        channels=channels,
        kernel=kernel,
        width=width,
        depth=layers(state, "encoder.layers"),
        heads=HEADS,
        hidden=hidden,
        position_kernel=reach,
        position_groups=width // max(in_group, 1),
    )
    require(state, _shapes(config), UNUSED)
    return config, _weights(state, config)


def _shapes(config: ECGFMConfig) -> dict[str, tuple[int, ...]]:
    """The published tensors, by their names there."""
    channels, width, hidden = config.channels, config.width, config.hidden
    found: dict[str, tuple[int, ...]] = {
        f"feature_extractor.conv_layers.{number}.0.weight": (channels, channels if number else 12, config.kernel)
        for number in range(config.convolutions)
    }
    found[f"{_POSITION}.weight_g"] = (1, 1, config.position_kernel)
    found[f"{_POSITION}.weight_v"] = (width, width // config.position_groups, config.position_kernel)
    found[f"{_POSITION}.bias"] = (width,)
    found["post_extract_proj.weight"], found["post_extract_proj.bias"] = (width, channels), (width,)
    norms = {"feature_extractor.conv_layers.0.2": channels, "layer_norm": channels, "encoder.layer_norm": width}
    for number in range(config.depth):
        layer = f"encoder.layers.{number}"
        norms |= {f"{layer}.self_attn_layer_norm": width, f"{layer}.final_layer_norm": width}
        linears = dict.fromkeys((f"self_attn.{name}" for name in (*_QKV, "out_proj")), (width, width))
        for name, shape in (linears | {"fc1": (hidden, width), "fc2": (width, hidden)}).items():
            found[f"{layer}.{name}.weight"], found[f"{layer}.{name}.bias"] = shape, shape[:1]
    for name, size in norms.items():
        found[f"{name}.weight"] = found[f"{name}.bias"] = (size,)
    return found


def _weights(state: State, config: ECGFMConfig) -> dict[str, Tensor]:
    """Our names. The three input maps of attention become one, the two parts of the normalised weight their product."""
    found = {
        f"convolutions.{number}.weight": state[f"feature_extractor.conv_layers.{number}.0.weight"]
        for number in range(config.convolutions)
    }
    direction = state[f"{_POSITION}.weight_v"]
    found["position.weight"] = state[f"{_POSITION}.weight_g"] * direction / direction.norm(dim=(0, 1), keepdim=True)
    found["position.bias"] = state[f"{_POSITION}.bias"]
    names = dict(_PLAIN)
    for number in range(config.depth):
        layer = f"encoder.layers.{number}"
        names |= {f"{layer}.{theirs}": f"layers.{number}.{ours}" for theirs, ours in _IN_LAYER.items()}
        for kind in ("weight", "bias"):
            found[f"layers.{number}.self_attn.in_proj_{kind}"] = torch.cat(
                [state[f"{layer}.self_attn.{name}.{kind}"] for name in _QKV]
            )
    for theirs, ours in names.items():
        found |= {f"{ours}.{kind}": state[f"{theirs}.{kind}"] for kind in ("weight", "bias")}
    return found
