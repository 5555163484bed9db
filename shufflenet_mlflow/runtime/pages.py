"""HTML pages from templates, in which names from files and runs are text and nothing else."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from shufflenet_mlflow.runtime.text import visible


def template(package: str, name: str) -> Template:
    """Return the template `name` in a package's folder."""
    environment = Environment(
        loader=PackageLoader(package, "."),
        autoescape=True,
        finalize=_clean,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _clean(value: Any) -> Any:
    """Escape controls in text that the page shows; what was drawn here stays as it is."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
