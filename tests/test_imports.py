"""Imports of each command: people wait for every second of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command_line import small_options
from tests.support.effort import only_in_full_run

PACKAGES = ("bokeh", "matplotlib", "mlflow", "onnx", "scipy", "sklearn", "torch", "torch._dynamo", "torchvision")


def imported(code: str, folder: Path) -> set[str]:
    """Return the slow packages that a process has imported after `code`, run in `folder`."""
    code = f"import json, sys\n{code}\nprint(json.dumps(sorted({set(PACKAGES)!r} & sys.modules.keys())))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=os.environ)
    assert ran.returncode == 0, ran.stderr
    return set(json.loads(ran.stdout.splitlines()[-1]))


IMPORTED = {
    "runs": set(),
    "checkpoints": set(),
    "compare": set(),
    **{job: {"torch"} for job in ("sync", "eval", "train", "predict", "bench", "export")},
}
FAST = ("runs", "train", "eval")


@pytest.mark.parametrize("job", [job if job in FAST else pytest.param(job, marks=pytest.mark.long) for job in IMPORTED])
def test_workflows_import_only_what_they_need(job: str, tmp_path: Path) -> None:
    assert imported(f"import shufflenet_mlflow.workflows.{job}", tmp_path) == IMPORTED[job]


def test_a_wrong_path_is_named_at_once(tmp_path: Path) -> None:
    """The error comes before torch is imported."""
    words = ["predict", "weights", "nowhere.png"]
    code = (
        f"import shufflenet_mlflow.cli as cli\ntry:\n    cli.main({words!r})\nexcept SystemExit as end:\n    print(end)"
    )
    assert imported(code, tmp_path) == set()


FIRST_IMAGE = """
import shufflenet_mlflow.cli as cli
from shufflenet_mlflow.data.preprocess import ToInput

class Reached(BaseException):
    pass

def reached(*_arguments, **_named):
    raise Reached

ToInput.__call__ = reached
try:
    cli.main({words!r}, standalone_mode=False)
except Reached:
    pass
else:
    raise SystemExit("it never came to an image")
"""


@pytest.mark.parametrize("optimizer", ["sgd", pytest.param("adamw", marks=pytest.mark.long)])
def test_a_training_does_not_import_the_compiler(optimizer: str, images: Path, tmp_path: Path) -> None:
    words = [str(word) for word in (*small_options(images), "--optimizer", optimizer)]
    words = ["train", *words, "--no-log-models"]
    code = f"import shufflenet_mlflow.cli as cli\ncli.main({words!r}, standalone_mode=False)"
    assert "torch._dynamo" not in imported(code, tmp_path)


@only_in_full_run
@pytest.mark.long
def test_imports_before_the_first_image(images: Path, tmp_path: Path) -> None:
    """torchvision serves the crops of `release`; MLflow brings scipy and scikit-learn where it finds them."""
    folders = ["--train-dir", str(images / "train"), "--val-dir", str(images / "val"), "--input-size", "32"]
    options = ["--batch-size", "8", "--save-dir", str(tmp_path / "saved"), "--workers", "0", "--augment", "shift"]
    words = ["train", *folders, *options, "--no-system-metrics"]
    brought = {"torch", "mlflow", "scipy", "sklearn"}
    assert imported(FIRST_IMAGE.format(words=words), tmp_path) <= brought
    saved = (
        "from shufflenet_mlflow import create_model, save_checkpoint\n"
        "save_checkpoint({'state_dict': create_model('shufflenet_v2_x0_5', 3).state_dict()}, 1, directory='weights')"
    )
    imported(saved, tmp_path)
    named = ["--model", "shufflenet_v2_x0_5", "--input-size", "32", "--log-to", "none"]
    words = ["eval", "weights", "--val-dir", str(images / "val"), *named]
    assert imported(FIRST_IMAGE.format(words=words), tmp_path) <= brought
    words = ["predict", "weights", str(images / "val"), *named[:4]]
    assert imported(FIRST_IMAGE.format(words=words), tmp_path) == {"torch"}
