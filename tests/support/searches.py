"""Small searches on the test images, in this process or in one that is killed."""

import json
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shufflenet_mlflow.config.search import SearchPlan, completed
from shufflenet_mlflow.models.search_space import SUPERNET
from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.workflows.search import SearchSummary, run_search
from shufflenet_mlflow.workflows.searching.request import SearchRequest
from tests.support.forked import Child, Report, fork
from tests.support.studies import kill_all
from tests.support.training import Reporter, run

SMALL = {"population": 3, "generations": 2, "top": 2, "bn_images": 16, "batch_size": 8}


def plan(**options: Any) -> SearchPlan:
    """Return the plan of a search with these options or fields, and the published defaults."""
    values = {"macs_limit": 330_000_000, "score_images": 1000, **completed(options)}
    return SearchPlan(**{**values, **{name: options[name] for name in options}})


def train_supernet(images: Path, folder: Path, name: str = SUPERNET) -> Path:
    """Train a supernet for six iterations, and return its last checkpoint."""
    options = ("--model", name, "--total-iters", 6, "--save-interval", 3, "--val-interval", 6)
    summary = run(
        images, *options, "--save-dir", folder / "supernet", "--tracking-uri", f"sqlite:///{folder}/mlflow.db"
    )
    assert summary.result.checkpoint is not None
    return summary.result.checkpoint


def search_request(supernet: Path, save_dir: Path, **more: Any) -> SearchRequest:
    """Return the request of a search of nine candidates."""
    options = {**SMALL, **more.pop("options", {})}
    return SearchRequest(str(supernet), options, save_dir=save_dir, **{"workers": 1, **more})


def search(request: SearchRequest, *, reporter: Reporter | None = None, stop: StopFlag | None = None) -> SearchSummary:
    """Search in this process."""
    return run_search(request, reporter=reporter or Reporter(), stop=stop or StopFlag())


def search_in_child(request: SearchRequest) -> Child:
    """Search in a forked process, which reports its document if it comes to an end."""

    def work(report: Report) -> None:
        report(json.dumps(search(request).to_dict()))

    return fork(work)


def killed_after(request: SearchRequest, seconds: float) -> list[str] | None:
    """Have a process search, and kill it after that time; return what it reported if it was faster."""
    child = search_in_child(request)
    killer = threading.Timer(seconds, kill_all, [[child.pid]])
    killer.start()
    status, lines = child.wait()
    killer.cancel()
    assert status in (0, signal.SIGKILL), "\n".join(lines)
    return lines if status == 0 else None


def listed(folder: Path) -> bytes:
    """Return the list of a search's candidates and scores, byte by byte."""
    return (folder / "candidates.jsonl").read_bytes()


def search_in_own_store(
    make_request: Callable[..., SearchRequest], supernet: Path, folder: Path, database: Path
) -> SearchSummary:
    """Search in `folder`/search, tracked in a store of its own in `folder`, a copy of the empty `database`."""
    shutil.copy(database, folder / "mlflow.db")
    return search(make_request(supernet, folder / "search", tracking_uri=f"sqlite:///{folder}/mlflow.db"))
