"""Putting a checkpoint's weights into a network."""

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

logger = logging.getLogger(__name__)

AUXILIARY_PREFIX = "predict_"
"""Heads that help training only; released weights may lack them."""

_NAMED = 5
_LONGEST_NAME = 120


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor, by bare name."""

    loaded: tuple[str, ...]
    """In both with equal shapes: the network has the checkpoint's."""
    missing: tuple[str, ...]
    """In the network, not in the checkpoint: left as they were."""
    unexpected: tuple[str, ...]
    """In the checkpoint, not in the network: left out."""
    reshaped: tuple[str, ...]
    """In both with different shapes: left as they were."""
    reset: tuple[str, ...] = ()
    """In both with equal shapes, and left as they were on request."""

    @property
    def is_complete(self) -> bool:
        """Whether every tensor of either side was loaded."""
        return not (self.missing or self.unexpected or self.reshaped or self.reset)

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        for what in ("missing", "unexpected", "reshaped", "reset"):
            if names := getattr(self, what):
                parts.append(f"{len(names)} {what}: {_name_some(names)}")
        return "; ".join(parts)


def _shortened(name: str) -> str:
    """A file can hold names of any kind and length."""
    return name if name.isprintable() and len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]!r}…"


def _name_some(names: tuple[str, ...]) -> str:
    shown = ", ".join(map(_shortened, names[:_NAMED]))
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"


def _source_of(checkpoint: str | Path | Mapping[str, Any]) -> str:
    return "the checkpoint" if isinstance(checkpoint, Mapping) else repr(str(checkpoint))


def weights_of(payload: Mapping[str, Any], source: str, *, ema: bool = True) -> dict[str, Tensor]:
    """The tensors of what a checkpoint file holds, by bare name.

    Args:
        payload: a dict with `state_dict`, or a bare state dict.
        source: what to call it in messages.
        ema: take the moving average of the weights where there is one.

    Raises:
        CheckpointError: it holds no state dict.
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
    """Bare name of the classifier: the last linear layer that is no auxiliary head."""
    names = [name for name in _linear_layers(model) if not name.startswith(AUXILIARY_PREFIX)]
    return names[-1] if names else None


def _class_layers(model: nn.Module) -> set[str]:
    """Bare names of the layers whose outputs are classes: the classifier and those of the auxiliary heads."""
    auxiliary = {name for name in _linear_layers(model) if name.startswith(AUXILIARY_PREFIX)}
    head = head_of(model)
    return auxiliary | ({head} if head is not None else set())


def _layer_of(key: str) -> str:
    return key.rpartition(".")[0]


def _compare(own: Mapping[str, Tensor], given: Mapping[str, Tensor], *, untouched: set[str]) -> LoadReport:
    """What is to become of every tensor of a network and of a checkpoint.

    Args:
        untouched: layers that stay as they are.
    """
    shared = [key for key in own if key in given]
    fitting = [key for key in shared if own[key].shape == given[key].shape]
    return LoadReport(
        loaded=tuple(key for key in fitting if _layer_of(key) not in untouched),
        missing=tuple(key for key in own if key not in given),
        unexpected=tuple(key for key in given if key not in own),
        reshaped=tuple(key for key in shared if own[key].shape != given[key].shape),
        reset=tuple(key for key in fitting if _layer_of(key) in untouched),
    )


def _faults(report: LoadReport, head: str | None) -> LoadReport:
    """What of it may not be left out.

    Args:
        head: the layer that may be of another width, if any may.
    """

    def is_fault(key: str) -> bool:
        return not key.startswith(AUXILIARY_PREFIX)

    return LoadReport(
        loaded=report.loaded,
        missing=tuple(filter(is_fault, report.missing)),
        unexpected=tuple(filter(is_fault, report.unexpected)),
        reshaped=tuple(key for key in report.reshaped if is_fault(key) and _layer_of(key) != head),
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

    Names match whatever DataParallel, DDP or torch.compile wrapped either side in. The model is untouched when
    loading fails.

    Args:
        model: takes the weights; it may be wrapped.
        checkpoint: a file, which is verified and read without running its code; or what such a file holds: a
            dict with `state_dict`, or a bare state dict.
        strict: every tensor must match. Otherwise the auxiliary `predict_*` heads may lack or differ on either side.
        reset_head: with `strict=False`, a classifier of another width is left as it is in `model`; with "always",
            one of the same width too, as for other classes of the same number.
        ema: take the moving average of the weights where the file has one, as evaluation does.
        source: what to call the checkpoint in messages; by default the file's name.

    Returns:
        What became of every tensor. What was left out also stands in the log.

    Raises:
        MismatchError: tensors are missing, unexpected or of another shape; the message names them, its `report` all.
        CheckpointError: the file cannot be used, or holds no state dict.
    """
    if strict and reset_head:
        raise ValueError("reset_head needs strict=False")
    source = source or _source_of(checkpoint)
    given = weights_of(checkpoint if isinstance(checkpoint, Mapping) else read_checkpoint(checkpoint), source, ema=ema)
    own = {bare_key(name): (name, tensor) for name, tensor in model.state_dict().items()}
    report = _compare(
        {key: tensor for key, (_, tensor) in own.items()},
        given,
        untouched=_class_layers(model) if reset_head == "always" else set(),
    )
    faults = report if strict else _faults(report, head_of(model) if reset_head else None)
    if not faults.is_complete:
        shapes = "".join(
            f"; {name} is {tuple(given[name].shape)} in the checkpoint, {tuple(own[name][1].shape)} here"
            for name in faults.reshaped[:1]
        )
        raise MismatchError(f"{source} does not fit the network: {faults}{shapes}", report, code="tensors-mismatch")
    if not report.is_complete:
        logger.warning("%s was loaded in part: %s", source, report)
    model.load_state_dict({**model.state_dict(), **{own[key][0]: given[key] for key in report.loaded}})
    return report
