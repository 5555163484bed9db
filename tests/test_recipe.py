"""Loss, parameter groups, schedule, BN re-estimation."""

import pytest
import torch
from torch import nn

from shufflenet_mlflow import create_model
from shufflenet_mlflow.evaluation.metrics import count_correct
from shufflenet_mlflow.training.batchnorm import reestimate_bn
from shufflenet_mlflow.training.loss import make_loss
from shufflenet_mlflow.training.optimizer import make_optimizer, make_scheduler, parameter_groups
from shufflenet_mlflow.training.recipe import get_recipe


def test_rate_is_scaled_with_the_batch() -> None:
    recipe = get_recipe("shufflenet_v2_x1_0")
    assert recipe.scaled_lr(1024) == 0.5
    assert recipe.scaled_lr(64) == 0.03125
    assert recipe.epochs == 240


def test_no_weight_decay_on_biases_and_bn() -> None:
    model = create_model("shufflenet_oneshot", num_classes=10)
    decayed, others = parameter_groups(model, 4e-5)
    assert decayed["weight_decay"] == 4e-5
    assert others["weight_decay"] == 0
    bn = sum(2 for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    assert len(others["params"]) == bn  # nothing else in this network has one dimension
    assert len(decayed["params"]) + bn == len(list(model.parameters()))


def test_rate_falls_linearly_to_zero() -> None:
    model = nn.Linear(2, 2)
    optimizer = make_optimizer(model, lr=0.4, momentum=0.9, weight_decay=0)
    scheduler = make_scheduler(optimizer, total_iters=4)
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0, 0.0])


def test_label_smoothing_spreads_over_all_classes() -> None:
    logits = torch.randn(6, 4)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    target = torch.full((6, 4), 0.1 / 4)
    target[torch.arange(6), labels] += 0.9
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    assert torch.allclose(make_loss(0.1)(logits, labels), expected)


def test_bn_statistics_become_the_average_over_the_batches() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    batches = [torch.randn(8, 3, 4, 4) * scale + scale for scale in (1, 2, 3)]
    momentum = model[0].momentum
    reestimate_bn([model], iter(batches))
    expected = torch.stack([batch.mean((0, 2, 3)) for batch in batches]).mean(0)
    assert torch.allclose(model[0].running_mean, expected, atol=1e-6)
    assert model[0].momentum == momentum


def test_momentum_of_bn_survives_an_interruption() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))

    def broken() -> object:
        yield torch.randn(8, 3, 4, 4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reestimate_bn([model], broken())  # type: ignore[arg-type]
    assert model[0].momentum == 0.1


@pytest.mark.parametrize("classes", [1, 2, 4, 5, 7])
def test_top1_and_top5(classes: int) -> None:
    logits = torch.randn(50, classes, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(50) % classes
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    top1, top5 = count_correct(logits, labels)
    assert top1.item() == (ranks < 1).sum().item()
    assert top5.item() == (ranks < 5).sum().item()
