"""ResNet1d: a residual network over time with the leads as channels (Hong et al. 2020, HOLMES).

Pre-activation basic blocks (normalise, ReLU, convolve, twice) round a path without parameters, which is max-pooled
where time is halved and padded with zero channels where the width doubles. It learns from labels alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from lsemvae.errors import LsemvaeError
from lsemvae.models.contract import Encoder, EncoderConfig, Features
from lsemvae.models.parts.fusion import full_precision
from lsemvae.models.parts.whole import BatchNorm, WholeEncoder, as_features, start_batch_norms


@dataclass(frozen=True)
class ResNet1dConfig(EncoderConfig):
    """Sizes of the network. The defaults are the paper's largest: 16 blocks, time halved 8 times, 64 to 512 filters."""

    architecture: ClassVar[str] = "resnet1d"
    title: ClassVar[str] = "ResNet1d"

    samples: int = 5000
    """Time points of a record."""
    filters: int = 64
    """Channels of the first quarter of the blocks; each later quarter has twice as many."""
    blocks: int = 16
    """Basic blocks, at least 4. Every second block of 16, or every block of 8 or fewer, halves the time points."""
    kernel: int = 16
    dropout: float = 0.2
    """Before each convolution but the first two (as in Hannun et al. 2019, whose layout this network has)."""

    def __post_init__(self) -> None:
        if self.blocks < 4 or min(self.filters, self.kernel) < 1 or not 0 <= self.dropout < 1:
            raise LsemvaeError(
                f"blocks={self.blocks}, filters={self.filters}, kernel={self.kernel}, dropout={self.dropout}: give 4 "
                "blocks or more, positive sizes, and a share below 1"
            )
        if self.samples <= self.stride:
            raise LsemvaeError(f"samples is {self.samples}: {self.blocks} blocks need more than {self.stride}")

    @property
    def stride(self) -> int:
        """Samples in one position of the last block's output."""
        return 2 ** sum(self.halves(index) for index in range(self.blocks))

    def halves(self, index: int) -> bool:
        """Whether the block of this index halves the time points."""
        return (index + 1) % max(self.blocks // 8, 1) == 0

    def width(self, index: int) -> int:
        """Output channels of the block of this index."""
        return self.filters * 2 ** (index // (self.blocks // 4))

    def embedder(self, leads: Sequence[str], features: Features = "means") -> Encoder:
        """An untrained encoder."""
        return as_features(ResNet1d(self, leads), features)


class SameConv(nn.Conv1d):
    """A convolution that gives ceil(T / stride) time points for any kernel.

    It has no bias: a normalisation follows, and shifts each channel.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, bias=False)
        nn.init.kaiming_uniform_(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        kernel = self.kernel_size[0]
        return super().forward(F.pad(input, ((kernel - 1) // 2, kernel // 2)))


class BasicBlock(nn.Module):
    """Two convolutions round an identity. The first block has no first activation: the stem ends with one."""

    def __init__(self, inputs: int, outputs: int, config: ResNet1dConfig, stride: int, first: bool) -> None:
        super().__init__()
        self.stride, self.more = stride, outputs - inputs
        self.norm1 = None if first else BatchNorm(inputs)
        self.conv1 = SameConv(inputs, outputs, config.kernel, stride)
        self.norm2 = BatchNorm(outputs)
        self.conv2 = SameConv(outputs, outputs, config.kernel)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, h_BCP: Tensor) -> Tensor:
        kept_BCP = F.max_pool1d(h_BCP, self.stride, ceil_mode=True) if self.stride > 1 else h_BCP
        kept_BCP = F.pad(kept_BCP, (0, 0, self.more // 2, self.more - self.more // 2))
        if self.norm1 is not None:
            h_BCP = self.dropout(F.relu(self.norm1(h_BCP)))
        h_BCP = self.conv1(h_BCP)
        return kept_BCP + self.conv2(self.dropout(F.relu(self.norm2(h_BCP))))


class ResNet1d(WholeEncoder):
    """Stem, blocks, and the mean over time. F is the width of the last block."""

    # Batch norms, as in the paper. Statistics of each record (GroupNorm) would divide its amplitude away, which is
    # evidence of hypertrophy. A batch of one record trains too, since its statistics are over time as well.

    def __init__(self, config: ResNet1dConfig, leads: Sequence[str]) -> None:
        super().__init__(config, leads)
        self.stem = SameConv(len(self.leads), config.filters, config.kernel)
        self.stem_norm = BatchNorm(config.filters)
        widths = [config.filters, *(config.width(index) for index in range(config.blocks))]
        self.blocks = nn.Sequential(
            *(
                BasicBlock(widths[index], widths[index + 1], config, 1 + config.halves(index), first=index == 0)
                for index in range(config.blocks)
            )
        )
        self.norm = BatchNorm(widths[-1])
        start_batch_norms(self)

    @property
    def embedding_size(self) -> int:
        """F."""
        return self.norm.num_features

    def positions(self, x_BLT: Tensor) -> Tensor:
        """The last block's output, [B, F, P]: a position stands for `config.stride` samples."""
        return self.blocks(F.relu(self.stem_norm(self.stem(x_BLT))))

    def features(self, x_BLT: Tensor, lead_mask_BL: Tensor) -> Tensor:
        """h_BF of an input that holds zeros in absent leads."""
        return full_precision(F.relu(self.norm(self.positions(x_BLT)))).mean(dim=2)


PRESETS = {
    "full": ResNet1dConfig(),
    "cpu": ResNet1dConfig(samples=2496, filters=8, blocks=8, kernel=8),
    "smoke": ResNet1dConfig(filters=4, blocks=8, kernel=8),
}
"""Configurations that recipes name."""
