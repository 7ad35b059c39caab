"""MIMIC-IV-ECG, its demo, and simulated cohorts of the same layout. https://physionet.org/content/mimic-iv-ecg/

The 1.6 million files are never listed: a recording that record_list.csv names but that is absent is noticed when it is
read.
"""

import pandas as pd

from lsemvae.cohorts import labels as definitions
from lsemvae.cohorts.tables import join_labels, read_table, require_columns
from lsemvae.errors import LsemvaeError
from lsemvae.storage import Storage

RECORD_LIST = "record_list.csv"
LABELS = "labels.csv"
MEASUREMENTS = "machine_measurements.csv"

# Column -> label with its unit, and the range of measurements that are possible in 10 s. "Not measurable" is written
# as 29999 for times, 65535 for the RR interval, 32767 or -32768 for axes.
_MEASURED = {
    "rr_interval": ("rr_interval_ms", 1, 10_000),
    **{name: (f"{name}_ms", 0, 10_000) for name in ("p_onset", "p_end", "qrs_onset", "qrs_end", "t_end")},
    **{name: (f"{name}_deg", -360, 360) for name in ("p_axis", "qrs_axis", "t_axis")},
}


def recordings(storage: Storage, labels: pd.DataFrame | None) -> pd.DataFrame:
    """The recordings of record_list.csv, with the machine's measurements if machine_measurements.csv is there.

    The labels of labels.csv in the source are used if none are given.
    """
    ids = ["subject_id", "study_id"]
    listed = read_table(storage, RECORD_LIST, only=[*ids, "path"])
    require_columns(listed, RECORD_LIST, *ids, "path")
    table = pd.DataFrame({"path": listed["path"], "record_id": listed["study_id"], "subject_id": listed["subject_id"]})
    if table.isna().any(axis=None) or table["record_id"].duplicated().any():
        raise LsemvaeError(f"{RECORD_LIST} has rows without path or ids, or a study twice: mend it")
    if storage.exists(MEASUREMENTS):
        table = join_labels(table, machine_measurements(storage))
    if labels is None and storage.exists(LABELS):
        labels = read_table(storage, LABELS)
    return table if labels is None else join_labels(table, labels)


def machine_measurements(storage: Storage) -> pd.DataFrame:
    """study_id and the machine's measurements: times in ms, axes in degrees, NaN where it could not measure.

    Onsets and ends are counted from the beginning of the machine's average beat. `left_axis` and `right_axis` follow
    from the QRS axis. Impossible values are NaN, too, because no user can correct them.
    """
    table = read_table(storage, MEASUREMENTS, only=["study_id", *_MEASURED])
    require_columns(table, MEASUREMENTS, "study_id", *_MEASURED)
    measured = {"study_id": table["study_id"]}
    for column, (label, low, high) in _MEASURED.items():
        values = pd.to_numeric(table[column], errors="coerce").astype("float64")
        measured[label] = values.where(values.between(low, high))
    measured["left_axis"] = definitions.left_axis_deviation(measured["qrs_axis_deg"])
    measured["right_axis"] = definitions.right_axis_deviation(measured["qrs_axis_deg"])
    return pd.DataFrame(measured)
