"""A cohort with catheter measurements, like the ASPIRE registry: recordings of any format and a table of pressures.

`aspire.csv` in the source (or, with `--cohort aspire`, the table of `--labels`) has a row a recording:

    file,patient,mpap_mmhg,pawp_mmhg
    ecg/0001.dcm,A17,43,11

`file` is a path below the source, or a file name where these are unique; `patient` (or patient_id, subject_id)
is text; pressures are in mmHg, and an empty cell means "not measured". `mPAP` and `PAWP` are accepted as names, too.
Other columns of numbers become labels unchanged. The labels `ph` and `post_capillary` are computed.
"""

import pandas as pd

from lsemvae.cohorts.folder import as_recordings
from lsemvae.cohorts.tables import SUBJECTS, clinical_labels, first_row, join_labels, read_table, require_columns
from lsemvae.errors import LsemvaeError
from lsemvae.storage import Storage

TABLE = "aspire.csv"

# Files in the source that are not recordings. DICOM files often have no extension, or one that is a part of their UID.
_BESIDE = r"(?i)(?:^|/)\.|\.(?:dat|txt|md|pdf|zip|jpg|png|xlsx?)$"


def recordings(storage: Storage, labels: pd.DataFrame | None) -> pd.DataFrame:
    """The recordings of the table that are in the source; other recordings are left out.

    Raises LsemvaeError when a row names no patient: two recordings of one patient could then be in different folds.
    """
    own = storage.exists(TABLE)
    if not own and labels is None:
        raise LsemvaeError(f"{storage.uri} has no {TABLE}: put it there, or give the table with --labels")
    name = TABLE if own else "the labels"
    table = clinical_labels(read_table(storage, TABLE) if own else labels, name)
    require_columns(table, name, "mpap_mmhg")
    subject = next((column for column in SUBJECTS if column in table.columns), "patient_id")
    key = next((column for column in ("path", "file") if column in table.columns), "file")
    require_columns(table, name, key, subject)
    unknown = table[key].isna() | table[subject].isna()
    if unknown.any():
        raise LsemvaeError(f"{name}, {first_row(unknown)}: no {key} or no {subject}: fill it in, or delete the row")

    paths = pd.Series(storage.list(), dtype=str)
    files = as_recordings(paths[~paths.str.contains(_BESIDE, regex=True) & (paths != TABLE)])
    table = join_labels(files, table, replace_subjects=True, only_labelled=True)
    return join_labels(table, labels) if own and labels is not None else table
