"""What is known about a data set since it was ingested: changed labels, and who has withdrawn.

Both are tables beside the shards that are consulted whenever the data set is opened, so no recording is read again:
`labels.csv` (see docs/labels.md for its keys) replaces or adds labels, `withdrawn.csv` names subjects.
"""

import hashlib
import logging
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lsemvae.cohorts.tables import LABEL_PREFIX, join_labels, read_table
from lsemvae.storage import Storage

LABELS = "labels.csv"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Labels:
    """Labels of every row of a data set, in the order of its shards: `record_id` and the `label.NAME` that changed."""

    table: pd.DataFrame
    digest: str

    @property
    def columns(self) -> list[str]:
        return [name for name in self.table.columns if name.startswith(LABEL_PREFIX)]

    def of(self, column: str, record_ids: np.ndarray) -> np.ndarray:
        """float64 [B], NaN where the label is not known."""
        return self.table.set_index("record_id")[column].reindex(record_ids).to_numpy(float)


NO_LABELS = Labels(pd.DataFrame({"record_id": []}, dtype=str), "")


def has_labels(storage: Storage) -> bool:
    return storage.exists(LABELS)


def read_labels_beside(storage: Storage, rows: pd.DataFrame) -> Labels:
    """labels.csv beside the shards, joined to `rows` (path, record_id, subject_id of every recording).

    A column of labels.csv replaces the label of that name in the shards, also where it is empty. Raises LsemvaeError.
    """
    joined = join_labels(rows, read_table(storage, LABELS))
    columns = [name for name in joined.columns if name.startswith(LABEL_PREFIX)]
    digest = hashlib.sha256(pd.util.hash_pandas_object(joined[["record_id", *columns]], index=False).to_numpy("<u8"))
    labels = Labels(joined[["record_id", *columns]], digest.hexdigest()[:16])
    log.info(f"labels of {LABELS} beside the shards are used ({len(columns)} columns, digest {labels.digest})")
    return labels
