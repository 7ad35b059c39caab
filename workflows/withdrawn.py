"""Find what still holds recordings of subjects who have withdrawn: tables, files, bundles, and runs in MLflow.

Give all places at once: shards, scores, explanations, the storage and outputs of trainings. Models are found by the
data set that they were trained on, so look before you delete shards or ingest again.

    python workflows/withdrawn.py --list withdrawn.csv --places shards scores s3://bucket/runs --output held.csv

The output names places and counts; --output writes a line for each file. Nothing is deleted. Not searched: a feed's
cache, backups, and what you have copied elsewhere.
"""

import csv
import io
from collections import Counter
from dataclasses import dataclass
from typing import Annotated

import tyro
from command import run_command

from lsemvae.cohorts.withdrawn import require_withdrawn
from lsemvae.data.held import MODEL, NOT_READ, PERHAPS, ROWS, Held, Search
from lsemvae.errors import LsemvaeError
from lsemvae.progress import Bar
from lsemvae.storage import Storage
from lsemvae.tracking import made_from, shown, tracking_uri


@dataclass(frozen=True)
class Args:
    list_: Annotated[str, tyro.conf.arg(name="list")]
    """The subjects who have withdrawn, an identifier a line (path or URI)."""
    places: tuple[str, ...]
    """Folders and s3:// URIs to look through."""
    output: str | None = None
    """A CSV that lists every file (path or URI). File names may hold identifiers: protect it as you protect scores."""
    mlflow: bool = True
    """Look for runs and versions in MLflow, too."""


def main(args: Args) -> None:
    gone = require_withdrawn(args.list_)
    if not gone.subjects or not args.places:
        raise LsemvaeError(
            f"{args.list_} names nobody, or --places is empty: give a list and the places to look through"
        )
    places = [Storage.open(uri).require() for uri in dict.fromkeys(args.places)]
    with Bar(None, "look"):
        search = Search(gone).look(places)
    held = list(search.found)
    if args.mlflow:
        runs, versions = made_from(search.data_digests, search.model_digests)
        held += [Held(shown(tracking_uri()), name, "run", 1) for name in runs]
        held += [Held(shown(tracking_uri()), name, "version", 1) for name in versions]
    if args.output is not None:
        write(Storage.open(args.output), held)
    show(gone.digest, len(gone.subjects), places, held)
    print(f"files: {args.output}" if args.output else "give --output FILE to have every file listed")


def write(output: Storage, held: list[Held]) -> None:
    text = io.StringIO()
    lines = csv.writer(text)
    lines.writerow(("place", "path", "what", "count"))
    lines.writerows((one.place, one.path, one.what, one.count) for one in held)
    output.write_bytes("", text.getvalue().encode())


def show(digest: str, subjects: int, places: list[Storage], held: list[Held]) -> None:
    """Places and counts, without names of files: they may hold identifiers."""
    print(f"list {digest} of {subjects} subjects")
    for place in dict.fromkeys([*(place.uri for place in places), *(one.place for one in held)]):
        found = Counter(one.what for one in held if one.place == place)
        rows = sum(one.count for one in held if one.place == place and one.what == ROWS)
        told = {
            f"tables with {rows} rows": found.pop(ROWS, 0),
            "models": found.pop(MODEL, 0),
            "models that were trained without the subjects of another list": found.pop(PERHAPS, 0),
            "tables that cannot be read": found.pop(NOT_READ, 0),
            "runs": found.pop("run", 0),
            "versions": found.pop("version", 0),
            "other files": found.total(),
        }
        print(f"{place}: {', '.join(f'{count} {what}' for what, count in told.items() if count) or 'nothing'}")


if __name__ == "__main__":
    run_command(main, Args)
