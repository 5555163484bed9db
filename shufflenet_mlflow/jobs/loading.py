"""From a checkpoint reference to the network it stands for."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shufflenet_mlflow.checkpoint import is_own, read_checkpoint
from shufflenet_mlflow.network import Architecture, Network, load_network
from shufflenet_mlflow.reporting import Reporter
from shufflenet_mlflow.resolve import Resolved, resolve
from shufflenet_mlflow.start import run_of


@dataclass(frozen=True)
class Loaded:
    """A checkpoint's network, on the CPU, and where it is from."""

    network: Network
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


def load_checkpointed(
    ref: str,
    *,
    asked: Architecture | None = None,
    input_size: int | None = None,
    mean_image: str | None = None,
    tracking_uri: str | None,
    cache_dir: Path | None,
    reporter: Reporter | None = None,
) -> Loaded:
    """The network of the checkpoint that `ref` means.

    Args:
        asked, input_size, mean_image: as for `load_network`.

    Raises:
        ShuffleNetError: as `resolve`, `read_checkpoint` and `load_network` do.
    """
    resolved = resolve(ref, tracking_uri=tracking_uri, cache_dir=cache_dir, reporter=reporter)
    return load_resolved(resolved, asked=asked, input_size=input_size, mean_image=mean_image)


def load_resolved(
    resolved: Resolved,
    *,
    asked: Architecture | None = None,
    input_size: int | None = None,
    mean_image: str | None = None,
) -> Loaded:
    """The same for a file that was resolved."""
    payload = read_checkpoint(resolved.path)
    network = load_network(payload, source_of(resolved.path), asked=asked, input_size=input_size, mean_image=mean_image)
    own = is_own(payload)
    return Loaded(
        network,
        {key: value for key, value in payload.items() if not key.endswith("state_dict")} if own else {},
        resolved.path,
        run_of(resolved.path, payload) or resolved.run_id,
        payload.get("iters", resolved.iters) if own else resolved.iters,
    )
