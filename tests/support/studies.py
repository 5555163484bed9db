"""Small studies on the test images, killed at any moment and gone on with from an empty folder."""

import contextlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from shufflenet_mlflow.config.study import plan_of
from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.tracking.delivery import Deliverer, Delivery
from shufflenet_mlflow.tracking.session import TrackingSession
from shufflenet_mlflow.workflows.tune import TuneSummary, run_tune
from shufflenet_mlflow.workflows.tuning.request import TuneRequest
from tests.support.forked import Child, Report, fork
from tests.support.metrics import steps
from tests.support.training import Reporter

STUDY = "lr"
SPACE = ("lr=log:0.003:0.3", "momentum=0.5,0.9")


def training(images: Path, **more: Any) -> dict[str, Any]:
    """Return options of training for 12 iterations on 36 images, as `small_options` has them."""
    options = {
        "train_dir": str(images / "train"),
        "val_dir": str(images / "val"),
        "input_size": 32,
        "batch_size": 8,
        "total_iters": 12,
        "display_interval": 2,
        "workers": 0,
        **more,
    }
    return {name: value for name, value in options.items() if value is not None}


def study_request(images: Path, save_dir: Path, **more: Any) -> TuneRequest:
    """Return the request of a study of six trials on three rungs: 3, 6 and 12 iterations."""
    asked = {"param": SPACE, "trials": 6, "rungs": 3, "reduction": 2, "generation": 3, "metric": "val/loss"}
    names = (
        *("trials", "rungs", "reduction", "generation", "asynchronous", "sampler", "metric", "direction", "param"),
        "max_parallel",
    )
    asked |= {name: more.pop(name) for name in names if name in more}
    plan = plan_of(asked, training(images, **more.pop("training", {})))
    return TuneRequest(more.pop("study", STUDY), plan, save_dir=save_dir, no_system_metrics=True, **more)


def tune(request: TuneRequest, *, reporter: Reporter | None = None, stop: StopFlag | None = None) -> TuneSummary:
    """Work on a study in this process."""
    return run_tune(request, reporter=reporter or Reporter(), stop=stop or StopFlag())


def decided(summary: TuneSummary) -> str:
    """Return the list of decisions."""
    return summary.report.decisions()


def tune_in_child(request: TuneRequest) -> Child:
    """Work on a study in a forked process, which reports its document and its decisions if it comes to an end."""

    def work(report: Report) -> None:
        summary = tune(request)
        report(json.dumps(summary.to_dict()))
        report(json.dumps(decided(summary)))

    return fork(work)


def killed_after(request: TuneRequest, seconds: float, workers: int) -> list[str] | None:
    """Have workers work on a study, and kill them all after that time; return what one reported that was faster."""
    children = [tune_in_child(request)]
    while len(children) < workers:
        time.sleep(0.3)  # the first one begins the study
        children.append(tune_in_child(request))
    killer = threading.Timer(seconds, kill_all, [[child.pid for child in children]])
    killer.start()
    ends = [child.wait() for child in children]
    killer.cancel()
    for status, lines in ends:
        assert status in (0, signal.SIGKILL), "\n".join(lines)
    return next((lines for status, lines in ends if status == 0), None)


def killed_before_delivery(request: TuneRequest, nth: int) -> Path:
    """Have a worker killed when a value is recorded of which MLflow has not heard; return the folder of the trial.

    Args:
        nth: training whose end stays in its journal.
    """

    def work(report: Report) -> None:
        seal, send_some, wait = TrackingSession.seal, Deliverer.send_some, Delivery.wait
        sealed: list[Path] = []

        def held_back(self: TrackingSession) -> bool:
            sealed.append(self.journal.directory)
            return seal(self)

        def send_unless_held_back(self: Deliverer) -> int:
            if len(sealed) >= nth:
                threading.Event().wait()
            return send_some(self)

        def killed(self: Delivery, *values: Any, **more: Any) -> bool:
            if len(sealed) >= nth and self.journal.directory == sealed[nth - 1]:
                report(str(sealed[nth - 1]))
                os.kill(os.getpid(), signal.SIGKILL)
            return wait(self, *values, **more)

        setattr(TrackingSession, "seal", held_back)  # noqa: B010 - in this process, which does not live long
        setattr(Deliverer, "send_some", send_unless_held_back)  # noqa: B010
        setattr(Delivery, "wait", killed)  # noqa: B010
        tune(request)

    status, lines = fork(work).wait()
    assert status == signal.SIGKILL, "\n".join(lines)
    return Path(lines[-1])


def kill_all(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def without_ids(document: Mapping[str, Any]) -> list[Any]:
    """Return the trials of the document of `tune --json` without their runs."""
    return [{key: value for key, value in trial.items() if key != "run_id"} for trial in document["trials"]]


def check_runs(client: MlflowClient, trials: int, experiment_name: str = "shufflenet") -> None:
    """Check that there are one parent and its trials, each once and ended, with every point once."""
    experiment = client.get_experiment_by_name(experiment_name)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "study.plan" in run.data.tags]
    assert len(parents) == 1, [(run.info, run.data.tags) for run in parents]
    [parent] = parents
    children = [run for run in runs if run.info.run_id != parent.info.run_id]
    assert sorted(int(run.data.tags["study.trial"]) for run in children) == list(range(trials))
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert parent.info.status == "FINISHED"
    for run in children:
        complete = run.data.tags["study.state"].startswith("complete")
        assert complete or run.data.tags["study.state"].startswith("pruned at rung")
        assert run.info.status == ("FINISHED" if complete else "KILLED")
    for run in runs:
        for name in run.data.metrics:
            found = steps(client, run.info.run_id, name)
            assert len(found) == len(set(found)), (run.info.run_name, name)


Invoked = Callable[..., Any]


def undisturbed_study(images: Path, folder: Path, empty_database: Path, **options: Any) -> tuple[str, list[Any]]:
    """Return the decisions and the trials of a study that nothing has disturbed, with a store of its own."""
    shutil.copy(empty_database, folder / "mlflow.db")
    summary = tune(study_request(images, folder / "study", tracking_uri=f"sqlite:///{folder}/mlflow.db", **options))
    return decided(summary), without_ids(summary.to_dict())
