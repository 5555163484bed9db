"""The supernet of Single Path One-Shot search: every branch of every unit; Guo et al., 2019, arXiv:1904.00420.

A path goes through one of the four branches of each unit. Each iteration of training draws one, and changes only the
weights on it; see `paths`. Outside of an iteration the supernet is the network of `SEARCHED_CHOICES`.

As in the release, batch normalisation has no weight and no bias. Its running statistics are averages over whatever
paths were drawn, and fit none of them: they are re-estimated for each path that is evaluated. The names of the weights
are the release's.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from shufflenet_mlflow.models.blocks import ShuffleUnit, classifier, conv_bn_act, initialise, unit_specs
from shufflenet_mlflow.models.oneshot import DROPOUT, FIRST_WIDTH, LAST_WIDTH, ShuffleNetOneShot, unit
from shufflenet_mlflow.models.paths import draw_path
from shufflenet_mlflow.models.search_space import (
    BRANCHES,
    SEARCHED_CHOICES,
    STAGE_UNITS,
    STAGE_WIDTHS,
    UNITS,
    Genes,
    check_choices,
)


class OneShotSupernet(nn.Module):
    """(N, 3, H, W) float images -> (N, num_classes) logits, along one path; H and W multiples of 32.

    Args:
        scale: the factor of all units' inner widths.
    """

    validated_path: ClassVar[Genes] = SEARCHED_CHOICES
    """The path outside of training."""

    def __init__(self, num_classes: int, scale: float = 1.0) -> None:
        super().__init__()
        self.path = self.validated_path
        """The network that images pass: the branch of each unit, and in a channel search its width."""
        self.first_conv = nn.Sequential(*conv_bn_act(3, FIRST_WIDTH, 3, stride=2))
        self.features = nn.ModuleList(
            nn.ModuleList(unit(spec, choice, scale) for choice in range(BRANCHES))
            for spec in unit_specs(FIRST_WIDTH, STAGE_WIDTHS, STAGE_UNITS)
        )
        self.conv_last = nn.Sequential(*conv_bn_act(STAGE_WIDTHS[-1], LAST_WIDTH, 1))
        self.globalpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(DROPOUT)
        self.classifier = nn.Sequential(classifier(LAST_WIDTH, num_classes, bias=False))
        initialise(self)
        _drop_affine(self)

    @property
    def has_widths(self) -> bool:
        """Whether a path has widths, too."""
        return len(self.validated_path) > UNITS

    def begin_iteration(self, seed: int, iters: int) -> None:
        """Take the path of the iteration after `iters` completed ones."""
        self.path = draw_path(seed, iters, widths=self.has_widths)

    def end_iteration(self) -> None:
        """Return to the path that is validated."""
        self.path = self.validated_path

    def unit_on(self, path: Genes, number: int) -> ShuffleUnit:
        """Return the branch that a path takes in a unit."""
        branch: ShuffleUnit = self.features[number][path[number]]  # type: ignore[index]  # a list of modules
        return branch

    def weights_on(self, path: Genes) -> dict[str, Tensor]:
        """Return weights and BN statistics on a path, by the names in its network; statistics may be of more channels.

        Raises:
            ModelError: the choices are none of the search space.
        """
        check_choices(path[:UNITS])
        weights = {}
        for key, tensor in self.state_dict().items():
            room, _, rest = key.partition(".")
            if room == "features":
                number, choice, rest = rest.split(".", 2)
                if int(choice) != path[int(number)]:
                    continue
                key = f"features.{number}.{rest}"
            weights[key] = tensor
        return weights

    def forward_features(self, x_NCHW: Tensor) -> Tensor:
        """Return the feature map that is pooled and classified, (N, C, H / 32, W / 32)."""
        x_NCHW = self.first_conv(x_NCHW)
        for number in range(UNITS):
            x_NCHW = self.unit_on(self.path, number)(x_NCHW)
        features: Tensor = self.conv_last(x_NCHW)
        return features

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x_NC = self.globalpool(self.forward_features(x_NCHW)).flatten(1)
        logits: Tensor = self.classifier(self.dropout(x_NC))
        return logits


def _drop_affine(model: nn.Module) -> None:
    """Remove weight and bias of batch normalisation."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.affine = False
            module.register_parameter("weight", None)
            module.register_parameter("bias", None)


@torch.no_grad()
def inherit_path(network: ShuffleNetOneShot, supernet: OneShotSupernet, path: Genes) -> None:
    """Give the network of a path its weights and BN statistics.

    Both then give the same logits, bit for bit: the weight of batch normalisation is 1, its bias 0.

    Raises:
        ModelError: the choices are none of the search space.
    """
    weights = supernet.weights_on(path)
    for name, tensor in network.state_dict().items():
        if name in weights:
            tensor.copy_(weights[name][: len(tensor)] if tensor.dim() else weights[name])
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def build(name: str, num_classes: int) -> OneShotSupernet:
    """Build the supernet with random weights.

    Args:
        name: not used; all `build` functions take it.
        num_classes: width of the classifier.
    """
    return OneShotSupernet(num_classes)
