"""A Transformer over patches of time: the encoder of Vaswani et al. 2017 on an ECG, with all leads in each token.

A token is a patch of all leads, since one token for each of 5,000 samples would be a waste. Layers normalise first
(Xiong et al. 2020). The features are the mean over the tokens. It learns from labels alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from lsemvae.errors import LsemvaeError
from lsemvae.models.contract import Encoder, EncoderConfig, Features
from lsemvae.models.parts.fusion import full_precision
from lsemvae.models.parts.whole import (
    PreNormLayers,
    WholeEncoder,
    as_features,
    require_attention,
    require_patches,
    sine_positions,
)


@dataclass(frozen=True)
class TransformerConfig(EncoderConfig):
    """Sizes of the network. The defaults are the paper's base encoder on patches of 0.1 s."""

    architecture: ClassVar[str] = "transformer"
    title: ClassVar[str] = "Transformer"

    samples: int = 5000
    """Time points of a record."""
    patch: int = 50
    """Time points of a token; it divides `samples`."""
    width: int = 512
    depth: int = 6
    heads: int = 8
    dropout: float = 0.1

    def __post_init__(self) -> None:
        require_patches(self.samples, self.patch)
        require_attention(self.width, self.depth, self.heads)
        if not 0 <= self.dropout < 1:
            raise LsemvaeError(f"dropout is {self.dropout}: give a share below 1")

    @property
    def tokens(self) -> int:
        """Tokens of a record."""
        return self.samples // self.patch

    def embedder(self, leads: Sequence[str], features: Features = "means") -> Encoder:
        """An untrained encoder."""
        return as_features(Transformer(self, leads), features)


class Transformer(WholeEncoder):
    """A linear embedding of each patch, its position, the layers, and the mean over the tokens. F is the width."""

    position_NW: Tensor

    def __init__(self, config: TransformerConfig, leads: Sequence[str]) -> None:
        super().__init__(config, leads)
        self.patch = nn.Linear(len(self.leads) * config.patch, config.width)
        self.register_buffer("position_NW", sine_positions(config.tokens, config.width))
        self.dropout = nn.Dropout(config.dropout)
        self.layers = PreNormLayers(config.width, config.depth, config.heads, config.dropout)

    @property
    def embedding_size(self) -> int:
        """F."""
        return self.config.width

    def features(self, x_BLT: Tensor, lead_mask_BL: Tensor) -> Tensor:
        """h_BF of an input that holds zeros in absent leads."""
        patch_BNE = x_BLT.unflatten(2, (-1, self.config.patch)).transpose(1, 2).flatten(2)
        h_BNW = self.layers(self.dropout(self.patch(patch_BNE) + self.position_NW))
        return full_precision(h_BNW).mean(dim=1)


PRESETS = {
    "full": TransformerConfig(),
    "cpu": TransformerConfig(samples=2496, patch=39, width=64, depth=3, heads=4),
    "smoke": TransformerConfig(width=16, depth=1, heads=2),
}
"""Configurations that recipes name."""
