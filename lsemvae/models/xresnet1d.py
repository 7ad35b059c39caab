"""xResNet1d: a residual network with bottleneck blocks and a refined stem and shortcut (Strodthoff et al. 2021).

The image network of He et al. 2019 ("bag of tricks") over time, with the leads as channels: a stem of three
convolutions, a shortcut that averages where time is halved, and the mean beside the maximum over time as features.
It learns from labels alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsemvae.errors import LsemvaeError
from lsemvae.models.contract import Encoder, EncoderConfig, Features
from lsemvae.models.parts.fusion import full_precision
from lsemvae.models.parts.whole import BatchNorm, WholeEncoder, as_features, start_batch_norms

EXPANSION = 4
"""Output channels of a bottleneck block over those of its inner convolution."""
LAST_SCALE = 0.1
"""First scale of each block's last normalisation. The paper's library begins with 0, so that a block is an identity at
first; a small number does nearly the same, and every parameter has a gradient from the first step on."""


@dataclass(frozen=True)
class XResNet1dConfig(EncoderConfig):
    """Sizes of the network. The defaults are xresnet1d50; blocks=(3, 4, 23, 3) makes xresnet1d101."""

    architecture: ClassVar[str] = "xresnet1d"
    title: ClassVar[str] = "xResNet1d"

    samples: int = 5000
    """Time points of a record."""
    width: int = 64
    """Channels after the stem, and inner channels of the first stage; each later stage has twice as many."""
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    """Blocks of each stage. Every stage but the first halves the time points."""
    kernel: int = 5
    """Odd kernel size of the stem and of the inner convolutions."""

    def __post_init__(self) -> None:
        if not self.blocks or min(self.blocks) < 1 or self.width < 2 or self.kernel < 1 or self.kernel % 2 == 0:
            raise LsemvaeError(
                f"width={self.width}, blocks={self.blocks}, kernel={self.kernel}: give a width of 2 or more, at least "
                "one block a stage, and an odd kernel"
            )
        if self.samples <= self.stride:
            raise LsemvaeError(f"samples is {self.samples}: {len(self.blocks)} stages need more than {self.stride}")

    @property
    def stride(self) -> int:
        """Samples in one position of the last block's output: the stem's convolution and pool, then the stages."""
        return 4 * 2 ** (len(self.blocks) - 1)

    def embedder(self, leads: Sequence[str], features: Features = "means") -> Encoder:
        """An untrained encoder."""
        return as_features(XResNet1d(self, leads), features)


class ConvNorm(nn.Sequential):
    """A convolution that gives ceil(T / stride) time points, and a batch norm."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, scale: float = 1.0) -> None:
        conv = nn.Conv1d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
        norm = BatchNorm(outputs)
        nn.init.kaiming_uniform_(conv.weight)
        nn.init.constant_(norm.weight, scale)
        super().__init__(conv, norm)


class Bottleneck(nn.Module):
    """Three convolutions (1, kernel, 1) beside a shortcut, which averages before its own convolution."""

    def __init__(self, inputs: int, inner: int, kernel: int, stride: int) -> None:
        super().__init__()
        outputs = EXPANSION * inner
        self.reduce = ConvNorm(inputs, inner, 1)
        self.inner = ConvNorm(inner, inner, kernel, stride)
        self.expand = ConvNorm(inner, outputs, 1, scale=LAST_SCALE)
        self.pool = nn.AvgPool1d(2, ceil_mode=True) if stride > 1 else nn.Identity()
        self.shortcut = ConvNorm(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, h_BCP: Tensor) -> Tensor:
        inner_BCP = F.relu(self.inner(F.relu(self.reduce(h_BCP))))
        return F.relu(self.expand(inner_BCP) + self.shortcut(self.pool(h_BCP)))


class XResNet1d(WholeEncoder):
    """Stem, stages, and the mean and maximum over time: F is twice the channels of the last stage."""

    # Batch norms, as in the paper. Statistics of each record (GroupNorm) would divide its amplitude away, which is
    # evidence of hypertrophy. A batch of one record trains too, since its statistics are over time as well.

    def __init__(self, config: XResNet1dConfig, leads: Sequence[str]) -> None:
        super().__init__(config, leads)
        width, kernel = config.width, config.kernel
        self.stem = nn.Sequential(
            *(ConvNorm(len(self.leads), width // 2, kernel, stride=2), nn.ReLU()),
            *(ConvNorm(width // 2, width // 2, kernel), nn.ReLU()),
            *(ConvNorm(width // 2, width, kernel), nn.ReLU()),
            nn.MaxPool1d(3, stride=2, padding=1),
        )
        blocks, channels = [], width
        for stage, count in enumerate(config.blocks):
            inner = width * 2**stage
            for number in range(count):
                blocks.append(Bottleneck(channels, inner, kernel, stride=2 if stage and not number else 1))
                channels = EXPANSION * inner
        self.blocks = nn.Sequential(*blocks)
        self.channels = channels
        start_batch_norms(self)

    @property
    def embedding_size(self) -> int:
        """F."""
        return 2 * self.channels

    def positions(self, x_BLT: Tensor) -> Tensor:
        """The last block's output, [B, F / 2, P]: a position stands for `config.stride` samples."""
        return self.blocks(self.stem(x_BLT))

    def features(self, x_BLT: Tensor, lead_mask_BL: Tensor) -> Tensor:
        """h_BF of an input that holds zeros in absent leads."""
        h_BCP = full_precision(self.positions(x_BLT))
        return torch.cat([h_BCP.mean(dim=2), h_BCP.amax(dim=2)], dim=1)


PRESETS = {
    "full": XResNet1dConfig(),
    "cpu": XResNet1dConfig(samples=2496, width=8, blocks=(1, 1, 1, 1)),
    "smoke": XResNet1dConfig(width=4, blocks=(1, 1, 1, 1)),
}
"""Configurations that recipes name."""
