"""The parts of a network, from its input to its classifier: what is frozen, or learns at a rate of its own."""

from collections.abc import Collection

from torch import nn

from shufflenet_mlflow.checkpoints.loading import AUXILIARY_PREFIX, head_of
from shufflenet_mlflow.checkpoints.marks import mark_of
from shufflenet_mlflow.config import option
from shufflenet_mlflow.errors import ConfigError
from shufflenet_mlflow.models.entry_points import Registration
from shufflenet_mlflow.models.spec import ModelSpec

STEM = ("first_conv", "conv1")
"""The layers before the stages, in the release's networks and in torchvision's."""


def parts_of(model: nn.Module) -> list[list[nn.Module]]:
    """Return the modules that have parameters, by part: the stem, each stage, what follows the stages, the classifier.

    Auxiliary heads belong to the classifier. What follows the stages may be nothing. A network that another package
    registers has two parts: the classifier, and all the rest; a parameter can be in several modules of the latter.
    """
    mark = mark_of(model)
    if mark is not None and "class_layers" in mark:
        return _rest_and_classifier(model, mark["class_layers"])
    head = head_of(model)
    classifier = [model.get_submodule(head)] if head is not None else []
    stem, stages, neck = [], [], []
    for name, module in model.named_children():
        if name in STEM:
            stem.append(module)
        elif name == "features":
            stages += _stages_of(module)
        elif name.startswith("stage"):
            stages.append([module])
        elif name.startswith(AUXILIARY_PREFIX):
            classifier.append(module)
        elif not any(layer in classifier for layer in module.modules()):
            neck.append(module)
    return [stem, *stages, neck, classifier]


def _rest_and_classifier(model: nn.Module, class_layers: Collection[str]) -> list[list[nn.Module]]:
    """Divide any network; parameters of modules that hold others, too, are put in lists of their own."""
    classifier = [model.get_submodule(name) for name in class_layers]
    inside = {id(module) for layer in classifier for module in layer.modules()}
    rest: list[nn.Module] = []
    for module in model.modules():
        if id(module) in inside:
            continue
        if not list(module.children()):
            rest.append(module)
        elif own := list(module.parameters(recurse=False)):
            rest.append(nn.ParameterList(own))
    return [rest, classifier]


def check_divisible(spec: ModelSpec, freeze: str, layer_decay: float) -> None:
    """Refuse options that need the stages of a network that another package registers.

    Raises:
        ConfigError: one is given.
    """
    network = spec.network
    if not isinstance(network, Registration):
        return
    given = {"freeze": freeze} if freeze not in ("none", "backbone") else {}
    given |= {"layer_decay": str(layer_decay)} if layer_decay != 1 else {}
    for name, value in given.items():
        raise ConfigError(
            f"{option(name)} (={value}) needs the stages of {spec.name}, which {network.package} does not name; "
            "leave it out, or use --freeze backbone or --head-lr-factor",
            code="stages-unknown",
        )


def _stages_of(features: nn.Module) -> list[list[nn.Module]]:
    """Divide the units before those that halve the image; where a stage is a module, it is one."""
    stages: list[list[nn.Module]] = []
    for unit in features.children():
        one = unit[0] if isinstance(unit, nn.ModuleList) else unit  # the choices of a supernet
        shortcut = getattr(one, "branch_proj", getattr(one, "proj_conv", one))
        if shortcut is not None:
            stages.append([])
        stages[-1].append(unit)
    return stages


def frozen_modules(model: nn.Module, freeze: str) -> list[nn.Module]:
    """Return the modules that `--freeze` keeps as they are.

    Args:
        freeze: `backbone`, `none`, or the number of stages, frozen together with the stem.

    Raises:
        ConfigError: the network has fewer stages.
    """
    if freeze == "none":
        return []
    parts = parts_of(model)
    stages = len(parts) - 3
    if freeze != "backbone" and int(freeze) > stages:
        raise ConfigError(
            f"--freeze (={freeze}) must be at most {stages}, the network's number of stages; backbone freezes all but "
            "the classifier",
            code="freeze-too-many-stages",
        )
    frozen = parts[:-1] if freeze == "backbone" else parts[: int(freeze) + 1]
    return [module for part in frozen for module in part]
