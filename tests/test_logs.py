"""Warnings of the package are seen whatever others do to the root logger's level."""

import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest

import shufflenet_mlflow

package = logging.getLogger(shufflenet_mlflow.__name__)
child = logging.getLogger(f"{shufflenet_mlflow.__name__}.tracking.courier")


@pytest.fixture(autouse=True)
def levels() -> Iterator[None]:
    root, own = logging.getLogger().level, package._own_level  # type: ignore[attr-defined]
    package.setLevel(logging.NOTSET)
    yield
    logging.getLogger().setLevel(root)
    package.setLevel(own)


@pytest.mark.parametrize(
    ("root", "own", "effective"),
    [
        ("DEBUG", "NOTSET", "DEBUG"),
        ("INFO", "NOTSET", "INFO"),
        ("WARNING", "NOTSET", "WARNING"),
        ("ERROR", "NOTSET", "WARNING"),
        ("CRITICAL", "NOTSET", "WARNING"),
        ("ERROR", "INFO", "INFO"),
        ("INFO", "ERROR", "ERROR"),
        ("ERROR", "CRITICAL", "CRITICAL"),
    ],
)
def test_the_level_in_force(root: str, own: str, effective: str) -> None:
    package.setLevel(own)
    for first in ("DEBUG", root):  # in the middle of a program
        logging.getLogger().setLevel(first)
        child.isEnabledFor(logging.WARNING)  # which remembers the answer
    assert logging.getLevelName(child.getEffectiveLevel()) == effective


def test_logging_that_is_disabled_stays_so(caplog: pytest.LogCaptureFixture) -> None:
    logging.disable(logging.WARNING)
    child.warning("unheard")
    logging.disable(logging.NOTSET)
    assert not caplog.records


def test_autologging_hushes_mlflow_and_not_this_package() -> None:
    script = (
        "import logging, mlflow.pytorch, shufflenet_mlflow\n"
        "mlflow.pytorch.autolog()\n"
        "logging.getLogger('other').warning('unheard')\n"
        "print(logging.getLogger().level)\n"
        "logging.getLogger('shufflenet_mlflow.tracking.courier').warning('heard')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert any(line.rpartition(":")[2] == "heard" for line in done.stderr.splitlines())
    if int(done.stdout) > logging.WARNING:  # as MLflow does with some versions of what it logs
        assert "unheard" not in done.stderr
