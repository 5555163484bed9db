"""Run IDs can be abbreviated, and the error for a mistyped one suggests similar ones."""

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from shufflenet_mlflow import get_latest_model, save_checkpoint
from shufflenet_mlflow.errors import TrackingError, UnresolvedError
from shufflenet_mlflow.tracking.resolve import resolve
from shufflenet_mlflow.tracking.run_ids import complete
from tests.support.command_line import Invoke

FIRST = "abcdef00112233445566778899aabbcc"
SECOND = "abcdef11112233445566778899aabbcc"
OTHER = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def three_runs(client: MlflowClient, workplace: Path) -> None:
    """Create runs with known IDs, which MLflow would draw at random; each has one checkpoint."""
    experiment = client.create_experiment("x")
    for number, run_id in enumerate((FIRST, SECOND, OTHER)):
        drawn = client.create_run(experiment, run_name=f"run {number}").info.run_id
        with closing(sqlite3.connect(workplace / "mlflow.db")) as store, store:
            change = "UPDATE runs SET run_uuid = ?, artifact_uri = replace(artifact_uri, ?, ?) WHERE run_uuid = ?"
            store.execute(change, (run_id, drawn, run_id, drawn))
            store.execute("UPDATE tags SET run_uuid = ? WHERE run_uuid = ?", (run_id, drawn))
        save_checkpoint({"state_dict": {}}, number + 1, directory=workplace / "models" / run_id, run_id=run_id)


@pytest.mark.usefixtures("three_runs")
def test_id_prefixes_name_a_run(tmp_path: Path, client: MlflowClient) -> None:
    for ref, iters in (("012345", 3), ("runs:/abcdef00", 1), ("abcdef11@best", 2), (f"runs:/{SECOND[:9]}@2", 2)):
        if not ref.endswith("best"):  # none of them was validated
            assert resolve(ref, cache_dir=tmp_path).iters == iters
    assert complete(f"runs:/{SECOND[:9]}/checkpoints/x", None) == f"runs:/{SECOND}/checkpoints/x"
    assert get_latest_model("0123456", cache_dir=tmp_path)[1] == 3
    client.delete_run(OTHER)
    assert complete("012345@best", None) == f"{OTHER}@best"


@pytest.mark.usefixtures("three_runs")
def test_other_references_are_unchanged(workplace: Path) -> None:
    (workplace / "012345").mkdir()
    for ref in ("012345", "01234", "models", OTHER, f"runs:/{OTHER}@best", "models:/net@x", Path("abcdef00")):
        assert complete(ref, None) == ref


@pytest.mark.usefixtures("three_runs")
def test_prefixes_of_no_run_or_several() -> None:
    with pytest.raises(UnresolvedError, match=rf"several run IDs in sqlite:.*{SECOND} \(run 1\), {FIRST} \(run 0\);"):
        complete("abcdef", None)
    with pytest.raises(UnresolvedError, match="'abcdef22' is not a file or folder, nor the start of a run ID in"):
        complete("abcdef22", None)
    with pytest.raises(
        UnresolvedError, match=rf"the start of a run ID in .*, perhaps {OTHER} \(run 2\); `shufflenet runs`"
    ):
        complete("runs:/0123456799", None)
    with pytest.raises(
        UnresolvedError, match=rf"there is no run 0023.* in sqlite:.*, perhaps {OTHER} \(run 2\); --track"
    ):
        resolve(OTHER.replace("0123", "0023", 1))


def test_a_missing_folder_may_look_like_an_id(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # MLflow would try for minutes
    (workplace / "mlflow.db").unlink()
    assert get_latest_model("20261125") == (None, 0)
    assert not (workplace / "mlflow.db").exists()  # nothing is made in order to find nothing in it
    with pytest.raises(TrackingError, match="cannot look for run IDs that begin with 20261125: connection refused"):
        complete("20261125", "http://127.0.0.1:9")


@pytest.mark.long
def test_commands_take_it(
    small_train: Callable[..., dict[str, Any]], shufflenet: Invoke, client: MlflowClient, workplace: Path
) -> None:
    run_id, other = (small_train("--total-iters", 4)["run_id"] for _ in range(2))
    short = run_id[:12]
    for words in (
        ("eval", short),
        ("eval", f"runs:/{short}@4", "--log-to", "none"),
        ("runs", "show", short),
        ("compare", short, f"runs:/{other[:12]}"),
        *(("checkpoints", command, short) for command in ("ls", "verify", "pull")),
        ("checkpoints", "prune", short, "--keep-last", 1, "--dry-run"),
        ("train", "--resume", short),
    ):
        result = shufflenet(*words, "--json")
        assert result.exit_code == 0, result.output
        assert run_id in result.stdout or words[1] in ("ls", "verify", "prune")
    fork_id = small_train("--init-from", f"{short}@4", "--total-iters", 2)["run_id"]
    assert json.loads(client.get_run(fork_id).data.tags["config"])["init_from"] == f"{run_id}@4"
    ambiguous = shufflenet("compare", short, run_id)
    assert (ambiguous.exit_code, f"run {run_id} is given twice" in ambiguous.stderr) == (2, True)
