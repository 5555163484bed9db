"""The digests of a run's images, so that other images can be compared with them when the files are gone."""

import json
import logging
import tempfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from shufflenet_mlflow.data.digests import DIGEST_BYTES, pack, unpack
from shufflenet_mlflow.errors import TrackingError
from shufflenet_mlflow.tracking.artifacts import RunArtifacts
from shufflenet_mlflow.tracking.messages import TextArtifact
from shufflenet_mlflow.tracking.names import IMAGES_FILE
from shufflenet_mlflow.tracking.run_ids import is_missing

logger = logging.getLogger(__name__)

_LARGEST = 1 << 26
"""Bytes of the file that are read: the digests of eight million images."""


def images_file(digests: Mapping[str, Iterable[bytes]]) -> list[TextArtifact]:
    """Return the message with the digests of training and validation images; none for sets that were not read."""
    packed = {part: pack(of_part) for part, of_part in digests.items()}
    if not packed["train"]:
        return []
    return [TextArtifact.of_json(IMAGES_FILE, {"digest": f"sha256, first {DIGEST_BYTES} bytes, base64", **packed})]


def training_digests(artifacts: RunArtifacts) -> Collection[bytes]:
    """Return the short digests of the images that a run was trained on; empty if it does not say.

    Raises:
        TrackingError: MLflow did not answer.
    """
    try:
        with tempfile.TemporaryDirectory() as scratch:
            file = artifacts.download(IMAGES_FILE, Path(scratch))
            if file.stat().st_size > _LARGEST:
                raise ValueError(f"{file.stat().st_size} bytes are too many")
            return unpack(json.loads(file.read_bytes())["train"])
    except TrackingError as error:
        if not (is_missing(error) or not artifacts.has(IMAGES_FILE)):
            raise
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s of run %s cannot be used: %s", IMAGES_FILE, artifacts.run_id, error)
    return ()
