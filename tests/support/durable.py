"""Scripts that log through `durable+http://…`, in processes of their own."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def entry_points() -> dict[str, dict[str, str]]:
    """Return the package's entry points for MLflow: group -> name -> object reference."""
    project = tomllib.loads(PYPROJECT.read_text("utf-8"))["project"]
    return {group: names for group, names in project["entry-points"].items() if group.startswith("mlflow.")}


def entry_points_site(folder: Path) -> str:
    """Write the entry points below a folder; return what has to be on `PYTHONPATH` for them to be found.

    An installation may be older than they are.
    """
    metadata = folder / "site" / "durable_entry_points-1.0.dist-info"
    if not metadata.exists():
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: durable-entry-points\nVersion: 1.0\n")
        lines = []
        for group, names in entry_points().items():
            lines += [f"[{group}]", *(f"{name} = {value}" for name, value in names.items())]
        (metadata / "entry_points.txt").write_text("\n".join((*lines, "")))
    return os.pathsep.join((str(metadata.parent), *filter(None, [os.environ.get("PYTHONPATH")])))


def environment(folder: Path, uri: str) -> dict[str, str]:
    """Return the environment of a script whose tracking URI is `uri` with a journal."""
    return {
        **os.environ,
        "MLFLOW_TRACKING_URI": f"durable+{uri}",
        "PYTHONPATH": entry_points_site(folder),
        "OMP_NUM_THREADS": "1",
    }


def start(
    folder: Path, uri: str, code: str, *words: str, env: Mapping[str, str] | None = None
) -> "subprocess.Popen[str]":
    """Start a script in `folder`."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *words],
        cwd=folder,
        env={**environment(folder, uri), **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def sync(folder: Path, *words: str) -> str:
    """Run `shufflenet sync mlflow-journal` in `folder`; return what it printed."""
    command = [sys.executable, "-m", "shufflenet_mlflow", "sync", "mlflow-journal", *words]
    ran = subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout
