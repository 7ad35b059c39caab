"""MIMIC-IV-ECG, its demo and simulated cohorts of the same layout. https://physionet.org/content/mimic-iv-ecg/"""

import pandas as pd

from lsemvae.cohorts.tables import join_labels, read_table, require_columns
from lsemvae.errors import LsemvaeError
from lsemvae.storage import Storage

RECORD_LIST = "record_list.csv"
LABELS = "labels.csv"
MEASUREMENTS = "machine_measurements.csv"

_MEASURED = (
    "rr_interval", "p_onset", "p_end", "qrs_onset", "qrs_end", "t_end", "p_axis", "qrs_axis", "t_axis",
)  # fmt: skip
# How the machine writes "not measurable": no interval is that long (ms), no axis that wide (degrees).
_NOT_MEASURABLE = (29999, 32767, -32768, 65535)


def recordings(storage: Storage, labels: pd.DataFrame | None) -> pd.DataFrame:
    """What record_list.csv lists, with the labels of labels.csv in the source where none are given."""
    listed = read_table(storage, RECORD_LIST)
    require_columns(listed, RECORD_LIST, "subject_id", "study_id", "path")
    table = pd.DataFrame({"path": listed["path"], "record_id": listed["study_id"], "subject_id": listed["subject_id"]})
    if table.isna().any(axis=None) or table["record_id"].duplicated().any():
        raise LsemvaeError(f"{RECORD_LIST} has rows without path or ids, or a study twice: mend it")
    if labels is None and storage.exists(LABELS):
        labels = read_table(storage, LABELS)
    return table if labels is None else join_labels(table, labels)


def machine_measurements(storage: Storage) -> pd.DataFrame:
    """What the machine measured of every study: intervals in ms, axes in degrees, NaN where it could not.

    The 18 columns of its report are left out.
    """
    table = read_table(storage, MEASUREMENTS, leave_out=tuple(f"report_{line}" for line in range(18)))
    require_columns(table, MEASUREMENTS, "subject_id", "study_id", *_MEASURED)
    measured = table[list(_MEASURED)].astype("float64")
    table[list(_MEASURED)] = measured.mask(measured.isin(_NOT_MEASURABLE))
    return table
