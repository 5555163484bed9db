"""Putting a checkpoint's weights into a network."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shufflenet_mlflow.checkpoint.state import STATE_DICT, bare_key, bare_state_dict
from shufflenet_mlflow.checkpoint.verify import read_checkpoint
from shufflenet_mlflow.errors import CheckpointError, MismatchError

logger = logging.getLogger(__name__)

AUXILIARY_PREFIX = "predict_"
"""Heads that help training only; released weights may lack them."""

_NAMED = 5


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor, by bare name."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    """In the network, not in the checkpoint: left as they were."""
    unexpected: tuple[str, ...]
    """In the checkpoint, not in the network: left out."""
    reshaped: tuple[str, ...]
    """In both with different shapes: left as they were."""

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        for what in ("missing", "unexpected", "reshaped"):
            if names := getattr(self, what):
                parts.append(f"{len(names)} {what}: {_name_some(names)}")
        return "; ".join(parts)


def _name_some(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"


def _state_dict_of(checkpoint: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    source = "the checkpoint" if isinstance(checkpoint, Mapping) else repr(str(checkpoint))
    payload = checkpoint if isinstance(checkpoint, Mapping) else read_checkpoint(checkpoint)
    state_dict = payload.get(STATE_DICT, payload)
    if not isinstance(state_dict, Mapping) or not any(isinstance(value, Tensor) for value in state_dict.values()):
        raise CheckpointError(f"{source} holds no state dict; it has {sorted(map(str, payload))[:8]}")
    for key, value in state_dict.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{source}: its state dict has the key {key!r}, which is not text")
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
            raise CheckpointError(f"{source}: {key!r} in its state dict is not a dense tensor")
    return bare_state_dict(state_dict)


def _head_of(model: nn.Module) -> str | None:
    """Bare name of the classifier: the last linear layer that is no auxiliary head."""
    names = [
        bare_key(name)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not bare_key(name).startswith(AUXILIARY_PREFIX)
    ]
    return names[-1] if names else None


def load_checkpoint(
    model: nn.Module,
    checkpoint: str | Path | Mapping[str, Any],
    *,
    strict: bool = True,
    reset_head: bool = False,
) -> LoadReport:
    """Load the weights of `checkpoint` into `model`.

    Names match whatever DataParallel, DDP or torch.compile wrapped either side in. The model is untouched when
    loading fails.

    Args:
        checkpoint: a file, which is verified and read without running its code; or what such a file holds: a
            dict with `state_dict`, or a bare state dict.
        strict: every tensor must match. Otherwise the auxiliary `predict_*` heads may lack on either side.
        reset_head: with `strict=False`, a classifier of another width is left as it is in `model`.

    Raises:
        MismatchError: tensors are missing, unexpected or of another shape; the message names them.
        CheckpointError: the file cannot be used, or holds no state dict.
    """
    source = _state_dict_of(checkpoint)
    own = {bare_key(name): (name, tensor) for name, tensor in model.state_dict().items()}
    fitting = {key for key in own.keys() & source.keys() if own[key][1].shape == source[key].shape}
    report = LoadReport(
        loaded=tuple(key for key in own if key in fitting),
        missing=tuple(key for key in own if key not in source),
        unexpected=tuple(key for key in source if key not in own),
        reshaped=tuple(key for key in own if key in source and key not in fitting),
    )

    def refused(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in names if strict or not name.startswith(AUXILIARY_PREFIX))

    head = _head_of(model) if reset_head and not strict else None
    faults = LoadReport(
        loaded=report.loaded,
        missing=refused(report.missing),
        unexpected=refused(report.unexpected),
        reshaped=tuple(name for name in refused(report.reshaped) if head is None or name.rpartition(".")[0] != head),
    )
    if faults.missing or faults.unexpected or faults.reshaped:
        shapes = "".join(
            f"; {name} is {tuple(source[name].shape)} in the checkpoint, {tuple(own[name][1].shape)} here"
            for name in faults.reshaped[:1]
        )
        raise MismatchError(f"the checkpoint does not fit the network: {faults}{shapes}")
    if report.missing or report.unexpected or report.reshaped:
        logger.warning("loaded in part: %s", report)
    model.load_state_dict({**model.state_dict(), **{own[key][0]: source[key] for key in report.loaded}})
    return report
