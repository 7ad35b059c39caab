"""A folder or bucket of recordings without a table of its own: found by listing, labelled by a CSV."""

import pandas as pd

from lsemvae.cohorts import ptb_xl
from lsemvae.cohorts.tables import join_labels
from lsemvae.errors import LsemvaeError
from lsemvae.formats import SUFFIXES
from lsemvae.storage import Storage


def recordings(storage: Storage, labels: pd.DataFrame | None) -> pd.DataFrame:
    """Every recording below the source; each is its own subject unless the labels say whose it is."""
    paths = [path for path in storage.list() if path.lower().endswith(SUFFIXES)]
    if not paths:
        raise LsemvaeError(f"{storage.uri} has no recordings: none of its files ends in {', '.join(SUFFIXES)}")
    table = pd.DataFrame({"path": paths}, dtype=str)
    without_extension = table["path"].str.rpartition(".")[0]
    names = without_extension.str.rpartition("/")[2]
    table["record_id"] = without_extension if names.duplicated().any() else names
    table["subject_id"] = table["record_id"]
    if labels is None:
        return table
    if ptb_xl.is_database(labels):
        labels = ptb_xl.label_table(labels, storage)
        labels["file"] = labels["path"]  # for a source that is one of PTB-XL's inner folders
    return join_labels(table, labels, replace_subjects=True)
