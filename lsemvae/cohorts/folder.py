"""A folder or bucket of recordings without a table of its own: found by listing, labelled by a CSV."""

from collections.abc import Iterable

import pandas as pd

from lsemvae.cohorts import ptb_xl
from lsemvae.cohorts.tables import join_labels
from lsemvae.errors import LsemvaeError
from lsemvae.formats import SUFFIXES, UNSURE_SUFFIXES, find_recordings
from lsemvae.storage import Storage


def recordings(storage: Storage, labels: pd.DataFrame | None) -> pd.DataFrame:
    """Every recording below the source; each is its own subject unless the labels say whose it is."""
    table = as_recordings(find_recordings(storage.list(), storage.head).recordings)
    if table.empty:
        suffixes = ", ".join(SUFFIXES + UNSURE_SUFFIXES)
        raise LsemvaeError(f"{storage.uri} has no recordings: none of its files that end in {suffixes} is one")
    if labels is None:
        return table
    if ptb_xl.is_database(labels):
        labels = ptb_xl.label_table(labels, storage)
        labels["file"] = labels["path"]  # for a source that is one of PTB-XL's inner folders
    return join_labels(table, labels, replace_subjects=True)


def as_recordings(paths: Iterable[str]) -> pd.DataFrame:
    """One row a path: the record is named by its file, or by as much of its path as it takes to tell them apart."""
    table = pd.DataFrame({"path": list(paths)}, dtype=str)
    without_extension = table["path"].str.replace(r"\.[^./]*$", "", regex=True)
    names = without_extension.str.replace(r"^.*/", "", regex=True)
    for candidate in (names, without_extension, table["path"]):
        table["record_id"] = table["subject_id"] = candidate
        if not candidate.duplicated().any():
            break
    return table
