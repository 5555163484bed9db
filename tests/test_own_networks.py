"""Files that know their network: `save_checkpoint({"model": model, …})`, and what the commands make of such files."""

import copy
import io
import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from shufflenet_mlflow import CheckpointWriter, create_model, load_checkpoint, read_checkpoint, save_checkpoint
from shufflenet_mlflow.checkpoints.glance import Glance, glance
from shufflenet_mlflow.checkpoints.verification import read_checkpoint as read_file
from shufflenet_mlflow.cli.tables import SHORT_ID
from shufflenet_mlflow.data.preprocess import Preprocess, preprocess_from
from shufflenet_mlflow.errors import CheckpointError, ConfigError
from shufflenet_mlflow.models.loaded import model_from_payload
from shufflenet_mlflow.models.recognition import Recognised, recognise
from tests.support.command_line import Invoke

NAME = "shufflenet_v2_x0_5"
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def saved(state: Any, **named: Any) -> dict[str, Any]:
    return read_file(save_checkpoint(state, 1, directory="saved", **named))


def weights(payload: dict[str, Any]) -> dict[str, Any]:
    return {key: payload[key] for key in ("state_dict", "ema_state_dict")}


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO(pickle.dumps(model))
    loaded: nn.Module = pickle.load(file)
    return loaded


@pytest.mark.parametrize("wrap", [nn.DataParallel, AveragedModel, copy.deepcopy, pickled, copy.copy])
def test_a_network_names_itself_in_what_it_is_saved_in(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = create_model(NAME, 7)
    assert not any("shufflenet" in key for key in model.state_dict())
    payload = saved({"model": wrap(model)})
    assert payload["model"] == {"name": NAME, "kwargs": {"num_classes": 7}}
    assert payload["state_dict"].keys() == model.state_dict().keys()
    loaded = model_from_payload(payload, "x")
    assert (loaded.num_classes, loaded.preprocess.mode, loaded.preprocess.input_size) == (7, "bgr255", 224)
    assert loaded.preprocess.reading.orientation == "stored"  # as torchvision's ImageFolder does


def test_everything_with_a_state_dict_is_saved_as_one() -> None:
    model = create_model(NAME, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=9)
    state = {"model": model, "optimizer": optimizer, "several": {"schedulers": [scheduler]}, "best": 0.5, "note": "x"}
    state["ema_state_dict"] = AveragedModel(model)
    payload = saved(state)
    assert payload["optimizer"] == optimizer.state_dict()
    assert payload["several"] == {"schedulers": [scheduler.state_dict()]}
    assert (payload["best"], payload["note"]) == (0.5, "x")
    assert payload["ema_state_dict"].keys() == model.state_dict().keys()
    again = saved(payload)
    assert {**again, "created_at": 0} == {**payload, "created_at": 0, **weights(again)}
    assert all(map(torch.equal, again["state_dict"].values(), payload["state_dict"].values()))
    model_from_payload(again, "x")  # `best` is the script's own


def test_the_network_may_stand_beside_its_weights() -> None:
    model = create_model(NAME, 3)
    payload = saved({"state_dict": model.state_dict()}, model=model, class_to_idx=["a", "b", "c"])
    assert payload["model"]["name"] == NAME and payload["class_to_idx"] == {"a": 0, "b": 1, "c": 2}
    with CheckpointWriter("saved") as writer:
        path = writer.save({"model": model, "class_to_idx": {"x": 2}, "preprocess": "rgb_256"}, 2)
    payload = read_checkpoint(path)
    assert (payload["class_to_idx"], payload["preprocess"]["mode"]) == ({"x": 2}, "rgb_256")
    assert "model" not in saved({"state_dict": model.state_dict()})
    assert "model" not in saved({"model": nn.Linear(2, 2)})


def test_the_number_of_classes_follows_from_the_weights() -> None:
    model = create_model("torchvision/shufflenet_v2_x0_5", 1000)
    model.fc = nn.Linear(1024, 37)
    assert saved({"model": model})["model"]["kwargs"] == {"num_classes": 37}


def test_arguments_of_a_network_are_in_its_files() -> None:
    payload = saved({"model": create_model("shufflenet_oneshot", 2, choices=(1,) * 20)})
    assert payload["model"]["kwargs"] == {"num_classes": 2, "choices": [1] * 20, "scales": [1.0] * 20}
    assert model_from_payload(payload, "x").spec.choices == (1,) * 20


def replace_head(model: Any) -> None:
    model.classifier = nn.Linear(1024, 5)


def replace_activation(model: Any) -> None:
    model.conv_last[2] = nn.GELU()


def drop_activation(model: Any) -> None:
    model.conv_last[2] = nn.Identity()


def take_grey_images(model: Any) -> None:
    model.first_conv[0] = nn.Conv2d(1, 24, 3, 2, 1, bias=False)


def keep_resolution(model: Any) -> None:
    model.first_conv[0].stride = (1, 1)


def add_a_layer(model: Any) -> None:
    model.classifier.append(nn.Softmax(1))


@pytest.mark.parametrize(
    "change",
    [replace_head, replace_activation, drop_activation, take_grey_images, keep_resolution, add_a_layer],
)
def test_a_changed_network_is_no_longer_named(
    change: Callable[[nn.Module], None], caplog: pytest.LogCaptureFixture
) -> None:
    model = create_model(NAME, 5)
    change(model)
    with caplog.at_level(logging.WARNING):
        assert "model" not in saved({"model": model})
        assert "preprocess" not in saved({"model": model})
    [warning] = [record.getMessage() for record in caplog.records]
    assert f"was made as {NAME} and has been changed" in warning


@pytest.mark.parametrize(
    "name", ["shufflenet_v1_x0_5_g3", "shufflenet_v2_plus_small", "torchvision/shufflenet_v2_x2_0"]
)
def test_every_network_is_recognised(name: str) -> None:
    """Also one whose batch normalisation was converted, and whose dropout was changed."""
    with torch.device("meta"):
        model = nn.SyncBatchNorm.convert_sync_batchnorm(create_model(name, 2))
    found = recognise(name, {}, model.state_dict(), model)
    assert isinstance(found, Recognised) and found.num_classes == 2


@pytest.mark.parametrize(
    ("state", "named", "message"),
    [
        (
            {"model": {"w": torch.zeros(2)}},
            {},
            r"'model' \(of type dict\) is no network; give the network itself, or its state dict",
        ),
        (
            {"model": "resnet", "state_dict": {}},
            {},
            r"'model' \(of type str\) is no network; give .* another name for this entry",
        ),
        ({"class_to_idx": {"a": 3}}, {}, "class_to_idx has the label 3, and the network 3 outputs"),
        ({}, {"class_to_idx": ["a", "a"]}, "names a class twice"),
        ({}, {"class_to_idx": ["a", "b"]}, "lists 2 names, and the network has 3 outputs"),
        ({}, {"class_to_idx": 3}, "class_to_idx is a int; give a dict"),
        ({}, {"class_to_idx": {"a": 0, "b": 0}}, "holds 'b': 0"),
        (
            {"model": {"name": "shufflenet_v1_x0_5_g3", "kwargs": {}}},
            {},
            "says shufflenet_v1_x0_5_g3, and its state_dict",
        ),
    ],
)
def test_states_that_are_refused(state: dict[str, Any], named: dict[str, Any], message: str) -> None:
    model = create_model(NAME, 3)
    own = {"state_dict": model.state_dict()} if "model" in state else {"model": model}
    with pytest.raises(CheckpointError, match=message):
        saved({**own, **state}, **named)


def test_two_networks_are_refused() -> None:
    with pytest.raises(ConfigError, match="two networks"):
        saved({"model": nn.Linear(2, 2)}, model=nn.Linear(2, 2))


# ---------------------------------------------------------------- the input


def test_the_input_can_be_described() -> None:
    model = create_model(NAME, 3, preprocess={**IMAGENET, "input_size": 64, "resize": 72})
    described = Preprocess.from_dict(saved({"model": model})["preprocess"])
    assert (described.input_size, described.resize_size, described.settings.channels) == (64, 72, "RGB")
    assert described.settings.mean == pytest.approx((123.675, 116.28, 103.53))
    assert preprocess_from(IMAGENET).mode == "rgb_256"
    assert (
        preprocess_from({"mean": [0, 0, 0], "std": [1 / 255] * 3, "channels": "BGR", "antialias": False}).mode
        == "bgr255"
    )
    own = preprocess_from({"mean": [0.5] * 3, "std": [0.25] * 3, "input_size": 96, "resize": 100, "decoding": "scaled"})
    assert Preprocess.from_dict(json.loads(json.dumps(own.to_dict()))) == own
    further = model_from_payload(saved({"model": model}), "x").module  # is saved with the same input
    assert saved({"model": further})["preprocess"] == described.to_dict()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("rgb", "there is no mode 'rgb'; there is bgr255"),
        (224, "is a int; give the name of a mode"),
        ({"mean": (123.7, 116.3, 103.5), "std": (1, 1, 1)}, "mean must be three numbers from 0 to 1, for images whose"),
        ({"mean": (0, 0, 0), "std": (0, 1, 1)}, "std must be three numbers above 0"),
        ({"std": (1, 1, 1)}, "neither a mode nor 'mean'"),
        ({"mode": "rgb_256", "mean": (0, 0, 0)}, "mean cannot stand beside the mode 'rgb_256'"),
        ({"mode": "rgb_256", "size": 224}, "unknown key 'size'"),
        ({"mode": "rgb_256", "input_size": 100}, "multiple of 32"),
        ({"mode": "rgb_256", "resize": 100}, "resize must be a whole number from 224 to 896 pixels"),
        ({**IMAGENET, "channels": "RGBA"}, "channels must be RGB or BGR"),
        ({**IMAGENET, "antialias": 1}, "antialias must be True or False"),
    ],
)
def test_inputs_that_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_model(NAME, 3, preprocess=given)


# ---------------------------------------------------------------- commands


def test_commands_need_no_model(images: Path, shufflenet: Invoke) -> None:
    model = create_model(NAME, 3, preprocess={"mode": "rgb_256", "input_size": 32})
    names = sorted(folder.name for folder in (images / "val").iterdir())
    path = save_checkpoint({"model": model, "config": "own.yaml"}, 1, class_to_idx=names)
    evaluated = shufflenet("eval", path, "--val-dir", images / "val", "--json")
    predicted = shufflenet("predict", path, images / "val" / names[0], "--json")
    assert json.loads(evaluated.stdout)["n"] == 15, evaluated.output
    assert {row["label"] for row in json.loads(predicted.stdout)} <= set(names)


def test_commands_say_that_they_need_a_network(images: Path, shufflenet: Invoke) -> None:
    path = save_checkpoint({"model": nn.Linear(2, 2)}, 1)
    for words in (("eval", path, "--val-dir", images / "val"), ("predict", path, images / "val"), ("export", path)):
        result = shufflenet(*words)
        assert result.exit_code == 2
        assert "needs one that `create_model` makes, or that a package registers" in result.output


def test_ls_says_whose_each_file_is_and_suggests_only_what_works(shufflenet: Invoke) -> None:
    model = create_model(NAME, 3)
    with mlflow.start_run() as first:
        save_checkpoint({"model": model}, 1, directory="shared")
    with mlflow.start_run() as second:
        save_checkpoint({"model": nn.Linear(2, 2)}, 2, directory="shared")
    result = shufflenet("checkpoints", "ls", "shared")
    lines = [line.split() for line in result.stdout.splitlines()]
    owners = {words[0]: words[-2] for words in lines if words and words[0] in ("1", "2")}
    assert owners == {"1": first.info.run_id[:SHORT_ID], "2": second.info.run_id[:SHORT_ID]}, result.output
    assert "shufflenet eval" not in result.output
    rows = {row["iters"]: row for row in json.loads(shufflenet("checkpoints", "ls", "shared", "--json").stdout)}
    assert {iters: row["network"] for iters, row in rows.items()} == {1: NAME, 2: None}
    result = shufflenet("checkpoints", "ls", first.info.run_id)
    assert f"shufflenet eval {first.info.run_id}" in result.output  # the run's tag says the network
    assert "shufflenet eval" not in shufflenet("checkpoints", "ls", second.info.run_id).output


def test_a_glance_at_strange_files(tmp_path: Path) -> None:
    for number, content in enumerate((b"", b"PK\x03\x04", pickle.dumps({"format_version": 1, "run_id": "x"}))):
        (tmp_path / str(number)).write_bytes(content)
        assert glance(tmp_path / str(number)) == Glance()
    torch.save({"format_version": 1, "run_id": 3, "model": "x"}, tmp_path / "a")
    torch.save({"run_id": "x", "model": {"name": "y"}}, tmp_path / "b")
    torch.save([1], tmp_path / "c")
    assert {glance(tmp_path / name) for name in "abc"} == {Glance()}


class Holder(nn.Module):
    """A network with a part called `module`, as wrappers call what they wrap."""

    def __init__(self, *, more: bool) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)
        if more:
            self.weight = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize("more", [False, True])
@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel])
def test_a_part_called_module_keeps_its_name(more: bool, wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = Holder(more=more)
    payload = saved({"model": wrap(model)})
    again = Holder(more=more)
    again.load_state_dict(payload["state_dict"])
    assert torch.equal(again.module.weight, model.module.weight)
    for other in (Holder(more=more), nn.DataParallel(Holder(more=more))):
        load_checkpoint(other, payload)
        assert torch.equal(list(other.state_dict().values())[-1], list(model.state_dict().values())[-1])
    from_weights = saved({"state_dict": nn.DataParallel(model).state_dict()})
    load_checkpoint(again, from_weights)


def test_an_average_of_weights_is_loaded_as_one() -> None:
    model = create_model(NAME, 3)
    average = AveragedModel(model)
    average.update_parameters(model)
    for state in ({"model": average}, {"state_dict": average.state_dict()}):
        payload = saved(state)
        again = AveragedModel(create_model(NAME, 3))
        load_checkpoint(again, payload)
        assert all(map(torch.equal, again.module.state_dict().values(), model.state_dict().values()))
        assert again.n_averaged == 1
        load_checkpoint(create_model(NAME, 3), payload)


def test_what_a_module_keeps_beside_its_tensors() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.seen = nn.Linear(2, 2), {"images": 0}

        def get_extra_state(self) -> dict[str, int]:
            return self.seen

        def set_extra_state(self, state: dict[str, int]) -> None:
            self.seen = state

    model = Counting()
    model.seen = {"images": 7}
    again = Counting()
    load_checkpoint(again, saved({"model": model}))
    assert again.seen == {"images": 7}


class Kind(torch.Tensor):
    """A tensor of a class of its own."""


def test_tensors_of_other_classes_are_refused_before_they_are_written(tmp_path: Path) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(2).as_subclass(Kind))

    for state in ({"model": Network()}, {"state_dict": {}, "seen": [torch.ones(2).as_subclass(Kind)]}):
        with pytest.raises(CheckpointError, match=r"\['w'\]|\['seen'\]\[0\]") as refused:
            save_checkpoint(state, 1, directory=tmp_path / "none")
        assert "is a tests.test_own_networks.Kind, which is more than a tensor" in str(refused.value)
    assert not (tmp_path / "none").exists()
