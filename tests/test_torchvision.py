"""torchvision's networks: an independent reference for ours, and networks to train."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import get_model

from shufflenet_mlflow import create_model, list_models
from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.data.decode import Picture
from shufflenet_mlflow.data.preprocess import Preprocess, ToInput, eval_transform
from shufflenet_mlflow.errors import CheckpointError, CorruptCheckpointError, ModelError
from shufflenet_mlflow.models.catalog import VARIANTS
from shufflenet_mlflow.models.torchvision_v2 import published_weights, weights_file
from tests.support.command_line import Invoke, small_options

NAMES = [name for name in list_models() if name.startswith("torchvision/")]
X0_5 = "torchvision/shufflenet_v2_x0_5"

# ---------------------------------------------------------------- as a reference
#
# Both put an identity half and a branch half together. torchvision interleaves the two and lets the next unit take
# the first half of all channels as its identity; here they stand one behind the other and the next unit takes the
# even channels. A channel survives as identity for as many units as its place can be halved here, or doubled there:
# that must agree, and is all that must.


def life_here(place: int) -> int:
    """Return how many units a channel passes unchanged: how often its index can be halved."""
    return 99 if place == 0 else (place & -place).bit_length() - 1


def life_there(place: int, channels: int) -> int:
    """Return how many units a channel passes unchanged: how often its index can be doubled within the first half."""
    life = 0
    while place < channels // 2 and life < 99:
        place, life = 2 * place, life + 1
    return life


def pair(here: list[int], there: list[int], channels: int) -> dict[int, int]:
    """Places here -> places there of equal life."""
    one = sorted(here, key=lambda place: (life_here(place), place))
    other = sorted(there, key=lambda place: (life_there(place, channels), place))
    for mine, theirs in zip(one, other, strict=True):
        assert life_here(mine) == life_there(theirs, channels)
    return dict(zip(one, other, strict=True))


def copy_norm(to: nn.Module, of: nn.Module, channels: list[int]) -> None:
    for key, tensor in to.state_dict().items():
        source = of.state_dict()[key]
        tensor.copy_(source[channels] if tensor.dim() else source)


def copy_conv(to: nn.Module, of: nn.Module, out: list[int], inputs: list[int]) -> None:
    to.weight.data.copy_(of.weight.data[out][:, inputs])


def copy_depthwise(to: nn.Module, of: nn.Module, channels: list[int]) -> None:
    to.weight.data.copy_(of.weight.data[channels])


def copy_unit(unit: nn.Module, other: nn.Module, places: dict[int, int]) -> dict[int, int]:
    """Make `unit` compute what torchvision's `other` does.

    Args:
        places: of the input's channels, here -> there.

    Returns:
        Places of the output's channels.
    """
    inputs = [places[place] for place in range(len(places))]
    here, there = unit.branch_main, other.branch2
    half = there[5].out_channels
    channels = 2 * half
    mid = list(range(half))
    if unit.branch_proj is not None:
        out = pair(list(range(half)), list(range(0, channels, 2)), channels)
        projected = [out[place] // 2 for place in range(half)]
        copy_depthwise(unit.branch_proj[0], other.branch1[0], inputs)
        copy_norm(unit.branch_proj[1], other.branch1[1], inputs)
        copy_conv(unit.branch_proj[2], other.branch1[2], projected, inputs)
        copy_norm(unit.branch_proj[3], other.branch1[3], projected)
        branch_inputs = inputs
    else:
        out = {place: 2 * inputs[2 * place] for place in range(half)}
        branch_inputs = [place - half for place in inputs[1::2]]
        assert min(branch_inputs) == 0
    out |= pair(list(range(half, channels)), list(range(1, channels, 2)), channels)
    outputs = [out[place] // 2 for place in range(half, channels)]
    copy_conv(here[0], there[0], mid, branch_inputs)
    copy_norm(here[1], there[1], mid)
    copy_depthwise(here[3], there[3], mid)
    copy_norm(here[4], there[4], mid)
    copy_conv(here[5], there[5], outputs, mid)
    copy_norm(here[6], there[6], outputs)
    return out


def randomised(name: str) -> nn.Module:
    """Return torchvision's network with weights and statistics that keep features at one scale."""
    torch.manual_seed(0)
    model = get_model(name, weights=None).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def units_of(model: nn.Module) -> list[nn.Module]:
    return [*model.stage2, *model.stage3, *model.stage4]


@torch.no_grad()
def test_x0_5_computes_what_torchvisions_does() -> None:
    other, model = randomised("shufflenet_v2_x0_5"), create_model("shufflenet_v2_x0_5").eval()
    copy_conv(model.first_conv[0], other.conv1[0], list(range(24)), [0, 1, 2])
    copy_norm(model.first_conv[1], other.conv1[1], list(range(24)))
    places = {place: place for place in range(24)}
    for unit, other_unit in zip(model.features, units_of(other), strict=True):
        places = copy_unit(unit, other_unit, places)
    copy_last(model, other, places)
    images = torch.randn(2, 3, 96, 96)
    expected = other(images) - other.fc.bias
    logits = model(images)
    assert logits.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * expected.std().item())


def copy_last(model: nn.Module, other: nn.Module, places: dict[int, int]) -> None:
    inputs = [places[place] for place in range(len(places))]
    out = list(range(1024))
    copy_conv(model.conv_last[0], other.conv5[0], out, inputs)
    copy_norm(model.conv_last[1], other.conv5[1], out)
    model.classifier[0].weight.data.copy_(other.fc.weight.data)


@torch.no_grad()
def test_x1_0_computes_what_torchvisions_does_behind_its_first_unit() -> None:
    """The first unit differs: its projection keeps the 24 input channels here, and widens them to 58 there."""
    other, model = randomised("shufflenet_v2_x1_0"), create_model("shufflenet_v2_x1_0").eval()
    places = pair(list(range(116)), list(range(116)), 116)
    features = torch.randn(2, 116, 12, 12)
    inputs: Tensor = features[:, [places[place] for place in range(116)]]
    first, *units = units_of(other)
    assert first.branch1[2].out_channels == 58
    assert model.features[0].branch_proj[2].out_channels == 24
    for unit, other_unit in zip(model.features[1:], units, strict=True):
        places = copy_unit(unit, other_unit, places)
    copy_last(model, other, places)
    expected = other.conv5(nn.Sequential(*units)(features))
    found = model.conv_last(model.features[1:](inputs))
    assert found.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.std().item())


# ---------------------------------------------------------------- preprocessing and published figures


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(300, 400), (401, 287), (224, 500), (60, 90)])
def test_preprocessing_is_that_of_the_weights(name: str, shape: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    preprocess = Preprocess(VARIANTS[name].preprocess, 224)
    x = ToInput(preprocess, torch.device("cpu"))(eval_transform(preprocess)(Picture(np.asarray(image).copy()))[None])[0]
    expected = published_weights(name).transforms()(image)
    one_level = 1 / (255 * 0.224)  # of 255, after the division by the smallest standard deviation
    torch.testing.assert_close(x, expected, rtol=0, atol=one_level + 1e-5)
    assert (x - expected).abs().gt(1e-5).float().mean() < 0.05


@pytest.mark.parametrize("name", NAMES)
def test_the_table_has_the_figures_of_the_weights(name: str) -> None:
    meta = published_weights(name).meta
    metrics = meta["_metrics"]["ImageNet-1K"]
    variant = VARIANTS[name]
    assert variant.top1_error == pytest.approx(100 - metrics["acc@1"], abs=0.01)
    assert variant.top5_error == pytest.approx(100 - metrics["acc@5"], abs=0.01)
    assert variant.parameters == meta["num_params"]


# ---------------------------------------------------------------- published weights


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give torch.hub an empty cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


def place_weights(hub: Path) -> dict[str, Tensor]:
    """Write a state dict where torch.hub caches the published one."""
    torch.manual_seed(1)
    state_dict = get_model("shufflenet_v2_x0_5", weights=None).state_dict()
    assert weights_file(X0_5).parent == hub
    hub.mkdir(parents=True)
    torch.save(state_dict, weights_file(X0_5))
    return state_dict


def test_published_weights_come_from_the_cache(hub: Path) -> None:
    state_dict = place_weights(hub)
    model = create_model(X0_5, pretrained=True)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state_dict[key]), key
    narrow = create_model(X0_5, 3, pretrained=True).state_dict()
    assert narrow["fc.weight"].shape == (3, 1024)
    assert torch.equal(narrow["conv5.0.weight"], state_dict["conv5.0.weight"])


def test_training_begins_with_published_weights(hub: Path, images: Path, shufflenet: Invoke) -> None:
    state_dict = place_weights(hub)
    result = shufflenet(
        "train", *small_options(images), "--model", X0_5, "--pretrained", "--total-iters", 1, "--lr", 1e-9, "--json"
    )
    assert result.exit_code == 0, result.output
    payload = read_checkpoint(Path(json.loads(result.stdout)["save_dir"]) / "checkpoint-000001.pth.tar")
    assert payload["config"]["pretrained"] is True
    assert payload["preprocess"] == Preprocess("rgb_256", 32).to_dict()
    torch.testing.assert_close(payload["state_dict"]["conv5.0.weight"], state_dict["conv5.0.weight"], atol=1e-6, rtol=0)


def test_a_failed_download_is_one_line(
    hub: Path, images: Path, shufflenet: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_arguments: object, **_options: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    result = shufflenet("train", *small_options(images), "--model", X0_5, "--pretrained")
    assert result.exit_code == 1
    assert f"Error: the published weights of {X0_5} could not be downloaded (no route to host); " in result.stderr
    assert f"put a copy of shufflenetv2_x0.5-f707e7126e.pth into '{hub}'" in result.stderr
    assert "Traceback" not in result.output
    assert not Path("models").exists()


class AnyAnswer(BaseHTTPRequestHandler):
    """A server that gives one answer to every request."""

    content = b""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[AnyAnswer]]:
    """Send torch.hub's requests to a local server, whatever their address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), AnyAnswer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}/weights"
    monkeypatch.setattr(torch.hub, "urlopen", lambda *_arguments, **_options: urlopen(address))
    yield AnyAnswer
    server.shutdown()
    thread.join()
    server.server_close()


def test_downloads_are_verified(
    hub: Path, answer: type[AnyAnswer], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer, "content", b"something else")
    with pytest.raises(CheckpointError, match=r"could not be downloaded \(invalid hash value"):
        create_model(X0_5, pretrained=True)
    assert not weights_file(X0_5).exists()
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Downloading" in printed.err


def test_a_damaged_cache_is_named(hub: Path) -> None:
    place_weights(hub)
    path = weights_file(X0_5)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=r"f707e7126e.pth' is corrupt: .* remove the file to download"):
        create_model(X0_5, pretrained=True)


def test_a_cache_that_is_not_what_is_published_is_mentioned(hub: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The old pickle format holds no checksums: only the hash in the file's name can tell."""
    state_dict = place_weights(hub)
    torch.save(state_dict, weights_file(X0_5), _use_new_zipfile_serialization=False)
    create_model(X0_5, pretrained=True)
    [line] = [message for message in caplog.messages if "is not the file that torchvision publishes" in message]
    assert weights_file(X0_5).name in line


@pytest.mark.parametrize("content", [[1, 2], "text", 5])
def test_a_cache_without_weights_is_named(content: object, hub: Path) -> None:
    place_weights(hub)
    torch.save(content, weights_file(X0_5))
    with pytest.raises(CheckpointError, match="remove the file to download it again"):
        create_model(X0_5, pretrained=True)


def test_other_networks_have_no_published_weights_to_fetch(images: Path, shufflenet: Invoke) -> None:
    with pytest.raises(ModelError, match="no published weights of shufflenet_v2_x0_5 to download"):
        create_model("shufflenet_v2_x0_5", pretrained=True)
    result = shufflenet("train", *small_options(images), "--model", "shufflenet_v2_x0_5", "--pretrained")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
