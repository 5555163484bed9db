"""A quick look at a checkpoint: its run and network, without reading tensors, verifying it, or importing torch."""

import zipfile
from pathlib import Path
from typing import NamedTuple

from shufflenet_mlflow.checkpoints.claims import LARGEST_PICKLE, entries_without_tensors
from shufflenet_mlflow.checkpoints.schema import is_own


class Glance(NamedTuple):
    """A checkpoint's run and network, as far as it names them."""

    run_id: str | None = None
    network: str | None = None


def glance(path: Path) -> Glance:
    """Return what a file says of itself; nothing if this project did not write it, or it cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            root = archive.namelist()[0].partition("/")[0]
            member = archive.getinfo(f"{root}/data.pkl")
            if member.file_size > LARGEST_PICKLE or member.compress_type != zipfile.ZIP_STORED:
                return Glance()
            entries = entries_without_tensors(archive.read(member))
    except Exception:  # noqa: BLE001 - a damaged file can lead to any
        return Glance()
    if not is_own(entries):
        return Glance()
    run_id, model = entries.get("run_id"), entries.get("model")
    name = model.get("name") if isinstance(model, dict) else None
    return Glance(run_id if isinstance(run_id, str) else None, name if isinstance(name, str) else None)
