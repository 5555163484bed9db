"""From a checkpoint reference to the network it stands for."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shufflenet_mlflow.checkpoints.schema import is_own
from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.models.loaded import LoadedModel, model_from_payload
from shufflenet_mlflow.models.spec import ModelSpec
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.tracking.resolve import resolve, run_of
from shufflenet_mlflow.workflows.options import check_request


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint's network, on the CPU, and where it is from."""

    network: LoadedModel
    payload: Mapping[str, Any]
    """The rest of what the checkpoint says, without its tensors."""
    path: Path
    run_id: str | None
    """The run that it belongs to."""
    iters: int

    @property
    def source(self) -> str:
        """What to call it in messages."""
        return source_of(self.path)


def source_of(path: Path) -> str:
    """What to call a checkpoint in messages."""
    return f"the checkpoint {str(path)!r}"


@dataclass(frozen=True)
class ModelRequest:
    """Which network, and where it is kept; None means as the checkpoint says."""

    ref: str
    model: str | None = None
    choices: str | None = None
    scales: str | None = None
    input_size: int | None = None
    mean_image: str | None = None
    tracking_uri: str | None = None
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        check_request(vars(self))

    def load(self, reporter: Reporter | None = None) -> LoadedCheckpoint:
        """The network of the checkpoint that `ref` means.

        Raises:
            ShuffleNetError: as `resolve`, `read_checkpoint` and `model_from_payload` do.
        """
        asked = ModelSpec.asked(vars(self))
        resolved = resolve(self.ref, tracking_uri=self.tracking_uri, cache_dir=self.cache_dir, reporter=reporter)
        payload = read_checkpoint(resolved.path)
        network = model_from_payload(
            payload,
            source_of(resolved.path),
            asked=asked,
            input_size=self.input_size,
            mean_image=self.mean_image,
        )
        own = is_own(payload)
        return LoadedCheckpoint(
            network,
            {key: value for key, value in payload.items() if not key.endswith("state_dict")} if own else {},
            resolved.path,
            run_of(resolved.path, payload) or resolved.run_id,
            payload.get("iters", resolved.iters) if own else resolved.iters,
        )
