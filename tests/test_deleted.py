"""Deleted runs and experiments: they can be read; what would write to them is refused before it does anything."""

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from mlflow import MlflowClient
from mlflow.cli import cli as mlflow_cli

from shufflenet_mlflow import save_checkpoint
from shufflenet_mlflow.cli import main
from shufflenet_mlflow.errors import DeletedError, TrackingError
from shufflenet_mlflow.tracking.lifecycle import require_active_run
from tests.support.command_line import Invoke, small_options
from tests.support.metrics import steps
from tests.support.training import Reporter, run


@dataclass(frozen=True)
class World:
    """Two trained runs, whose store each test copies."""

    folder: Path
    runs: tuple[str, str]
    experiment: str
    images: Path

    @property
    def both_deleted(self) -> str:
        """Command that restores the first run and its experiment."""
        return f"{EXPERIMENT} && {RUN}".format(run=self.runs[0], experiment=self.experiment)


@pytest.fixture(scope="module")
def world(images: Path, tmp_path_factory: pytest.TempPathFactory, empty_database: Path, cache_dir: Path) -> World:
    folder = tmp_path_factory.mktemp("world")
    shutil.copy(empty_database, folder / "mlflow.db")
    runs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.setenv("SHUFFLENET_CACHE_DIR", str(cache_dir))
        for name in ("models", "other"):
            words = ["train", *small_options(images), "--total-iters", 2, "--save-interval", 1, "--save-dir", name]
            result = CliRunner().invoke(main, [*map(str, words), "--json"])
            assert result.exit_code == 0, result.output
            runs.append(json.loads(result.stdout)["run_id"])
        assert CliRunner().invoke(main, ["eval", runs[1], "--json"]).exit_code == 0
    experiment = MlflowClient(f"sqlite:///{folder}/mlflow.db").get_run(runs[0]).info.experiment_id
    return World(folder, (runs[0], runs[1]), experiment, images)


def _delete_run(client: MlflowClient, world: World) -> None:
    client.delete_run(world.runs[0])


def _delete_experiment(client: MlflowClient, world: World) -> None:
    client.delete_experiment(world.experiment)  # and with it its runs


def _delete_experiment_only(client: MlflowClient, world: World) -> None:
    client.delete_experiment(world.experiment)
    client.restore_run(world.runs[0])


RUN, EXPERIMENT = "mlflow runs restore --run-id {run}", "mlflow experiments restore --experiment-id {experiment}"
STATES: dict[str, tuple[Callable[[MlflowClient, World], None], str]] = {
    "run": (_delete_run, RUN),
    "experiment and run": (_delete_experiment, f"{EXPERIMENT} && {RUN}"),
    "experiment": (_delete_experiment_only, EXPERIMENT),
}


def in_turn(*fast: str) -> list[Any]:
    """Return all states; only those named here are among the fast tests."""
    return [state if state in fast else pytest.param(state, marks=pytest.mark.long) for state in STATES]


@pytest.fixture(params=STATES)
def restoring(request: pytest.FixtureRequest, world: World, client: MlflowClient, workplace: Path) -> str:
    """Delete in a copy of the world; return the command that restores it."""
    for name in ("mlflow.db", "models", "other"):
        source = world.folder / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, workplace / name)
    delete, command = STATES[request.param]
    delete(client, world)
    return command.format(run=world.runs[0], experiment=world.experiment)


def _restore(commands: str) -> None:
    """Type MLflow's commands as they were printed."""
    for command in commands.split(" && "):
        name, *words = shlex.split(command)
        assert name == "mlflow"
        result = CliRunner().invoke(mlflow_cli, words)
        assert result.exit_code == 0, (command, result.output)


def _forbid_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("it has begun to work")

    for place in ("eval.evaluate", "train.list_data", "export.log_model", "checkpoints.choose_dropped"):
        monkeypatch.setattr(f"shufflenet_mlflow.workflows.{place}", work)
    monkeypatch.setattr("shufflenet_mlflow.workflows.runs.require_abandoned", work)


WRITING = (
    "eval {run}",
    "eval models --log-to source",
    "checkpoints promote {run} --name net",
    "checkpoints promote models --name net",
    "checkpoints prune {run} --keep-last 1",
    "checkpoints prune models --keep-last 1",
    "runs mend {run} {other}",
    "sync models",
    "sync models --refused",
    "train --resume {run}",
    "train --resume models",
    "train --resume {run} --save-dir new",
    "train {small} --save-dir models",
)
READING = (
    "runs show {run}",
    "compare {run} {other} --out compared",
    "predict {run} {picture}",
    "eval {run} --log-to none",
    "eval models",
    "checkpoints ls {run}",
    "checkpoints ls models",
    "checkpoints verify {run}",
    "checkpoints pull {run} --output pulled",
    "checkpoints prune {run} --keep-last 1 --dry-run",
    "export {run}",
    "sync models --dry-run",
)


def _words(command: str, world: World) -> list[str]:
    small = shlex.join([*map(str, small_options(world.images)), "--total-iters", "2", "--save-interval", "1"])
    picture = next((world.images / "val").rglob("*.png"))
    text = command.format(run=world.runs[0], other=world.runs[1], small=small, picture=picture)
    # The journal of a copied folder names the store that it was copied from.
    return [*shlex.split(text), "--tracking-uri", f"sqlite:///{Path('mlflow.db').absolute()}", "--json"]


def test_writing_is_refused_before_the_work(
    restoring: str, world: World, client: MlflowClient, shufflenet: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        _forbid_work(patch)
        for command in WRITING:
            result = shufflenet(*_words(command, world))
            assert result.exit_code == 1, (command, result.output)
            *notes, line = result.stderr.splitlines()
            assert all(note.startswith("fetching ") for note in notes), (command, result.stderr)
            assert line.startswith("Error: ") and f"`{restoring}` restores " in line, (command, line)
            assert json.loads(result.stdout)["error"]["code"] == "run-deleted"
    assert not Path("new").exists()
    _restore(restoring)
    require_active_run(client, world.runs[0])
    if restoring != world.both_deleted:
        return
    # Not pruning: the artifacts are those of every test.
    for command in ("eval {run}", "runs mend {run} {other}", "sync models", "train --resume {run} --save-dir new"):
        result = shufflenet(*_words(command, world))
        assert result.exit_code == 0, (command, result.output)


@pytest.mark.long
@pytest.mark.parametrize("restoring", in_turn("experiment and run"), indirect=True)
def test_reading_is_possible(restoring: str, world: World, shufflenet: Invoke) -> None:
    assert restoring
    for command in READING:
        result = shufflenet(*_words(command, world))
        assert result.exit_code == 0, (command, result.output)


@pytest.mark.long
@pytest.mark.parametrize("restoring", in_turn("run", "experiment and run"), indirect=True)
def test_a_fork_of_a_deleted_run_goes_where_a_run_can_be(
    restoring: str, world: World, client: MlflowClient, shufflenet: Invoke
) -> None:
    """Also an evaluation in a run of its own, which by default lies in the experiment of the run."""
    experiment = ["--experiment", "living"] if "experiments" in restoring else []
    fork = ["train", "--resume", f"runs:/{world.runs[0]}@1", "--new-run", "--save-dir", "fork"]
    evaluate = ["eval", world.runs[0], "--log-to", "new"]
    for words in (fork, evaluate):
        if experiment:
            refused = shufflenet(*words)
            assert refused.exit_code == 1
            line = f"the experiment 'shufflenet' was deleted; `{EXPERIMENT}` restores it, --experiment names another"
            assert line.format(experiment=world.experiment) in refused.stderr
        assert shufflenet(*words, *experiment).exit_code == 0


@pytest.mark.parametrize(
    "command",
    [
        "train --experiment gone",
        "train --job pets --experiment gone",
        "train --resume none --experiment gone",
        "train --resume {run} --experiment gone",
        "runs --experiment gone",
        "eval {run} --log-to new --experiment gone",
        "eval models --log-to new --experiment gone",
    ],
)
@pytest.mark.parametrize("restoring", ["run"], indirect=True)
def test_an_experiment_that_was_deleted_is_called_so(
    restoring: str,
    command: str,
    world: World,
    client: MlflowClient,
    shufflenet: Invoke,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _restore(restoring)
    experiment = client.create_experiment("gone")
    client.delete_experiment(experiment)
    line = f"the experiment 'gone' was deleted; `{EXPERIMENT.format(experiment=experiment)}` restores it"
    _forbid_work(monkeypatch)
    result = shufflenet(*_words(command, world))
    assert (result.exit_code, line in result.stderr) == (1, True), result.output
    if "{run}" not in command and "models" not in command:  # those belong to another experiment already
        monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment)
        result = shufflenet(*[word for word in _words(command, world) if word not in ("--experiment", "gone")])
        assert (result.exit_code, line in result.stderr) == (1, True), result.output


@pytest.mark.parametrize("state", STATES)
def test_a_run_deleted_while_it_trains_keeps_everything(
    state: str, images: Path, client: MlflowClient, shufflenet: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command in its last line brings everything to the run; the end does not wait for a deleted run."""

    def delete(phase: str, done: int) -> None:
        if phase == "training" and done == 6:
            [running] = client.search_runs([client.get_experiment_by_name("shufflenet").experiment_id])
            STATES[state][0](client, World(Path(), (running.info.run_id, ""), running.info.experiment_id, images))

    reporter = Reporter(delete)
    monkeypatch.setattr("shufflenet_mlflow.tracking.delivery.GIVE_UP_SECONDS", 1e6)
    summary = run(images, "--save-dir", "my models", "--no-system-metrics", reporter=reporter)
    assert summary.result.iters == 12
    if state == "experiment":  # MLflow itself only looks at the run
        assert summary.pending == 0
        return
    assert summary.pending
    command = STATES[state][1].format(run=summary.run_id, experiment=summary.experiment_id)
    assert summary.restoring == command
    assert f"`{command}`, and then `shufflenet sync 'my models'`, delivers them" in reporter.warnings[-1]
    assert any("training goes on" in text and command in text for text in reporter.warnings)
    _restore(command)
    sent = shufflenet("sync", "my models", "--json")
    assert (sent.exit_code, json.loads(sent.stdout)["pending"]) == (0, 0), sent.output
    assert json.loads(sent.stdout)["refused"] == 0
    found = client.get_run(str(summary.run_id))
    assert found.info.status == "FINISHED"
    assert json.loads(found.data.tags["checkpoint.latest"])["iters"] == 12
    assert steps(client, str(summary.run_id), "train/loss") == [2, 4, 6, 8, 10, 12]


def test_save_checkpoint_names_the_way_back(client: MlflowClient) -> None:
    run_id = client.create_run(client.create_experiment("own")).info.run_id
    client.delete_run(run_id)
    with pytest.raises(TrackingError, match=f"`mlflow runs restore --run-id {run_id}` restores it; .*shufflenet sync"):
        save_checkpoint({"state_dict": {}}, 1, run_id=run_id)


@pytest.mark.parametrize("is_named", [False, True])
def test_the_command_names_a_store_that_mlflow_would_not_find(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_named: bool
) -> None:
    run_id = client.create_run(client.create_experiment("own")).info.run_id
    client.delete_run(run_id)
    if not is_named:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    prefix = "" if is_named else f"MLFLOW_TRACKING_URI={client.tracking_uri} "
    with pytest.raises(DeletedError) as caught:
        require_active_run(client, run_id)
    assert caught.value.command == f"{prefix}mlflow runs restore --run-id {run_id}"
