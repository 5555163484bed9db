"""The supernet of a channel search: widths that share their weights, what they cost, and the networks on it."""

from itertools import product
from typing import cast

import pytest
import torch
from torch import nn

from shufflenet_mlflow import create_model
from shufflenet_mlflow.errors import ModelError
from shufflenet_mlflow.models.channel_supernet import ChannelSupernet, WidthConv
from shufflenet_mlflow.models.cost import model_cost
from shufflenet_mlflow.models.fuse_bn import fuse_bn
from shufflenet_mlflow.models.oneshot import ShuffleNetOneShot
from shufflenet_mlflow.models.oneshot_supernet import OneShotSupernet, inherit_path
from shufflenet_mlflow.models.paths import draw_path, macs_table, scaled_limit, uniform_genes
from shufflenet_mlflow.models.search_space import (
    CHANNEL_SUPERNET,
    LARGEST_SCALE,
    NETWORK,
    SEARCHED_CHOICES,
    UNITS,
    WIDTHS,
    Genes,
    genes_of,
    network_of,
)
from tests.support.effort import repetitions

LONG = (pytest.mark.long, pytest.mark.timeout(900))


def drawn(count: int, seed: int = 0) -> list[Genes]:
    genes_PG = uniform_genes(count, torch.Generator().manual_seed(seed), widths=True)
    return [tuple(genes) for genes in genes_PG.tolist()]


def supernet(classes: int = 10) -> ChannelSupernet:
    made = create_model(CHANNEL_SUPERNET, classes)
    assert isinstance(made, ChannelSupernet)
    return made


def network(genes: Genes, classes: int = 10) -> ShuffleNetOneShot:
    choices, scales = network_of(genes)
    made = create_model(NETWORK, classes, choices=choices, scales=scales)
    assert isinstance(made, ShuffleNetOneShot)
    return made


# ---------------------------------------------------------------- what networks cost


@pytest.mark.parametrize("count", [10, pytest.param(repetitions(full=1000, ci=100), marks=LONG)])
@pytest.mark.parametrize(("classes", "size"), [(1000, 224), (7, 64)])
def test_the_table_equals_the_counter(count: int, classes: int, size: int) -> None:
    table = macs_table(classes, size, widths=True)
    for genes in drawn(count, size):
        choices, scales = network_of(genes)
        assert table.macs(genes) == model_cost(NETWORK, classes, size, choices=choices, scales=scales).macs
        assert table.of_many(torch.tensor([genes])).tolist() == [table.macs(genes)]


def test_with_scales_of_1_it_is_the_other_table() -> None:
    for choices in uniform_genes(20, torch.Generator().manual_seed(0)).tolist():
        genes = genes_of(choices, [1.0] * UNITS)
        assert macs_table(widths=True).macs(genes) == macs_table().macs(choices)


def test_the_figures_in_the_documentation() -> None:
    table = macs_table(widths=True)
    assert (round(table.lowest / 1e6, 2), round(table.highest / 1e6, 2)) == (94.96, 880.31)
    macs = table.of_many(uniform_genes(200_000, torch.Generator().manual_seed(0), widths=True))
    share = ((macs >= 290_000_000) & (macs <= 360_000_000)).double().mean().item()
    assert share == pytest.approx(0.434, abs=0.005)
    assert (macs <= 330_000_000).double().mean().item() == pytest.approx(0.223, abs=0.005)


def test_a_limit_means_the_same_networks_at_every_size() -> None:
    genes = uniform_genes(2000, torch.Generator().manual_seed(1), widths=True)
    below = macs_table(widths=True).of_many(genes) <= 330_000_000
    for classes, size in ((10, 32), (100, 96), (1000, 448)):
        table = macs_table(classes, size, widths=True)
        assert torch.equal(table.of_many(genes) <= scaled_limit(classes, size), below)


def test_the_paths_of_training() -> None:
    paths = [draw_path(0, iters, widths=True) for iters in range(300)]
    macs = [macs_table(widths=True).macs(path) for path in paths]
    assert 290_000_000 <= min(macs) <= max(macs) <= 360_000_000
    for low in range(290_000_000, 360_000_000, 10_000_000):
        assert sum(low <= one <= low + 10_000_000 for one in macs) > 20  # 43 expected
    for part, count in ((slice(UNITS), 4), (slice(UNITS, None), len(WIDTHS))):
        genes = torch.tensor([path[part] for path in paths]).flatten()
        assert torch.bincount(genes, minlength=count).min() > 6000 / count * 0.6
    assert paths == [draw_path(0, iters, widths=True) for iters in range(300)]
    assert len(set(paths)) == 300


# ---------------------------------------------------------------- weights in blocks


def test_all_widths_are_the_first_channels_of_the_widest() -> None:
    """As the same draws without blocks, in a supernet whose units all have the largest width."""
    torch.manual_seed(0)
    whole = OneShotSupernet(10, LARGEST_SCALE)
    torch.manual_seed(0)
    divided = supernet()
    convs = [(name, layer) for name, layer in divided.named_modules() if isinstance(layer, WidthConv)]
    assert len(convs) == UNITS * (3 * 3 + 5)
    for name, conv in convs:
        weight = cast(nn.Conv2d, whole.get_submodule(name)).weight
        for width in range(len(WIDTHS)):
            rows, columns, *_ = conv.weight(width).shape
            assert torch.equal(conv.weight(width), weight[:rows, :columns])
        assert conv.weight(len(WIDTHS) - 1).shape == weight.shape
    rest = {name for name, _ in divided.named_parameters() if ".blocks." not in name}
    assert all(torch.equal(divided.get_parameter(name), whole.get_parameter(name)) for name in rest)


def test_outside_of_training_it_is_the_published_path() -> None:
    made = supernet()
    assert network_of(made.path) == (SEARCHED_CHOICES, (1.0,) * UNITS)
    made.begin_iteration(0, 5)
    assert made.path == draw_path(0, 5, widths=True)
    made.end_iteration()
    assert network_of(made.path) == (SEARCHED_CHOICES, (1.0,) * UNITS)


def test_statistics_of_further_channels_stay() -> None:
    made = supernet()
    made.path = drawn(1)[0]
    made.train()(torch.randn(4, 3, 32, 32))
    for number, (choice, width) in enumerate(zip(made.path[:UNITS], made.path[UNITS:], strict=True)):
        bn = cast(nn.BatchNorm2d, made.features[number][choice].branch_main[1 if choice < 3 else 3])  # type: ignore[index]
        inner = int(bn.num_features // 2 * WIDTHS[width])
        assert bn.running_mean is not None
        assert bn.num_batches_tracked == 1
        assert (bn.running_mean[:inner] != 0).all()
        assert (bn.running_mean[inner:] == 0).all()


# ---------------------------------------------------------------- the networks on it


def every_combination() -> list[Genes]:
    """Return 40 networks, among which each unit has each branch with each width."""
    options = list(product(range(4), range(len(WIDTHS))))
    rows = [[options[(number + 7 * unit) % len(options)] for unit in range(UNITS)] for number in range(len(options))]
    return [(*(choice for choice, _ in row), *(width for _, width in row)) for row in rows]


@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, pytest.param(torch.channels_last, marks=pytest.mark.long)]
)
@pytest.mark.parametrize("paths", [every_combination()[::10], pytest.param(every_combination(), marks=LONG)])
def test_a_path_and_its_network_give_the_same_logits(paths: list[Genes], memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    whole = supernet().to(memory_format=memory_format)
    images = torch.randn(4, 3, 32, 32).to(memory_format=memory_format)
    for path in paths:
        whole.path = path
        whole.train()(images)
        one = network(path).to(memory_format=memory_format)
        inherit_path(one, whole, path)
        for training in (True, False):
            for model in (whole, one):
                model.train(training)
            torch.manual_seed(1)
            expected = whole(images)
            torch.manual_seed(1)
            assert torch.equal(one(images), expected)
        torch.testing.assert_close(fuse_bn(one)(images), expected, rtol=1e-3, atol=1e-4)
        whole.path = (*path[:-1], (path[-1] + 1) % len(WIDTHS))
        assert not torch.equal(whole(images), expected)


def test_gradients_are_those_of_the_network() -> None:
    torch.manual_seed(0)
    whole, path = supernet().eval(), drawn(1, 3)[0]
    images, one = torch.randn(2, 3, 32, 32), network(path)
    inherit_path(one, whole, path)
    whole.path = path
    for model in (whole, one.eval()):
        model(images).square().sum().backward()
    inherited = network(path)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.copy_(torch.zeros(()) if parameter.grad is None else parameter.grad)
    inherit_path(inherited, whole, path)
    for name, parameter in one.named_parameters():
        if parameter.dim() > 1:
            torch.testing.assert_close(parameter.grad, inherited.get_parameter(name).data)


def test_genes_and_networks() -> None:
    genes = drawn(1)[0]
    choices, scales = network_of(genes)
    assert scales is not None
    assert genes_of(choices, scales) == genes
    assert network_of(choices) == (choices, None)
    assert genes_of(choices) == choices
    with pytest.raises(ModelError, match="there are 3, not 20"):
        inherit_path(network(genes), supernet(), (1, 2, 3))
