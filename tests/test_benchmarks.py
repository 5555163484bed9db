"""The benchmarks take what they measure from the package: every name that they import is there."""

import ast
import importlib
from pathlib import Path

import pytest

SCRIPTS = sorted(Path(__file__).parents[1].joinpath("benchmarks").glob("*.py"))
OURS = ("shufflenet_mlflow", "tests")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_what_a_benchmark_imports_is_there(script: Path) -> None:
    imports = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.ImportFrom)]
    for node in imports:
        if node.module and node.module.partition(".")[0] in OURS:
            module = importlib.import_module(node.module)
            missing = [name.name for name in node.names if not hasattr(module, name.name)]
            assert not missing, f"{script.name}, line {node.lineno}: {node.module} has no {missing}"
