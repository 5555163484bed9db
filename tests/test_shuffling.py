"""Channel shuffling and splitting: values and gradients of the plain operations, in the memory format of the input."""

import copy

import pytest
import torch
from torch import Tensor, nn

from shufflenet_mlflow import create_model
from shufflenet_mlflow.models.shuffling import channel_shuffle, split_even_odd

FORMATS = [torch.contiguous_format, torch.channels_last]


def pixels(channels: int, memory_format: torch.memory_format, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, channels, 5, 4, generator=generator).contiguous(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("used", ["both", "even", "odd"])
def test_even_odd_split(memory_format: torch.memory_format, used: str) -> None:
    found, plain = (pixels(8, memory_format).requires_grad_() for _ in range(2))
    halves, expected = split_even_odd(found), (plain[:, 0::2], plain[:, 1::2])
    for half, other in zip(halves, expected, strict=True):
        assert torch.equal(half, other)
    weights = [pixels(4, memory_format, seed) * (used in ("both", name)) for seed, name in ((1, "even"), (2, "odd"))]
    for pair in (halves, expected):
        sum((half * weight).sum() for half, weight in zip(pair, weights, strict=True)).backward()
    assert found.grad is not None
    assert plain.grad is not None
    assert torch.equal(found.grad, plain.grad)
    assert found.grad.abs().sum() > 0
    assert halves[1].is_contiguous(memory_format=memory_format)
    assert found.grad.is_contiguous(memory_format=memory_format)


def test_without_gradients_the_split_copies_nothing() -> None:
    x = pixels(8, torch.channels_last).requires_grad_()
    with torch.no_grad():
        assert [half.data_ptr() - x.data_ptr() for half in split_even_odd(x)] == [0, x.element_size()]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_channel_shuffle(memory_format: torch.memory_format, device: str) -> None:
    x = pixels(12, memory_format).to(device).requires_grad_()
    shuffled = channel_shuffle(x, 3)
    gradient = pixels(12, memory_format, 1).to(device)
    shuffled.backward(gradient)
    assert x.grad is not None
    for tensor in (shuffled, x.grad):
        assert tensor.shape == x.shape
        assert tensor.is_contiguous(memory_format=memory_format)
    if device == "cpu":
        shuffle = nn.ChannelShuffle(3)
        assert torch.equal(shuffled, shuffle(x))
        assert torch.equal(shuffle(x.grad), gradient)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_other_devices_shuffle_the_same(memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    x = pixels(12, memory_format)
    expected = channel_shuffle(x, 4)
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)  # takes the way of every device but the CPU
    assert torch.equal(channel_shuffle(x, 4), expected)


@pytest.mark.parametrize(
    "name",
    ["shufflenet_v1_x0_5_g3", "shufflenet_v2_x0_5", "shufflenet_v2_plus_small", "torchvision/shufflenet_v2_x0_5"],
)
def test_training_in_channels_last_changes_rounding_only(name: str) -> None:
    torch.manual_seed(0)
    plain = create_model(name, num_classes=5).double()
    other = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    for model, images in ((plain, x), (other, x.contiguous(memory_format=torch.channels_last))):
        torch.manual_seed(1)  # for dropout
        model(images).logsumexp(1).sum().backward()
    gradients = [[parameter.grad for parameter in model.parameters()] for model in (plain, other)]
    largest = max(gradient.abs().max().item() for gradient in gradients[0] if gradient is not None)
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-6, atol=1e-9 * largest)


@pytest.mark.parametrize("name", ["shufflenet_v1_x0_5_g3", "shufflenet_v2_x0_5", "torchvision/shufflenet_v2_x0_5"])
def test_no_activation_leaves_the_channels_last_format(name: str) -> None:
    model = create_model(name, num_classes=5).to(memory_format=torch.channels_last)
    others: list[str] = []

    def look(module: nn.Module, _inputs: object, output: Tensor) -> None:
        if output.dim() == 4 and not output.is_contiguous(memory_format=torch.channels_last):
            others.append(type(module).__name__)

    for module in model.modules():
        module.register_forward_hook(look)
    images = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    model(images)
    model.eval()
    with torch.inference_mode():
        model(images)
    assert not others
