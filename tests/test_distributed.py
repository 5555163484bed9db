"""Several processes: the same samples in the same order, the same losses up to rounding, every image counted once."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from torch import nn
from torch.distributed import TCPStore

from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.data.sampler import EvalBatches, MicroBatches, ReestimationBatches, SampleOrder, TrainBatches
from shufflenet_mlflow.errors import ConfigError
from shufflenet_mlflow.runtime.distributed import World, loss_of_process
from shufflenet_mlflow.runtime.rendezvous import joined, name_attempt
from shufflenet_mlflow.runtime.signals import StopFlag, StopRequested
from shufflenet_mlflow.training.batchnorm import RunningStatistics
from tests.support.command_line import small_options
from tests.support.effort import cases
from tests.support.metrics import steps, values
from tests.support.option_groups import GROUPS
from tests.support.processes import finish, start, torchrun
from tests.support.training import run

ORDER = SampleOrder(num_samples=53, batch_size=12, seed=3)


@pytest.mark.parametrize(("processes", "micro_batch_size"), [(1, 12), (1, 3), (2, 6), (2, 3), (3, 4), (5, 12), (4, 1)])
def test_every_division_makes_the_same_global_batches(processes: int, micro_batch_size: int) -> None:
    divisions = [MicroBatches.of(12, micro_batch_size, rank, processes) for rank in range(processes)]
    for sampler, first in (
        (lambda micro_batches: TrainBatches(ORDER, 2, 9, micro_batches), [ORDER.batch(iters) for iters in range(2, 9)]),
        (
            lambda micro_batches: ReestimationBatches(ORDER, 3, micro_batches),
            [ORDER.reestimation_batch(n) for n in range(3)],
        ),
    ):
        by_rank = [list(sampler(micro_batches)) for micro_batches in divisions]
        for number, expected in enumerate(first):
            parts = [
                part
                for micro_batches, local in zip(divisions, by_rank, strict=True)
                for part in local[
                    number * micro_batches.accumulation_steps : (number + 1) * micro_batches.accumulation_steps
                ]
            ]
            assert [key for part in parts for key in part] == expected
            sizes = {len(part) for part in parts}
            assert max(sizes) - min(sizes) <= 1
            assert min(sizes) == divisions[0].smallest
            assert max(sizes) <= max(micro_batch_size, 1)


def test_fewer_processes_keep_the_micro_batches() -> None:
    def parts(processes: int) -> list[Any]:
        divisions = [MicroBatches.of(12, 3, rank, processes) for rank in range(processes)]
        assert divisions[0].count == 4
        return [part for micro_batches in divisions for part in micro_batches.cut(ORDER.batch(7))]

    assert parts(1) == parts(2) == parts(4)


@pytest.mark.parametrize("num_samples", [1, 4, 15, 16, 17, 53])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_evaluation_counts_each_image_once(num_samples: int, processes: int) -> None:
    shares = [EvalBatches(num_samples, 4, rank, processes) for rank in range(processes)]
    seen = [key for share in shares for part in share for key in part]
    assert sorted(seen) == [(0, index) for index in range(num_samples)]
    assert max(len(share) for share in shares) == shares[0].max_batches


class Together:
    """A world whose processes are threads of this process."""

    def __init__(self, size: int) -> None:
        self.worlds = [self.Member(self, rank, size) for rank in range(size)]
        self.barrier = threading.Barrier(size)
        self.given: list[torch.Tensor] = [torch.empty(0)] * size

    class Member(World):
        def __init__(self, together: "Together", rank: int, size: int) -> None:
            super().__init__(rank, size)
            self._together = together

        def sum(self, tensor: torch.Tensor) -> torch.Tensor:
            together = self._together
            together.given[self.rank] = tensor.clone()
            together.barrier.wait(10)
            tensor.copy_(torch.stack(together.given).sum(0))
            together.barrier.wait(10)
            return tensor

    def run(self, work: Callable[[World], Any]) -> list[Any]:
        with ThreadPoolExecutor(len(self.worlds)) as pool:
            return list(pool.map(work, self.worlds))


def statistics_after(
    world: World, parts: list[torch.Tensor], momentum: float = 0.1
) -> tuple[torch.Tensor, torch.Tensor]:
    layer = nn.BatchNorm2d(3)
    kept = RunningStatistics(nn.Sequential(layer), world, len(parts))
    for part in parts:
        with kept.micro_batch():
            layer(part)
    kept.combine()
    assert layer.num_batches_tracked == 1
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean, layer.running_var


def test_running_statistics_do_not_depend_on_who_computes_which_part() -> None:
    parts = [torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(n)) + n for n in range(4)]
    mean, var = statistics_after(World(), parts)
    expected = 0.1 * torch.stack([part.mean((0, 2, 3)) for part in parts]).mean(0)
    torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(statistics_after(World(), parts[::-1])[0], mean)
    for found in Together(2).run(lambda world: statistics_after(world, parts[2 * world.rank : 2 * world.rank + 2])):
        torch.testing.assert_close(found[0], mean)
        torch.testing.assert_close(found[1], var)
    # Without it the last part would count most, and each process would have its own.
    layer = nn.BatchNorm2d(3)
    for part in parts:
        layer(part)
    assert not torch.allclose(layer.running_mean, mean)  # type: ignore[arg-type]


def test_processes_that_start_again_do_not_meet_their_predecessors() -> None:
    """The store is a real one and keeps what earlier attempts have written."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def attempt(size: int) -> set[str]:
        def join(rank: int) -> str:
            return name_attempt(TCPStore("127.0.0.1", server.port, is_master=False), rank, size, StopFlag())

        with ThreadPoolExecutor(size) as pool:
            return set(pool.map(join, range(size)))

    names = [attempt(size) for size in (3, 3, 2, 4)]
    assert [len(name) for name in names] == [1, 1, 1, 1]
    assert len(set.union(*names)) == 4


def test_a_signal_ends_the_wait_for_the_others() -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    stop = StopFlag()
    threading.Timer(0.1, lambda: stop.set(15)).start()
    with pytest.raises(StopRequested):
        name_attempt(server, 1, 2, stop)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "one"}, "RANK, WORLD_SIZE, LOCAL_RANK or MASTER_PORT is not a number .*'one'.*; torchrun sets all"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is not a number .*'http'.*; torchrun sets all of these"),
        ({"RANK": "2"}, r"RANK \(=2\) must be at least 0 and below its WORLD_SIZE \(=2\); torchrun sets all"),
    ],
)
def test_invalid_launcher_environments(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in {**usual, **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message), joined(StopFlag()):
        pass


def test_pytorchs_error_for_a_lost_process() -> None:
    message = "[gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:11157: Connection reset by peer"
    assert "has lost another process" in str(loss_of_process(RuntimeError(message)))
    assert loss_of_process(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


def test_micro_batches_too_small_for_batch_normalisation(images: Path) -> None:
    with pytest.raises(ConfigError, match=r"--micro-batch-size \(=1\) must be at least 2"):
        run(images, "--micro-batch-size", 1)


@pytest.mark.long
@pytest.mark.parametrize(
    "more", cases([(*GROUPS["sampler"], "--freeze", 1, "--erasing", 0.5, "--clip-norm", 1), ()], ci=1)
)
def test_micro_batches_train_as_several_processes_do(
    more: tuple[object, ...], images: Path, client: MlflowClient, tmp_path: Path
) -> None:
    """Compare two processes with one that computes the same two micro-batches: equal up to rounding."""
    options = ["--micro-batch-size", 4, "--ema-decay", 0.9, *more]
    alone = run(images, *options, "--save-dir", "alone")
    words = [*small_options(images), *options, "--save-dir", "m", "--json"]
    two = finish(start(tmp_path / "two", "train", *words, under=torchrun(2)))
    for name in ("train/loss", "train/top1", "val/loss", "val/top1", "val/top5", "train/lr", "loss"):
        assert steps(client, two["run_id"], name) == steps(client, alone.run_id, name)
        assert values(client, two["run_id"], name) == pytest.approx(values(client, alone.run_id, name), rel=1e-4)
    payload = read_checkpoint(tmp_path / "two" / "m" / "bnps-checkpoint-000012.pth.tar")
    assert payload["environment"]["processes"] == 2
    assert payload["config"]["micro_batch_size"] == 4
    assert not any(key.startswith("module.") for key in payload["state_dict"])
    assert payload["state_dict"].keys() == payload["ema_state_dict"].keys()
    # What one process had of the two is another's: the file continues alone.
    assert run(images, *options, "--resume", two["run_id"], "--save-dir", "elsewhere").was_complete
