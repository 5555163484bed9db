"""Devices and memory formats of networks."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from shufflenet_mlflow import create_model
from shufflenet_mlflow.config import RunConfig
from shufflenet_mlflow.models.fuse_bn import fuse_bn
from shufflenet_mlflow.runtime import devices
from shufflenet_mlflow.runtime.devices import choose_device, memory_format_on, move_images, move_model, repeat_exactly
from shufflenet_mlflow.training.optimizer import make_optimizer, make_scheduler
from shufflenet_mlflow.training.state import TrainingState

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

CONFIG = RunConfig(
    model="shufflenet_v2_x0_5",
    choices=None,
    scales=None,
    init_from=None,
    pretrained=False,
    mean_image=None,
    augment="none",
    on_bad_image="fail",
    train_dir=None,
    val_dir=None,
    num_classes=3,
    input_size=32,
    batch_size=4,
    total_iters=100,
    lr=0.01,
    momentum=0.9,
    weight_decay=0.01,
    label_smooth=0.0,
    seed=0,
    workers=0,
    device="cpu",
    display_interval=1,
    val_interval=1,
    save_interval=1,
)


def test_networks_and_images_are_placed_alike() -> None:
    model = move_model(create_model("shufflenet_v2_x0_5", num_classes=3), CPU)
    assert model.first_conv[0].weight.is_contiguous(memory_format=torch.channels_last)
    images = move_images(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), CPU)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert memory_format_on(torch.device("mps")) == torch.contiguous_format


@pytest.mark.parametrize(
    ("limit", "expected"), [("max 100000", 8), ("200000 100000", 2), ("50000 100000", 1), ("?", 8)]
)
def test_cores_are_those_that_the_process_may_use(
    limit: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _process: range(8), raising=False)
    (tmp_path / "cpu.max").write_text(limit)
    monkeypatch.setattr(devices, "_QUOTA", tmp_path / "cpu.max")
    assert devices.usable_cores() == expected
    monkeypatch.setattr(devices, "_QUOTA", tmp_path / "nowhere")
    assert devices.usable_cores() == 8


def test_auto_is_an_existing_device() -> None:
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def train(fused: bool, between: Callable[[TrainingState], TrainingState] = lambda state: state) -> TrainingState:
    """Train for four steps, with a hook after two of them that may replace the state."""
    state = fresh_state(fused)
    generator = torch.Generator().manual_seed(1)
    for iteration in range(4):
        images = move_images(torch.randn(4, 3, 32, 32, generator=generator), CPU)
        state.optimizer.zero_grad()
        state.backward(state.model(images).logsumexp(1).sum())
        state.step()
        if iteration == 1:
            state = between(state)
    return state


def fresh_state(fused: bool) -> TrainingState:
    torch.manual_seed(0)
    model = move_model(create_model("shufflenet_v2_x0_5", num_classes=3), CPU)
    optimizer = make_optimizer(model, lr=0.01, momentum=0.9, weight_decay=0.01, fused=fused)
    return TrainingState(model, optimizer, make_scheduler(optimizer, 100), CPU)


def test_a_fused_step_is_the_same_step() -> None:
    for one, two in zip(train(True).model.parameters(), train(False).model.parameters(), strict=True):
        torch.testing.assert_close(one, two)


def test_momentum_lies_in_memory_as_its_weights_do_also_after_loading() -> None:
    """PyTorch's fused SGD walks both in memory order: two layouts would mix up the weights."""

    def through_a_checkpoint(state: TrainingState) -> TrainingState:
        payload = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone().contiguous(), state.state_dict())
        other = fresh_state(True)
        other.load_state_dict({**payload, "iters": state.iters})
        return other

    undisturbed, resumed = train(True), train(True, through_a_checkpoint)
    for state in (undisturbed, resumed):
        for parameter in state.model.parameters():
            assert parameter.grad is not None
            momentum = state.optimizer.state[parameter]["momentum_buffer"]
            assert parameter.stride() == parameter.grad.stride() == momentum.stride()
        assert all(group["fused"] for group in state.optimizer.param_groups)
    for one, two in zip(undisturbed.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    "name",
    ["shufflenet_v1_x0_5_g3", "shufflenet_v2_plus_small", "detnas_voc_fpn_300m", "torchvision/shufflenet_v2_x0_5"],
)
def test_folded_networks_compute_the_same(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name, num_classes=5).double()
    images = torch.randn(8, 3, 64, 64, dtype=torch.float64)
    for _ in range(3):
        model(images)  # running statistics that are not those of a fresh network
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    network = fuse_bn(model)
    assert not [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.inference_mode():
        found = network(images)
        assert model.training  # untouched
        torch.testing.assert_close(found, model.eval()(images), rtol=1e-9, atol=1e-12)
    assert found.std() > 1e-6
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


MEASURE = """
import resource, torch
from shufflenet_mlflow.runtime.devices import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def settled():
    for _ in range(20):
        faults()
    return sum(faults() for _ in range(5))
print(settled())
keep_freed_memory(torch.device("cpu"))
print(settled())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_is_reused() -> None:
    ran = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    returned, kept = map(int, ran.stdout.split())
    assert kept < 1000
    assert returned > 40_000  # 40 MB in pages of 4 KiB, five times: the measurement notices it


def test_training_on_a_gpu_uses_repeatable_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    repeat_exactly(CPU)
    assert not torch.backends.cudnn.deterministic
    asked: list[torch.device] = []
    monkeypatch.setattr("shufflenet_mlflow.training.state.repeat_exactly", asked.append)
    TrainingState.of(CONFIG, create_model("shufflenet_v2_x0_5", num_classes=3), CPU, 10)
    assert asked == [CPU]
    repeat_exactly(CUDA)
    assert torch.backends.cudnn.deterministic


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_training_on_a_gpu_is_equal_bit_for_bit() -> None:
    def weights() -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = move_model(create_model("shufflenet_v2_x0_5", num_classes=3), CUDA)
        state = TrainingState.of(CONFIG, model, CUDA, 10)
        generator = torch.Generator().manual_seed(1)
        for _ in range(20):
            images = move_images(torch.randn(64, 3, 64, 64, generator=generator), CUDA)
            state.optimizer.zero_grad()
            state.backward(state.model(images).logsumexp(1).sum())
            state.step()
        return list(model.parameters())

    assert all(torch.equal(one, two) for one, two in zip(weights(), weights(), strict=True))
