"""One Python file out of several modules, for a logged model that has to run without this package."""

import ast
from collections.abc import Sequence
from types import ModuleType

_PACKAGE = __name__.partition(".")[0]


def bundle(modules: Sequence[ModuleType]) -> str:
    """Return the source of `modules`, in order, as one module.

    MLflow takes a single file as the code of a logged model. Its `code_paths` would put this package, or part of it,
    on `sys.path`, where two logged models of different versions, or an installed version of the package, would get
    each other's code.

    Args:
        modules: each imports names of this package only from modules before it, and only as `from ... import name`.

    Raises:
        ValueError: a module imports something of the package that the bundle does not hold.
    """
    known: set[str] = set()
    parts = []
    for module in modules:
        path = str(module.__file__)
        with open(path, encoding="utf-8") as file:
            source = file.read()
        lines = source.splitlines(keepends=True)
        for node in reversed(ast.parse(source).body):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == _PACKAGE:
                if node.module not in known or any(alias.asname for alias in node.names):
                    raise ValueError(f"{path} imports {node.module}, which the bundle does not hold before it")
                del lines[node.lineno - 1 : node.end_lineno]
        known.add(module.__name__)
        parts.append("".join(lines))
    return "\n\n".join(parts)
