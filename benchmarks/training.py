"""Time a training step, and training from JPEG files, against the plain loop that users write.

    python benchmarks/training.py [--device auto] [--models NAME ...] [--rounds 3] [--no-loop] [--variants bf16 compile]

`step`: the images are in memory. The plain loop has float32 images in PyTorch's default memory format, torchvision's
networks for `torchvision/` and otherwise ours as `create_model` returns them, plain SGD, and reads loss and accuracy
after each step. Ours is the step of `shufflenet train`. `loop`: both read photographs from a folder. Each side runs in
a process of its own, in turn; medians over the rounds. Floors: the shortest possible time of the multiplications
(forward once, backward twice) and of moving the activations (five times: written, read, read again for the gradient,
and the gradient written and read), at the rates of a large matrix product and of a copy, measured in the same run.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import add_device, apart, choose_device, describe, finish, report
from photographs import write_photographs
from plain import Training, train_loader
from torch import Tensor, nn
from torchvision.models import get_model

from shufflenet_mlflow import create_model
from shufflenet_mlflow.data.loader import Batch
from shufflenet_mlflow.models.cost import model_cost
from shufflenet_mlflow.runtime.compiler import compiled
from shufflenet_mlflow.runtime.context import JobContext
from shufflenet_mlflow.runtime.progress import LoggingReporter
from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.training.loop import TrainingLoop
from shufflenet_mlflow.workflows.bench import bare_training

FAMILIES = (
    "shufflenet_v1_x1_0_g3",
    "shufflenet_v2_x1_0",
    "shufflenet_v2_plus_small",
    "shufflenet_oneshot",
    "detnas_voc_fpn_300m",
    "torchvision/shufflenet_v2_x1_0",
    "shufflenet_v2_large",
    "shufflenet_v2_exlarge",
)
LOOP = ("shufflenet_v2_x1_0", "shufflenet_oneshot")
SIZE, CLASSES = 224, 8
VARIANTS: dict[str, dict[str, Any]] = {"bf16": {"amp": "bf16"}, "compile": {"compile": True}}
_PASSES = 5
"""Times that an activation moves."""


def batch_of(model: str, device: torch.device) -> int:
    """Return the batch size, which is small for the giants."""
    giant = model in ("shufflenet_v2_large", "shufflenet_v2_exlarge")
    if device.type == "cpu":
        return 4 if giant else 64
    return 32 if giant else 256


def seconds_each(step: Callable[[], object], device: torch.device, *, slow: bool) -> float:
    """Return the median seconds of a step."""
    for _ in range(2 if slow else 3):
        step()
    times = []
    for _ in range(3 if slow else 7):
        finish(device)
        began = time.perf_counter()
        step()
        finish(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def make_trainer(root: Path, model: str, device: torch.device, batch: int, options: dict[str, Any]) -> TrainingLoop:
    """Return the training loop of `shufflenet train`, with nothing kept."""
    given = {"model": model, "train_dir": str(root), "val_dir": str(root), "batch_size": batch, "device": device.type}
    context = JobContext.alone(LoggingReporter(), StopFlag())
    return bare_training({**given, "lr": 0.01, **options}, None, context)[1]


def plain_model(model: str) -> nn.Module:
    """Return the same network as users have it."""
    if model.startswith("torchvision/"):
        return get_model(model.removeprefix("torchvision/"), weights=None, num_classes=CLASSES)
    return create_model(model, CLASSES)


def stepper(side: str, model: str, root: Path, device: torch.device, batch: int) -> Callable[[], None]:
    """Return what makes one step of a side, with images that are in memory."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (batch, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    labels = torch.randint(CLASSES, (batch,), generator=generator)
    if side == "plain":
        images = pixels.float()
        training = Training(plain_model(model), device)
        return lambda: training.step(images, labels)
    trainer = make_trainer(root, model, device, batch, VARIANTS.get(side, {}))
    network = compiled(trainer.state.model) if trainer.config.compile else trainer.state.model
    network.train()
    parts = [Batch(pixels.contiguous(memory_format=torch.channels_last), labels, labels, None, ())]

    def step() -> None:
        trainer.step(network, parts)
        if device.type == "cpu":
            trainer.state.check_finite()

    return step


def measure_step(side: str, model: str, root: Path, device: torch.device, batch: int) -> dict[str, float]:
    """Return the seconds of a step, and of the first one."""
    step = stepper(side, model, root, device, batch)
    began = time.perf_counter()
    step()
    finish(device)
    first = time.perf_counter() - began
    return {"seconds": seconds_each(step, device, slow=batch <= 4), "first": first}


def measure_loop(side: str, model: str, root: Path, device: torch.device, batch: int) -> dict[str, float]:
    """Return the seconds of an iteration that reads files."""
    iterations, warm = 12, 3
    if side == "plain":
        training = Training(plain_model(model), device)
        workers = make_trainer(root, model, device, batch, {}).config.workers

        def endless() -> Any:
            while True:
                yield from train_loader(root, SIZE, batch, workers)

        batches = endless()

        def step() -> None:
            training.step(*next(batches))
    else:
        trainer = make_trainer(root, model, device, batch, {})
        trainer.state.model.train()
        ours = trainer.batches(0, iterations + warm)

        def step() -> None:
            trainer.step(trainer.state.model, trainer.fetch(ours))

    for _ in range(warm):
        step()
    finish(device)
    began = time.perf_counter()
    for _ in range(iterations):
        step()
    finish(device)
    return {"seconds": (time.perf_counter() - began) / iterations}


def activation_bytes(model: str) -> int:
    """Return the bytes of all layers' outputs for one image."""
    network = create_model(model, CLASSES).eval()
    sizes: list[int] = []

    def look(_module: nn.Module, _inputs: object, output: Any) -> None:
        if isinstance(output, Tensor):
            sizes.append(output.numel() * output.element_size())

    for module in network.modules():
        if not list(module.children()):
            module.register_forward_hook(look)
    with torch.inference_mode():
        network(torch.zeros(1, 3, SIZE, SIZE))
    return sum(sizes)


def rates(device: torch.device) -> dict[str, float]:
    """Return multiplications per second of a large matrix product, and bytes per second of a large copy."""
    n = 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    x = torch.randn(1 << 26 if device.type == "cpu" else 1 << 28, device=device)
    y = torch.empty_like(x)
    product = seconds_each(lambda: a @ b, device, slow=False)
    copy = seconds_each(lambda: y.copy_(x), device, slow=False)
    return {"macs_per_second": n**3 / product, "bytes_per_second": 2 * x.numel() * 4 / copy}


def floors(model: str, batch: int, speed: dict[str, float]) -> dict[str, float]:
    """Return the shortest possible milliseconds of a step's multiplications, and of moving its activations."""
    macs = model_cost(model, CLASSES, SIZE).macs
    return {
        "arithmetic_floor_ms": round(3e3 * macs * batch / speed["macs_per_second"], 1),
        "memory_floor_ms": round(1e3 * _PASSES * activation_bytes(model) * batch / speed["bytes_per_second"], 1),
    }


def compare(
    what: str, sides: list[str], model: str, root: Path, device: torch.device, rounds: int
) -> dict[str, dict[str, float]]:
    """Return medians over the rounds, with the sides taking turns."""
    batch = batch_of(model, device)
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            found[side].append(apart(__file__, what, side, model, root, device.type, batch))
    return {
        side: {name: statistics.median(run[name] for run in runs) for name in runs[0]} for side, runs in found.items()
    }


def row(results: dict[str, dict[str, float]], batch: int) -> dict[str, Any]:
    """Return the row to print."""
    plain = results["plain"]["seconds"]
    return {
        "batch": batch,
        "milliseconds": {side: round(1e3 * found["seconds"], 1) for side, found in results.items()},
        "images_per_second": {side: round(batch / found["seconds"], 1) for side, found in results.items()},
        "ratio": {side: round(plain / found["seconds"], 2) for side, found in results.items() if side != "plain"},
    }


def main() -> None:
    """Measure all networks."""
    parser = argparse.ArgumentParser()
    add_device(parser)
    parser.add_argument("--models", nargs="+", default=list(FAMILIES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-loop", action="store_true")
    parser.add_argument("--variants", nargs="*", default=[], choices=list(VARIANTS))
    parser.add_argument("--measure", nargs=6, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        what, side, model, folder, name, batch = arguments.measure
        measure = measure_step if what == "step" else measure_loop
        print(json.dumps(measure(side, model, Path(folder), torch.device(name), int(batch))))
        return
    device = choose_device(arguments.device)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        write_photographs(root, CLASSES, 80)
        speed = rates(device)
        steps: dict[str, Any] = {}
        for model in arguments.models:
            batch = batch_of(model, device)
            results = compare("step", ["plain", "ours", *arguments.variants], model, root, device, arguments.rounds)
            steps[model] = {
                **row(results, batch),
                "first_step_seconds": {side: round(found["first"], 1) for side, found in results.items()},
                **floors(model, batch, speed),
            }
        loops = {
            model: row(
                compare("loop", ["plain", "ours"], model, root, device, arguments.rounds), batch_of(model, device)
            )
            for model in LOOP
            if not arguments.no_loop and model in arguments.models
        }
    report(
        {
            **describe(device),
            **{name: round(value / 1e9, 1) for name, value in speed.items()},
            "unit_of_rates": "1e9",
            "step": steps,
            "loop": loops,
        }
    )


if __name__ == "__main__":
    main()
