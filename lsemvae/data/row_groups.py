"""Read the signals of one row group of a shard, and tell a damaged row group from a failing storage."""

import random
import time
from functools import lru_cache

import pyarrow as pa
import pyarrow.parquet as pq

from lsemvae.data.shards import SCHEMA, SIGNAL_COLUMNS
from lsemvae.errors import LsemvaeError
from lsemvae.storage import Storage, explained

LOOKS = 3
"""How many readings from an object store must agree that a row group is damaged."""
_SIGNAL_SCHEMA = pa.schema([SCHEMA.field(name) for name in SIGNAL_COLUMNS])


class Damaged(Exception):
    """A row group is not what was written."""


def read_row_group(storage: Storage, path: str, group: int, rows: int) -> pa.Table:
    """The `SIGNAL_COLUMNS` of a row group that has `rows` rows.

    Raises Damaged, StorageError if the storage itself fails, LsemvaeError if there is no such shard.
    """
    for look in range(1, 1 if storage.is_local else LOOKS):
        try:
            return _read(storage, path, group, rows)
        except Damaged:  # the bytes may have been cut on the way
            footer.cache_clear()
            time.sleep(random.uniform(0, look))
    return _read(storage, path, group, rows)


def _read(storage: Storage, path: str, group: int, rows: int) -> pa.Table:
    try:
        with explained(f"{storage.uri}/{path}"):
            try:
                with storage.filesystem.open_input_file(storage.path(path)) as stream:
                    file = pq.ParquetFile(stream, metadata=footer(storage, path), page_checksum_verification=True)
                    table = file.read_row_group(group, columns=SIGNAL_COLUMNS, use_threads=False)
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                # Parquet's own complaints are OSErrors too, without a number.
                if isinstance(error, OSError) and (error.errno or "AWS Error" in str(error)):
                    raise
                raise Damaged(" ".join(str(error).split())) from error
    except FileNotFoundError:
        raise LsemvaeError(
            f"{storage.uri}/{path} is gone, though the manifest names it: put it back, or ingest again"
        ) from None
    if table.num_rows != rows or not table.schema.equals(_SIGNAL_SCHEMA):
        raise Damaged(f"it has {table.num_rows} rows of {table.schema.names}, not {rows} of {SIGNAL_COLUMNS}")
    return table


@lru_cache(maxsize=4096)
def footer(storage: Storage, path: str) -> pq.FileMetaData:
    """The shard's metadata: read once by each process, not once for each row group."""
    with storage.filesystem.open_input_file(storage.path(path)) as stream:
        return pq.read_metadata(stream)
