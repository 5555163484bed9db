"""The supernet of single path one-shot search: what its paths cost, and that training changes nothing else."""

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from shufflenet_mlflow import Callback, TrainConfig, Trainer, create_model
from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.data.division import Division
from shufflenet_mlflow.data.folder import list_images
from shufflenet_mlflow.data.holding_out import hold_out, some_of_each_class
from shufflenet_mlflow.data.table import list_table
from shufflenet_mlflow.errors import ConfigError, DataError, ModelError
from shufflenet_mlflow.models import oneshot_supernet
from shufflenet_mlflow.models.cost import model_cost
from shufflenet_mlflow.models.fuse_bn import fuse_bn
from shufflenet_mlflow.models.oneshot import ShuffleNetOneShot
from shufflenet_mlflow.models.oneshot_supernet import OneShotSupernet, inherit_path
from shufflenet_mlflow.models.paths import draw_path, macs_table, scaled_limit, uniform_genes
from shufflenet_mlflow.models.search_space import CHANNEL_SUPERNET, NETWORK, SEARCHED_CHOICES, SUPERNET, SUPERNETS
from shufflenet_mlflow.training.state import TrainingState
from tests.support.command_line import Invoke, small_options
from tests.support.effort import repetitions
from tests.support.images import write_images
from tests.support.metrics import steps, values
from tests.support.payloads import assert_equal_payloads
from tests.support.processes import finish, start, torchrun
from tests.support.training import run, run_until

SHORT = ("--total-iters", 6, "--val-interval", 2, "--save-interval", 3, "--micro-batch-size", 4)
OPTIONS = ("--model", SUPERNET, *SHORT)


def random_paths(count: int, seed: int = 0) -> list[list[int]]:
    return uniform_genes(count, torch.Generator().manual_seed(seed)).tolist()


# ---------------------------------------------------------------- multiply-accumulates


def test_the_published_figures() -> None:
    table = macs_table()
    alike = [table.macs([choice] * 20) for choice in range(4)]
    assert [round(macs / 1e6, 2) for macs in alike] == [295.84, 313.65, 340.37, 358.83]
    assert (round(table.lowest / 1e6, 2), round(table.highest / 1e6, 2)) == (270.36, 398.61)
    assert table.macs(SEARCHED_CHOICES) == 322_918_720


@pytest.mark.parametrize(
    "count", [15, pytest.param(repetitions(full=1000, ci=100), marks=[pytest.mark.long, pytest.mark.timeout(600)])]
)
@pytest.mark.parametrize(("classes", "size"), [(1000, 224), (7, 64)])
def test_the_table_equals_the_counter(count: int, classes: int, size: int) -> None:
    table = macs_table(classes, size)
    for path in random_paths(count, size):
        assert table.macs(path) == model_cost(NETWORK, classes, size, choices=path).macs
        assert table.of_many(torch.tensor([path])).tolist() == [table.macs(path)]


def test_the_share_of_networks_below_the_limit() -> None:
    macs = macs_table().of_many(uniform_genes(200_000, torch.Generator().manual_seed(0)))
    assert (macs <= 330_000_000).double().mean().item() == pytest.approx(0.59, abs=0.005)


def test_a_limit_means_the_same_networks_at_every_size() -> None:
    paths = uniform_genes(2000, torch.Generator().manual_seed(1))
    below = macs_table().of_many(paths) <= 330_000_000
    assert scaled_limit(1000, 224) == 330_000_000
    for classes, size in ((10, 32), (100, 96), (1000, 448)):
        assert torch.equal(macs_table(classes, size).of_many(paths) <= scaled_limit(classes, size), below)


# ---------------------------------------------------------------- paths of training


def test_the_paths_of_training() -> None:
    paths = [draw_path(0, iters) for iters in range(300)]
    macs = np.array([macs_table().macs(path) for path in paths])
    assert macs.min() >= 290_000_000
    assert macs.max() <= 360_000_000
    by_bin = np.bincount((macs - 290_000_000) // 10_000_000, minlength=7)
    assert by_bin[:7].min() > 20  # 43 expected
    assert np.bincount(np.array(paths).flatten()).min() > 1000  # 1,500 expected
    assert paths == [draw_path(0, iters) for iters in range(300)]
    assert len(set(paths)) == 300
    assert draw_path(1, 0) != draw_path(0, 0)


def test_no_global_generator_has_a_part_in_it() -> None:
    torch.manual_seed(5)
    before, path = torch.get_rng_state(), draw_path(3, 4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert draw_path(3, 4) == path


def on_path(name: str, path: tuple[int, ...], names: Iterable[str]) -> bool:
    room, *rest = name.split(".")
    if room != "features":
        return True
    number, choice = map(int, rest[:2])
    if choice != path[number] or "blocks" not in rest:
        return choice == path[number]
    blocks = sum(other.startswith(name.rpartition(".")[0] + ".") for other in names)
    assert blocks in (10, 19)  # of ten widths; each but the first has one block, or two where both sides vary
    return int(rest[-1]) <= path[20 + number] * (blocks // 9)


class Watch(Callback):
    """Compares the weights off the path of each iteration with those before it."""

    def __init__(self) -> None:
        self.before: dict[str, Any] = {}
        self.seen = self.changed = 0

    def on_start(self, trainer: Trainer) -> None:
        self.before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}

    def on_step(self, trainer: Trainer) -> None:
        assert isinstance(trainer.model, OneShotSupernet)
        path = draw_path(trainer.config.seed, trainer.iters - 1, widths=trainer.model.has_widths)
        for name, weight in trainer.model.named_parameters():
            is_equal = torch.equal(weight, self.before[name])
            if on_path(name, path, self.before):
                self.changed += 1
                assert not is_equal, f"{name} is on the path of iteration {trainer.iters}"
            else:
                assert is_equal, f"{name} is off the path of iteration {trainer.iters}"
                self.seen += bool(trainer.optimizer.state.get(weight))
        self.on_start(trainer)


class Noise:
    """Images of four classes."""

    def __init__(self, n: int) -> None:
        self.images = torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(n))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], index % 4


@pytest.mark.parametrize("name", SUPERNETS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_an_iteration_changes_its_path_only(optimizer: str, name: str) -> None:
    """Weights off the path that have a momentum, and would decay, stay as they are, bit for bit."""
    config = TrainConfig(
        total_iters=5, batch_size=8, val_interval=10, lr=0.1, weight_decay=0.1, optimizer=optimizer, label_smooth=0.1
    )
    watch = Watch()
    Trainer(create_model(name, 4), Noise(16), Noise(4), config, callbacks=[watch], progress=False).run()
    assert watch.seen > 200
    assert watch.changed > 200


@pytest.mark.parametrize("name", SUPERNETS)
def test_an_interrupted_training_goes_on_as_if_nothing_had_happened(name: str, images: Path) -> None:
    options = ("--model", name, *SHORT)
    whole = run(images, *options, "--save-dir", "whole")
    run_until(images, "training", 2, *options, "--save-dir", "parts")
    torch.manual_seed(12345)
    parts = run(images, *options, "--save-dir", "parts")
    assert whole.result.checkpoint
    assert parts.result.checkpoint
    kept = ("state_dict", "optimizer_state_dict", "metrics", "best", "meter_state")
    first, second = (read_checkpoint(summary.result.checkpoint) for summary in (whole, parts))
    assert_equal_payloads({key: first[key] for key in kept}, {key: second[key] for key in kept})


def test_a_path_from_the_processs_generator_is_noticed(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the test above."""
    monkeypatch.setattr(oneshot_supernet, "draw_path", lambda *_, **__: tuple(np.random.randint(4, size=20).tolist()))
    with pytest.raises(AssertionError):
        test_an_interrupted_training_goes_on_as_if_nothing_had_happened(SUPERNET, images)


@pytest.mark.parametrize("name", SUPERNETS)
def test_validating_changes_nothing(name: str, images: Path) -> None:
    """How often it is validated, each time with BN statistics of its own, is not seen in what is trained."""
    options = ("--model", name, *SHORT)
    often = run(images, *options, "--save-dir", "often")
    once = run(images, *options, "--save-dir", "once", "--val-interval", 6)
    first, second = (read_checkpoint(summary.result.checkpoint) for summary in (often, once))  # type: ignore[arg-type]
    assert_equal_payloads(first["state_dict"], second["state_dict"])
    assert_equal_payloads(first["optimizer_state_dict"], second["optimizer_state_dict"])


def test_validations_have_bn_statistics_of_the_path(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--model", SUPERNET, "--total-iters", 8, "--val-interval", 4, "--save-dir")
    with_them = run(images, *options, "with")
    monkeypatch.setattr(TrainingState, "model_to_validate", lambda self, _: self.evaluated_model)
    without = run(images, *options, "without")
    logged = [values(MlflowClient(), summary.run_id, "val/loss") for summary in (with_them, without)]
    assert [len(points) for points in logged] == [2, 2]
    assert logged[0][0] != logged[1][0]
    assert logged[0][1] == logged[1][1]  # after the last iteration they are re-estimated anyway


@pytest.mark.long
@pytest.mark.parametrize("options", [OPTIONS, ("--model", CHANNEL_SUPERNET, *SHORT)])
def test_several_processes_take_the_same_paths(
    options: Sequence[object], images: Path, client: MlflowClient, tmp_path: Path
) -> None:
    alone = run(images, *options, "--save-dir", "alone")
    words = [*small_options(images), *options, "--save-dir", "m", "--json"]
    two = finish(start(tmp_path / "two", "train", *words, under=torchrun(2)))
    for name in ("train/loss", "val/loss", "val/top1"):
        assert steps(client, two["run_id"], name) == steps(client, alone.run_id, name)
        assert values(client, two["run_id"], name) == pytest.approx(values(client, alone.run_id, name), rel=1e-4)
    # And from the middle on, bit for bit.
    checkpoint = tmp_path / "two" / "m" / "checkpoint-000003.pth.tar"
    again = [*small_options(images), *options, "--save-dir", "n", "--json", "--resume", checkpoint, "--new-run"]
    resumed = finish(start(tmp_path / "two", "train", *again, under=torchrun(2)))
    ends = [read_checkpoint(Path(tmp_path / "two" / found["checkpoint"])) for found in (two, resumed)]
    assert_equal_payloads(ends[0]["state_dict"], ends[1]["state_dict"])
    assert_equal_payloads(ends[0]["optimizer_state_dict"], ends[1]["optimizer_state_dict"])


@pytest.mark.parametrize("name", SUPERNETS)
def test_it_is_not_compiled(name: str, images: Path) -> None:
    with pytest.raises(ConfigError, match=f"--compile: each iteration of {name} takes another path"):
        run(images, "--model", name, "--compile")


# ---------------------------------------------------------------- the networks on it


@pytest.mark.parametrize("path", random_paths(3))
def test_a_path_and_its_network_give_the_same_logits(path: list[int]) -> None:
    torch.manual_seed(0)
    supernet, network = create_model(SUPERNET, 10), create_model(NETWORK, 10, choices=path)
    assert isinstance(supernet, OneShotSupernet)
    assert isinstance(network, ShuffleNetOneShot)
    images = torch.randn(4, 3, 32, 32)
    supernet.path = tuple(path)
    supernet.train()(images)
    inherit_path(network, supernet, path)
    for training in (True, False):
        for model in (supernet, network):
            model.train(training)
        torch.manual_seed(1)
        expected = supernet(images)
        torch.manual_seed(1)
        assert torch.equal(network(images), expected)
    assert torch.equal(fuse_bn(network)(images), fuse_bn(supernet)(images))
    supernet.path = tuple((choice + 1) % 4 for choice in path)
    assert not torch.equal(supernet(images), expected)


def test_a_path_that_is_none() -> None:
    with pytest.raises(ModelError, match="there are 2, not 20"):
        inherit_path(create_model(NETWORK, 2), create_model(SUPERNET, 2), (1, 2))  # type: ignore[arg-type]


def test_no_affine_parameters() -> None:
    supernet = create_model(SUPERNET, 10)
    assert all(parameter.dim() > 1 for parameter in supernet.parameters())
    assert sum(key.endswith("running_mean") for key in supernet.state_dict()) == 334


# ---------------------------------------------------------------- held-out images


def test_a_fifth_of_each_class_is_held_out(images: Path) -> None:
    listing = list_images(images / "train")
    held = hold_out(listing, None, 0, option="--train-dir")
    assert np.bincount(held.scoring.samples.labels).tolist() == [2, 2, 2]
    parts = [{sample.path for sample in part.samples} for part in held]
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == {sample.path for sample in listing.samples}
    assert hold_out(listing, None, 0, option="--train-dir").scoring.digest == held.scoring.digest
    assert hold_out(listing, None, 1, option="--train-dir").scoring.digest != held.scoring.digest
    assert len(some_of_each_class(listing, 7, 0)) == 6
    assert len(some_of_each_class(listing, 1000, 0)) == len(listing)


def test_training_leaves_them_out(images: Path) -> None:
    summary = run(images, *OPTIONS, "--save-dir", "models")
    assert summary.result.checkpoint
    payload = read_checkpoint(summary.result.checkpoint)
    assert set(payload["data"]["train_counts"].values()) == {10}
    assert set(payload["data"]["val_counts"].values()) == {5}


def test_groups_stay_together(images: Path, workplace: Path) -> None:
    shutil.copytree(images / "train", "own")
    listing = list_images(Path("own"))
    rows = [f"own/{sample.path},{sample.label},g{n // 3}" for n, sample in enumerate(listing.samples)]
    Path("table.csv").write_text("\n".join(["path,label,group", *rows]) + "\n")
    held = hold_out(list_table("table.csv", option="--train-dir"), None, 0, option="--train-dir")
    assert np.bincount(held.scoring.samples.labels).tolist() == [3, 3, 3]
    pattern = Division(group_by=r"(\d)\.")
    by_name = hold_out(listing, pattern, 0, option="--train-dir")
    digits = [{sample.path.rpartition(".")[0][-1] for sample in part.samples} for part in by_name]
    assert not digits[0] & digits[1]


def test_too_few_images_to_hold_out(tmp_path: Path) -> None:
    write_images(tmp_path / "train", per_class=4)
    with pytest.raises(DataError, match="one image in 5 of each class, and class .* has too few; add images"):
        hold_out(list_images(tmp_path / "train"), None, 0, option="--train-dir")


def test_a_checkpoint_between_paths_is_warned_of(images: Path, shufflenet: Invoke) -> None:
    summary = run(images, *OPTIONS, "--save-dir", "models")
    last = shufflenet("eval", f"{summary.run_id}@latest", "--json")
    assert "BN statistics of many paths" not in last.stderr
    assert json.loads(last.stdout)["top1"] == summary.result.val_top1
    assert "BN statistics of many paths" in shufflenet("eval", "models/checkpoint-000003.pth.tar").stderr
    training = shufflenet("eval", "models", "--split", "train", "--json")
    assert "no longer holds the run's" not in training.stderr
    assert json.loads(training.stdout)["n"] == 30  # without those that are held out
