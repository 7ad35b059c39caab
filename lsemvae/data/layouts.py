"""The two layouts of a training batch: model input, or windows of which a device makes model input.

Every batch has `weight_B` float32, which is 0 for a record that does not count, else 1. Its layout defines the other
arrays. A refused record keeps its place in the batch, so that every batch has the same size. In a packed batch the
samples are int16, see `lsemvae.data.packing`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lsemvae.data.packing import BYTES_A_LEAD, pack
from lsemvae.preprocess import PreprocessConfig, preprocess_signals, window_signals

Rows = dict[str, np.ndarray]


@dataclass(frozen=True)
class Layout(ABC):
    """What a batch holds, and how it is made."""

    leads: tuple[str, ...]
    preprocess: PreprocessConfig
    packed: bool = False
    """Whether samples are int16, of which `lsemvae.training.resident.widened` makes float32."""

    signal: ClassVar[str]
    """The array of samples."""
    on_device: ClassVar[bool]
    """Whether `DeviceFinish.batch` has to make model input of the batches."""

    @property
    def meaning(self) -> str:
        """Names what `prepare` does: equal for layouts that give the same numbers."""
        return f"{self.preprocess.digest} {','.join(self.leads)} {self.on_device}{' int16' if self.packed else ''}"

    @property
    def record_bytes(self) -> int:
        """What a record takes in memory and in the cache, but for a few bytes."""
        a_lead = 2 * self.preprocess.samples + BYTES_A_LEAD if self.packed else 4 * self.preprocess.samples
        return len(self.leads) * a_lead

    def prepare(self, signals_mv: Sequence[np.ndarray], rates_hz: np.ndarray) -> Rows:
        """Recordings, each float32 [L, T] in mV with NaN for what is missing -> their part of a batch."""
        return self._packed(self._prepare(signals_mv, rates_hz))

    def nothing(self, records: int) -> Rows:
        """The part of a batch for records that are not there."""
        return self._packed(self._nothing(records))

    def _packed(self, rows: Rows) -> Rows:
        if not self.packed:
            return rows
        return pack(rows[self.signal]) | {name: values for name, values in rows.items() if name != self.signal}

    @abstractmethod
    def _prepare(self, signals_mv: Sequence[np.ndarray], rates_hz: np.ndarray) -> Rows: ...

    @abstractmethod
    def _nothing(self, records: int) -> Rows: ...


@dataclass(frozen=True)
class ModelInput(Layout):
    """`x_BLT` float32 and `lead_mask_BL` bool, preprocessed on the CPU."""

    on_device: ClassVar[bool] = False
    signal: ClassVar[str] = "x_BLT"

    def _prepare(self, signals_mv: Sequence[np.ndarray], rates_hz: np.ndarray) -> Rows:
        prepared = preprocess_signals(signals_mv, rates_hz.tolist(), self.leads, self.preprocess)
        accepted_B = prepared.accepted_B
        return {
            "x_BLT": prepared.x_BLT,
            "lead_mask_BL": prepared.lead_mask_BL | ~accepted_B[:, None],
            "weight_B": accepted_B.astype(np.float32),
        }

    def _nothing(self, records: int) -> Rows:
        shape = (records, len(self.leads), self.preprocess.samples)
        return {
            "x_BLT": np.zeros(shape, dtype=np.float32),
            "lead_mask_BL": np.ones(shape[:2], dtype=bool),
            "weight_B": np.zeros(records, dtype=np.float32),
        }


@dataclass(frozen=True)
class Windows(Layout):
    """`filled_mv_BLT` float32, `nan_share_BL` float32 and `length_B` int64: resampled and cut, not yet filtered."""

    on_device: ClassVar[bool] = True
    signal: ClassVar[str] = "filled_mv_BLT"

    def _prepare(self, signals_mv: Sequence[np.ndarray], rates_hz: np.ndarray) -> Rows:
        windows = window_signals(signals_mv, rates_hz.tolist(), self.leads, self.preprocess, np.float32)
        accepted_B = np.array([reason is None for reason in windows.refused_B], dtype=bool)
        return {
            "filled_mv_BLT": windows.filled_mv_BLT,
            "nan_share_BL": windows.nan_share_BL.astype(np.float32),
            "length_B": windows.length_B,
            "weight_B": accepted_B.astype(np.float32),
        }

    def _nothing(self, records: int) -> Rows:
        shape = (records, len(self.leads), self.preprocess.samples)
        return {
            "filled_mv_BLT": np.zeros(shape, dtype=np.float32),
            "nan_share_BL": np.zeros(shape[:2], dtype=np.float32),
            "length_B": np.full(records, self.preprocess.samples),
            "weight_B": np.zeros(records, dtype=np.float32),
        }
