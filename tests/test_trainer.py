"""`Trainer` and `Callback`: a loop for networks, data, losses and optimizers of one's own."""

import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shufflenet_mlflow import Callback, TrainConfig, Trainer, create_model
from shufflenet_mlflow.checkpoints.folders import list_checkpoints
from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.errors import ConfigError, ShuffleNetError
from shufflenet_mlflow.runtime.progress import PrintingReporter, reporter_of
from shufflenet_mlflow.training.result import TrainResult
from tests.support.payloads import assert_equal_payloads

CONFIG = TrainConfig(total_iters=12, batch_size=8, val_interval=4, save_interval=5, display_interval=3, lr=0.1)


class Noisy:
    """Images of four classes, with noise that is drawn anew each time."""

    def __init__(self, n: int) -> None:
        generator = torch.Generator().manual_seed(n)
        self.images = torch.randn(n, 3, 8, 8, generator=generator)
        self.targets = torch.randint(0, 4, (n,), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index] + 0.1 * torch.randn(3, 8, 8), self.targets[index]


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2)]
    return nn.Sequential(*layers, nn.Linear(8, 4))


class Heard(Callback):
    """Notes what it hears, counts steps, and acts after one of them."""

    def __init__(self, at: int = 0, act: Callable[[Trainer], object] = lambda _trainer: None) -> None:
        self.at, self.act = at, act
        self.events: list[tuple[Any, ...]] = []
        self.steps = 0

    def on_start(self, trainer: Trainer) -> None:
        self.events.append(("start", trainer.iters, self.steps))

    def on_step(self, trainer: Trainer) -> None:
        self.steps += 1
        trainer.log({"steps": self.steps})
        if trainer.iters == self.at:
            self.act(trainer)

    def on_validation(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        assert metrics == trainer.validation
        self.events.append(("validation", trainer.iters, 0 <= metrics["val/top1"] <= 1))

    def on_checkpoint(self, trainer: Trainer, path: Path) -> None:
        assert read_checkpoint(path)["iters"] == trainer.iters
        self.events.append(("checkpoint", trainer.iters))

    def on_end(self, trainer: Trainer, result: TrainResult) -> None:
        self.events.append(("end", result.iters))

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


class Points:
    """Keeps metric points; see `MetricSink`."""

    def __init__(self) -> None:
        self.points: list[tuple[int, dict[str, float]]] = []

    def log(self, values: Mapping[str, float], iters: int) -> None:
        self.points.append((iters, dict(values)))


def trainer(store: Path | None, *callbacks: Callback, config: TrainConfig = CONFIG, **more: Any) -> Trainer:
    more = {"progress": False, **more}
    return Trainer(network(), Noisy(40), Noisy(16), config, store=store, callbacks=callbacks, **more)


def test_an_error_of_a_callback_ends_the_training_which_resumes_bit_for_bit(tmp_path: Path) -> None:
    def fail(_trainer: Trainer) -> None:
        raise RuntimeError("mine, not gloo's")

    heard, points = Heard(), Points()
    whole = trainer(tmp_path / "whole", heard, sink=points).run()
    assert heard.events[:3] == [("start", 0, 0), ("validation", 4, True), ("checkpoint", 4)]
    assert heard.events[-4:] == [("checkpoint", 12), ("validation", 12, True), ("checkpoint", 12), ("end", 12)]
    assert [entry for entry in points.points if "steps" in entry[1]] == [(n, {"steps": n}) for n in range(1, 13)]
    assert {"train/loss", "val/top1", "best/val_top1"} <= {name for _, values in points.points for name in values}

    with pytest.raises(RuntimeError, match="mine, not gloo's") as raised:
        trainer(tmp_path / "parts", Heard(7, fail)).run()
    assert raised.traceback[-1].name == "fail"
    again = Heard()
    resumed = trainer(tmp_path / "parts", again).run()
    assert again.events[0] == ("start", 7, 7)
    assert again.steps == 12
    assert whole.checkpoint is not None
    assert resumed.checkpoint is not None
    payloads = [read_checkpoint(path) for path in (whole.checkpoint, resumed.checkpoint)]
    for payload in payloads:
        del payload["created_at"]
    assert_equal_payloads(*payloads)

    complete = Heard()
    done = trainer(tmp_path / "parts", complete).run()
    assert (done.iters, done.checkpoint, complete.events) == (12, resumed.checkpoint, [])
    with pytest.raises(ShuffleNetError, match=r"changed --lr \(0.1 -> 0.2\).*another folder"):
        trainer(tmp_path / "parts", config=CONFIG.replace(lr=0.2))
    with pytest.raises(ShuffleNetError, match="train_set has 48 images, and had 40"):
        Trainer(network(), Noisy(48), Noisy(16), CONFIG, store=tmp_path / "parts")


def test_a_callback_ends_or_pauses_the_training(tmp_path: Path) -> None:
    heard = Heard(6, lambda trainer: trainer.stop("good enough"))
    result = trainer(tmp_path / "ended", heard).run()
    assert (result.iters, result.stop_reason, result.ended_by_patience) == (6, "good enough", False)
    assert heard.events[-3:] == [("validation", 6, True), ("checkpoint", 6), ("end", 6)]
    assert trainer(tmp_path / "ended", Heard()).run().iters == 6  # it is complete

    paused = trainer(tmp_path / "paused", Heard(6, lambda trainer: trainer.stop(finish=False))).run()
    assert paused.checkpoint is not None
    assert (paused.iters, paused.stopped_by, paused.checkpoint.name) == (6, signal.SIGTERM, "checkpoint-000006.pth.tar")
    assert trainer(tmp_path / "paused", Heard()).run().iters == 12


def test_ctrl_c_saves_first_and_leaves_the_handlers_as_they_were(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"stopped at iteration 6, .*checkpoint-000006"):
        trainer(tmp_path, Heard(6, lambda _trainer: signal.raise_signal(signal.SIGINT))).run()
    assert signal.getsignal(signal.SIGINT) is before

    def twice(_trainer: Trainer) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, Heard(8, twice)).run()
    with pytest.raises(SystemExit) as ended:
        trainer(tmp_path, Heard(10, lambda _trainer: signal.raise_signal(signal.SIGTERM))).run()
    assert ended.value.code == 143
    assert list_checkpoints(tmp_path)[0].name == "checkpoint-000010.pth.tar"


def test_in_a_thread_with_workers(tmp_path: Path) -> None:
    results: list[TrainResult] = []
    config = CONFIG.replace(total_iters=2, workers=1)
    thread = threading.Thread(target=lambda: results.append(trainer(tmp_path, config=config).run()))
    thread.start()
    thread.join()
    assert [result.iters for result in results] == [2]


def test_own_loss_and_optimizer() -> None:
    seen: list[Tensor] = []

    def loss(logits_NC: Tensor, labels_N: Tensor) -> Tensor:
        seen.append(labels_N)
        return nn.functional.cross_entropy(logits_NC, labels_N)

    model = network()
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    optimizer = torch.optim.Adagrad(list(model[-1].parameters()), lr=0.1)  # type: ignore[index]
    config = TrainConfig(total_iters=4, batch_size=8, schedule="constant", balance="weights")
    result = Trainer(model, Noisy(40), Noisy(16), config, loss=loss, optimizer=optimizer, progress=False).run()
    assert len(seen) == 4
    assert result.checkpoint is None  # none was asked for
    changed = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    assert changed == {"5.weight", "5.bias"}
    assert optimizer.param_groups[0]["lr"] == 0.1


class Endless:
    """Images without a number of them."""

    def __iter__(self) -> Any:
        return iter(())


class Unlabelled(Noisy):
    targets: Any

    def __init__(self, n: int, item: Any = None) -> None:
        super().__init__(n)
        self.item, self.labels = item, self.targets
        del self.targets

    def __getitem__(self, index: int) -> Any:
        return self.item if self.item is not None else (self.images[index], self.labels[index])


def build(**changes: Any) -> Trainer:
    parts: dict[str, Any] = {"model": network(), "train_set": Noisy(40), "val_set": Noisy(16), "config": CONFIG}
    return Trainer(**{**parts, "progress": False, **changes})


def adam() -> torch.optim.Optimizer:
    return torch.optim.Adam([torch.zeros(1, requires_grad=True)])


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "option of files": ({"config": TrainConfig(train_dir="pets")}, r"--train-dir \(=pets\) is for train\(\)"),
    "option of optimizer": ({"optimizer": adam()}, r"--lr \(=0.1\) has no effect on an optimizer of your own"),
    "no classifier": ({"model": create_model("shufflenet_v2_x0_5", 0)}, "the network has no classifier"),
    "no classes": ({"model": nn.Flatten()}, "--num-classes is missing"),
    "no indices": ({"train_set": Endless()}, "train_set is a Endless without __len__ and __getitem__"),
    "no images": ({"val_set": Noisy(0)}, "val_set has no images"),
    "no labels": (
        {"train_set": Unlabelled(40), "config": CONFIG.replace(balance="sampler")},
        r"--balance \(=sampler\) needs all labels; .*targets",
    ),
    "callback": ({"callbacks": Heard()}, "callbacks .*must be a list"),
    "class": ({"callbacks": [Heard]}, r"Heard is a class; give an instance, Heard\(\)"),
    "deaf": ({"callbacks": [print]}, "has none of the methods on_start, "),
    "too few": ({"train_set": Noisy(4)}, "--batch-size 4 or less"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake: str) -> None:
    parts, says = MISTAKES[mistake]
    with pytest.raises(ShuffleNetError, match=says):
        build(**parts)


def test_mistakes_in_a_job_and_in_items(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ShuffleNetError, match=r"train_set\[\d+\] is an image of str; it must be a tensor"):
        build(train_set=Unlabelled(40, ("cat.jpg", 0))).run()
    with pytest.raises(ShuffleNetError, match=r"an image of shape \(8, 8\); it must be a tensor"):
        build(train_set=Unlabelled(40, (torch.zeros(8, 8), 0))).run()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="a Trainer trains in one process"):
        build()


def test_progress_is_printed_or_logged(capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(reporter_of(True), PrintingReporter)
    trainer(None, config=CONFIG.replace(total_iters=3), progress=True).run()
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "iteration 3: train/loss" in printed.err
    trainer(None, config=CONFIG.replace(total_iters=3)).run()
    assert capsys.readouterr().err == ""
