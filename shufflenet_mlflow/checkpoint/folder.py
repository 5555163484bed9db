"""A folder of checkpoints: what is in it, and taking things out of it."""

import contextlib
import os
from pathlib import Path

from shufflenet_mlflow.checkpoint.names import list_checkpoints, parse_name
from shufflenet_mlflow.checkpoint.record import CheckpointRecord, read_record, record_path
from shufflenet_mlflow.runtime.files import remove_temporaries, sync_folder, temporary_beside

_RECORD_SUFFIX = ".json"


def list_records(directory: Path) -> list[CheckpointRecord]:
    """The records of the checkpoints in `directory`, newest first; files without one are passed over."""
    records = (read_record(path) for path in list_checkpoints(directory))
    return [record for record in records if record is not None]


def delete_checkpoint(path: Path) -> int:
    """Delete a checkpoint and its record.

    First it loses its name, so that nobody begins to read it; then it is removed. What a process that is killed in
    between leaves, `remove_leftovers` takes away.

    Returns:
        The bytes that became free.

    Raises:
        OSError: it could not be deleted.
    """
    size = path.stat().st_size
    nameless = temporary_beside(path)
    os.replace(path, nameless)
    sync_folder(path.parent)
    nameless.unlink()
    record_path(path).unlink(missing_ok=True)
    return size


def remove_leftovers(directory: Path) -> None:
    """Remove what killed writers and deleters left in `directory`; call while nobody writes there."""
    if not directory.is_dir():
        return
    with contextlib.suppress(OSError):  # a folder that cannot be written says so when something is saved
        remove_temporaries(directory)
        for entry in directory.iterdir():
            name = entry.name.removesuffix(_RECORD_SUFFIX)
            lonely = name != entry.name and parse_name(name) is not None and not (directory / name).exists()
            if lonely and read_record(directory / name) is not None:
                entry.unlink(missing_ok=True)
