"""KardiaMobile recordings: a folder of `.atc` files and JSON of the Kardia API.

A table is optional, `kardia.csv` in the source or `--labels`, with a row a recording: `file`, `patient` (or
patient_id, subject_id), and labels. Pressures in mmHg (mpap_mmhg, pawp_mmhg) give `ph` and `post_capillary`.
"""

import pandas as pd

from lsemvae.cohorts.folder import as_recordings, without_copies
from lsemvae.cohorts.source import Source
from lsemvae.cohorts.tables import clinical_labels, join_labels, read_table
from lsemvae.errors import LsemvaeError
from lsemvae.storage import Storage

TABLE = "kardia.csv"
SUFFIXES = (".atc", ".json")


def recordings(storage: Storage, labels: pd.DataFrame | None) -> pd.DataFrame:
    """Every Kardia recording below the source; each is a subject of its own unless the table says whose it is.

    Of a recording that is there as `.atc` and as `.json`, the `.atc` is used.
    """
    paths = [path for path in Source.of(storage).found.recordings if owns(path)]
    if not paths:
        raise LsemvaeError(f"{storage.uri} has no recordings: none of its files is .atc or Kardia JSON")
    table = as_recordings(without_copies(paths))
    if storage.exists(TABLE):
        own = clinical_labels(read_table(storage, TABLE), TABLE)
        table = join_labels(table, own, replace_subjects=True)
    return table if labels is None else join_labels(table, clinical_labels(labels, "the labels"), replace_subjects=True)


def owns(path: str) -> bool:
    """Whether a recording is one of KardiaMobile. Among recordings, only those of its API end in .json."""
    return path.lower().endswith(SUFFIXES)
