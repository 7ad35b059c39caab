"""A folder or bucket of recordings without a table of its own: found by listing it, labelled by a CSV."""

from collections import Counter
from collections.abc import Iterable, Sequence

import pandas as pd

from lsemvae.cohorts import ptb_xl
from lsemvae.cohorts.source import Source
from lsemvae.cohorts.tables import join_labels
from lsemvae.errors import LsemvaeError
from lsemvae.storage import Storage


def recordings(storage: Storage, labels: pd.DataFrame | None) -> pd.DataFrame:
    """Every recording below the source; each is a subject of its own unless the labels say whose it is."""
    found = Source.of(storage).found
    table = as_recordings(without_copies(found.recordings))
    if table.empty:
        reasons = Counter(file.reason for file in found.passed_over).most_common(3)
        shown = "; ".join(f"{count} are passed over: {reason}" for reason, count in reasons) or "it has no files"
        raise LsemvaeError(f"{storage.uri} has no recordings that can be read ({shown}): check the path")
    if labels is None:
        return table
    if ptb_xl.is_database(labels):
        labels = ptb_xl.label_table(labels, storage)
        labels["file"] = labels["path"]  # for a source that is one of PTB-XL's inner folders
    return join_labels(table, labels, replace_subjects=True)


def without_copies(paths: Sequence[str]) -> list[str]:
    """The paths without a JSON of the Kardia API where the same recording is there as `.atc`."""
    stems = {path.rpartition(".")[0] for path in paths if path.lower().endswith(".atc")}
    return [path for path in paths if not (path.lower().endswith(".json") and path.rpartition(".")[0] in stems)]


def as_recordings(paths: Iterable[str]) -> pd.DataFrame:
    """One row for each path. A record is named by its file, or by its path where file names are not unique."""
    table = pd.DataFrame({"path": list(paths)}, dtype=str)
    without_extension = table["path"].str.replace(r"\.[^./]*$", "", regex=True)
    names = without_extension.str.replace(r"^.*/", "", regex=True)
    for candidate in (names, without_extension, table["path"]):
        table["record_id"] = table["subject_id"] = candidate
        if not candidate.duplicated().any():
            break
    return table
