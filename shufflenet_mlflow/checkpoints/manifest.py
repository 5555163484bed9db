"""The manifest of a checkpoint: what it is, and what its bytes must be.

It stands as JSON beside the file (`<file>.json`), beside the artifact, and in the run's tags
`checkpoint.latest` and `checkpoint.best`.
"""

import json
import logging
import math
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from shufflenet_mlflow.errors import CheckpointError
from shufflenet_mlflow.runtime.files import write_atomically

logger = logging.getLogger(__name__)

ARTIFACT_FOLDER = "checkpoints"
LATEST_TAG = "checkpoint.latest"
BEST_TAG = "checkpoint.best"


def finite(value: float | None) -> float | None:
    """JSON has no NaN: what is not finite is null."""
    return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class CheckpointManifest:
    """One checkpoint, as its writer knew it."""

    path: str
    """Artifact path, `checkpoints/<file>`."""
    iters: int
    epoch: int | None
    loss: float | None
    val_top1: float | None
    """Top-1 accuracy on the validation set at this very state; None if it was not validated."""
    sha256: str
    bytes: int

    @property
    def file_name(self) -> str:
        """The last part of `path`."""
        return self.path.rpartition("/")[2]

    def to_json(self) -> str:
        """JSON on one line."""
        return json.dumps(asdict(self), allow_nan=False)

    def to_line(self) -> str:
        """The same with its own CRC-32, as it stands in files."""
        return json.dumps({**asdict(self), "crc32": _crc32(self.to_json())}, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "CheckpointManifest":
        """The inverse of `to_json` and `to_line`; keys that a later version may add are passed over.

        Raises:
            CheckpointError: the text is not such a manifest.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            manifest = cls(**{name: values[name] for name in cls.__dataclass_fields__})
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"not a checkpoint manifest: {text[:80]!r}", code="manifest-syntax") from error
        if not (
            isinstance(manifest.path, str)
            and isinstance(manifest.sha256, str)
            and type(manifest.iters) is int
            and type(manifest.bytes) is int
            and all(map(_is_number_or_none, (manifest.epoch, manifest.loss, manifest.val_top1)))
        ):
            raise CheckpointError(f"not a checkpoint manifest: {text[:80]!r}", code="manifest-types")
        if "crc32" in values and values.pop("crc32") != _crc32(json.dumps(values)):  # of all keys, also unknown ones
            raise CheckpointError(f"a damaged checkpoint manifest: {text[:80]!r}", code="manifest-damaged")
        return manifest


def _is_number_or_none(value: object) -> bool:
    return value is None or type(value) is int or (type(value) is float and math.isfinite(value))


def _crc32(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def manifest_path(checkpoint: Path) -> Path:
    """Where the manifest of the file `checkpoint` stands."""
    return checkpoint.with_name(checkpoint.name + ".json")


def write_manifest(checkpoint: Path, manifest: CheckpointManifest) -> None:
    """Put the manifest beside the file `checkpoint`."""
    write_atomically(manifest_path(checkpoint), lambda file: file.write(manifest.to_line().encode()))


def update_manifest(checkpoint: Path, *, val_top1: float) -> CheckpointManifest | None:
    """Note the validation accuracy of a checkpoint that was written before it was validated.

    Returns:
        The new manifest; None if there was none.

    Raises:
        CheckpointError: it cannot be written; the former one is intact.
    """
    manifest = read_manifest(checkpoint)
    if manifest is None:
        return None
    manifest = replace(manifest, val_top1=finite(val_top1))
    try:
        write_manifest(checkpoint, manifest)
    except OSError as error:
        raise CheckpointError(
            f"cannot write the manifest {str(manifest_path(checkpoint))!r}: {error.strerror}; "
            "earlier checkpoints are intact, --save-dir takes another place",
            code="manifest-unwritable",
        ) from error
    return manifest


def read_manifest(checkpoint: Path) -> CheckpointManifest | None:
    """The manifest beside the file `checkpoint`; None if there is none, or none that can be read."""
    path = manifest_path(checkpoint)
    try:
        return CheckpointManifest.from_json(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, CheckpointError) as error:
        logger.warning("the manifest %s cannot be used, the checkpoint's CRCs have to do: %s", path, error)
        return None
