"""Changes to a data set after ingest: new labels, and subjects who have withdrawn.

Both are tables beside the shards that are consulted whenever the data set is opened, so no recording is read again:
`labels.csv` (see docs/labels.md for its keys) replaces or adds labels, `withdrawn.csv` names subjects.
"""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lsemvae.cohorts.tables import LABEL_PREFIX, join_labels, read_table
from lsemvae.storage import Storage

LABELS = "labels.csv"

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Labels:
    """The labels that changed, for every record of a data set of N records.

    Records are sorted by id, and arrays are sent to other processes without a copy: each batch looks its few records up
    among perhaps a million.
    """

    record_id_N: np.ndarray
    """Sorted text."""
    values: Mapping[str, np.ndarray]
    """`label.NAME` -> float64 [N], NaN where the label is not known."""
    digest: str

    @classmethod
    def of_table(cls, table: pd.DataFrame, digest: str) -> "Labels":
        """`table` has `record_id` and the labels; other columns are ignored."""
        record_id_N = table["record_id"].to_numpy(str)
        order = np.argsort(record_id_N)
        names = [name for name in table.columns if name.startswith(LABEL_PREFIX)]
        return cls(record_id_N[order], {name: table[name].to_numpy(float)[order] for name in names}, digest)

    @property
    def columns(self) -> list[str]:
        return list(self.values)

    def of(self, column: str, record_ids: np.ndarray) -> np.ndarray:
        """float64 [B], NaN where the label is not known."""
        wanted_B = np.asarray(record_ids).astype(str)
        at_B = np.minimum(np.searchsorted(self.record_id_N, wanted_B), len(self.record_id_N) - 1)
        return np.where(self.record_id_N[at_B] == wanted_B, self.values[column][at_B], np.nan)


NO_LABELS = Labels(np.array([], dtype=str), {}, "")


def has_labels(storage: Storage) -> bool:
    return storage.exists(LABELS)


def read_labels_beside(storage: Storage, rows: pd.DataFrame) -> Labels:
    """labels.csv beside the shards, joined to `rows` (path, record_id, subject_id of every recording).

    A column of labels.csv replaces the label of that name in the shards, also where it is empty. Raises LsemvaeError.
    """
    joined = join_labels(rows, read_table(storage, LABELS))
    columns = [name for name in joined.columns if name.startswith(LABEL_PREFIX)]
    digest = hashlib.sha256(pd.util.hash_pandas_object(joined[["record_id", *columns]], index=False).to_numpy("<u8"))
    labels = Labels.of_table(joined, digest.hexdigest()[:16])
    log.info(f"labels of {LABELS} beside the shards are used ({len(columns)} columns, digest {labels.digest})")
    return labels
