"""pyarrow, which is imported where Parquet is first needed, and Parquet files opened with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tokenflow_sdk.dataset.storage import Storage
from tokenflow_sdk.errors import DatasetError, MissingPackageError, StorageError

__all__ = ["import_pyarrow", "open_parquet"]


def import_pyarrow(instead: str = "") -> tuple[Any, Any]:
    """The modules `pyarrow` and `pyarrow.parquet`.

    Args:
        instead: what else may be done where they are missing; follows the command that installs them.

    Raises:
        MissingPackageError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        hint = f"Run `pip install 'tokenflow-sdk[dataset]'`{instead}."
        raise MissingPackageError("Parquet files need pyarrow, which is not installed.", hint) from error
    return pa, pq


@contextmanager
def open_parquet(storage: Storage, **options: Any) -> Iterator[Any]:
    """Give a `pyarrow.parquet.ParquetFile`, with its options. What goes wrong within the block is named as damage of the file.

    Raises:
        DatasetError: it is damaged, or no Parquet file.
        StorageError, DatasetFileError: it cannot be read.
        MissingPackageError: pyarrow is not installed.
    """
    pa, pq = import_pyarrow()
    try:
        with storage.open() as file, pq.ParquetFile(file, **options) as parquet:
            yield parquet
    except StorageError:
        raise
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        again = "Fetch or make it again."
        raise DatasetError(f"{storage.address} is damaged, or no Parquet file: {str(error).rstrip('.')}.", again) from error
