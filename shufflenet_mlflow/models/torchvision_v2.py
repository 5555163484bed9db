"""torchvision's ShuffleNetV2, as `torchvision/<name>`, and its published weights.

It shuffles channels after the branch, while the release splits them before it; its classifier has a bias, and its
weights expect normalised RGB images.
"""

import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from shufflenet_mlflow.checkpoints.verification import verify_checkpoint
from shufflenet_mlflow.errors import CheckpointError
from shufflenet_mlflow.models.shufflenet_v2 import STAGE_UNITS, WIDTHS
from shufflenet_mlflow.runtime.files import sha256_of

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum

logger = logging.getLogger(__name__)


def build(name: str, num_classes: int) -> nn.Module:
    """Build torchvision's network with weights drawn as torchvision does."""
    from shufflenet_mlflow.models.torchvision_unit import Network

    return Network(STAGE_UNITS, WIDTHS[name.rpartition("/")[2]], num_classes)


def published_weights(name: str) -> "WeightsEnum":
    """Return torchvision's default weights of the network `name`."""
    from torchvision.models import get_model_weights

    weights: WeightsEnum = get_model_weights(name.rpartition("/")[2]).DEFAULT  # type: ignore[attr-defined]
    return weights


def weights_file(name: str) -> Path:
    """Return the path of the published weights in torch.hub's cache."""
    folder: str = torch.hub.get_dir()
    return Path(folder) / "checkpoints" / os.path.basename(str(published_weights(name).url))


def fetch_weights(name: str) -> dict[str, Tensor]:
    """Return the published weights of the network `name`, from torch.hub's cache or downloaded into it.

    Raises:
        ModelError: it is not one of torchvision's networks.
        CheckpointError: they could not be downloaded, or the cached file cannot be used.
    """
    weights = published_weights(name)
    path = weights_file(name)
    cached = path.exists()
    if cached:
        _check_cached(path)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # torch.hub announces a download on stdout
            state_dict: dict[str, Tensor] = weights.get_state_dict(
                progress=False, check_hash=True, map_location="cpu", weights_only=True
            )
    except Exception as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        line = str(reason).splitlines()[0] if str(reason) else type(error).__name__
        if cached:
            raise CheckpointError(
                f"the published weights in {str(path)!r} cannot be used ({line}); {_REMOVE}",
                code="published-weights-damaged",
            ) from error
        raise CheckpointError(
            f"the published weights of {name} could not be downloaded ({line}); put a copy of {path.name} into "
            f"{str(path.parent)!r}, or train without --pretrained",
            code="published-weights-not-fetched",
        ) from error
    if not isinstance(state_dict, dict):
        raise CheckpointError(f"{str(path)!r} holds no state dict; {_REMOVE}", code="published-weights-empty")
    return state_dict


_REMOVE = "remove the file to download it again"


def _check_cached(path: Path) -> None:
    """Verify a cached file: PyTorch checks its hash only after downloading it."""
    try:
        verify_checkpoint(path)
    except CheckpointError as error:
        raise type(error)(f"{error}; {_REMOVE}", code="published-weights-cache") from error
    with open(path, "rb") as file:
        digest = sha256_of(file)
    published = path.stem.rpartition("-")[2]
    if not digest.startswith(published):
        logger.warning(
            "%s is not the file that torchvision publishes: its SHA-256 begins with %s", path, digest[: len(published)]
        )
