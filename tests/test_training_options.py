"""Options of training: each acts as it says, and a run that is killed goes on as if nothing had happened."""

import json
import math
import random
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from torch import nn

from shufflenet_mlflow import create_model, list_models
from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.config import FIELDS, RECIPE_NAMES
from shufflenet_mlflow.data.augment import AUGMENTATIONS, Erasing, seeded
from shufflenet_mlflow.data.decode import Picture
from shufflenet_mlflow.data.preprocess import Preprocess, ToInput
from shufflenet_mlflow.data.sampler import BalancedOrder
from shufflenet_mlflow.errors import ConfigError, ResumeError
from shufflenet_mlflow.models.loaded import LoadedModel
from shufflenet_mlflow.models.parts import frozen_modules, parts_of
from shufflenet_mlflow.models.spec import ModelSpec
from shufflenet_mlflow.runtime.context import JobContext
from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.training.batchnorm import bn_layers, freeze, reestimate_bn
from shufflenet_mlflow.training.distillation import WEIGHT, Teacher
from shufflenet_mlflow.training.loss import class_weights, make_loss, training_loss
from shufflenet_mlflow.training.mixing import Mixing, main_labels
from shufflenet_mlflow.training.optimizer import clip_gradients, make_optimizer, parameter_groups, rate_factor
from shufflenet_mlflow.training.recipe import recipe_options
from shufflenet_mlflow.workflows.bench import bare_training
from tests.support.bare_training import Kill, bare_trainer, train
from tests.support.command_line import Invoke, small_options
from tests.support.option_groups import GROUPS
from tests.support.payloads import assert_equal_payloads
from tests.support.training import Reporter, request, run, run_until

STATE = ("state_dict", "ema_state_dict", "optimizer_state_dict", "scaler_state_dict", "meter_state", "best", "metrics")


def assert_same_state(first: Any, second: Any) -> None:
    assert_equal_payloads(*({key: payload.get(key) for key in STATE} for payload in (first, second)))


# ---------------------------------------------------------------- resuming


@pytest.mark.parametrize("group", GROUPS)
def test_a_run_killed_at_random_equals_an_undisturbed_one(group: str, images: Path, tmp_path: Path) -> None:
    """Twelve iterations, three epochs, a checkpoint every five: killed before the first one, and after others."""
    options = [*GROUPS[group], "--save-interval", 3]
    kills = tuple(sorted(random.Random(group).sample(range(1, 12), 3)))
    _, whole = train(images, tmp_path / "whole", *options)
    _, parts = train(images, tmp_path / "parts", *options, kills=kills)
    assert_same_state(whole, parts)


def test_a_draw_from_the_global_generator_is_noticed(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control of the test above."""
    options = [*GROUPS["modern"], "--save-interval", 3]
    monkeypatch.setattr("shufflenet_mlflow.training.mixing.seeded", lambda _seed: nullcontext())
    _, whole = train(images, tmp_path / "whole", *options)
    _, parts = train(images, tmp_path / "parts", *options, kills=(5,))
    with pytest.raises(AssertionError):
        assert_same_state(whole, parts)


PATIENCE = ("--lr", 1e-9, "--patience", 3, "--val-interval", 2, "--save-interval", 1)
"""Nothing is learnt: no validation is better than the first, after two iterations."""


@pytest.mark.parametrize("kills", [(), (3,), (1, 6, 7), (8, ("re-estimating BN", 1))])
def test_patience_ends_at_the_same_iteration_after_a_resumption(
    kills: tuple[Kill, ...], images: Path, tmp_path: Path
) -> None:
    result, payload = train(images, tmp_path, *PATIENCE, kills=kills)
    assert (result.iters, result.ended_by_patience) == (8, True)
    assert payload["iters"] == 8


def test_patience_starts_again_with_each_better_validation(images: Path, tmp_path: Path) -> None:
    trainer = bare_trainer(images, tmp_path, "--patience", 2)
    tops = iter([0.1, 0.2, 0.2, 0.3, 0.3])
    counts = []
    for top1 in tops:
        trainer.state.record_validation({"val/top1": top1})
        counts.append(trainer.state.validations_since_best)
    assert counts == [0, 0, 1, 0, 1]
    trainer.state.record_validation({"val/top1": math.nan})
    assert trainer.state.validations_since_best == 2


# ---------------------------------------------------------------- rates


def test_rates_follow_the_schedule() -> None:
    assert [rate_factor("linear", 4)(n) for n in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    assert [rate_factor("constant", 4)(n) for n in range(5)] == [1] * 5
    assert [rate_factor("cosine", 4)(n) for n in range(5)] == pytest.approx([1, 0.8536, 0.5, 0.1464, 0], abs=1e-4)
    warm = rate_factor("linear", 6, warmup_iters=2)
    assert [warm(n) for n in range(7)] == pytest.approx([1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25, 0])


@pytest.mark.parametrize("name", list_models())
def test_the_parts_of_every_network(name: str) -> None:
    """Every parameter is in one part, and the classifier is the last."""
    with torch.device("meta"):
        model = create_model(name, num_classes=5)
    parts = [[parameter for module in part for parameter in module.parameters()] for part in parts_of(model)]
    ids = [id(parameter) for part in parts for parameter in part]
    assert sorted(ids) == sorted(map(id, model.parameters()))
    assert len(parts) - 3 == (3 if name.startswith(("shufflenet_v1", "shufflenet_v2_x", "torchvision")) else 4)
    assert 5 in {parameter.shape[0] for parameter in parts[-1]}
    assert 5 not in {parameter.shape[0] for part in parts[:-1] for parameter in part}
    stem = next(iter(model.parameters()))
    assert stem.shape[1] == 3
    assert any(stem is parameter for parameter in parts[0])


def test_each_part_has_its_rate() -> None:
    model = create_model("shufflenet_v2_x0_5", num_classes=3)
    groups = parameter_groups(model, 0.1, lr=1.0, head_lr_factor=8, layer_decay=0.5)
    rate_of = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    decay_of = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert rate_of.keys() == {id(parameter) for parameter in model.parameters()}
    for part, expected in zip(parts_of(model), (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 8), strict=True):
        for module in part:
            for parameter in module.parameters():
                assert rate_of[id(parameter)] == expected
                assert decay_of[id(parameter)] == (0.1 if parameter.dim() > 1 else 0)


def test_the_logged_rate_has_no_factor(images: Path, tmp_path: Path) -> None:
    trainer = bare_trainer(images, tmp_path, "--head-lr-factor", 10, "--layer-decay", 0.5, "--lr", 0.25)
    assert trainer.state.lr == pytest.approx(0.25)


def test_gradients_are_clipped_together() -> None:
    model = nn.Linear(4, 4)
    optimizer = make_optimizer(model, lr=0.1, momentum=0, weight_decay=0)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    clip_gradients(optimizer, 1.0)
    norm = torch.cat(
        [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    ).norm()
    assert norm.item() == pytest.approx(1.0, abs=1e-5)


# ---------------------------------------------------------------- frozen parts


@pytest.mark.parametrize(
    ("model", "part"),
    [
        ("shufflenet_v2_x0_5", "backbone"),
        ("shufflenet_v2_x0_5", "2"),
        ("shufflenet_v1_x0_5_g3", "0"),
        ("shufflenet_v2_plus_small", "4"),
        ("detnas_voc_fpn_300m", "3"),
        ("torchvision/shufflenet_v2_x0_5", "backbone"),
    ],
)
def test_what_is_frozen_stays_bit_equal(model: str, part: str, images: Path, tmp_path: Path) -> None:
    """Weights and BN statistics; in the moving average, in BN re-estimation, and with several micro-batches, too."""
    options = [
        "--model",
        model,
        "--freeze",
        part,
        "--ema-decay",
        0.9,
        "--micro-batch-size",
        3,
        "--total-iters",
        2,
        "--lr",
        1,
    ]
    trainer = bare_trainer(images, tmp_path, *options, "--val-interval", 2)
    before = {name: tensor.clone() for name, tensor in trainer.state.model.state_dict().items()}
    modules = {id(module) for top in frozen_modules(trainer.state.model, part) for module in top.modules()}
    frozen = {
        f"{prefix}.{name}"
        for prefix, module in trainer.state.model.named_modules()
        if id(module) in modules
        for name in module.state_dict()
    }
    trainer.run()
    after, average = trainer.state.model.state_dict(), trainer.state.evaluated_model.state_dict()
    for name, tensor in before.items():
        if name in frozen:
            assert torch.equal(after[name], tensor), name
            assert torch.equal(average[name], tensor), name
    trained = [name for name in before if name not in frozen and before[name].is_floating_point()]
    unchanged = [name for name in trained if torch.equal(after[name], before[name])]
    assert len(unchanged) <= 1, unchanged  # two iterations change a gate of V2+ by less than rounding
    assert len(frozen) + len(trained) <= len(before)
    assert frozen
    assert trained


def test_frozen_statistics_normalise_in_training() -> None:
    layer = nn.BatchNorm2d(2)
    model = nn.Sequential(layer)
    freeze([layer])
    model.train()
    images = torch.randn(4, 2, 3, 3) * 5 + 3
    assert torch.allclose(model(images), images, atol=1e-4)  # with mean 0 and variance 1, not the batch's
    reestimate_bn([model], iter([images]))
    assert torch.equal(layer.running_mean, torch.zeros(2))  # type: ignore[arg-type]
    assert bn_layers(model) == []


# ---------------------------------------------------------------- balance


def unequal_order(batch_size: int = 10, seed: int = 3) -> BalancedOrder:
    labels = torch.tensor([0] * 90 + [1] * 9 + [2]).int().numpy()
    return BalancedOrder(100, batch_size, seed, labels=labels)


def test_the_sampler_draws_all_classes_equally_often() -> None:
    order = unequal_order()
    assert order.iters_per_epoch == 10  # as without it
    keys = [key for iters in range(300) for key in order.batch(iters)]
    counts = torch.bincount(torch.from_numpy(order.labels)[[key[1] for key in keys]].long())
    assert counts.tolist() == pytest.approx([1000, 1000, 1000], abs=100)
    assert len(set(keys)) == len(keys)  # each draw is augmented in its own way
    assert len({key[1] for key in keys}) == 100


def test_the_sampler_depends_on_seed_and_epoch_alone() -> None:
    order, again = unequal_order(), unequal_order()
    torch.manual_seed(7)
    expected = [order.batch(iters) for iters in range(30)]
    assert [again.batch(iters) for iters in reversed(range(30))] == expected[::-1]
    assert [key[1] for key in expected[0]] != [key[1] for key in expected[10]]
    assert unequal_order(seed=4).batch(0) != expected[0]


def test_weights_count_all_classes_equally() -> None:
    labels = torch.tensor([0] * 6 + [1] * 2).int().numpy()
    weights = class_weights(labels, 3)
    assert weights.tolist() == pytest.approx([8 / (2 * 6), 8 / (2 * 2), 1])  # the third has no image
    assert sum(weights[label].item() for label in labels) == pytest.approx(8)
    logits = torch.randn(4, 3)
    targets = torch.tensor([0, 1, 1, 0])
    each = nn.functional.cross_entropy(logits, targets, reduction="none", label_smoothing=0.1)
    assert torch.allclose(make_loss(0.1, weights)(logits, targets), (each * weights[targets]).mean())
    shares = nn.functional.one_hot(targets, 3).float()
    assert torch.allclose(make_loss(0.1, weights)(logits, shares), make_loss(0.1, weights)(logits, targets))


# ---------------------------------------------------------------- mixing and augmentation


def test_mixing_depends_on_seed_iteration_and_micro_batch_alone() -> None:
    images, labels = torch.rand(6, 3, 8, 8), torch.arange(6) % 3
    mixing = Mixing(0.2, 1.0, 3, seed=1)
    before = torch.get_rng_state()
    first = mixing(images, labels, 5, 0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert_equal_payloads(list(first), list(Mixing(0.2, 1.0, 3, seed=1)(images, labels, 5, 0)))
    for other in (
        mixing(images, labels, 6, 0),
        mixing(images, labels, 5, 1),
        Mixing(0.2, 1, 3, 2)(images, labels, 5, 0),
    ):
        assert not torch.equal(first[1], other[1])


@pytest.mark.parametrize(("mixup", "cutmix"), [(1.0, 0.0), (0.0, 1.0)])
def test_images_and_labels_are_mixed_in_the_same_shares(mixup: float, cutmix: float) -> None:
    labels = torch.arange(4)
    images = labels.float().view(4, 1, 1, 1).expand(4, 3, 16, 16)
    for iters in range(20):
        mixed, shares = Mixing(mixup, cutmix, 4, seed=0)(images, labels, iters, 0)
        assert torch.allclose(shares.sum(1), torch.ones(4))
        assert torch.allclose(mixed.mean((1, 2, 3)), shares @ labels.float(), atol=1e-4)
        assert torch.equal(main_labels(shares), shares.argmax(1))
    assert Mixing(0, 0, 4, 0)(images, labels, 0, 0)[1] is labels


def test_auxiliary_losses_take_mixed_labels() -> None:
    outputs = tuple(torch.randn(5, 3) for _ in range(4))
    labels = torch.tensor([0, 1, 2, 0, 1])
    shares = nn.functional.one_hot(labels, 3).float()
    mixed, plain = (training_loss(outputs, targets, make_loss(0.1))[0] for targets in (shares, labels))
    assert torch.allclose(mixed, plain)


@pytest.mark.parametrize("name", ["trivial", "rand"])
def test_policies_are_drawn_from_the_seed(name: str) -> None:
    transform = AUGMENTATIONS[name].transform(Preprocess("bgr255", 32))
    pixels = torch.randint(256, (40, 50, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    drawn = []
    for seed in (1, 1, 2, 3, 4):
        with seeded(seed):
            drawn.append(transform(Picture(pixels)))
    assert {(image.shape, image.dtype) for image in drawn} == {((3, 32, 32), torch.uint8)}
    assert torch.equal(drawn[0], drawn[1])
    assert len({image.numpy().tobytes() for image in drawn}) == 4


@pytest.mark.parametrize("mode", ["bgr255", "rgb_256"])
def test_erasing_fills_a_rectangle_with_the_mean_colour(mode: str) -> None:
    preprocess = Preprocess(mode, 32)
    erasing = Erasing(AUGMENTATIONS["none"].transform(preprocess), preprocess, 1.0)
    image = erasing(Picture(torch.zeros(32, 32, 3, dtype=torch.uint8).numpy()))
    mean = [124, 116, 104] if mode == "rgb_256" else [104, 116, 124]
    erased = image.sum(0) > 0
    assert 0.02 * 0.8 < erased.float().mean().item() < 0.34
    assert {tuple(colour) for colour in image[:, erased].T.tolist()} == {tuple(mean)}


# ---------------------------------------------------------------- the whole command


def test_a_recipe_is_a_set_of_options_that_others_override(images: Path, tmp_path: Path) -> None:
    options = ["--recipe", "modern", "--mixup", 0.4, "--batch-size", 16, "--ema-decay", 0]
    asked = {**request(images, *options).options}
    del asked["lr"]
    config = bare_training(asked, None, JobContext.alone(Reporter(), StopFlag()))[0].config
    full = recipe_options("modern", "shufflenet_v2_x0_5", 16)
    assert (config.recipe, config.mixup, config.ema_decay) == ("modern", 0.4, 0)
    for name in ("optimizer", "lr", "schedule", "weight_decay", "clip_norm", "augment", "erasing", "label_smooth"):
        assert getattr(config, name) == full[name], name
    assert config.warmup_epochs == pytest.approx(0.6)  # a tenth of six epochs, not the recipe's five
    with pytest.raises(ConfigError, match="--warmup-epochs"):
        bare_trainer(images, tmp_path, "--warmup-epochs", 3)


@pytest.mark.parametrize(
    ("options", "augment"),
    [
        ({"epochs": 10}, "shift"),
        ({"epochs": 11}, "release"),
        ({"total_iters": 2}, "release"),
        ({"epochs": 1, "augment": "rand"}, "rand"),
        ({"epochs": 1, "recipe": "paper"}, "release"),
    ],
)
def test_a_short_run_has_a_gentler_augmentation(options: dict[str, Any], augment: str, images: Path) -> None:
    asked = {name: value for name, value in request(images).options.items() if name not in ("lr", "total_iters")}
    config = bare_training({**asked, "recipe": "modern", **options}, None, JobContext.alone(Reporter(), StopFlag()))[0]
    assert config.config.augment == augment


def test_the_digits_keep_their_augmentation(cache_dir: Path) -> None:
    plan, _ = bare_training({"recipe": "modern"}, cache_dir, JobContext.alone(Reporter(), StopFlag()))
    assert (plan.config.augment, plan.config.optimizer) == ("shift", "adamw")


def test_recipes_are_shown_in_full(shufflenet: Invoke) -> None:
    result = shufflenet("recipes", "--batch-size", 1024)
    assert result.exit_code == 0, result.output
    document = json.loads(shufflenet("recipes", "--batch-size", 1024, "--json").stdout)
    assert document["recipes"].keys() == {*RECIPE_NAMES}
    assert document["recipes"]["paper"]["lr"] == 0.5
    for name in document["recipes"]["paper"]:
        assert f"--{name.replace('_', '-')}" in result.stdout
    assert set(document["recipes"]["paper"]) - set(FIELDS) == {"epochs"}


def test_a_run_that_patience_ended_says_so(images: Path, client: MlflowClient, shufflenet: Invoke) -> None:
    options = [*PATIENCE[:2], "--patience", 1, "--val-interval", 2, "--save-dir", "models"]
    stopped = run_until(images, "validating", 2, *options)
    assert not stopped.result.ended_by_patience
    ended = run(images, *options)
    assert (ended.run_id, ended.result.iters, ended.result.ended_by_patience) == (stopped.run_id, 4, True)
    found = client.get_run(str(ended.run_id))
    assert found.info.status == "FINISHED"
    assert "iteration 4 of 12" in found.data.tags["mlflow.note.content"]
    assert "ended by --patience" in found.data.tags["mlflow.note.content"]
    again = shufflenet("train", *small_options(images), *options)
    assert "nothing is left to train" in again.stderr, again.output
    assert "iterations           4  (epoch 1; ended by --patience" in again.stdout
    document = json.loads(shufflenet("train", *small_options(images), *options, "--json").stdout)
    assert document["ended_by_patience"]
    with pytest.raises(ResumeError, match=r"--patience \(1 -> 2\)"):
        run(images, *options, "--patience", 2)
    with pytest.raises(ResumeError, match=r"--val-interval \(2 -> 3\)"):
        run(images, *options, "--val-interval", 3)


def test_a_fork_counts_validations_anew(images: Path) -> None:
    options = [*PATIENCE[:2], "--patience", 1, "--val-interval", 2]
    run(images, *options, "--save-dir", "models")
    fork = run(images, *options, "--resume", "models", "--new-run", "--save-dir", "fork", "--lr", 1e-8)
    assert (fork.result.iters, fork.result.ended_by_patience) == (8, True)  # its first validation is its best


@pytest.mark.long
def test_a_teacher_resumes(images: Path, client: MlflowClient) -> None:
    """From the run's ID alone, and with the teacher's file in another place; not with another teacher."""
    teacher = run(images, "--total-iters", 2, "--model", "shufflenet_v1_x0_5_g3", "--input-size", 64)
    path = teacher.result.checkpoint
    assert path is not None
    options = ["--teacher", teacher.run_id, "--cutmix", 1.0, "--total-iters", 6, "--val-interval", 6]
    whole = run(images, *options, "--save-dir", "whole")
    alone = run(images, *options[2:], "--save-dir", "alone")
    assert client.get_run(str(whole.run_id)).data.tags["teacher.run"] == teacher.run_id
    stopped = run_until(images, "training", 3, *options, "--save-dir", "parts")
    other = run(images, "--total-iters", 1, "--save-dir", "other").result.checkpoint
    with pytest.raises(ResumeError, match="--teacher .* is not the one that the run began with"):
        run(images, *options[2:], "--save-dir", "parts", "--teacher", other)
    shutil.copy(path, "copy.pth.tar")
    parts = run(
        images, "--resume", stopped.run_id, "--save-dir", "elsewhere", *options[2:], "--teacher", "copy.pth.tar"
    )
    last = [read_checkpoint(one.result.checkpoint) for one in (whole, parts, alone)]
    assert_same_state(last[0], last[1])
    with pytest.raises(AssertionError):  # without a teacher it learns something else
        assert_same_state(last[0], last[2])


def test_a_teacher_answers_in_the_order_of_the_classes() -> None:
    """Its channels, its input size and the order of its classes are its own."""
    network = create_model("torchvision/shufflenet_v2_x0_5", num_classes=3)
    network.eval()
    own = Preprocess("rgb_256", 64)
    classes = {"a": 0, "b": 1, "c": 2}
    loaded = LoadedModel(network, ModelSpec("torchvision/shufflenet_v2_x0_5"), 3, own, {"c": 0, "a": 1, "b": 2})
    teacher = Teacher(loaded, classes, Preprocess("bgr255", 64), torch.device("cpu"))
    pixels = torch.randint(256, (4, 3, 64, 64)).float()
    expected = network(ToInput(own, torch.device("cpu")).normalise(pixels.flip(1)))[:, [1, 2, 0]]
    assert torch.allclose(teacher.answers(pixels), expected, atol=1e-5)
    assert teacher.answers(pixels[..., :32, :32]).shape == (4, 3)
    loss = torch.tensor(2.0)
    assert teacher.blend(loss, expected, pixels).item() == pytest.approx(2.0 * (1 - WEIGHT), abs=1e-4)
    assert teacher.blend(loss, expected.flip(1) * 3, pixels).item() > 2.0 * (1 - WEIGHT)
    assert not any(parameter.requires_grad for parameter in network.parameters())
