"""The command line as users see it: documents on stdout, one line per error, exit statuses."""

import json
import logging
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from mlflow import MlflowClient

from shufflenet_mlflow import create_model, save_checkpoint
from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.cli import main
from shufflenet_mlflow.cli.tables import print_json
from shufflenet_mlflow.errors import ConfigError
from shufflenet_mlflow.tracking.redaction import redact
from shufflenet_mlflow.version import __version__
from tests.support.command_line import Invoke, small_options
from tests.support.effort import only_in_full_run
from tests.support.images import write_images

SmallTrain = Callable[..., dict[str, Any]]


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in its own process."""
    words = [sys.executable, "-m", "shufflenet_mlflow", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, env={**os.environ, **environment}, check=False)


# ---------------------------------------------------------------- what works


def test_train_then_eval_from_an_empty_folder(
    small_train: SmallTrain, shufflenet: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = small_train()
    document = (
        "run_id",
        "iters",
        "epoch",
        "loss",
        "val_top1",
        "val_top5",
        "val_mean_class_accuracy",
        "val_majority",
        "best_val_top1",
        "best_iters",
        "ended_by_patience",
        "checkpoint",
        "save_dir",
        "pending",
        "refused",
    )
    assert trained.keys() == set(document)
    assert (trained["iters"], trained["epoch"]) == (12, 3)
    monkeypatch.chdir(tmp_path)
    result = shufflenet("eval", f"{trained['run_id']}@latest", "--json", "--cache-dir", tmp_path / "cache")
    assert result.exit_code == 0, result.output
    evaluated = json.loads(result.stdout)
    assert {"top1", "top5", "loss", "n", "checkpoint", "run_id"} <= evaluated.keys()
    assert (evaluated["top1"], evaluated["top5"]) == (trained["val_top1"], trained["val_top5"])
    assert (evaluated["n"], evaluated["run_id"]) == (15, trained["run_id"])
    assert Path(evaluated["checkpoint"]).is_relative_to(tmp_path / "cache")


def test_every_form_of_reference_evaluates(small_train: SmallTrain, shufflenet: Invoke, workplace: Path) -> None:
    trained = small_train("--save-dir", "models")
    run_id = trained["run_id"]
    for ref in ("models", trained["checkpoint"], f"runs:/{run_id}", f"runs:/{run_id}@best", f"{run_id}@10"):
        result = shufflenet("eval", ref, "--json")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["run_id"] == run_id


@pytest.mark.long
def test_the_batch_size_does_not_change_the_accuracy(small_train: SmallTrain, shufflenet: Invoke) -> None:
    trained = small_train()
    documents = [
        json.loads(shufflenet("eval", f"{trained['run_id']}@latest", "--json", "--batch-size", size).stdout)
        for size in (1, 4, 15)
    ]
    assert {document["top1"] for document in documents} == {trained["val_top1"]}
    assert all(document["n"] == 15 for document in documents)
    assert documents[0]["loss"] == pytest.approx(documents[2]["loss"], rel=1e-5)


def test_people_get_lines(images: Path, shufflenet: Invoke) -> None:
    result = shufflenet("train", *small_options(images))
    assert result.exit_code == 0, result.output
    for expected in ("run ID  ", "validation accuracy", "bnps-checkpoint-000012.pth.tar"):
        assert expected in result.stdout
    for expected in ("next: shufflenet eval ", "mlflow ui ", "#/experiments/"):
        assert expected in result.stderr
    assert "iteration  2/12" in result.stderr
    assert "validation at iteration 4" in result.stderr
    run_id = result.stdout.split()[2]
    result = shufflenet("eval", run_id)
    assert result.exit_code == 0, result.output
    assert "top1        " in result.stdout


def test_models(shufflenet: Invoke) -> None:
    rows = json.loads(shufflenet("models", "--json").stdout)
    [row] = [row for row in rows if row["name"] == "shufflenet_v2_x1_0"]
    assert row == {
        "name": "shufflenet_v2_x1_0",
        "family": "v2",
        "parameters": 2278760,
        "macs": 145814296,
        "top1_error": 30.6,
        "top5_error": 11.1,
        "preprocess": "bgr255",
    }
    assert re.search(r"shufflenet_v2_x1_0 +v2 +2\.28 +146 +30\.60 +11\.10  bgr255\n", shufflenet("models").stdout)


def test_data_digits(shufflenet: Invoke, tmp_path: Path) -> None:
    result = shufflenet("data", "digits", tmp_path / "digits", "--json")
    assert json.loads(result.stdout) == {"directory": str(tmp_path / "digits"), "train": 1442, "val": 355}
    second = shufflenet("data", "digits", tmp_path / "digits")
    assert (second.exit_code, second.stderr.count("\n")) == (1, 1)


def test_bundled_digits_train(shufflenet: Invoke) -> None:
    result = shufflenet("train", "--total-iters", 2, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["iters"] == 2


def test_empty_text_means_the_default(small_train: SmallTrain, client: MlflowClient) -> None:
    trained = small_train("--seed", "", "--model", "''", "--resume", "", "--save-dir", "", "--on-bad-image", "")
    params = client.get_run(trained["run_id"]).data.params
    assert (params["seed"], params["model"]) == ("0", "shufflenet_v2_x0_5")


def test_json_is_all_there_is_on_stdout(images: Path) -> None:
    result = command("train", *small_options(images), "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["iters"] == 12
    assert "iteration  2/12" in result.stderr
    assert "\x1b[" not in result.stderr  # not a terminal: no colours, no moving bars


def test_not_finite_values_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": -float("inf")}})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": {"d": None}}


# ---------------------------------------------------------------- below `mlflow run`


def test_the_run_that_mlflow_made_is_adopted(
    small_train: SmallTrain, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = client.create_experiment("projects")
    wrapper_run_id = client.create_run(experiment, run_name="made").info.run_id
    client.log_param(wrapper_run_id, "lr", "2e-2")  # as `mlflow run -P lr=2e-2` does
    client.log_param(wrapper_run_id, "seed", "''")
    client.log_param(wrapper_run_id, "epochs", "3")
    monkeypatch.setenv("MLFLOW_RUN_ID", wrapper_run_id)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment)
    trained = small_train()
    assert trained["run_id"] == wrapper_run_id
    run = client.get_run(wrapper_run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "made")
    assert (run.data.params["lr"], run.data.params["resolved/lr"]) == ("2e-2", "0.02")
    assert run.data.params["resolved/seed"] == "0"
    assert "resolved/epochs" not in run.data.params
    assert "MLFLOW_RUN_ID" not in os.environ
    assert len(client.search_runs([experiment])) == 1


def test_eval_logs_to_the_run_that_mlflow_made(
    small_train: SmallTrain, shufflenet: Invoke, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = small_train()
    wrapper_run_id = client.create_run(client.create_experiment("projects")).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", wrapper_run_id)
    assert shufflenet("eval", trained["run_id"]).exit_code == 0
    run = client.get_run(wrapper_run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["val/top1"] == trained["val_top1"]
    assert run.data.tags["evaluated.run"] == trained["run_id"]


def test_a_failing_eval_fails_the_run_that_mlflow_made(
    shufflenet: Invoke, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapper_run_id = client.create_run(client.create_experiment("projects")).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", wrapper_run_id)
    assert shufflenet("eval", "nowhere").exit_code == 1
    assert client.get_run(wrapper_run_id).info.status == "FAILED"


@pytest.mark.long
def test_resuming_below_mlflow_run_continues_the_old_run_and_says_so(
    small_train: SmallTrain, shufflenet: Invoke, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = small_train()
    experiment = client.create_experiment("projects")
    for options, status in (([], "FINISHED"), (["--seed", 9], "RUNNING")):
        wrapper_run_id = client.create_run(experiment).info.run_id
        monkeypatch.setenv("MLFLOW_RUN_ID", wrapper_run_id)
        result = shufflenet("train", "--resume", trained["run_id"], *options, "--json")
        assert (result.exit_code == 0) == (status == "FINISHED")
        run = client.get_run(wrapper_run_id)
        assert run.info.status == status  # wrong options are found before it is adopted: MLflow then ends it
    assert client.get_run(trained["run_id"]).info.status == "FINISHED"
    [continued] = client.search_runs([experiment], "attributes.status = 'FINISHED'")
    assert continued.data.tags["continues.run"] == trained["run_id"]


# ---------------------------------------------------------------- what does not


STRANGE: list[dict[str, Any]] = [
    {"class_to_idx": ["a"]},
    {"class_to_idx": {"a": "x"}},
    {"class_to_idx": {5: 5}},
    {"config": "x"},
    {"config": {"batch_size": "8"}},
    {"config": {"val_dir": 7}},
    {"iters": None},
    {"iters": "7"},
    {"iters": True},
    {"preprocess": "bgr255"},
    {"preprocess": {"mode": "bgr255"}},
    {"preprocess": {"mode": "x", "input_size": 32}},
    {"preprocess": {"mode": "bgr255", "input_size": float("inf")}},
    {"preprocess": {"mode": "bgr255", "input_size": 320_000_000}},
    {"preprocess": {"mode": "bgr255_mean", "input_size": 32, "mean_image": torch.zeros(3, 32, 32, dtype=torch.bool)}},
    {"preprocess": {"mode": "bgr255_mean", "input_size": 32, "mean_image": torch.full((3, 32, 32), torch.nan)}},
    {"preprocess": {"mode": "bgr255_mean", "input_size": 32, "mean_image": torch.zeros(3, 32, 32).to_sparse()}},
    {"model": {"name": "shufflenet_oneshot", "kwargs": {"scales": [10**400] * 20}}},
    {"config": {"batch_size": 0}},
    {"config": {"workers": -1}},
    {"config": {"val_dir": "a\0b"}},
    {"data": {"train_digest": 5}},
    {"iters": -3},
    {"state_dict": {"w": torch.zeros(1).expand(10**13)}},
    {"state_dict": {"w" * 5000 + "\x1b[31m": torch.zeros(1)}},
    {"model": "shufflenet_v2_x0_5"},
    {"model": {"name": "nothing", "kwargs": {}}},
    {"model": {"name": "shufflenet_v2_x0_5", "kwargs": {"depth": 3}}},
    {"best": "0.9"},
    {"best": {"val_top1": 0.9}},
    {"run_id": 7},
    {"data": None},
    {"optimizer_state_dict": None},
    {"optimizer_state_dict": {"state": {}, "param_groups": []}},
    {"lr_scheduler_state_dict": {}},
    {"meter_state": [1.0]},
    {"rng_state": {"cpu": torch.zeros(3, dtype=torch.uint8)}},
    {"metrics": {}},
    {"state_dict": {1: torch.zeros(1)}},
    {"state_dict": {"w": torch.zeros(2).to_sparse()}},
    {"state_dict": {"w": 1}},
    {"state_dict": {}},
]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(change, id=str(change)[:60], marks=[] if number % 3 == 0 else [pytest.mark.long, only_in_full_run])
        for number, change in enumerate(STRANGE)
    ],
)
def test_strange_checkpoints_are_one_line(
    change: dict[str, Any],
    small_train: SmallTrain,
    shufflenet: Invoke,
    images: Path,
    tmp_path: Path,
    strange_base: dict[str, Any],
) -> None:
    """A file may hold anything that loads: the command works or prints one line."""
    path = tmp_path / "checkpoint-000010.pth.tar"
    torch.save({**strange_base, **change}, path)
    evaluated = shufflenet("eval", path, "--val-dir", images / "val", "--workers", 0)
    resumed = shufflenet("train", "--resume", path, "--new-run", "--save-dir", tmp_path / "new")
    assert evaluated.exit_code in (0, 1, 2), evaluated.output
    assert resumed.exit_code in (0, 1, 2), resumed.output
    assert 0 not in (evaluated.exit_code, resumed.exit_code) or change.keys() != {"state_dict"}
    for result in (evaluated, resumed):
        assert "Traceback" not in result.output
        assert "\x1b" not in result.output
        assert len(result.output) < 5000
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception


@pytest.fixture(scope="module")
def strange_base(images: Path, tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> dict[str, Any]:
    """Return the payload of a valid checkpoint at iteration 10."""
    folder = tmp_path_factory.mktemp("strange")
    words = ["train", *map(str, small_options(images)), "--save-dir", str(folder / "models")]
    result = CliRunner().invoke(main, [*words, "--tracking-uri", f"sqlite:///{folder}/mlflow.db"])
    assert result.exit_code == 0, result.output
    return read_checkpoint(folder / "models" / "checkpoint-000010.pth.tar")


def test_a_checkpoint_without_its_iteration_is_evaluated(
    strange_base: dict[str, Any], shufflenet: Invoke, images: Path, tmp_path: Path
) -> None:
    payload = {key: value for key, value in strange_base.items() if key != "iters"}
    torch.save(payload, tmp_path / "checkpoint-000010.pth.tar")
    result = shufflenet("eval", tmp_path / "checkpoint-000010.pth.tar", "--val-dir", images / "val", "--json")
    assert (result.exit_code, json.loads(result.stdout)["iters"]) == (0, 10)


def test_a_configuration_of_ones_own_does_not_mean_the_digits(shufflenet: Invoke, tmp_path: Path) -> None:
    state = {"state_dict": create_model("shufflenet_v2_x0_5", 10).state_dict(), "config": {"lr": 0.1}}
    path = save_checkpoint(state, 3, directory=tmp_path)
    result = shufflenet("eval", path, "--model", "shufflenet_v2_x0_5")
    assert (result.exit_code, "--val-dir is missing" in result.stderr) == (2, True)


def test_evaluating_on_other_classes_is_refused(small_train: SmallTrain, shufflenet: Invoke, tmp_path: Path) -> None:
    trained = small_train()
    other = write_images(tmp_path / "other", classes=("blue", "green", "violet"))
    result = shufflenet("eval", trained["run_id"], "--val-dir", other)
    assert result.exit_code == 1
    assert "it lacks 'red'; it also has 'violet'" in result.stderr


def test_debug_shows_the_traceback(shufflenet: Invoke) -> None:
    for words in (["--debug", "eval", "nowhere"], ["eval", "nowhere", "--debug"]):
        result = shufflenet(*words)
        assert result.exit_code == 1
        assert "Traceback (most recent call last)" in result.stderr
        assert "UnresolvedError: 'nowhere' does not exist" in result.stderr


@pytest.mark.parametrize("debug", [[], ["--debug"]])
@pytest.mark.parametrize("userinfo", ["user:s3cret", "user:p@s3cret", "user:pa/s3cret", "s3cret"])
def test_credentials_are_never_shown(
    userinfo: str, debug: list[str], shufflenet: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shufflenet_mlflow.tracking.exchanges._PAUSE_SECONDS", 0.0)
    uri = f"http://{userinfo}@127.0.0.1:9"
    result = shufflenet("eval", "0" * 32, "--tracking-uri", uri, *debug)
    assert result.exit_code == 1
    assert "s3cret" not in result.output


@pytest.mark.parametrize("userinfo", ["user:s3cret", "user:pa/s3cret"])
def test_credentials_are_never_in_a_journal(
    userinfo: str, images: Path, shufflenet: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is unreachable, so everything meant for it is on the disk."""
    monkeypatch.setattr("shufflenet_mlflow.tracking.delivery.GIVE_UP_SECONDS", 0.5)
    uri = f"http://{userinfo}@127.0.0.1:9"
    result = shufflenet(
        "train", *small_options(images), "--total-iters", 4, "--save-dir", "models", "--tracking-uri", uri
    )
    assert result.exit_code == 0
    assert "training goes on" in result.stderr
    assert "s3cret" not in result.output
    assert "http://127.0.0.1:9" in Path("models/spool.jsonl").read_text()
    for path in Path("models").iterdir():
        assert b"s3cret" not in path.read_bytes(), path


def test_credentials_are_never_logged(small_train: SmallTrain, client: MlflowClient, workplace: Path) -> None:
    trained = small_train("--run-name", "http://user:s3cret@host/x", "--experiment", "e")
    run = client.get_run(trained["run_id"])
    assert "s3cret" not in json.dumps({**run.data.tags, "mlflow.runName": ""})
    assert "s3cret" not in json.dumps(run.data.params)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("at http://u:p@h/x and http://v:q@k/", "at http://h/x and http://k/"),
        ("postgresql+psycopg://u:p@h/db", "postgresql+psycopg://h/db"),
        ("sqlite:////data/me@work/mlflow.db", "sqlite:////data/me@work/mlflow.db"),
        ("runs:/0123@best models:/net@champion", "runs:/0123@best models:/net@champion"),
        ("http://h/?a=1&api_key=x&b=2", "http://h/?a=1&api_key=***&b=2"),
    ],
)
def test_redaction(text: str, expected: str) -> None:
    assert redact(text) == expected


def test_a_full_disk_is_one_line(images: Path, shufflenet: Invoke) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500 << 10, hard))  # the database is smaller, a checkpoint larger
    try:
        result = shufflenet("train", *small_options(images))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.exit_code == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert "Error: cannot write the checkpoint" in result.stderr
    assert "File too large; earlier checkpoints are intact" in result.stderr


@pytest.mark.parametrize(
    ("words", "status", "code"),
    [
        (["eval", "nowhere"], 1, "reference-missing"),
        (["train", "--lr", "0"], 2, "option-lr"),
        (["train", "--lr", "fast"], 2, "usage"),
        (["predict", "models"], 2, "no-images-named"),
        (["frobnicate"], 2, "unknown-command"),
        (["--json", "train"], 2, "usage"),
    ],
)
def test_with_json_an_error_is_a_document(words: list[str], status: int, code: str, shufflenet: Invoke) -> None:
    plain, result = shufflenet(*words), shufflenet(*words, "--json")
    assert (result.exit_code, plain.exit_code) == (status, status)
    document = json.loads(result.stdout)
    assert document == {"error": {"code": code, "message": document["error"]["message"]}}
    assert f"Error: {document['error']['message']}" == result.stderr.splitlines()[0]
    if "--json" not in words:
        assert (plain.stdout, plain.stderr) == ("", result.stderr)


@pytest.mark.parametrize("words", [["predict", "x", "--", "--json"], ["runs", "show"]])
def test_without_json_stdout_is_empty(words: list[str], shufflenet: Invoke) -> None:
    result = shufflenet(*words)
    assert (result.exit_code in (1, 2), result.stdout) == (True, "")


def test_json_errors_hold_no_credentials(shufflenet: Invoke) -> None:
    result = shufflenet("eval", "0" * 32, "--tracking-uri", "http://u:s3cret@127.0.0.1:9", "--json")
    assert (result.exit_code, "s3cret" in result.output) == (1, False)
    assert json.loads(result.stdout)["error"]["code"] == "mlflow"


def test_the_reporter_and_the_log_warn_alike(shufflenet: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, reporter: Any, **__: object) -> None:
        reporter.warn("from the reporter")
        logging.getLogger("shufflenet_mlflow.x").warning("from the %s", "log")
        reporter.note("[bold]a note[/]")
        raise ConfigError("enough", code="enough")

    monkeypatch.setattr("shufflenet_mlflow.workflows.eval.run_evaluation", run)
    lines = ["Warning: from the reporter", "Warning: from the log", "[bold]a note[/]", "Error: enough"]
    assert shufflenet("eval", "nowhere").stderr.splitlines() == lines
    assert shufflenet("eval", "nowhere", "-q").stderr.splitlines() == [*lines[:2], lines[3]]


def test_ctrl_c_before_anything_has_begun(monkeypatch: pytest.MonkeyPatch, shufflenet: Invoke) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shufflenet_mlflow.workflows.eval.run_evaluation", interrupt)
    result = shufflenet("eval", "nowhere")
    assert (result.exit_code, result.stderr) == (130, "Stopped by SIGINT.\n")


# ---------------------------------------------------------------- help


def test_help_and_usage_errors_import_nothing_heavy() -> None:
    code = (
        "import sys, click.testing, shufflenet_mlflow.cli as cli\n"
        "for words in (['--help'], ['train', '--help'], ['train', '--lr', 'x'], ['train', '--epochs', '0']):\n"
        "    click.testing.CliRunner().invoke(cli.main, words)\n"
        "print(sorted({'torch', 'mlflow', 'torchvision', 'rich', 'numpy'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


@pytest.mark.parametrize("words", [[], ["train"], ["eval"], ["models"], ["data"], ["data", "digits"]])
def test_every_command_has_help(words: list[str], shufflenet: Invoke) -> None:
    result = shufflenet(*words, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_version(shufflenet: Invoke) -> None:
    assert shufflenet("--version").output == f"shufflenet, version {__version__}\n"


def test_every_option_has_help_text() -> None:
    for command_name, found in main.commands.items():
        for parameter in found.params:
            if parameter.param_type_name == "option":
                assert parameter.help, f"{command_name} {parameter.name}"  # type: ignore[attr-defined]
