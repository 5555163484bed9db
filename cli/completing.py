"""Parameter types that complete networks, runs and checkpoints.

Importing MLflow takes longer than anyone waits at TAB: a server is asked directly, and of any other store there is what
commands have met lately. If anything goes wrong, nothing is offered.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

import click
from click.shell_completion import CompletionItem

from .errors import BadParameter

SECONDS = 2.0
"""A server may take to answer."""
MOST = 50

Found = list[tuple[str, str]]
"""Words that can be typed, each with a description."""


# Parameter types are generic in newer versions of click only: subscripting them would fail in the older ones.


class NetworkName(click.ParamType):  # type: ignore[type-arg]
    """The name of a network."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from shufflenet_mlflow.errors import ModelError
        from shufflenet_mlflow.models.catalog import find_network

        try:
            find_network(value)
            return value
        except ModelError as error:
            raise BadParameter(str(error), ctx, param, code=error.code) from error

    def shell_complete(self, _ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from shufflenet_mlflow.models.catalog import list_models

        return [CompletionItem(name) for name in list_models() if name.startswith(incomplete)]


class Run(click.ParamType):  # type: ignore[type-arg]
    """The ID of a run, or its first characters."""

    name = "run"

    def shell_complete(self, ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return _items(recent_runs(_store(ctx)), incomplete)


class Reference(click.ParamType):  # type: ignore[type-arg]
    """A checkpoint: a file or folder, a run, a registered model."""

    name = "ref"

    def __init__(self, *words: str) -> None:
        self._words = words
        """Values that do not name a checkpoint."""

    def shell_complete(self, ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        words = _items([(word, "") for word in self._words], incomplete)
        if incomplete.startswith("models:/"):
            return _items([(f"models:/{name}", text) for name, text in aliases(_store(ctx))], incomplete)
        if incomplete.startswith("runs:/"):
            return _items([(f"runs:/{run_id}", text) for run_id, text in recent_runs(_store(ctx))], incomplete)
        found = words + _items(recent_runs(_store(ctx)), incomplete)
        return found or [CompletionItem(incomplete, type="file")]


class ImageSet(click.Path):
    """A folder of images or a table of them. The workflow that uses it checks whether it exists."""


class Folder(click.Path):
    """A folder. The workflow that uses it checks whether it exists."""

    def shell_complete(self, _ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="dir")]


NETWORK, RUN, REFERENCE = NetworkName(), Run(), Reference()


def _items(found: Iterable[tuple[str, str]], incomplete: str) -> list[CompletionItem]:
    return [
        CompletionItem(text, help=description or None) for text, description in found if text.startswith(incomplete)
    ]


def _store(ctx: click.Context) -> str:
    from shufflenet_mlflow.tracking.uris import uri_in_force

    return uri_in_force(ctx.params.get("tracking_uri"))


def recent_runs(uri: str) -> Found:
    """Return IDs of the newest runs of the store, with their names; of all experiments."""
    from shufflenet_mlflow.tracking.uris import is_server

    if not is_server(uri):
        return _known_runs(uri)
    experiments = _ask(uri, "experiments/search", {"max_results": 1000}).get("experiments", [])
    query = {
        "experiment_ids": [experiment["experiment_id"] for experiment in experiments],
        "max_results": MOST,
        "order_by": ["attributes.start_time DESC"],
    }
    runs = _ask(uri, "runs/search", query).get("runs", []) if experiments else []
    return [(run["info"]["run_id"], run["info"].get("run_name", "")) for run in runs]


def _known_runs(uri: str) -> Found:
    """Return the runs that commands have met lately, and those with a folder of checkpoints here."""
    from shufflenet_mlflow.checkpoints.references import is_run_id
    from shufflenet_mlflow.config import DEFAULT_SAVE_ROOT

    from .recent import recent

    folders = [path.name for path in Path(DEFAULT_SAVE_ROOT).glob("*") if is_run_id(path.name)]
    return list({**dict.fromkeys(folders, ""), **recent("runs", uri)}.items())


def aliases(uri: str) -> Found:
    """Return NAME@ALIAS of the registered models, with the version that each one names."""
    from shufflenet_mlflow.tracking.uris import is_server

    if not is_server(uri):
        from .recent import recent

        return list(recent("aliases", uri).items())
    models = _ask(uri, "registered-models/search?max_results=100", None).get("registered_models", [])
    return [
        (f"{model['name']}@{alias['alias']}", f"version {alias['version']}")
        for model in models
        for alias in model.get("aliases", [])
    ]


def _ask(uri: str, what: str, document: dict[str, Any] | None) -> dict[str, Any]:
    """Call MLflow's REST interface; with nothing to send it is a GET."""
    import base64
    import json
    import urllib.request

    parts = urlsplit(uri)
    user = os.environ.get("MLFLOW_TRACKING_USERNAME") or unquote(parts.username or "")
    password = os.environ.get("MLFLOW_TRACKING_PASSWORD") or unquote(parts.password or "")
    address = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))
    data = None if document is None else json.dumps(document).encode()
    request = urllib.request.Request(f"{address}/api/2.0/mlflow/{what}", data, {"Content-Type": "application/json"})  # noqa: S310
    if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        request.add_header("Authorization", f"Bearer {token}")
    elif user:
        request.add_header("Authorization", "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:  # noqa: S310 - http or https
            found = json.load(answer)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
