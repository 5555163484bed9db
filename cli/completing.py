"""What the shell offers where a network, a run or a checkpoint is to be typed.

A person waits for it at every TAB, and importing MLflow takes seconds: runs are read from the store's file, or asked
of its server, directly. Whatever goes wrong offers nothing.
"""

import contextlib
import os
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import click
from click.shell_completion import CompletionItem

from .errors import BadParameter

SECONDS = 2.0
"""A server may take to answer."""
MOST = 50
DEFAULT_STORE = "sqlite:///mlflow.db"

Found = list[tuple[str, str]]
"""What can be typed, with what is said of it."""


# Parameter types are generic in newer versions of click only: subscripting them would fail in the older ones.


class NetworkName(click.ParamType):  # type: ignore[type-arg]
    """The name of a network; a wrong one is an error before anything heavy is imported."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from shufflenet_mlflow.errors import ModelError
        from shufflenet_mlflow.models.catalog import get_variant

        try:
            return get_variant(value).name
        except ModelError as error:
            raise BadParameter(str(error), ctx, param, code=error.code) from error

    def shell_complete(self, _ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from shufflenet_mlflow.models.catalog import list_models

        return [CompletionItem(name) for name in list_models() if name.startswith(incomplete)]


class Run(click.ParamType):  # type: ignore[type-arg]
    """The ID of a run, or its beginning."""

    name = "run"

    def shell_complete(self, ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return _items(recent_runs(_store(ctx)), incomplete)


class Reference(click.ParamType):  # type: ignore[type-arg]
    """A checkpoint: a file or folder, a run, a registered model."""

    name = "ref"

    def __init__(self, *words: str) -> None:
        self._words = words
        """What may stand there instead of a checkpoint."""

    def shell_complete(self, ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        words = _items([(word, "") for word in self._words], incomplete)
        if incomplete.startswith("models:/"):
            return _items([(f"models:/{name}", text) for name, text in aliases(_store(ctx))], incomplete)
        if incomplete.startswith("runs:/"):
            return _items([(f"runs:/{run_id}", text) for run_id, text in recent_runs(_store(ctx))], incomplete)
        found = words + _items(recent_runs(_store(ctx)), incomplete)
        return found or [CompletionItem(incomplete, type="file")]


class Folder(click.Path):
    """A folder; whether it is there, and is one, is found out where it is used."""

    def shell_complete(self, _ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="dir")]


NETWORK, RUN, REFERENCE = NetworkName(), Run(), Reference()


def _items(found: Iterable[tuple[str, str]], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(text, help=said or None) for text, said in found if text.startswith(incomplete)]


def _store(ctx: click.Context) -> str:
    return ctx.params.get("tracking_uri") or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_STORE


def recent_runs(uri: str) -> Found:
    """IDs of the newest runs of the store, with their names; of all experiments."""
    if uri.startswith("sqlite:///"):
        return _select(
            uri,
            "SELECT run_uuid, name FROM runs WHERE lifecycle_stage = 'active' ORDER BY start_time DESC LIMIT ?",
            (MOST,),
        )
    experiments = _ask(uri, "experiments/search", {"max_results": 1000}).get("experiments", [])
    asked = {
        "experiment_ids": [experiment["experiment_id"] for experiment in experiments],
        "max_results": MOST,
        "order_by": ["attributes.start_time DESC"],
    }
    runs = _ask(uri, "runs/search", asked).get("runs", []) if experiments else []
    return [(run["info"]["run_id"], run["info"].get("run_name", "")) for run in runs]


def aliases(uri: str) -> Found:
    """NAME@ALIAS of the registered models, with the version that each stands for."""
    if uri.startswith("sqlite:///"):
        found = _select(uri, "SELECT name || '@' || alias, version FROM registered_model_aliases ORDER BY 1", ())
        return [(name, f"version {version}") for name, version in found]
    models = _ask(uri, "registered-models/search?max_results=100", None).get("registered_models", [])
    return [
        (f"{model['name']}@{alias['alias']}", f"version {alias['version']}")
        for model in models
        for alias in model.get("aliases", [])
    ]


def _select(uri: str, query: str, values: tuple[Any, ...]) -> Found:
    import sqlite3

    path = uri.removeprefix("sqlite:///").partition("?")[0]
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(
            sqlite3.connect(f"file:{quote(os.path.abspath(path))}?mode=ro", uri=True, timeout=SECONDS)
        ) as store,
    ):
        return [(str(first), str(second or "")) for first, second in store.execute(query, values)]
    return []


def _ask(uri: str, what: str, document: dict[str, Any] | None) -> dict[str, Any]:
    """One call of MLflow's REST interface; with nothing to send it is a GET."""
    if not uri.startswith(("http://", "https://")):
        return {}
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
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:  # noqa: S310 - of these two schemes only
            found = json.load(answer)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
