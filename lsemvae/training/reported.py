"""Ray Train's own list of the checkpoints that a run has reported, checked before Ray reads it.

Ray needs the list only to delete old checkpoints; a run resumes from what is in its folder (see `checkpoints`). But Ray
does not start where it cannot read the list. Where the list names checkpoints that are not there, something has deleted
them, and the run must not start from zero without a word.
"""

import json
import logging
from importlib.metadata import version

from lsemvae.bundle import CONFIG
from lsemvae.errors import LsemvaeError
from lsemvae.storage import Storage
from lsemvae.training.checkpoints import BUNDLE, STATE, folders

log = logging.getLogger(__name__)

LIST = "checkpoint_manager_snapshot.json"


def require_checkpoints(place: Storage) -> None:
    """Raises LsemvaeError where checkpoints that the run in this folder wrote are gone.

    A list that is damaged or of another version of Ray is removed, with a warning.
    """
    there = {name for name in folders(place) if place.exists(f"{name}/{STATE}")}
    listed = _listed(place)
    if gone := sorted(listed - there):
        left = f", or delete {LIST} to go on from {max(there)}" if there else ""
        raise LsemvaeError(
            f"{place.uri}: {', '.join(gone)} {'is' if len(gone) == 1 else 'are'} gone, though {LIST} names "
            f"{'it' if len(gone) == 1 else 'them'}: deleted by a lifecycle rule of the bucket, or by hand. Restore "
            f"{'it' if len(gone) == 1 else 'them'}{left}, or give another --name to start anew"
        )
    if not there and _epoch_of_bundle(place) > 0:
        raise LsemvaeError(
            f"{place.uri}: the checkpoints are gone, though {BUNDLE}/ shows that the run had some: deleted by a "
            "lifecycle rule of the bucket, or by hand. Restore them, or give another --name to start anew"
        )
    if there and not listed:
        log.warning(f"{place.uri} has checkpoints and no {LIST}: Ray will not delete {', '.join(sorted(there))}")


def _epoch_of_bundle(place: Storage) -> int:
    """The epoch of the best bundle so far, -1 without one. It is written before the checkpoint of its own epoch."""
    try:
        return int(json.loads(place.read_bytes(f"{BUNDLE}/{CONFIG}"))["provenance"]["metrics"]["epoch"])
    except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError):
        return -1


def _listed(place: Storage) -> set[str]:
    try:
        content = json.loads(place.read_bytes(LIST))
        listed = {entry["checkpoint_dir_name"] for entry in content["checkpoint_results"]}
        written_by = content["ray_version"]
    except FileNotFoundError:
        return set()
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError):
        log.warning(f"{place.uri}/{LIST} is cut or altered, and is removed: the run resumes without it")
        place.remove(LIST)
        return set()
    if written_by != version("ray"):
        log.warning(f"{place.uri}/{LIST} is of Ray {written_by}, this is {version('ray')}: it is removed")
        place.remove(LIST)
    return listed
