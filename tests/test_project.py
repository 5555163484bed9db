"""Consistency of the project's files: MLproject and the CLI, conda.yaml and pyproject.toml, packaging."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow.projects._project_spec import load_project

import shufflenet_mlflow
from shufflenet_mlflow.cli import main
from shufflenet_mlflow.cli.train import train

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "shufflenet_mlflow"


def read_yaml(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())
    return document


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


# ---------------------------------------------------------------- MLproject and conda.yaml


def test_conda_yaml_agrees_with_pyproject() -> None:
    dependencies = read_yaml("conda.yaml")["dependencies"]
    [pip_list] = [entry["pip"] for entry in dependencies if isinstance(entry, dict)]
    assert pip_list == pyproject()["project"]["dependencies"]
    # Everything outside the pip list would become a pip requirement under uv and virtualenv.
    others = [entry for entry in dependencies if isinstance(entry, str)]
    assert [re.split(r"[=<>]", entry)[0] for entry in others] == ["python", "pip"]


def test_entry_points() -> None:
    project = read_yaml("MLproject")
    assert project["conda_env"] == "conda.yaml"
    assert set(project["entry_points"]) == {"main", "train", "eval", "tune"}
    assert project["entry_points"]["main"] == project["entry_points"]["train"]


NOT_IN_MLPROJECT = {
    "tracking_uri",  # `mlflow run` passes it in the environment
    "experiment",  # `mlflow run --experiment-name`
    "cache_dir",
    "as_json",
    "verbose",
    "quiet",
    "debug",
    "help",
    "help_all",
}


@pytest.mark.parametrize("name", ["train", "eval", "tune"])
def test_mlproject_mirrors_the_command(name: str) -> None:
    entry = read_yaml("MLproject")["entry_points"][name]
    options = {parameter.name: parameter for parameter in main.commands[name].params}
    options.pop("ref", None)
    parameters = dict(entry["parameters"])
    checkpoint = parameters.pop("checkpoint", None)
    assert (checkpoint is not None) == (name == "eval")
    assert set(parameters) == set(options) - NOT_IN_MLPROJECT
    ref = ["REF"] if name == "eval" else []
    words = list(ref)
    for key, parameter in parameters.items():
        flag = f"--{key.replace('_', '-')}"
        assert f"{flag} {{{key}}}" in entry["command"]
        words += [flag, str(parameter.get("default", "lr"))]
    # Passing every default is the same as passing nothing: the defaults are the command's own, in one place.
    command = main.commands[name]
    needed = [*ref, *(["--study", "lr"] if name == "tune" else [])]
    assert command.make_context(name, words).params == command.make_context(name, needed).params


def test_several_params_in_one_text() -> None:
    """As `mlflow run -e tune -P param=…` passes them."""
    words = ["--study", "x", "--param", "lr=log:0.003:0.3 recipe=paper, modern  weight-decay=0:0.1"]
    found = main.commands["tune"].make_context("tune", words).params["param"]
    assert found == ("lr=log:0.003:0.3", "recipe=paper, modern", "weight-decay=0:0.1")


# ---------------------------------------------------------------- packaging


def test_every_package_is_listed() -> None:
    listed = set(pyproject()["tool"]["setuptools"]["packages"])
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in LIBRARY.rglob("__init__.py")}
    assert listed == found | {"shufflenet_mlflow.cli"}


def test_every_exported_name_is_there() -> None:
    assert set(shufflenet_mlflow.__all__) - {"__version__"} == set(shufflenet_mlflow._HOMES)
    for name in shufflenet_mlflow.__all__:
        assert getattr(shufflenet_mlflow, name) is not None
    with pytest.raises(AttributeError, match="module 'shufflenet_mlflow' has no attribute 'nothing'"):
        shufflenet_mlflow.nothing  # noqa: B018


def test_the_root_of_the_package_holds_nothing_loose() -> None:
    assert {path.name for path in LIBRARY.iterdir() if path.is_file()} == {
        *("__init__.py", "__main__.py", "errors.py", "version.py", "py.typed")
    }


def test_tracked_files_name_no_machine() -> None:
    pattern = re.compile(r"(^|[\"'= (:])/(root|home/[a-z]+)/")
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *LIBRARY.rglob("*.py"), *ROOT.glob("cli/*.py")]:
        assert not pattern.search(path.read_text()), path


# ---------------------------------------------------------------- docs/clusters

CLUSTERS = ROOT / "docs" / "clusters"


def train_options() -> set[str]:
    return {word for parameter in train.params for word in parameter.opts}


@pytest.mark.parametrize("path", sorted(CLUSTERS.glob("*.sh")), ids=lambda path: path.name)
def test_cluster_scripts_are_sound(path: Path) -> None:
    """They are valid bash, executable, and pass existing options."""
    subprocess.run(["bash", "-n", path], check=True)
    assert path.stat().st_mode & 0o100
    [command] = re.findall(r"(?:shufflenet|shufflenet_mlflow) train (--.*)", path.read_text())
    assert set(re.findall(r"--[a-z-]+", command)) <= train_options()


def test_the_kubernetes_project_is_sound() -> None:
    """MLflow takes the project, and every word of its command is an option."""
    folder = CLUSTERS / "kubernetes"
    entry = load_project(folder).get_entry_point("main")
    command = entry.compute_command({"train_dir": "/a b"}, None)
    assert set(re.findall(r"--[a-z-]+", command)) <= train_options()
    assert "--train-dir '/a b'" in command
    backend = json.loads((folder / "backend.json").read_text())
    template = yaml.safe_load((ROOT / backend["kube-job-template-path"]).read_text())
    assert template["kind"] == "Job"
    pod = template["spec"]["template"]["spec"]
    grace = float(re.findall(r"--grace (\d+)", command)[0])
    assert pod["terminationGracePeriodSeconds"] >= grace + 10
    [container] = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
