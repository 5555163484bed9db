"""The state that a script saves: state dicts in place of objects, and the description of a network that has a mark."""

import logging
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from shufflenet_mlflow.checkpoints.marks import Mark, mark_of, unwrapped
from shufflenet_mlflow.checkpoints.plain import OwnNames, bare_state_dict, too_deep
from shufflenet_mlflow.checkpoints.schema import EMA_STATE_DICT, STATE_DICT, check_class_names
from shufflenet_mlflow.errors import CheckpointError, ConfigError, ModelError
from shufflenet_mlflow.runtime.text import counted

if TYPE_CHECKING:
    from shufflenet_mlflow.models.recognition import Recognised

logger = logging.getLogger(__name__)

_MODEL, _PREPROCESS, _CLASSES = "model", "preprocess", "class_to_idx"

_changed: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
"""Networks that no longer fit their mark, of which that has been said."""


def complete_state(
    state: Mapping[str, Any],
    *,
    model: nn.Module | None = None,
    class_to_idx: Mapping[str, int] | Sequence[str] | None = None,
    preprocess: str | Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the entries of the file that a state is written to; arguments as for `save_checkpoint`.

    Raises:
        CheckpointError: the state is no dict, its `model` is neither a network nor the description of its own weights,
            or the classes are not names and labels, or more than the network has outputs.
        ConfigError: `model` is given twice, or `preprocess` is not understood.
    """
    if isinstance(state, nn.Module):
        raise CheckpointError(
            f'state is a {type(state).__name__}, a module; give a dict, such as {{"model": model}}',
            code="state-is-module",
        )
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f'state is a {type(state).__name__}; give a dict, such as {{"model": model}}', code="state-not-dict"
        )
    described = (_MODEL, _PREPROCESS, _CLASSES)
    entries = {key: value for key, value in state.items() if value is not None or key not in described}
    network = _take_network(entries, model)
    own = [key for key in (STATE_DICT, EMA_STATE_DICT) if isinstance(entries.get(key), nn.Module)]
    try:
        entries = {key: _without_objects(value) for key, value in entries.items()}
        entries |= {key: OwnNames(entries[key]) for key in own}
    except RecursionError:
        raise too_deep("state") from None
    names = class_to_idx if class_to_idx is not None else entries.get(_CLASSES)
    classes = _classes(names)
    found = _recognise(network, entries)
    if found is not None:  # otherwise a description of a network that is not known here stays as it is
        entries[_MODEL] = found.spec.to_entry(found.num_classes)
        if classes and max(classes.values()) >= found.num_classes:
            raise CheckpointError(
                f"class_to_idx has the label {max(classes.values())}, and the network {found.num_classes} outputs",
                code="classes-beyond-network",
            )
        if classes and not isinstance(names, Mapping) and len(classes) != found.num_classes:
            raise CheckpointError(
                f"class_to_idx lists {counted(len(classes), 'name')}, and the network has "
                f"{counted(found.num_classes, 'output')}; give a name for each, or a dict of names and labels",
                code="classes-not-all",
            )
    if classes is not None:
        entries[_CLASSES] = classes
    given = preprocess if preprocess is not None else entries.get(_PREPROCESS)
    if given is not None:
        from shufflenet_mlflow.data.preprocess import preprocess_from

        entries[_PREPROCESS] = preprocess_from(given).to_dict()
    elif found is not None:
        mark = (mark_of(network) if network is not None else None) or {}
        entries[_PREPROCESS] = mark.get(_PREPROCESS) or found.spec.preprocess.to_dict()
    return entries


def _take_network(entries: dict[str, Any], model: nn.Module | None) -> nn.Module | None:
    """Return the network that is saved, and put its state dict in its place; None if there are only its weights."""
    there = entries.get(_MODEL)
    if isinstance(there, nn.Module):
        if model is not None and model is not there:
            raise ConfigError(
                "model= and the state's 'model' are two networks; give one of them", code="two-networks-saved"
            )
        model = there
    elif there is not None and not (isinstance(there, Mapping) and "name" in there and "kwargs" in there):
        hint = "its state dict as 'state_dict'" if isinstance(there, Mapping) else "another name for this entry"
        raise CheckpointError(
            f"the state's 'model' (of type {type(there).__name__}) is no network; give the network itself, or {hint}",
            code="state-model-invalid",
        )
    weights = entries.get(STATE_DICT)
    if model is None and isinstance(weights, nn.Module):
        model = weights
    if model is not None:
        entries.pop(_MODEL, None)
        if weights is None or isinstance(weights, nn.Module):
            entries[STATE_DICT] = unwrapped(model)
    if isinstance(average := entries.get(EMA_STATE_DICT), nn.Module):
        entries[EMA_STATE_DICT] = unwrapped(average)
    return model


def _without_objects(value: Any) -> Any:
    """Return the same with the state dict of everything that has one."""
    if isinstance(value, Tensor):
        return value
    if callable(state_dict := getattr(value, "state_dict", None)) and not isinstance(value, type):
        return _without_objects(state_dict())
    if isinstance(value, Mapping):
        return {key: _without_objects(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_without_objects, value))
    return value


def _classes(given: Mapping[str, int] | Sequence[str] | None) -> dict[str, int] | None:
    if given is None:
        return None
    if isinstance(given, Mapping):
        classes = dict(given)
    elif isinstance(given, (list, tuple)):
        classes = {name: label for label, name in enumerate(given)}
        if len(classes) != len(given):
            raise CheckpointError("class_to_idx names a class twice; give each once", code="classes-twice")
    else:
        raise CheckpointError(
            f"class_to_idx is a {type(given).__name__}; give a dict of names and labels, or a list of names",
            code="classes-type",
        )
    check_class_names(classes, "the state")
    return classes


def _recognise(network: nn.Module | None, entries: Mapping[str, Any]) -> "Recognised | None":
    """Return the network that the file is to name: that of the mark, or of the description in the state."""
    if not isinstance(entries.get(STATE_DICT), Mapping):
        return None  # which is refused when the file is prepared
    if network is None:
        described = entries.get(_MODEL)
        return None if described is None else _check_described(described, entries)
    mark = mark_of(network)
    if mark is None or unwrapped(network) in _changed:
        return None
    found = _fitting(mark, entries, unwrapped(network))
    if isinstance(found, str):
        _changed.add(unwrapped(network))
        logger.warning(
            "the network was made as %s and has been changed since: %s; its checkpoints do not name a network, and "
            "eval, predict, promote and export do not take them",
            mark["name"],
            found,
        )
        return None
    return found


def _check_described(described: Mapping[str, Any], entries: Mapping[str, Any]) -> "Recognised | None":
    """Return the network that the state's `model` describes, if the weights are still its own."""
    try:
        found = _fitting(described, entries, None)
    except ModelError:  # of a package that is not installed here
        return None
    if isinstance(found, str):
        raise CheckpointError(
            f"the state's 'model' says {described['name']}, and its state_dict is not that network's: {found}; give "
            "the network itself as model=, or leave 'model' out",
            code="state-model-differs",
        )
    return found


def _fitting(
    described: Mark | Mapping[str, Any], entries: Mapping[str, Any], module: nn.Module | None
) -> "Recognised | str":
    from shufflenet_mlflow.models.recognition import recognise

    kwargs = {key: value for key, value in described["kwargs"].items() if key != "num_classes"}
    return recognise(described["name"], kwargs, bare_state_dict(entries[STATE_DICT]), module)
