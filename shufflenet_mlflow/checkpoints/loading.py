"""Loading a checkpoint's weights into a network."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX
from torch.optim.swa_utils import AveragedModel

from shufflenet_mlflow.checkpoints.marks import mark_of
from shufflenet_mlflow.checkpoints.plain import AVERAGE_COUNT, bare_key, bare_names, bare_state_dict, is_plain_tensor
from shufflenet_mlflow.checkpoints.schema import EMA_STATE_DICT, STATE_DICT, is_own
from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.errors import CheckpointError, MismatchError
from shufflenet_mlflow.runtime.text import counted, name_some

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
        parts = [f"{counted(len(self.loaded), 'tensor')} loaded"]
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
        if not is_plain_tensor(value) and not key.endswith(_EXTRA_STATE_KEY_SUFFIX):
            raise CheckpointError(
                f"{source}: {_shortened(key)!r} in its state dict is not a plain tensor of numbers",
                code="state-dict-value",
            )
    try:
        return bare_state_dict(state_dict)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}", code="state-dict-prefixes") from error


def _linear_layers(model: nn.Module) -> list[str]:
    names = bare_names(model.state_dict())
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [_layer_of(names.get(f"{name}.weight", f"{bare_key(name)}.weight")) for name in layers]


def has_no_classes(model: nn.Module) -> bool:
    """Whether it is a network of the catalog that was built with `num_classes=0`; it may be wrapped."""
    return any(getattr(module, "num_classes", None) == 0 for module in model.modules())


def head_of(model: nn.Module) -> str | None:
    """Return the bare name of the classifier: the mark's, or the last linear layer outside the auxiliary heads.

    None if there is none.
    """
    mark = mark_of(model)
    if mark is not None and "head" in mark:
        return str(mark["head"])
    if has_no_classes(model):
        return None
    names = [name for name in _linear_layers(model) if not name.startswith(AUXILIARY_PREFIX)]
    return names[-1] if names else None


def _class_layers(model: nn.Module) -> set[str]:
    """Return the bare names of the layers that output classes: the classifier and those of the auxiliary heads."""
    mark = mark_of(model)
    if mark is not None and "class_layers" in mark:
        return set(mark["class_layers"])
    auxiliary = {name for name in _linear_layers(model) if name.startswith(AUXILIARY_PREFIX)}
    head = head_of(model)
    return auxiliary | ({head} if head is not None else set())


def _removed_layers(model: nn.Module) -> set[str]:
    """Return the bare names of the layers that return their input, such as in the place of a classifier."""
    return {bare_key(name) for name, module in model.named_modules() if isinstance(module, nn.Identity)}


def _layer_of(key: str) -> str:
    return key.rpartition(".")[0]


def _shape(value: Any) -> tuple[int, ...] | None:
    """Return a tensor's shape; None for what a module keeps beside its tensors."""
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _compare(model: Mapping[str, Tensor], weights: Mapping[str, Tensor], *, reset: set[str]) -> LoadReport:
    """Decide for every tensor of a network and of a checkpoint whether it can be loaded.

    Args:
        reset: layers to leave unchanged.
    """
    shared = [key for key in model if key in weights]
    fitting = [key for key in shared if _shape(model[key]) == _shape(weights[key])]
    return LoadReport(
        loaded=tuple(key for key in fitting if _layer_of(key) not in reset),
        missing=tuple(key for key in model if key not in weights),
        unexpected=tuple(key for key in weights if key not in model),
        reshaped=tuple(key for key in shared if _shape(model[key]) != _shape(weights[key])),
        reset=tuple(key for key in fitting if _layer_of(key) in reset),
    )


def _without_tolerated(report: LoadReport, heads: set[str], unused: set[str], *, has_auxiliary: bool) -> LoadReport:
    """Return the report without the differences that `strict=False` tolerates.

    Args:
        heads: the layers whose width may differ.
        unused: layers of the checkpoint that the network has no use for.
        has_auxiliary: auxiliary heads may be missing or differ.
    """

    def is_needed(key: str) -> bool:
        return not (has_auxiliary and key.startswith(AUXILIARY_PREFIX)) and _layer_of(key) not in unused

    return LoadReport(
        loaded=report.loaded,
        missing=tuple(filter(is_needed, report.missing)),
        unexpected=tuple(filter(is_needed, report.unexpected)),
        reshaped=tuple(key for key in report.reshaped if is_needed(key) and _layer_of(key) not in heads),
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
    """Load the weights of a file, or of its content, into `model`; the public `load_checkpoint` takes references, too.

    Arguments, result and errors that are not described here are those of `shufflenet_mlflow.load_checkpoint`.

    Args:
        checkpoint: a file, which is verified and read without running its code; or the content of one: a dict with
            `state_dict`, or a bare state dict.
        source: what to call the checkpoint in messages; by default the file's name.
    """
    if strict and reset_head:
        raise ValueError("reset_head needs strict=False")
    source = source or _source_of(checkpoint)
    payload = checkpoint if isinstance(checkpoint, Mapping) else read_checkpoint(checkpoint)
    weights = weights_of(payload, source, ema=ema)
    state_dict = model.state_dict()
    names = {bare: name for name, bare in bare_names(state_dict).items()}
    if isinstance(model, AveragedModel):
        names.pop(AVERAGE_COUNT, None)
    if AVERAGE_COUNT not in names:
        weights.pop(AVERAGE_COUNT, None)
    report = _compare(
        {key: state_dict[name] for key, name in names.items()},
        weights,
        reset=_class_layers(model) if reset_head == "always" else set(),
    )
    faults = report
    if not strict:
        heads = _class_layers(model) if reset_head else set()
        unused = _removed_layers(model) if has_no_classes(model) else set()
        is_registered = "head" in (mark_of(model) or {})  # where a name may begin as the auxiliary heads' do
        faults = _without_tolerated(report, heads, unused, has_auxiliary=not is_registered)
    if not faults.is_complete:
        shapes = "".join(
            f"; {key} is {_shape(weights[key])} in the checkpoint, {_shape(state_dict[names[key]])} here"
            for key in faults.reshaped[:1]
        )
        raise MismatchError(f"{source} does not fit the network: {faults}{shapes}", report, code="tensors-mismatch")
    if not report.is_complete:
        logger.warning("%s was loaded in part: %s", source, report)
    model.load_state_dict({**state_dict, **{names[key]: weights[key] for key in report.loaded}})
    if isinstance(model, AveragedModel):
        model.n_averaged.clamp_(min=1)  # at 0, the next weights would take the place of the average
    return report
