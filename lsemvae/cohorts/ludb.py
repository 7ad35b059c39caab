"""LUDB, 200 recordings with diagnoses. https://physionet.org/content/ludb/

The gains in its headers are wrong: they scale every lead to 1 mV peak to peak, which breaks Einthoven's law. The raw
counts fulfil it exactly. That one count is 1 uV is inferred.
"""

import numpy as np
import pandas as pd

from lsemvae.cohorts.demographics import age_years, female
from lsemvae.cohorts.labels import stated
from lsemvae.cohorts.tables import join_labels, only_present, read_table, require_columns
from lsemvae.storage import Storage

TABLE = "ludb.csv"
UV_PER_LSB = 1.0

_AXIS = "Electric axis of the heart"
# Label -> column, and the statements any of which makes it 1.
_LABELS = {
    "af": ("Rhythms", ["Atrial fibrillation"]),
    "afl": ("Rhythms", ["Atrial flutter, typical"]),
    "left_axis": (_AXIS, ["Electric axis of the heart: left axis deviation"]),
    "right_axis": (_AXIS, ["Electric axis of the heart: right axis deviation"]),
    "lafb": ("Conduction abnormalities", ["Left anterior hemiblock"]),
    "rbbb": (
        "Conduction abnormalities",
        ["Incomplete right bundle branch block", "Complete right bundle branch block"],
    ),
    "lbbb": (
        "Conduction abnormalities",
        ["Incomplete left bundle branch block", "Complete left bundle branch block"],
    ),
    "lvh": ("Hypertrophies", ["Left ventricular hypertrophy"]),
    "rvh": ("Hypertrophies", ["Right ventricular hypertrophy"]),
    "ra_enlargement": ("Hypertrophies", ["Right atrial hypertrophy", "Right atrial overload"]),
}
# In these columns an empty cell means that nothing is stated; in the others, that nothing was found.
_ALWAYS_STATED = ("Rhythms", _AXIS)


def recordings(storage: Storage, labels: pd.DataFrame | None) -> pd.DataFrame:
    """Recordings of ludb.csv that are in the source; every recording is of another subject."""
    listed = read_table(storage, TABLE)
    require_columns(listed, TABLE, "ID", *{column for column, _ in _LABELS.values()})
    identifiers = listed["ID"].astype(str)
    table = pd.DataFrame({"path": "data/" + identifiers, "record_id": identifiers, "subject_id": identifiers})
    for name, (column, positive) in _LABELS.items():
        statements = listed[column].fillna("").map(lambda cell: {line.strip() for line in cell.splitlines()} - {""})
        values = stated(statements, positive)
        table[f"label.{name}"] = values if column in _ALWAYS_STATED else np.nan_to_num(values, nan=0.0)
    if "Sex" in listed.columns:
        table["label.female"] = female(listed["Sex"])
    if "Age" in listed.columns:
        table["label.age_years"] = age_years(listed["Age"])
    table = only_present(table, storage, TABLE)
    return table if labels is None else join_labels(table, labels)
