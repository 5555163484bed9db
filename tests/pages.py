"""Addresses of the UI's pages, and what each must show for runs of ours: for tests, and for the pictures in `docs/`."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from browser import Browser
from mlflow import MlflowClient
from mlflow.entities import Run


def visit(browser: Browser, client: MlflowClient, runs: Sequence[Run], pictures: Path | None = None) -> None:
    """Look at every page on which runs are compared, and check that it shows them; the first run must be evaluated.

    Args:
        pictures: a folder for what was seen.
    """
    experiment = runs[0].info.experiment_id
    names = [run.info.run_name for run in runs]
    first = runs[0].info.run_id
    model = next(
        iter(client.search_logged_models([experiment], f"source_run_id = '{first}'", max_results=1)),
    )

    def seen(name: str, raise_if_any_failed: float = 1.5) -> None:
        time.sleep(raise_if_any_failed)  # charts are drawn after their titles
        if pictures is not None:
            browser.picture(pictures / f"{name}.png")

    browser.open(f"/#/experiments/{experiment}/runs?workflowType=machine_learning", *names)
    seen("table")

    browser.open(
        f"/#/experiments/{experiment}/runs?compareRunsMode=CHART&workflowType=machine_learning",
        *names,
        "best",
        "train",
        "val",
    )
    browser.count(".js-plotly-plot", 2)
    seen("chart", 4)

    ids = json.dumps([run.info.run_id for run in runs])
    browser.open(
        f'/#/compare-runs?runs={ids}&experiments=["{experiment}"]&workflowType=machine_learning',
        "Parallel Coordinates Plot",
        *names,
    )
    browser.wait_for("label_smooth", "best/val_top1")
    seen("compare", 4)

    browser.open(f"/#/experiments/{experiment}/models?workflowType=machine_learning", *names, "Ready", str(model.name))
    seen("models")

    browser.open(
        f"/#/experiments/{experiment}/runs/{first}?workflowType=machine_learning",
        names[0],
        "Result:",
        "shufflenet train",
        "val/top1",
    )
    seen("run")

    browser.open(f"/#/experiments/{experiment}/runs/{first}/model-metrics?workflowType=machine_learning", "best")
    browser.count(".js-plotly-plot", 2)
    seen("metrics", 4)

    browser.open(
        f"/#/experiments/{experiment}/runs/{first}/artifacts?workflowType=machine_learning",
        "checkpoints",
        "evaluation",
        "config.json",
    )
    seen("artifacts")

    [data] = client.list_artifacts(first, "figures")
    [checkpoint] = client.list_artifacts(first, data.path)
    for name in ("figures", data.path.rpartition("/")[2], checkpoint.path.rpartition("/")[2], "confusion.png"):
        browser.click(name)
    browser.count("img[src^='blob:'], img[src*='confusion']", 1)
    seen("figure")

    browser.open(
        f"/#/experiments/{experiment}/models/{model.model_id}?workflowType=machine_learning",
        str(model.name),
        "val/top1",
        names[0],
    )
    seen("model")


def main() -> None:
    """`python tests/pages.py URI FOLDER`: pictures of the runs in the experiment `shufflenet`, the oldest first."""
    uri, folder = sys.argv[1], Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("shufflenet")
    browser = Browser(uri)
    try:
        visit(browser, client, client.search_runs([experiment.experiment_id], order_by=["start_time ASC"]), folder)
    finally:
        browser.close()


if __name__ == "__main__":
    main()
