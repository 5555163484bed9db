"""A visit to the MLflow UI's pages for our runs: for a test, and for the pictures in `docs/`."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from tests.support.browser import Browser


def visit(browser: Browser, client: MlflowClient, runs: Sequence[Run], pictures: Path | None = None) -> None:
    """Open every page that shows or compares runs, and check what it shows; the first run must be evaluated.

    Args:
        pictures: a folder for screenshots, if any are wanted.
    """
    experiment = runs[0].info.experiment_id
    names = [run.info.run_name for run in runs]
    first = runs[0].info.run_id
    model = next(
        iter(client.search_logged_models([experiment], f"source_run_id = '{first}'", max_results=1)),
    )

    def take_picture(name: str, delay: float = 1.5) -> None:
        time.sleep(delay)  # charts are drawn after their titles
        if pictures is not None:
            browser.picture(pictures / f"{name}.png")

    browser.open(f"/#/experiments/{experiment}/runs?workflowType=machine_learning", *names)
    take_picture("table")

    browser.open(
        f"/#/experiments/{experiment}/runs?compareRunsMode=CHART&workflowType=machine_learning",
        *names,
        "best",
        "train",
        "val",
    )
    browser.count(".js-plotly-plot", 1)  # best/val_top1 comes first; charts are drawn once they are in sight
    browser.scroll_to("val")
    browser.count(".js-plotly-plot", 3)
    take_picture("chart", 4)

    ids = json.dumps([run.info.run_id for run in runs])
    browser.open(
        f'/#/compare-runs?runs={ids}&experiments=["{experiment}"]&workflowType=machine_learning',
        "Parallel Coordinates Plot",
        *names,
    )
    browser.wait_for("label_smooth", "best/val_top1")
    take_picture("compare", 4)

    browser.open(f"/#/experiments/{experiment}/models?workflowType=machine_learning", *names, "Ready", str(model.name))
    take_picture("models")

    browser.open(
        f"/#/experiments/{experiment}/runs/{first}?workflowType=machine_learning",
        names[0],
        "Result:",
        "shufflenet train",
        "val/top1",
    )
    take_picture("run")

    browser.open(f"/#/experiments/{experiment}/runs/{first}/model-metrics?workflowType=machine_learning", "best")
    browser.scroll_to("val")
    browser.count(".js-plotly-plot", 2)
    take_picture("metrics", 4)

    browser.open(
        f"/#/experiments/{experiment}/runs/{first}/artifacts?workflowType=machine_learning",
        "checkpoints",
        "evaluation",
        "config.json",
    )
    take_picture("artifacts")

    [data] = client.list_artifacts(first, "figures")
    [checkpoint] = client.list_artifacts(first, data.path)
    for name in ("figures", data.path.rpartition("/")[2], checkpoint.path.rpartition("/")[2], "confusion.png"):
        browser.click(name)
    browser.count("img[src^='blob:'], img[src*='confusion']", 1)
    take_picture("figure")

    browser.open(
        f"/#/experiments/{experiment}/models/{model.model_id}?workflowType=machine_learning",
        str(model.name),
        "val/top1",
        names[0],
    )
    take_picture("model")


def picture_of_page(page: Path, picture: Path) -> None:
    """Save a page of `compare --out`, from the verdict to the curves."""
    browser = Browser(page.absolute().as_uri(), width=1180)
    try:
        browser.wait_for("at the end", "%")
        height = "document.querySelector('.readout').getBoundingClientRect().bottom + outerHeight - innerHeight + 2"
        browser.driver.set_window_size(1180, round(browser.driver.execute_script(f"return {height}")))
        time.sleep(1)
        browser.picture(picture)
    finally:
        browser.close()


def shrink(picture: Path) -> None:
    """Save a picture again in a few colours, which screens have: a third of the bytes."""
    with Image.open(picture) as image:
        image.convert("RGB").quantize(96, dither=Image.Dither.NONE).save(picture, optimize=True)


def main() -> None:
    """Take pictures of an experiment's runs, and of a page of `compare --out`.

    `python -m tests.support.ui_pages URI FOLDER EXPERIMENT [PAGE]`; those in `docs/` are `chart.png`, `metrics.png` as
    `run.png`, `models.png`, `figure.png` as `evaluation.png`, and `page.png` as `compare.png`.
    """
    uri, folder, name = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    folder.mkdir(parents=True, exist_ok=True)
    if sys.argv[4:]:
        picture_of_page(Path(sys.argv[4]), folder / "page.png")
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None, f"no experiment {name}"
    browser = Browser(uri)
    try:
        visit(browser, client, client.search_runs([experiment.experiment_id], order_by=["start_time ASC"]), folder)
    finally:
        browser.close()
    for picture in folder.glob("*.png"):
        shrink(picture)


if __name__ == "__main__":
    main()
