"""torchvision's own ShuffleNetV2, under `torchvision/<name>`, and its published weights.

It shuffles channels behind the branch where the release splits them before it, its classifier has a bias, and its
weights expect normalised RGB images.
"""

import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_model, get_model_weights

from shufflenet_mlflow.checkpoint import verify_checkpoint
from shufflenet_mlflow.errors import CheckpointError, ModelError

PREFIX = "torchvision/"


def build(name: str, num_classes: int) -> nn.Module:
    """torchvision's network behind `name`, freshly initialised as torchvision does."""
    model: nn.Module = get_model(name.removeprefix(PREFIX), weights=None, num_classes=num_classes)
    return model


def published_weights(name: str) -> WeightsEnum:
    """torchvision's default weights of the network behind `name`.

    Raises:
        ModelError: it is not one of torchvision's.
    """
    if not name.startswith(PREFIX):
        raise ModelError(
            f"there are no published weights of {name} to fetch; download the release's file and begin from it "
            f"(--init-from FILE), or take a {PREFIX} network"
        )
    weights: WeightsEnum = get_model_weights(name.removeprefix(PREFIX)).DEFAULT  # type: ignore[attr-defined]
    return weights


def weights_file(name: str) -> Path:
    """Where torch.hub keeps the published weights once they are fetched."""
    folder: str = torch.hub.get_dir()
    return Path(folder) / "checkpoints" / os.path.basename(str(published_weights(name).url))


def fetch_weights(name: str) -> dict[str, Tensor]:
    """The published weights of the network behind `name`, from torch.hub's cache, or fetched into it.

    Raises:
        ModelError: it is not one of torchvision's.
        CheckpointError: they could not be fetched, or what is in the cache cannot be used.
    """
    weights = published_weights(name)
    path = weights_file(name)
    if path.exists():
        verify_checkpoint(path)  # torch.load would not notice a flipped bit
    try:
        state_dict: dict[str, Tensor] = weights.get_state_dict(
            progress=False, check_hash=True, map_location="cpu", weights_only=True
        )
    except OSError as error:
        reason = getattr(error, "reason", None) or error.strerror or error
        raise CheckpointError(
            f"the published weights of {name} could not be fetched ({reason}); with another machine's help, put "
            f"{path.name} into {str(path.parent)!r}, or train without --pretrained"
        ) from error
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"the published weights in {str(path)!r} cannot be used ({reason}); remove the file to fetch it anew"
        ) from error
    return state_dict
