"""Options from files and from the environment: precedence, refusals, and messages that name the source."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from mlflow import MlflowClient

from shufflenet_mlflow.cli import main
from shufflenet_mlflow.cli.option import Option
from tests.support.command_line import Invoke, small_options

SmallTrain = Callable[..., dict[str, Any]]


def commands(command: click.Command = main, name: str = "") -> dict[str, click.Command]:
    """Return every command by its words."""
    found = {name: command}
    if isinstance(command, click.Group):
        for word, one in command.commands.items():
            found |= commands(one, f"{name} {word}".strip())
    return found


def params(client: MlflowClient, trained: dict[str, Any]) -> dict[str, str]:
    return dict(client.get_run(trained["run_id"]).data.params)


def test_command_line_overrides_environment_overrides_file(
    images: Path, shufflenet: Invoke, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("pets.toml").write_text(
        f"""
        train-dir = "{images}/train"
        val_dir = "{images}/val"
        input_size = 32
        batch-size = 12
        total_iters = 2
        seed = 1
        lr = 1e-2
        no_log_models = true
        momentum = 0.5
        """
    )
    monkeypatch.setenv("SHUFFLENET_SEED", "2")
    monkeypatch.setenv("SHUFFLENET_MOMENTUM", "0.6")
    result = shufflenet("train", "--config", "pets.toml", "--momentum", 0.7, "--json")
    assert result.exit_code == 0, result.output
    found = params(client, json.loads(result.stdout))
    assert {name: found[name] for name in ("batch_size", "seed", "momentum", "lr", "total_iters")} == {
        "batch_size": "12",
        "seed": "2",
        "momentum": "0.7",
        "lr": "0.01",
        "total_iters": "2",
    }


@pytest.mark.long
def test_a_runs_configuration_reproduces_it(
    small_train: SmallTrain, shufflenet: Invoke, client: MlflowClient, tmp_path: Path
) -> None:
    first = small_train("--total-iters", 4, "--seed", 3)
    config = client.download_artifacts(first["run_id"], "config.json", str(tmp_path))
    second = shufflenet("train", "--config", config, "--no-log-models", "--json")
    assert second.exit_code == 0, second.output
    document = json.loads(second.stdout)
    assert document["run_id"] != first["run_id"]
    assert params(client, document) == params(client, first)
    assert document["loss"] == first["loss"]
    resumed = shufflenet("train", "--resume", first["run_id"], "--config", config, "--json")
    assert (resumed.exit_code, json.loads(resumed.stdout)["run_id"]) == (0, first["run_id"])
    evaluated = shufflenet("eval", first["run_id"], "--config", config, "--json")  # which has options of other commands
    assert (evaluated.exit_code, json.loads(evaluated.stdout)["n"]) == (0, 15)


def test_exclusive_options_follow_precedence(images: Path, shufflenet: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("pets.toml").write_text("total_iters = 9999")
    words = ["train", *small_options(images), "--config", "pets.toml"]
    at = words.index("--total-iters")
    del words[at : at + 2]
    result = shufflenet(*words, "--epochs", 1, "--json")
    assert (result.exit_code, json.loads(result.stdout)["iters"]) == (0, 4), result.output
    both = shufflenet(*words, "--epochs", 1, "--total-iters", 3)
    assert (both.exit_code, "--epochs (=1) and --total-iters (=3) exclude each other" in both.stderr) == (2, True)
    monkeypatch.setenv("SHUFFLENET_TOTAL_ITERS", "1")
    assert json.loads(shufflenet(*words, "--json").stdout)["iters"] == 1


BAD_FILES = {
    "lr = ": "pets.toml is not TOML: Invalid value",
    "lerning_rate = 1": "pets.toml: there is no option 'lerning_rate'; keys are options without their hyphens",
    "batchsize = 1": "pets.toml: there is no option 'batchsize'; did you mean batch_size?",
    "json = true": "pets.toml: there is no option 'json'",
    "config = 'x'": "pets.toml: there is no option 'config'",
    "[train]\nlr = 1": "pets.toml: train is a table; options stand at the top of the file",
    "batch_size = {a = 1}": "pets.toml: batch_size (={'a': 1}) must be a whole number",
    "batch_size = 2024-01-01": "pets.toml: batch_size (=2024-01-01) must be a whole number",
    "batch_size = 1.5": "pets.toml: batch_size (=1.5) must be a whole number",
    "batch_size = true": "pets.toml: batch_size (=true) must be a whole number",
    "compile = 'perhaps'": "Invalid value for '--compile' (from pets.toml): 'perhaps' is not a valid boolean",
    "model = 'shufflenet_v2_x1'": "'--model' (from pets.toml): there is no network 'shufflenet_v2_x1'; did you mean",
    "epochs = 0": "--epochs (=0) must be at least 1 and at most 10**12 (--epochs is from pets.toml)",
    "batch_size = [16]": "pets.toml: batch_size (=[16]) must be a whole number",
    "save_dir = 7": "pets.toml: save_dir (=7) must be text",
    "compile = 1": "pets.toml: compile (=1) must be true or false",
    "choices = 3": "pets.toml: choices (=3) must be a list, or text with commas",
    "lr = -1": "--lr (=-1.0) must be above 0 (--lr is from pets.toml)",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_bad_files(text: str, shufflenet: Invoke) -> None:
    Path("pets.toml").write_text(text)
    result = shufflenet("train", "--config", "pets.toml")
    assert (result.exit_code, result.stdout) == (2, "")
    assert BAD_FILES[text] in result.stderr
    assert result.stderr.count("\n") <= 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", "config.json is not JSON"),
        ("config.json", b"[1]", "config.json holds no options"),
        ("pets.toml", b"\xff\xfe", "pets.toml is not TOML"),
        ("nowhere/x.toml", None, "cannot read 'nowhere/x.toml': No such file or directory"),
        (".", None, "cannot read '.': Is a directory"),
    ],
)
def test_unreadable_files(name: str, content: bytes | None, message: str, shufflenet: Invoke) -> None:
    if content is not None:
        Path(name).write_bytes(content)
    result = shufflenet("eval", "x", "--config", name)
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


def test_lists_in_files(shufflenet: Invoke) -> None:
    Path("pets.toml").write_text('model = "shufflenet_oneshot"\nchoices = [0, 1]')
    result = shufflenet("train", "--config", "pets.toml")
    assert "choices: there are 2, not 20, one per unit" in result.stderr


def test_messages_say_which_variable_it_was(shufflenet: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHUFFLENET_BATCH_SIZE", "many")
    result = shufflenet("train")
    assert "'--batch-size' (from SHUFFLENET_BATCH_SIZE): 'many' is not a valid integer" in result.stderr
    monkeypatch.setenv("SHUFFLENET_BATCH_SIZE", "1")
    assert "(--batch-size is from SHUFFLENET_BATCH_SIZE)" in shufflenet("train").stderr
    assert "from SHUFFLENET" not in shufflenet("train", "--batch-size", 1).stderr


def test_empty_variables_and_empty_words_count_as_not_given(
    small_train: SmallTrain, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`mlflow run` passes empty words; then the environment and the file apply."""
    monkeypatch.setenv("SHUFFLENET_SEED", "5")
    monkeypatch.setenv("SHUFFLENET_MOMENTUM", "")
    found = params(client, small_train("--total-iters", 1, "--seed", ""))
    assert (found["seed"], found["momentum"]) == ("5", "0.9")


def test_unknown_variables_are_named(shufflenet: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHUFFLENET_BATCHSIZE", "7")
    result = shufflenet("models")
    warning = "Warning: SHUFFLENET_BATCHSIZE is set, and is no option's variable; did you mean SHUFFLENET_BATCH_SIZE?\n"
    assert result.stderr.startswith(warning)


def test_verbose_and_quiet(
    small_train: SmallTrain, images: Path, shufflenet: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHUFFLENET_SEED", "5")
    words = ["train", *small_options(images), "--total-iters", 2]
    quiet, usual, verbose = (shufflenet(*words, *more) for more in (["-q"], [], ["-v"]))
    assert quiet.stderr == ""
    assert "iteration 2/2" in usual.stderr
    assert "--seed is from SHUFFLENET_SEED" not in usual.stderr
    for expected in ("--seed is from SHUFFLENET_SEED", "36 images of 3 classes", "wrote models/", "sent to MLflow: "):
        assert expected in verbose.stderr
    assert all("run ID  " in result.stdout for result in (quiet, usual, verbose))
    both = shufflenet("models", "-q", "-v")
    assert (both.exit_code, "exclude each other" in both.stderr) == (2, True)
    monkeypatch.setenv("SHUFFLENET_QUIET", "1")
    assert shufflenet("models").stderr == ""


# ---------------------------------------------------------------- what holds for every command


@pytest.mark.parametrize("words", [words for words in commands() if words])
def test_help_is_complete(words: str, shufflenet: Invoke) -> None:
    command = commands()[words]
    text = shufflenet(*words.split(), "--help-all" if getattr(command, "usual", ()) else "--help").output
    if not isinstance(command, click.Group) or command.invoke_without_command:
        assert "Example" in text
        assert f"      shufflenet {words}" in command.help.replace("Example:", "Examples:") or words == "completion"  # type: ignore[union-attr]
    assert max(map(len, text.splitlines())) <= 80
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    assert {"-v", "-q", "--debug"} <= {name for option in options for name in option.opts} or isinstance(
        command, click.Group
    )
    for option in options:
        assert option.help, option.name
        takes_value = option.metavar != "" and not option.is_flag
        if takes_value and not option.required and not option.multiple:
            assert "[default: " in option.help, option.name


def test_an_option_means_the_same_everywhere() -> None:
    """One name has one type and one variable."""
    seen: dict[str, tuple[str, str]] = {}
    for words, command in commands().items():
        for option in command.params:
            if isinstance(option, Option):
                [long] = [name for name in option.opts if name.startswith("--")]
                kind = type(option.type).__name__.removesuffix("Range").replace("Folder", "Path")
                assert option.envvar == "SHUFFLENET_" + long[2:].upper().replace("-", "_")
                if long not in ("--output", "--format"):  # a file here, a folder there
                    assert seen.setdefault(long, (kind.lower().replace("paramtype", ""), words))[
                        0
                    ] == kind.lower().replace("paramtype", ""), (long, words, seen[long])
