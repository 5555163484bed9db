"""Exported programs, logged models, promotion: equal to the checkpoint, and created once."""

import ast
import base64
import io
import json
import re
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient, pyfunc
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import ENDPOINT_NOT_FOUND
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from PIL import Image
from torch import nn

from shufflenet_mlflow import create_model, list_models
from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.data.decode import CentreCrop, decode, open_picture
from shufflenet_mlflow.data.formats import UnreadableImageError
from shufflenet_mlflow.data.preprocess import Preprocess, ToInput, eval_transform
from shufflenet_mlflow.data.reading import READING_0_1, Reading
from shufflenet_mlflow.errors import ExportError, RefusedError, TrackingError
from shufflenet_mlflow.evaluation.ranking import rank
from shufflenet_mlflow.export import LogModels, export_file, files, log_model, program
from shufflenet_mlflow.export.logged import find_logged_model, write_model
from shufflenet_mlflow.export.program import Exporter, check_equal, example_pixels, export_program
from shufflenet_mlflow.export.requests import image_bytes
from shufflenet_mlflow.export.serving import Classifier
from shufflenet_mlflow.export.weights import sha256_of_program
from shufflenet_mlflow.models import shufflenet_v2
from shufflenet_mlflow.models.cost import _count
from shufflenet_mlflow.models.loaded import LoadedModel, choose_preprocess
from shufflenet_mlflow.models.recognition import _expected
from shufflenet_mlflow.models.spec import ModelSpec, _body
from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.tracking.names import MODEL_SHA256_TAG
from shufflenet_mlflow.tracking.target import RunTarget, manifest_in_tag
from shufflenet_mlflow.workflows.sync import run_sync
from tests.support.command_line import Invoke
from tests.support.effort import cases
from tests.support.training import Reporter, run

X0_5_OF_TORCHVISION = "torchvision/shufflenet_v2_x0_5"

SMALL = (
    "shufflenet_v2_x0_5",
    *(pytest.param(name, marks=pytest.mark.long) for name in ("shufflenet_v1_x0_5_g3", X0_5_OF_TORCHVISION)),
)


@contextmanager
def short_networks() -> Iterator[None]:
    """Shorten V2 to two units per stage, one of each kind: exporting all sixteen takes four times as long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shufflenet_v2, "STAGE_UNITS", (2, 2, 2))
        forget_networks()
        yield
    forget_networks()


def forget_networks() -> None:
    """Clear what is cached by name: it would belong to another network."""
    for kept in (_body, _count, _expected):
        kept.cache_clear()


@pytest.fixture(autouse=True)
def _short(request: pytest.FixtureRequest) -> Iterator[None]:
    """Shorten networks in fast tests; long ones use whole networks."""
    with nullcontext() if request.node.get_closest_marker("long") else short_networks():
        yield


def network(name: str = "shufflenet_v2_x0_5") -> LoadedModel:
    torch.manual_seed(0)
    spec = ModelSpec(name)
    model = spec.build(3).eval()
    names = {f"class {index}": index for index in range(3)}
    return LoadedModel(model, spec, 3, choose_preprocess(spec, 32), names)


def png(seed: int = 0, size: tuple[int, int] = (40, 50)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


# ---------------------------------------------------------------- programs


@pytest.mark.parametrize("name", SMALL)
def test_pt2_is_equal_bit_for_bit(name: str, tmp_path: Path) -> None:
    ours = network(name)
    assert export_file(ours, tmp_path / "net.pt2", "pt2").difference == 0
    extra = {"classifier.json": ""}
    program = torch.export.load(tmp_path / "net.pt2", extra_files=extra).module()
    settings = json.loads(extra["classifier.json"])
    assert settings["labels"] == ["class 0", "class 1", "class 2"]
    assert program(example_pixels(ours, 7)).shape == (7, 3)


def test_networks_that_differ_in_weights_share_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    exports = []
    monkeypatch.setattr(program, "export_program", lambda made: (exports.append(made), export_program(made))[1])
    first, second, wider = network("shufflenet_v2_x0_5"), network("shufflenet_v2_x0_5"), network("shufflenet_v2_x1_0")
    with torch.no_grad():
        for tensor in second.module.state_dict().values():
            tensor.add_(tensor.new_tensor(1) if not tensor.is_floating_point() else 0.01)
    export, pixels = Exporter(), example_pixels(first, 3)
    for made in (first, second, wider, second):
        shared, apart = export(made), export_program(made)
        assert sha256_of_program(shared) == sha256_of_program(apart)
        assert torch.equal(shared.module()(pixels), apart.module()(pixels))
    assert exports == [first, wider, second]
    means = [torch.full((3, 32, 32), value) for value in (1.0, 99.0)]
    with_mean = [replace(second, preprocess=Preprocess("bgr255_mean", 32, mean_image)) for mean_image in means]
    export = Exporter()
    answers = [export(made).module()(pixels) for made in with_mean]
    assert not torch.equal(*answers)


OF_EACH_FAMILY = ("shufflenet_v1_x0_5_g8", "shufflenet_oneshot", "shufflenet_v2_plus_small", "detnas_coco_fpn_300m")
GIANTS = ("shufflenet_v2_large", "shufflenet_v2_exlarge")
OTHERS = [name for name in list_models() if name not in (*OF_EACH_FAMILY, *GIANTS)]


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, form) for name in cases(OF_EACH_FAMILY, ci=2) for form in ("pt2", "onnx")),
        *((name, "pt2") for name in cases(OTHERS, ci=0)),
    ],
)
def test_every_network_can_be_exported(name: str, form: str, tmp_path: Path) -> None:
    """The two giants are left out: they have the same blocks."""
    assert export_file(network(name), tmp_path / f"net.{form}", form).difference <= 1e-4


@pytest.mark.long
def test_onnx_takes_any_number_of_images(tmp_path: Path) -> None:
    ours = network()
    assert export_file(ours, tmp_path / "net.onnx", "onnx").difference <= 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
    settings = json.loads(session.get_modelmeta().custom_metadata_map["classifier.json"])
    assert settings["labels"] == ours.labels
    for images in (1, 3):
        [logits] = session.run(["logits"], {"images": example_pixels(ours, images).numpy()})
        assert logits.shape == (images, 3)


def test_a_mean_image_is_in_the_program(tmp_path: Path) -> None:
    mean = torch.rand(3, 32, 32) * 255
    ours = network()
    with_mean = replace(ours, preprocess=Preprocess("bgr255_mean", 32, mean))
    assert export_file(with_mean, tmp_path / "net.pt2", "pt2").difference == 0
    program = torch.export.load(tmp_path / "net.pt2").module()
    pixels = example_pixels(ours)
    inputs = (pixels.float() - mean).contiguous(memory_format=torch.channels_last)
    assert torch.equal(program(pixels), ours.module(inputs))


def test_a_program_that_differs_is_no_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = network()
    with pytest.raises(ExportError, match=r"differs from the checkpoint by .* \(> 0.0001\)"):
        check_equal(ours, lambda pixels: ours.module(pixels.float() * 1.01), "the test's program")
    with pytest.raises(ExportError, match="differs"):
        check_equal(ours, lambda pixels: ours.module(pixels.float()) * float("nan"), "the test's program")
    other = network()
    nn.init.ones_(next(other.module.parameters()))
    monkeypatch.setitem(
        files.FORMATS, "pt2", (lambda _, path, settings: files.write_pt2(other, path, settings), files.load_pt2)
    )
    with pytest.raises(ExportError, match="differs"):
        export_file(ours, tmp_path / "net.pt2", "pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(
        ExportError, match=r"format onnx needs the package onnx; pip install 'shufflenet-mlflow\[export\]'"
    ):
        export_file(network(), tmp_path / "net.onnx", "onnx")


def test_a_name_too_long_for_its_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(files.FORMATS, "pt2", (lambda _, path, _settings: path.write_bytes(b""), files.load_pt2))
    with pytest.raises(ExportError, match="File name too long; --output names another file"):
        export_file(network(), tmp_path / ("x" * 250), "pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["mlflow", *(pytest.param(form, marks=pytest.mark.long) for form in ("pt2", "onnx"))])
def test_a_checkpoint_of_the_release(form: str, tmp_path: Path, shufflenet: Invoke) -> None:
    """The file names neither network nor classes, and belongs to no run."""
    model = create_model("shufflenet_v2_x0_5", 4)
    torch.save({"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, "old.pth.tar")
    target = tmp_path / f"out{files.SUFFIXES.get(form, '')}"
    words = ["export", "old.pth.tar", "--format", form, "--input-size", 32, "--output", target]
    result = shufflenet(*words)
    assert result.exit_code == 2
    assert "it fits --model" in result.output
    result = shufflenet(*words, "--model", "shufflenet_v2_x0_5", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["classes"], document["tolerance"]) == (["0", "1", "2", "3"], 1e-4)
    assert target.exists()
    result = shufflenet("checkpoints", "promote", "old.pth.tar", "--name", "old")
    assert result.exit_code == 1
    assert "belongs to no run" in result.output
    assert "--format mlflow" in result.output


def test_output_that_cannot_be_written(tmp_path: Path, shufflenet: Invoke) -> None:
    torch.save({"state_dict": create_model("shufflenet_v2_x0_5", 4).state_dict()}, "old.pth.tar")
    words = ["export", "old.pth.tar", "--model", "shufflenet_v2_x0_5", "--input-size", 32]
    result = shufflenet(*words, "--output", tmp_path / "nowhere" / "x.pt2")
    assert (result.exit_code, result.output.count("\n")) == (1, 1)
    assert "its folder does not exist" in result.output
    (tmp_path / "there").mkdir()
    for target, expected in ((tmp_path / "there", "is a folder"), ("/proc/x.pt2", "cannot write '/proc/x.pt2'")):
        result = shufflenet(*words, "--output", target)
        assert (result.exit_code, result.output.count("\n")) == (1, 1), result.output
        assert expected in result.output
    result = shufflenet(*words, "--format", "mlflow", "--output", tmp_path / "there")
    assert result.exit_code == 1
    assert "exists already" in result.output
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    for form in ("pt2", "onnx", "openvino"):
        result = shufflenet(*words, "--format", form, "--output", notes)
        assert result.exit_code == 1
        assert f"must end in {files.SUFFIXES[form]}" in result.output
    assert notes.read_text() == "mine"


# ---------------------------------------------------------------- the model that MLflow runs


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the files of a logged model of `network()`; tests share them, so they only read."""
    folder = tmp_path_factory.mktemp("written") / "model"
    with short_networks():
        write_model(network(), folder)
    return folder


def test_the_logged_model_asks_for_what_its_code_imports(written: Path) -> None:
    tree = ast.parse((written / "classifier.py").read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    owners = packages_distributions()
    tops = {module.split(".")[0] for module in modules}
    needed = {top: {owner.lower().replace("_", "-") for owner in owners[top]} for top in tops if top in owners}
    required = {re.split("[=<>]", line)[0] for line in (written / "requirements.txt").read_text().split()}
    assert needed.pop("onnxruntime")  # of exported .onnx files only, which ask for it
    assert all(names & required for names in needed.values()), needed
    assert {"simplejpeg", "cv2", "PIL", "torch"} <= needed.keys()


def test_the_logged_code_needs_nothing_of_this_package(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs no permission to unpickle either."""
    code = (written / "classifier.py").read_text()
    assert "from shufflenet_mlflow" not in code
    assert "import shufflenet_mlflow" not in code
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    for name in [name for name in sys.modules if name.split(".")[0] == "shufflenet_mlflow"]:
        monkeypatch.setitem(sys.modules, name, None)
    served = pyfunc.load_model(str(written))
    answers = served.predict(pd.DataFrame({"image": [png(seed) for seed in range(70)]}))
    assert list(answers.columns) == ["label", "probability"]
    assert len(answers) == 70
    assert set(answers["label"]) <= {"class 0", "class 1", "class 2"}
    with zipfile.ZipFile(written / "artifacts" / "network.pt2") as archive:
        assert archive.testzip() is None


def test_a_request_that_holds_no_image(written: Path) -> None:
    served = pyfunc.load_model(str(written))
    with pytest.raises(MlflowException, match="image 1 is not a readable image") as caught:
        served.predict(pd.DataFrame({"image": [png(), b"no picture"]}))
    assert caught.value.get_http_status_code() == 400


def test_bytes_and_base64() -> None:
    picture = png()
    for value in (picture, base64.b64encode(picture).decode()):
        assert decode(image_bytes(value)).shape == (40, 50, 3)
    for value in ("no base64!", 7, None, b"", b"RIFF\x00\x00\x00\x00WEBPVP8 "):
        with pytest.raises(UnreadableImageError):
            decode(image_bytes(value))


def test_ranking() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, -1.0]])
    [ranked] = rank(logits, ["a", "b", "c", "d"], 3)
    assert [label for label, _ in ranked] == ["b", "c", "a"]
    assert ranked[0][1] == pytest.approx(torch.softmax(logits, 1)[0, 1].item())


def test_a_classifier_from_files(written: Path) -> None:
    """It gives the answers of the network from which it was exported."""
    ours, artifacts = network(), written / "artifacts"
    classifier = Classifier.load(artifacts / "network.pt2", artifacts / "classifier.json")
    [found] = classifier.classify([io.BytesIO(png())], 2)
    pixels = eval_transform(ours.preprocess)(open_picture(io.BytesIO(png()), Reading()))
    with torch.inference_mode():
        logits = ours.module(ToInput(ours.preprocess, torch.device("cpu"))(pixels[None]))
    assert found == rank(logits, ours.labels, 2)[0]


def test_a_served_model_turns_pictures(written: Path) -> None:
    """Loaded as `mlflow models serve` does it."""
    served, upright = pyfunc.load_model(str(written)), Image.open(io.BytesIO(png(size=(60, 40))))
    exif, copies = Image.Exif(), [png(size=(60, 40))]
    for orientation, undoing in ((6, Image.Transpose.ROTATE_90), (3, Image.Transpose.ROTATE_180)):
        exif[0x0112] = orientation
        file = io.BytesIO()
        upright.transpose(undoing).save(file, "PNG", exif=exif)
        copies.append(file.getvalue())
    answers = served.predict(pd.DataFrame({"image": copies}))
    assert len(set(answers["label"])) == 1
    np.testing.assert_allclose(answers["probability"], answers["probability"][0], rtol=1e-3)
    stored = eval_transform(replace(network().preprocess, reading=READING_0_1))
    assert not torch.equal(*(stored(open_picture(io.BytesIO(copy), READING_0_1)) for copy in copies[1:]))


def test_settings_of_version_0_1_mean_what_they_did() -> None:
    values = {"crop": 32, "resize": 37, "channels": "BGR", "antialias": False}
    assert CentreCrop.of(values).reading == READING_0_1
    new = eval_transform(network().preprocess)
    assert CentreCrop.of(asdict(new)) == new
    assert new.reading == Reading()


# ---------------------------------------------------------------- in the run


def models_of(client: MlflowClient, run_id: str) -> list[Any]:
    run = client.get_run(run_id)
    return list(client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run_id}'"))


WITH_MODELS = ("--no-log-models", "false")


def test_a_model_is_made_once_per_checkpoint(client: MlflowClient, images: Path) -> None:
    summary = run(images, *WITH_MODELS)
    stored = client.get_run(summary.run_id)
    tags = {manifest_in_tag(stored.data.tags, tag) for tag in ("checkpoint.best", "checkpoint.latest")}
    models = models_of(client, summary.run_id)
    assert {model.tags[MODEL_SHA256_TAG] for model in models} == {manifest.sha256 for manifest in tags}
    assert all(str(model.status) == "READY" for model in models)
    assert {output.model_id for output in stored.outputs.model_outputs} == {model.model_id for model in models}
    # Resuming what is complete says it all once more, and makes nothing new.
    run(images, "--resume", summary.run_id, *WITH_MODELS)
    assert {model.model_id for model in models_of(client, summary.run_id)} == {model.model_id for model in models}
    for name in ("loss", "val/top1"):
        points = client.get_metric_history(summary.run_id, name)
        assert len({point.step for point in points}) == len(points)


def test_an_unfinished_model_is_completed(client: MlflowClient, images: Path) -> None:
    """A process that is killed during the upload leaves such a model; a finished one is not touched."""
    summary = run(images)
    stored = client.get_run(summary.run_id)
    manifest = manifest_in_tag(stored.data.tags, "checkpoint.latest")
    tags = {MODEL_SHA256_TAG: manifest.sha256}
    unfinished = client.create_logged_model(stored.info.experiment_id, "begun", summary.run_id, tags)
    assert find_logged_model(client, stored, manifest) is None
    model_id = log_model(client, stored, manifest, summary.result.checkpoint)
    assert [model.model_id for model in models_of(client, summary.run_id)] == [model_id]
    assert model_id == unfinished.model_id
    assert str(client.get_logged_model(model_id).status) == "READY"
    pyfunc.load_model(f"models:/{model_id}")
    assert log_model(client, stored, manifest, summary.result.checkpoint) == model_id


def test_a_network_that_cannot_be_exported_holds_nothing_up(
    client: MlflowClient, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failure is reported, and the entries behind it are delivered."""
    from shufflenet_mlflow.export import logged

    def fail(*_: object, **_named: object) -> None:
        raise RuntimeError("a bug in the exporter")

    monkeypatch.setattr(logged, "write_pt2", fail)
    summary = run(images, *WITH_MODELS)
    assert summary.pending == 0
    assert client.get_run(summary.run_id).info.status == "FINISHED"
    assert {str(model.status) for model in models_of(client, summary.run_id)} == {"FAILED"}
    [line] = (summary.save_dir / "spool.refused.jsonl").read_text().splitlines()
    assert "a bug in the exporter" in json.loads(line)["reason"]


@pytest.mark.parametrize("why_no_backing_stores", ["the endpoint", "the checkpoint"])
def test_models_that_cannot_be_created_do_not_block_delivery(
    client: MlflowClient, images: Path, monkeypatch: pytest.MonkeyPatch, why_no_backing_stores: str
) -> None:
    """A server without logged models, or a deleted checkpoint: the entry is set aside, not retried for ever."""
    summary = run(images)
    target = RunTarget(client, summary.run_id, Path("nowhere"))
    if why_no_backing_stores == "the endpoint":

        def refuse(*_: object, **__: object) -> None:
            raise MlflowException("no such page", error_code=ENDPOINT_NOT_FOUND)

        monkeypatch.setattr(client, "search_logged_models", refuse)
    else:
        artifacts = get_artifact_repository(client.get_run(summary.run_id).info.artifact_uri)
        artifacts.delete_artifacts("checkpoints")
    with pytest.raises(RefusedError, match="no logged model of"):
        LogModels().send(target)


@pytest.mark.long
def test_models_of_a_deleted_run_wait(client: MlflowClient, images: Path) -> None:
    summary = run(images)
    client.delete_run(summary.run_id)
    with pytest.raises(TrackingError, match="was deleted") as caught:
        LogModels().send(RunTarget(client, summary.run_id, Path()))
    assert not isinstance(caught.value, RefusedError)
    client.restore_run(summary.run_id)
    LogModels().send(RunTarget(client, summary.run_id, summary.save_dir))
    assert models_of(client, summary.run_id)


@pytest.mark.long
def test_models_wait_for_the_server_too(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shufflenet_mlflow.tracking.delivery.GIVE_UP_SECONDS", 0.5)
    uri = "http://127.0.0.1:9"
    summary = run(images, *WITH_MODELS, "--tracking-uri", uri, "--save-dir", tmp_path / "m")
    assert summary.run_id is None
    store = f"sqlite:///{tmp_path}/later.db"
    synced = run_sync(tmp_path / "m", dry_run=False, tracking_uri=store, reporter=Reporter(), stop=StopFlag())
    assert synced.pending == ()
    assert models_of(MlflowClient(store), synced.run_id)


def test_promoting(client: MlflowClient, images: Path, shufflenet: Invoke) -> None:
    summary = run(images)

    def promote(ref: object, *words: object) -> Any:
        result = shufflenet("checkpoints", "promote", ref, "--name", "pets", *words, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    first = promote(summary.run_id, "--alias", "champion", "--alias", "newest")
    assert (first["version"], first["uri"], first["aliases"]) == ("1", "models:/pets@champion", ["champion", "newest"])
    second = promote(summary.result.checkpoint)
    assert (second["version"], second["uri"], second["model_id"]) == ("1", "models:/pets/1", first["model_id"])
    second = promote(f"runs:/{summary.run_id}@5", "--alias", "champion")
    assert second["version"] == "2"
    version = client.get_model_version_by_alias("pets", "champion")
    assert (version.version, version.run_id) in {("2", summary.run_id), (2, summary.run_id)}
    assert json.loads(version.tags["checkpoint"])["iters"] == 5
    result = shufflenet("checkpoints", "pull", "models:/pets@champion", "--json")
    assert json.loads(result.stdout)["iters"] == 5


def test_a_file_of_another_run(client: MlflowClient, images: Path, shufflenet: Invoke) -> None:
    """Another run in the same folder has replaced the file."""
    summary = run(images)
    path = summary.result.checkpoint
    payload = dict(read_checkpoint(path))
    other = path.parent / "elsewhere"
    from shufflenet_mlflow import save_checkpoint

    payload["loss"] = 7.0
    written = save_checkpoint(payload, 12, "bnps-", directory=other)
    result = shufflenet("checkpoints", "promote", written, "--name", "pets")
    assert (result.exit_code, "is not the one that run" in result.output) == (1, True), result.output


@pytest.mark.parametrize(
    ("words", "named"),
    [(("--name", "it's"), "it's"), (("--name", "a@b"), "a@b"), (("--name", "a", "--alias", "v1"), "v1")],
)
def test_names_that_no_reference_could_hold(
    client: MlflowClient, shufflenet: Invoke, words: tuple[str, ...], named: str
) -> None:
    """The name is refused before the checkpoint is looked up."""
    result = shufflenet("checkpoints", "promote", "nowhere", *words)
    assert (result.exit_code, f"(={named})" in result.output) == (2, True), result.output
    assert client.search_registered_models() == []


def test_versions_that_mlflow_made_itself(client: MlflowClient, images: Path, shufflenet: Invoke) -> None:
    """For a version registered in the UI, the logged model names the checkpoint."""
    summary = run(images, *WITH_MODELS)
    model = models_of(client, summary.run_id)[0]
    client.create_registered_model("ui")
    client.create_model_version("ui", f"models:/{model.model_id}", model_id=model.model_id)
    client.create_model_version("ui", "file:///somewhere", tags={"checkpoint": "nonsense"})
    path = str(images / "val" / "red" / "000.png")
    assert json.loads(shufflenet("predict", "models:/ui/1", path, "--json").stdout)[0]["path"] == path
    result = shufflenet("predict", "models:/ui/2", path)
    assert (result.exit_code, "which is not a checkpoint" in result.output) == (1, True), result.output
    for number in range(9):
        client.create_registered_model(f"a{number}")
    result = shufflenet("predict", "models:/ui@nope", path)
    assert "ui has the aliases: none" in result.output
