"""The catalog of networks: a table of variants, `create_model` and `list_models`."""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from shufflenet_mlflow.config import MOST_CLASSES, parse_numbers
from shufflenet_mlflow.data.modes import MODES
from shufflenet_mlflow.errors import ConfigError, ModelError
from shufflenet_mlflow.models.entry_points import Registration, find_registration, is_name, registrations
from shufflenet_mlflow.models.search_space import CHANNEL_SUPERNET, SUPERNET, SUPERNETS, check_choices, check_scales

if TYPE_CHECKING:
    from torch import nn

TORCHVISION = "torchvision/"
"""Prefix of torchvision's own networks."""

FAMILIES = {
    "v1": "shufflenet_v1",
    "v2": "shufflenet_v2",
    "v2_plus": "shufflenet_v2_plus",
    "oneshot": "oneshot",
    "oneshot_supernet": "oneshot_supernet",
    "channel_supernet": "channel_supernet",
    "detnas": "detnas",
    "large": "shufflenet_v2_large",
    "exlarge": "shufflenet_v2_exlarge",
    "torchvision": "torchvision_v2",
}
"""Family -> the module of this package whose `build(name, num_classes, **options)` builds its networks."""


@dataclass(frozen=True)
class Variant:
    """A row of the table: a network's cost and published results."""

    name: str
    family: str
    parameters: int
    """Number of parameters with 1,000 classes; a test counts them."""
    macs: int
    """Multiply-accumulates for one image of 224x224 pixels; a test counts them."""
    top1_error: float
    """Published ImageNet-1k top-1 error of the released weights, percent."""
    top5_error: float
    """Published ImageNet-1k top-5 error of the released weights, percent."""
    preprocess: str = "bgr255"
    """The mode of `shufflenet_mlflow.data.preprocess` that the released weights expect."""
    options: tuple[str, ...] = ()
    """Names of further arguments of `build`."""

    def build(self, num_classes: int, **options: Any) -> "nn.Module":
        """Build the network with random weights. Only this imports torch, so that reading the table is fast."""
        model: nn.Module = import_module(f"{__package__}.{FAMILIES[self.family]}").build(
            self.name, num_classes, **options
        )
        model.num_classes = num_classes  # type: ignore[assignment]  # a plain number, as in timm
        return model


# Errors: the README files of the original release; for torchvision's, the metrics in its weights' metadata.
VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("shufflenet_v1_x0_5_g3", "v1", 717_324, 37_589_856, 42.7, 20.0),
        Variant("shufflenet_v1_x1_0_g3", "v1", 1_864_728, 137_460_672, 32.2, 12.3),
        Variant("shufflenet_v1_x1_5_g3", "v1", 3_441_168, 292_443_552, 28.4, 9.8),
        Variant("shufflenet_v1_x2_0_g3", "v1", 5_449_776, 524_045_184, 25.9, 8.6),
        Variant("shufflenet_v1_x0_5_g8", "v1", 1_010_448, 40_469_760, 41.2, 19.0),
        Variant("shufflenet_v1_x1_0_g8", "v1", 2_433_768, 138_365_952, 32.0, 13.6),
        Variant("shufflenet_v1_x1_5_g8", "v1", 4_268_952, 290_188_800, 29.0, 10.4),
        Variant("shufflenet_v1_x2_0_g8", "v1", 6_521_232, 521_942_016, 27.1, 9.2),
        Variant("shufflenet_v2_x0_5", "v2", 1_365_792, 40_476_448, 38.9, 17.4),
        Variant("shufflenet_v2_x1_0", "v2", 2_278_760, 145_814_296, 30.6, 11.1),
        Variant("shufflenet_v2_x1_5", "v2", 3_506_720, 298_970_656, 27.4, 9.4),
        Variant("shufflenet_v2_x2_0", "v2", 7_402_600, 590_783_000, 25.0, 7.6),
        Variant("shufflenet_v2_plus_small", "v2_plus", 5_137_116, 155_845_008, 25.9, 8.3),
        Variant("shufflenet_v2_plus_medium", "v2_plus", 5_679_840, 222_249_984, 24.3, 7.4),
        Variant("shufflenet_v2_plus_large", "v2_plus", 6_768_220, 360_050_704, 22.9, 6.7),
        Variant("shufflenet_oneshot", "oneshot", 3_432_579, 327_857_920, 25.1, 8.0, options=("choices", "scales")),
        Variant(SUPERNET, "oneshot_supernet", 8_388_176, 322_918_720, math.nan, math.nan),
        Variant(CHANNEL_SUPERNET, "channel_supernet", 15_777_040, 322_918_720, math.nan, math.nan),
        Variant("detnas_voc_retinanet_300m", "detnas", 3_479_480, 360_625_984, 25.4, 8.1),
        Variant("detnas_voc_fpn_300m", "detnas", 3_651_128, 349_524_544, 25.9, 8.3),
        Variant("detnas_coco_retinanet_300m", "detnas", 3_725_320, 324_342_464, 26.0, 8.4),
        Variant("detnas_coco_fpn_300m", "detnas", 3_533_112, 321_219_008, 26.2, 8.4),
        Variant("detnas_coco_fpn_1_3g", "detnas", 10_426_328, 1_318_374_496, 22.8, 6.5),
        Variant("detnas_coco_fpn_3_8g", "detnas", 31_444_596, 4_085_874_080, 21.6, 6.3),
        Variant("shufflenet_v2_large", "large", 140_685_664, 12_780_652_544, 18.56, 4.48, "bgr255_mean"),
        Variant("shufflenet_v2_exlarge", "exlarge", 271_283_296, 46_174_794_752, 15.52, 2.9),
        Variant("torchvision/shufflenet_v2_x0_5", "torchvision", 1_366_792, 40_476_448, 39.45, 18.25, "rgb_256"),
        Variant("torchvision/shufflenet_v2_x1_0", "torchvision", 2_278_604, 144_907_992, 30.64, 11.68, "rgb_256"),
        Variant("torchvision/shufflenet_v2_x1_5", "torchvision", 3_503_624, 295_759_392, 27.0, 8.91, "rgb_232"),
        Variant("torchvision/shufflenet_v2_x2_0", "torchvision", 7_393_996, 583_253_464, 23.77, 6.99, "rgb_232"),
    )
}


def list_models() -> list[str]:
    """Return the names that `create_model` takes: in the table's order, then those that other packages register."""
    registered = (found.name for found in registrations() if not found.is_prefix and refusal_of(found) is None)
    return [*VARIANTS, *dict.fromkeys(registered)]


def get_variant(name: str) -> Variant:
    """Return the table's row for `name`.

    Raises:
        ModelError: there is no such network; the message suggests similar names.
    """
    try:
        return VARIANTS[name]
    except KeyError:
        near = difflib.get_close_matches(_spelled_as_here(name), list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "`shufflenet models` lists them."
        raise ModelError(f"there is no network {name!r}; {hint}", code="model-unknown") from None


def find_network(name: str) -> Variant | Registration:
    """Return the table's row for `name`, or else its entry point; nothing of another package is imported for that.

    Raises:
        ModelError: there is no such network, or several packages register it.
    """
    is_of_table = name in VARIANTS or name.startswith(TORCHVISION)
    return (None if is_of_table else find_registration(name)) or get_variant(name)


def refusal_of(registration: Registration) -> str | None:
    """Return why an entry point is never used; None if it can be."""
    if not is_name(registration.name):
        return f"{registration} is left out: a name has letters, digits, dots, hyphens, underscores and slashes only"
    if registration.name in VARIANTS or registration.name.startswith(TORCHVISION):
        return f"{registration} is left out: the name belongs to this package"
    return None


def _spelled_as_here(name: str) -> str:
    """Return a name in the release's spelling, such as `ShuffleNetV2.1.0x`, in the table's."""
    name = name.lower().replace("shufflenetv", "shufflenet_v")
    return re.sub(r"[._+-]*(\d)\.(\d)x", r"_x\1_\2", name)


def check_network(options: Mapping[str, Any], *, may_be_inherited: bool = False) -> dict[str, tuple[float, ...]]:
    """Check the options that describe a network, as far as no checkpoint is needed.

    Args:
        options: `model`, `choices`, `scales`, `channel_search`, `pretrained`, `mean_image`, `compile`; None means not
            given.
        may_be_inherited: without `model`, a checkpoint may name the network that takes the choices.

    Returns:
        `choices` and `scales` as numbers, if they are given.

    Raises:
        ConfigError: they are not numbers, or need a network; or the network takes no mean image.
        ModelError: no such network, or it does not take these arguments.
    """
    arguments: dict[str, tuple[float, ...]] = {}
    if options.get("choices") is not None:
        arguments["choices"] = parse_numbers(options["choices"], "choices", int)
    if options.get("scales") is not None:
        arguments["scales"] = parse_numbers(options["scales"], "scales", float)
    model = options.get("model")
    if options.get("channel_search") and model not in SUPERNETS:
        raise ConfigError(
            f"--channel-search needs --model {SUPERNET}" + (f", not {model}" if model else ""),
            code="channel-search-model",
        )
    if model is not None:
        variant = find_network(model)
        check_arguments(variant, arguments)
        if options.get("pretrained") and isinstance(variant, Variant):  # others would have to be imported
            check_published(model)
        if options.get("mean_image") is not None:
            _check_takes_mean_image(variant, options["mean_image"])
        if options.get("compile") and model in SUPERNETS:
            raise ConfigError(
                f"--compile: each iteration of {model} takes another path, and would be compiled anew; leave it out",
                code="compile-supernet",
            )
    elif arguments and not may_be_inherited:
        name = next(iter(arguments))
        raise ConfigError(f"--{name} (={options[name]}) needs --model shufflenet_oneshot", code="choices-without-model")
    if "choices" in arguments:
        check_choices(arguments["choices"])  # type: ignore[arg-type]
    if "scales" in arguments:
        check_scales(arguments["scales"])
    return arguments


def check_arguments(network: Variant | Registration, arguments: Mapping[str, object]) -> None:
    """Raise ModelError for arguments that a network of the table, or any other, does not take."""
    taken = network.options if isinstance(network, Variant) else ()
    if foreign := [key for key in arguments if key not in taken]:
        takers = [other.name for other in VARIANTS.values() if foreign[0] in other.options]
        raise ModelError(
            f"{network.name} takes no {' and no '.join(foreign)}; only {', '.join(takers) or 'another network'} does",
            code="model-option-unknown",
        )


def check_published(model: str) -> None:
    """Raise ModelError unless torchvision, or the package that registers it, has weights of the network."""
    network = find_network(model)
    if isinstance(network, Registration):
        from shufflenet_mlflow.models.registered import takes_pretrained

        if not takes_pretrained(network):
            raise ModelError(
                f"--pretrained: {network} has no argument 'pretrained'; leave it out, or start from a checkpoint with "
                "--init-from",
                code="registered-without-weights",
            )
    elif not model.startswith(TORCHVISION):
        raise ModelError(
            f"--pretrained: there are no published weights of {model} to download; start from the release's file with "
            f"--init-from FILE, or take a {TORCHVISION} network",
            code="no-published-weights",
        )


def _check_takes_mean_image(network: Variant | Registration, mean_image: object) -> None:
    if isinstance(network, Registration) or not MODES[network.preprocess].takes_mean_image:
        takers = [other.name for other in VARIANTS.values() if MODES[other.preprocess].takes_mean_image]
        raise ConfigError(
            f"--mean-image {str(mean_image)!r} is for {', '.join(takers)}; {network.name} takes none, leave it out",
            code="mean-image-not-for-model",
        )


def create_model(
    name: str,
    num_classes: int = 1000,
    *,
    choices: Sequence[int] | None = None,
    scales: Sequence[float] | None = None,
    pretrained: bool = False,
    preprocess: str | Mapping[str, Any] | None = None,
    **arguments: Any,
) -> "nn.Module":
    """Build the network `name` with random or published weights.

    It is marked with its name, arguments and input: `save_checkpoint({"model": network}, …)` writes them, so that
    `eval`, `predict`, `export` and `promote` need no `--model`.

    The network maps (N, 3, H, W) float images, H and W multiples of 32, to (N, num_classes) logits; Large and ExLarge
    return four such logits in training mode, the main ones first. The original release's weights fit it key for key.

    Its method `forward_features` maps the images to the feature map that is pooled and classified, float
    (N, C, H / 32, W / 32), as in timm.

    Args:
        name: one of `list_models()`.
        num_classes: width of the classifier; with 0 there is none, and the network returns pooled features, float
            (N, C), as in timm.
        choices: `shufflenet_oneshot` only: for each of its 20 units 0, 1, 2 (kernels of 3, 5, 7) or 3 (Xception
            branch); by default the released network's.
        scales: `shufflenet_oneshot` only: for each unit the factor of its inner width, at most 2; by default the
            released network's, or 1 if `choices` are given.
        pretrained: `torchvision/` networks only: load the weights that torchvision publishes, from torch.hub's cache
            or over the network; a classifier of another width keeps its random weights.
        preprocess: the input that it is trained on, for the files that `save_checkpoint` writes; by default what its
            published weights expect. A mode such as `rgb_256`, or a mapping; see
            [files that know their network](own-loop.md#files-that-know-their-network).
        arguments: further ones of a network that another package registers.

    Raises:
        ModelError: there is no such network, or it does not take these arguments.
        CheckpointError: the published weights could not be downloaded, or cannot be used.
    """
    network = find_network(name)
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or not 0 <= num_classes <= MOST_CLASSES:
        raise ModelError(
            f"num_classes (={num_classes!r}) must be a whole number, at least 1 and at most {MOST_CLASSES}, or 0 for "
            "the features",
            code="num-classes-invalid",
        )
    options: dict[str, Any] = {"choices": choices, "scales": scales}
    given = {key: value for key, value in options.items() if value is not None}
    check_arguments(network, {**given, **arguments} if isinstance(network, Variant) else given)
    if pretrained:
        check_published(name)
    from shufflenet_mlflow.checkpoints.marks import set_mark

    entry = _described(preprocess)
    if isinstance(network, Variant):
        model = _build(network, num_classes, given, pretrained=pretrained)
        mark: dict[str, Any] = {"name": name, "kwargs": {key: list(value) for key, value in given.items()}}
    else:
        from shufflenet_mlflow.models.registered import build_marked

        model, mark = build_marked(network, name, num_classes, arguments, pretrained=pretrained)
    if num_classes:  # commands need a classifier
        set_mark(model, {**mark, **entry})
    return model


def _described(preprocess: str | Mapping[str, Any] | None) -> dict[str, Any]:
    if preprocess is None:
        return {}
    from shufflenet_mlflow.data.preprocess import preprocess_from

    return {"preprocess": preprocess_from(preprocess).to_dict()}


def _build(variant: Variant, num_classes: int, given: Mapping[str, Any], *, pretrained: bool) -> "nn.Module":
    if not pretrained:
        return variant.build(num_classes, **given)
    from shufflenet_mlflow.checkpoints.loading import load_checkpoint
    from shufflenet_mlflow.models.torchvision_v2 import fetch_weights

    weights = fetch_weights(variant.name)
    model = variant.build(num_classes, **given)
    source = f"the published weights of {variant.name}"
    load_checkpoint(model, weights, strict=False, reset_head=True, source=source)
    return model
