"""Load the network of a checkpoint reference, for all commands that take one."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shufflenet_mlflow.checkpoints.schema import is_own
from shufflenet_mlflow.models.loaded import LoadedModel, model_from_payload
from shufflenet_mlflow.models.spec import ModelSpec
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.tracking.connection import Connection
from shufflenet_mlflow.tracking.resolve import resolve, run_of
from shufflenet_mlflow.workflows.options import check_request


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint's network, on the CPU, and its origin."""

    network: LoadedModel
    payload: Mapping[str, Any]
    """The checkpoint's other entries, without tensors."""
    path: Path
    run_id: str | None
    """The run that it belongs to."""
    iters: int

    @property
    def source(self) -> str:
        """Name of the checkpoint in messages."""
        return source_of(self.path)


def source_of(path: Path) -> str:
    """Return the name of a checkpoint in messages."""
    return f"the checkpoint {str(path)!r}"


@dataclass(frozen=True)
class ModelRequest:
    """A checkpoint and its network; None means what the checkpoint itself says."""

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

    def load(self, store: Connection, reporter: Reporter | None = None) -> LoadedCheckpoint:
        """Load the network of the checkpoint that `ref` names.

        Raises:
            ShuffleNetError: as `resolve`, `read_checkpoint` and `model_from_payload` do.
        """
        requested = ModelSpec.from_options(vars(self))
        resolved = resolve(self.ref, tracking_uri=store, cache_dir=self.cache_dir, reporter=reporter)
        payload = resolved.checkpoint.read()
        network = model_from_payload(
            payload,
            source_of(resolved.path),
            requested=requested,
            input_size=self.input_size,
            mean_image=self.mean_image,
        )
        own = is_own(payload)
        return LoadedCheckpoint(
            network,
            {key: value for key, value in payload.items() if not key.endswith("state_dict")} if own else {},
            resolved.path,
            run_of(resolved.checkpoint) or resolved.run_id,
            payload.get("iters", resolved.iters) if own else resolved.iters,
        )
