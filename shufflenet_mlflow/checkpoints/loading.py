"""Loading a checkpoint's weights into a network."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from shufflenet_mlflow.checkpoints.plain import bare_key, bare_state_dict, is_plain_tensor
from shufflenet_mlflow.checkpoints.schema import EMA_STATE_DICT, STATE_DICT, is_own
from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.errors import CheckpointError, MismatchError
from shufflenet_mlflow.runtime.text import name_some

logger = logging.getLogger(__name__)

AUXILIARY_PREFIX = "predict_"
"""Auxiliary heads, used in training only; released weights may lack them."""

_NAMED = 5
"""Tensors that a message names."""
_LONGEST_NAME = 120
"""Characters of a name that a message shows."""


@dataclass(frozen=True)
class LoadReport:
    """Bare names of all tensors, by what happened to them."""

    loaded: tuple[str, ...]
    """In both with equal shapes: copied from the checkpoint."""
    missing: tuple[str, ...]
    """In the network only: unchanged."""
    unexpected: tuple[str, ...]
    """In the checkpoint only: ignored."""
    reshaped: tuple[str, ...]
    """In both with different shapes: unchanged."""
    reset: tuple[str, ...] = ()
    """In both with equal shapes, unchanged because of `reset_head`."""

    @property
    def is_complete(self) -> bool:
        """Whether every tensor of the network and of the checkpoint was loaded."""
        return not (self.missing or self.unexpected or self.reshaped or self.reset)

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        for outcome in ("missing", "unexpected", "reshaped", "reset"):
            if names := getattr(self, outcome):
                parts.append(f"{len(names)} {outcome}: {name_some(names, _NAMED, shown_as=_shortened)}")
        return "; ".join(parts)


def _shortened(name: str) -> str:
    """Return a name fit for a message: a file can hold names of any kind and length."""
    return name if name.isprintable() and len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]!r}…"


def _source_of(checkpoint: str | Path | Mapping[str, Any]) -> str:
    return "the checkpoint" if isinstance(checkpoint, Mapping) else repr(str(checkpoint))


def weights_of(payload: Mapping[str, Any], source: str, *, ema: bool = True) -> dict[str, Tensor]:
    """Return the weights in a checkpoint, by bare name.

    Args:
        payload: a dict with `state_dict`, or a bare state dict.
        source: what to call it in messages.
        ema: prefer the moving average of the weights.

    Raises:
        CheckpointError: it holds no state dict of plain tensors.
    """
    has_ema = ema and is_own(payload) and EMA_STATE_DICT in payload
    state_dict = payload[EMA_STATE_DICT] if has_ema else payload.get(STATE_DICT, payload)
    if not isinstance(state_dict, Mapping) or not any(isinstance(value, Tensor) for value in state_dict.values()):
        raise CheckpointError(
            f"{source} holds no state dict; it has {sorted(map(str, payload))[:8]}", code="no-state-dict"
        )
    for key, value in state_dict.items():
        if not isinstance(key, str):
            raise CheckpointError(
                f"{source}: its state dict has the key {key!r}, which is not text", code="state-dict-key"
            )
        if not is_plain_tensor(value):
            raise CheckpointError(
                f"{source}: {_shortened(key)!r} in its state dict is not a plain tensor of numbers",
                code="state-dict-value",
            )
    try:
        return bare_state_dict(state_dict)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}", code="state-dict-prefixes") from error


def _linear_layers(model: nn.Module) -> list[str]:
    return [bare_key(name) for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def head_of(model: nn.Module) -> str | None:
    """Return the bare name of the classifier: the last linear layer outside the auxiliary heads."""
    names = [name for name in _linear_layers(model) if not name.startswith(AUXILIARY_PREFIX)]
    return names[-1] if names else None


def _class_layers(model: nn.Module) -> set[str]:
    """Return the bare names of the layers that output classes: the classifier and those of the auxiliary heads."""
    auxiliary = {name for name in _linear_layers(model) if name.startswith(AUXILIARY_PREFIX)}
    head = head_of(model)
    return auxiliary | ({head} if head is not None else set())


def _layer_of(key: str) -> str:
    return key.rpartition(".")[0]


def _compare(model: Mapping[str, Tensor], weights: Mapping[str, Tensor], *, reset: set[str]) -> LoadReport:
    """Decide for every tensor of a network and of a checkpoint whether it can be loaded.

    Args:
        reset: layers to leave unchanged.
    """
    shared = [key for key in model if key in weights]
    fitting = [key for key in shared if model[key].shape == weights[key].shape]
    return LoadReport(
        loaded=tuple(key for key in fitting if _layer_of(key) not in reset),
        missing=tuple(key for key in model if key not in weights),
        unexpected=tuple(key for key in weights if key not in model),
        reshaped=tuple(key for key in shared if model[key].shape != weights[key].shape),
        reset=tuple(key for key in fitting if _layer_of(key) in reset),
    )


def _without_tolerated(report: LoadReport, head: str | None) -> LoadReport:
    """Return the report without the differences that `strict=False` tolerates.

    Args:
        head: the layer whose width may differ, if any.
    """

    def is_needed(key: str) -> bool:
        return not key.startswith(AUXILIARY_PREFIX)

    return LoadReport(
        loaded=report.loaded,
        missing=tuple(filter(is_needed, report.missing)),
        unexpected=tuple(filter(is_needed, report.unexpected)),
        reshaped=tuple(key for key in report.reshaped if is_needed(key) and _layer_of(key) != head),
    )


def load_checkpoint(
    model: nn.Module,
    checkpoint: str | Path | Mapping[str, Any],
    *,
    strict: bool = True,
    reset_head: bool | Literal["always"] = False,
    ema: bool = True,
    source: str | None = None,
) -> LoadReport:
    """Load the weights of `checkpoint` into `model`.

    Names match even if DataParallel, DDP or torch.compile wraps either side. If loading fails, the model is unchanged.

    Args:
        model: takes the weights; it may be wrapped.
        checkpoint: a file, which is verified and read without running its code; or the content of one: a dict with
            `state_dict`, or a bare state dict.
        strict: require every tensor to match. Otherwise the auxiliary `predict_*` heads may be missing or differ.
        reset_head: with `strict=False`, leave a classifier of another width as it is in `model`; with "always", also
            one of the same width, such as for other classes of the same number.
        ema: prefer the moving average of the weights, as evaluation does.
        source: what to call the checkpoint in messages; by default the file's name.

    Returns:
        The names of all tensors, by what happened to them. Tensors that were not loaded are also logged.

    Raises:
        ValueError: `reset_head` is given with `strict=True`.
        MismatchError: tensors are missing, unexpected or of another shape; the message names the first of them, its
            `report` all.
        CheckpointError: the file cannot be used, or holds no state dict.
    """
    if strict and reset_head:
        raise ValueError("reset_head needs strict=False")
    source = source or _source_of(checkpoint)
    payload = checkpoint if isinstance(checkpoint, Mapping) else read_checkpoint(checkpoint)
    weights = weights_of(payload, source, ema=ema)
    state_dict = model.state_dict()
    names = {bare_key(name): name for name in state_dict}
    report = _compare(
        {key: state_dict[name] for key, name in names.items()},
        weights,
        reset=_class_layers(model) if reset_head == "always" else set(),
    )
    faults = report if strict else _without_tolerated(report, head_of(model) if reset_head else None)
    if not faults.is_complete:
        shapes = "".join(
            f"; {key} is {tuple(weights[key].shape)} in the checkpoint, {tuple(state_dict[names[key]].shape)} here"
            for key in faults.reshaped[:1]
        )
        raise MismatchError(f"{source} does not fit the network: {faults}{shapes}", report, code="tensors-mismatch")
    if not report.is_complete:
        logger.warning("%s was loaded in part: %s", source, report)
    model.load_state_dict({**state_dict, **{names[key]: weights[key] for key in report.loaded}})
    return report
