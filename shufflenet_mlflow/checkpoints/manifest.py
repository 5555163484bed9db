"""The manifest of a checkpoint: its iteration and metrics, size and hash.

It is stored as JSON beside the file (`<file>.json`), beside the artifact, and in the run's tags
`checkpoint.latest` and `checkpoint.best`.
"""

import json
import logging
import math
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from shufflenet_mlflow.checkpoints.names import LARGEST_COUNT, local_name
from shufflenet_mlflow.errors import CheckpointError
from shufflenet_mlflow.runtime.files import write_atomically

logger = logging.getLogger(__name__)

ARTIFACT_FOLDER = "checkpoints"
LATEST_TAG = "checkpoint.latest"
BEST_TAG = "checkpoint.best"
MANIFEST_SUFFIX = ".json"
"""Appended to the checkpoint's file name."""


def finite(value: float | None) -> float | None:
    """Return the value as a float, or None if it is not finite: JSON has no NaN."""
    return float(value) if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class CheckpointManifest:
    """Description of one checkpoint file."""

    path: str
    """Artifact path, `checkpoints/<file>`; beside a file on the disk, with that file's name."""
    iters: int
    epoch: int | None
    loss: float | None
    val_top1: float | None
    """Top-1 accuracy of this state on the validation set, 0..1; None if it was not validated."""
    sha256: str
    """Hex digest of the file."""
    bytes: int
    """Size of the file."""
    monitor: str | None = None
    """Name of the metric that decides which checkpoint is the best; None: `val_top1`, the higher the better."""
    value: float | None = None
    """That metric's value."""
    mode: str | None = None
    """`max` or `min`: which values of it are better."""

    @property
    def score(self) -> float | None:
        """Number that is higher for a better checkpoint; None if this one cannot be the best."""
        if self.monitor is None:
            return self.val_top1
        return -self.value if self.value is not None and self.mode == "min" else self.value

    @property
    def file_name(self) -> str:
        """The last part of `path`."""
        return self.path.rpartition("/")[2]

    def named(self, name: str) -> "CheckpointManifest":
        """Return the manifest of the same bytes under another file name."""
        return replace(self, path=f"{ARTIFACT_FOLDER}/{name}")

    def as_local(self) -> "CheckpointManifest":
        """Return the manifest as it stands beside the file on a disk."""
        name = local_name(self.file_name)
        return self if name == self.file_name else self.named(name)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values by field, without the fields of `monitor` if there is none."""
        values = asdict(self)
        return values if self.monitor is not None else {key: values[key] for key in values if key not in _MONITOR}

    def to_json(self) -> str:
        """Return JSON on one line, as in tags."""
        return json.dumps(self.to_dict(), allow_nan=False)

    def to_line(self) -> str:
        """Return the same JSON with its own CRC-32, as in files."""
        return json.dumps({**self.to_dict(), "crc32": _crc32(self.to_json())}, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "CheckpointManifest":
        """Parse the output of `to_json` or `to_line`; unknown keys, which a later version may add, are ignored.

        Raises:
            CheckpointError: the text is not a manifest, or its CRC is wrong.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            optional: dict[str, Any] = {name: values.get(name) for name in _MONITOR}
            needed = {name: values[name] for name in cls.__dataclass_fields__ if name not in optional}
            manifest = cls(**needed, **optional)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"not a checkpoint manifest: {text[:80]!r}", code="manifest-syntax") from error
        if not (
            isinstance(manifest.path, str)
            and isinstance(manifest.sha256, str)
            and _is_count(manifest.iters)
            and _is_count(manifest.bytes)
            and all(map(_is_number_or_none, (manifest.epoch, manifest.loss, manifest.val_top1, manifest.value)))
            and isinstance(manifest.monitor, str | None)
            and manifest.mode in (("max", "min") if manifest.monitor is not None else (None,))
        ):
            raise CheckpointError(f"not a checkpoint manifest: {text[:80]!r}", code="manifest-types")
        if "crc32" in values and values.pop("crc32") != _crc32(json.dumps(values)):  # over all keys, unknown ones too
            raise CheckpointError(f"a damaged checkpoint manifest: {text[:80]!r}", code="manifest-damaged")
        return manifest


_MONITOR = ("monitor", "value", "mode")

_MOST_BYTES = 1 << 16
"""Bytes of a manifest; a longer one is cut off, and so damaged."""


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_COUNT


def _is_number_or_none(value: object) -> bool:
    return value is None or _is_count(value) or (type(value) is float and math.isfinite(value))


def _crc32(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def manifest_path(checkpoint: Path) -> Path:
    """Return the path of the manifest beside the file `checkpoint`."""
    return checkpoint.with_name(checkpoint.name + MANIFEST_SUFFIX)


def write_manifest(checkpoint: Path, manifest: CheckpointManifest) -> None:
    """Write the manifest beside the file `checkpoint`.

    Raises:
        OSError: it cannot be written; the former one is intact.
    """
    write_atomically(manifest_path(checkpoint), lambda file: file.write(manifest.to_line().encode()))


def update_manifest(checkpoint: Path, *, val_top1: float) -> CheckpointManifest | None:
    """Record the validation accuracy of a checkpoint that was written before it was validated.

    Returns:
        The new manifest, or None if the checkpoint has none.

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
            "earlier checkpoints are intact; choose another folder with --save-dir",
            code="manifest-unwritable",
        ) from error
    return manifest


def read_manifest(checkpoint: Path) -> CheckpointManifest | None:
    """Return the manifest beside the file `checkpoint`, or None if there is none that can be read."""
    path = manifest_path(checkpoint)
    try:
        with open(path, "rb") as file:
            return CheckpointManifest.from_json(file.read(_MOST_BYTES).decode("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, CheckpointError) as error:
        logger.warning("the manifest %s cannot be used, only the checkpoint's CRCs are checked: %s", path, error)
        return None
