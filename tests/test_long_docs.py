"""Every page of the documentation, run from top to bottom as a reader would."""

import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from shufflenet_mlflow.runtime.devices import usable_cores
from tests.support.doc_pages import PAGES, ROOT, Fence, fences
from tests.support.doc_terminal import Terminal, errors_in, write_page_data
from tests.support.durable import entry_points_site
from tests.support.effort import IN_CI

pytestmark = [pytest.mark.long, pytest.mark.alone, pytest.mark.timeout(1800)]

ONLY_IN_FULL_RUN = {
    *(
        "clusters.md",
        "comparing.md",
        "devices.md",
        "migrating.md",
        "performance.md",
        "servers.md",
        "serving.md",
        "troubleshooting.md",
    ),
}
"""Pages that take long, and whose commands other tests have, too."""

Timings = list[tuple[str, float]]
"""Page and line of each block, and the seconds that it took."""


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def runnable(page: Path) -> list[Fence]:
    return [fence for fence in fences(page) if fence.language in ("console", "python") and fence.reason is None]


@pytest.fixture(scope="module")
def page_data(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Path:
    """Write the files of each page's folder, with an empty store, which takes seconds to create."""
    folder = tmp_path_factory.mktemp("page_data")
    write_page_data(folder)
    shutil.copy(empty_database, folder / "mlflow.db")
    return folder


@pytest.fixture(scope="module")
def environment(cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return environment variables: this environment's PATH, no settings of MLflow, options for quick runs."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "SHUFFLENET_"))}
    return {
        **kept,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}",
        "SHUFFLENET_CACHE_DIR": str(cache_dir),
        "SHUFFLENET_INPUT_SIZE": "32",
        "SHUFFLENET_WORKERS": "0",
        "SHUFFLENET_NO_LOG_MODELS": "true",  # promoting and exporting make what they need
        "SHUFFLENET_NO_SYSTEM_METRICS": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # spares eight processes for each server
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": entry_points_site(tmp_path_factory.mktemp("plugin")),
    }


@pytest.fixture
def terminal(page_data: Path, tmp_path: Path) -> Iterator[Terminal]:
    shutil.copytree(page_data, tmp_path / "home")
    terminal = Terminal(tmp_path / "home", tmp_path)
    yield terminal
    terminal.close()


SHOWN_FOLDER = "/data"
"""The folder that pages name in their output."""


def run_page(page: Path, terminal: Terminal, environment: dict[str, str]) -> Timings:
    """Run the blocks of a page, and check that the errors it shows were printed."""
    timings = []
    output = ""
    stale = []
    try:
        for fence in fences(page):
            if fence.language == "text":
                printed = errors_in(output, str(terminal.folder))
                lines = [line for line in errors_in(fence.text, SHOWN_FOLDER) if line not in printed]
                if lines:
                    stale.append("\n".join((f"{fence.where} shows", *lines, "but printed was", *printed)))
            elif fence in runnable(page):
                began = time.monotonic()
                output = terminal.run(fence, environment)
                timings.append((fence.where, time.monotonic() - began))
    finally:
        terminal.close()
    assert not stale, "\n\n".join(stale)
    return timings


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest,
    page_data: Path,
    environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[Path, "Future[Timings]"]]:
    """Run the selected pages, as many at a time as there are cores."""
    items = [item for item in request.session.items if getattr(item, "originalname", "") == "test_a_page_runs"]
    pages = [item.callspec.params["page"] for item in items]
    outcomes = {}
    with ThreadPoolExecutor(usable_cores()) as pool:
        for page in pages:
            folder = tmp_path_factory.mktemp("page")
            shutil.copytree(page_data, folder / "home")
            outcomes[page] = pool.submit(run_page, page, Terminal(folder / "home", folder), environment)
        yield outcomes
        for outcome in outcomes.values():
            outcome.cancel()


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if runnable(page) and not (IN_CI and page.name in ONLY_IN_FULL_RUN)],
    ids=name_of,
)
def test_a_page_runs(page: Path, outcomes: dict[Path, "Future[Timings]"]) -> None:
    """With -s this prints how long each block takes."""
    timings = outcomes[page].result()
    for where, seconds in timings:
        sys.stdout.write(f"{where}: {seconds:.1f} s\n")
    sys.stdout.write(f"{name_of(page)}: {sum(seconds for _, seconds in timings):.1f} s in all\n")


def test_a_block_that_fails_is_named(terminal: Terminal, environment: dict[str, str]) -> None:
    """The message has page, line, commands and output, and the rest of the block is not run."""
    fence = Fence(ROOT / "README.md", 12, "console", "echo before\nshufflenet eval nowhere\ntouch after\n", None)
    with pytest.raises(AssertionError, match=r"README\.md:12: exit status 1") as caught:
        terminal.run(fence, environment)
    assert all(word in str(caught.value) for word in ("shufflenet eval nowhere", "before", "Error:"))
    assert not (terminal.folder / "after").exists()


def test_blocks_share_variables_and_folder(terminal: Terminal, environment: dict[str, str]) -> None:
    page = ROOT / "README.md"
    terminal.run(Fence(page, 1, "console", "export COLOUR='a b'\nmkdir -p in && cd in\n", None), environment)
    terminal.run(Fence(page, 2, "console", 'test "$COLOUR" = "a b"\ntest -d ../pets\n', None), environment)
    terminal.run(Fence(page, 3, "python", 'import os\nassert os.environ["COLOUR"] == "a b"\n', None), environment)
    with pytest.raises(AssertionError, match="AssertionError: no"):
        terminal.run(Fence(page, 4, "python", 'assert 1 > 2, "no"\n', None), environment)


def test_the_newest_run_is_looked_up_when_a_command_begins(terminal: Terminal, environment: dict[str, str]) -> None:
    """Runs with checkpoints come before those without, such as evaluations; OTHER_RUN_ID is the second newest."""
    train = (
        "import mlflow, torch\nfrom shufflenet_mlflow import save_checkpoint\nmlflow.set_experiment('x')\n"
        "for name in ('first', 'second'):\n    with mlflow.start_run(run_name=name):\n"
        "        save_checkpoint({'state_dict': {'w': torch.ones(1)}}, 1, directory=name)\n"
        "with mlflow.start_run(run_name='third'):\n    pass\n"
    )
    page = ROOT / "README.md"
    terminal.run(Fence(page, 1, "python", train, None), environment)
    names = "echo $(shufflenet runs show RUN_ID) / $(shufflenet runs show OTHER_RUN_ID) > names\n"
    terminal.run(Fence(page, 2, "console", names, None), environment)
    newest, _, other = (terminal.folder / "names").read_text().partition(" / ")
    assert "second" in newest
    assert "first" in other
    client = "import mlflow\nassert mlflow.get_run('OTHER_RUN_ID').info.run_name == 'first'\n"
    terminal.run(Fence(page, 3, "python", client, None), environment)
