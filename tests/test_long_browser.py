"""The UI in a real browser: it shows which run was better, on what data, and what became of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.support.browser import Browser, why_no_browser
from tests.support.command_line import small_options
from tests.support.mlflow_server import Server
from tests.support.processes import finish, start
from tests.support.ui_pages import visit

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(why_no_browser() is not None, reason=str(why_no_browser())),
]


@pytest.fixture
def browser(server: Server) -> Iterator[Browser]:
    browser = Browser(server.uri)
    yield browser
    browser.close()


def test_every_page_shows_our_runs(server: Server, browser: Browser, images: Path, tmp_path: Path) -> None:
    env = {"MLFLOW_TRACKING_URI": server.uri}
    for model, rate in (("shufflenet_oneshot", 0.02), ("shufflenet_v2_x0_5", 0.005)):
        options = [*small_options(images), "--model", model, "--lr", rate, "--no-log-models", "false"]
        trained = finish(
            start(tmp_path / model, "train", *options, "--run-name", f"{model} at {rate}", "--json", env=env)
        )
        finish(start(tmp_path / model, "eval", trained["run_id"], "--json", env=env))
    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("shufflenet").experiment_id
    runs = client.search_runs([experiment], order_by=["start_time ASC"])
    assert len(runs) == 2
    visit(browser, client, runs)
