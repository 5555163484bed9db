"""Addresses of tracking stores."""

import os
import re
from shlex import quote
from urllib.parse import urlsplit

from shufflenet_mlflow.errors import TrackingError
from shufflenet_mlflow.tracking.paths import (
    DEFAULT_STORE,
    as_typed_for_mlflow,
    mlflow_needs_uri,
    query_of,
    require_unicode,
    store_file,
    store_uri,
)
from shufflenet_mlflow.tracking.redaction import redact

_HOST_AND_PORT = re.compile(r"[\w.-]+:\d+(/|$)")
_SCHEME = re.compile(r"([a-z][\w.-]+)(\+\w+)?:", re.IGNORECASE)  # one letter is a drive

_SCHEME_OF_SERVERS = re.compile(r"https?:", re.IGNORECASE)

_STORES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks", "file")
_REGISTRIES = ("databricks-uc", "uc")


DURABLE_SCHEMES = ("durable+http", "durable+https")
"""Schemes under which `tracking.durable` puts a journal in front of MLflow's own client."""


def server_behind(uri: str) -> str:
    """Return the address without the journal that `durable+http://` puts in front of it; any other one unchanged."""
    return uri[len("durable+") :] if uri.lower().startswith(tuple(f"{scheme}:" for scheme in DURABLE_SCHEMES)) else uri


def is_server(uri: str) -> bool:
    """Whether the store is reached over a network, and may be away."""
    return uri.lower().startswith(("http://", "https://"))


def stored_uri(uri: str) -> str:
    """Return the store's address as a process in another folder can use it; without credentials."""
    file = store_file(uri)
    return redact(uri if file is None else store_uri(file, query_of(uri)))


def uri_in_force(tracking_uri: str | None) -> str:
    """Return the store's address: the given one, or else the one that MLflow itself would use.

    Of `durable+http://…` it is the server: what this package sends has a journal of its own.
    """
    return server_behind(tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_STORE)


def mlflow_command(command: str, uri: str) -> str:
    """Return a command of MLflow's, such as `mlflow runs list`, as it has to be typed here for the store at `uri`."""
    known, typed = os.environ.get("MLFLOW_TRACKING_URI"), as_typed_for_mlflow(uri)
    is_found = typed == known if known else uri == DEFAULT_STORE and not mlflow_needs_uri()
    return command if is_found else f"MLFLOW_TRACKING_URI={quote(redact(typed))} {command}"


def check_store_file(uri: str) -> None:
    """Check an address, and refuse a database file that cannot exist; MLflow would try to open it for minutes."""
    check_address(uri)
    path = store_file(uri)
    if path is None:
        return
    require_unicode(path.absolute())
    if path.is_dir():
        raise TrackingError(
            f"the tracking store {uri} is a folder; name a file in it, such as {uri}/mlflow.db", code="store-is-folder"
        )
    if not path.parent.is_dir():
        raise TrackingError(
            f"the tracking store {uri} is in a folder that does not exist; create it first", code="store-folder-missing"
        )


def check_address(uri: str) -> None:
    """Raise TrackingError for an address that cannot be valid; its server would seem to be away."""
    uri = server_behind(uri)
    if store_file(uri) is not None:
        return
    shown = redact(uri)
    if shown != (bare := shown.strip(" \t\r\n'\"")):
        raise TrackingError(
            f"the tracking store {shown!r} has blanks or quotes around it; write {bare}", code="store-quoted"
        )
    if _HOST_AND_PORT.match(uri):
        raise TrackingError(
            f"the tracking store {shown} lacks its scheme; write http://{shown}", code="store-without-scheme"
        )
    _check_scheme(uri)
    try:
        parts = urlsplit(shown)  # a password may contain anything
        complete = not _SCHEME_OF_SERVERS.match(uri) or (is_server(uri) and parts.hostname and parts.port != 0)
    except ValueError:  # a port beyond 65535, half a bracket
        complete = False
    if not complete or (uri.startswith("sqlite:") and not re.match(r"sqlite://(/.|\?|$)", uri)):
        raise TrackingError(
            f"the tracking store {shown} is not an address; give one such as sqlite:///FOLDER/mlflow.db or http://HOST:5000",
            code="store-address",
        )
    if is_server(uri) and (parts.query or parts.fragment):
        server = f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/")
        raise TrackingError(
            f"the tracking store {shown} is a page, not the address of a server; write {server}", code="store-page"
        )


def _check_scheme(uri: str) -> None:
    """Refuse an address of a kind that MLflow has no store for; it would speak of its model registry."""
    found = _SCHEME.match(uri)
    scheme = found[1].lower() if found else uri
    if scheme in _REGISTRIES:
        raise TrackingError(
            f"the tracking store {redact(uri)} is a model registry and keeps no runs; write databricks or databricks://PROFILE",
            code="store-registry",
        )
    if found is None or scheme in _STORES or scheme in _plugin_schemes():
        return
    raise TrackingError(
        f"MLflow has no tracking store of the kind {redact(uri)}; give one such as sqlite:///FOLDER/mlflow.db, "
        "http://HOST:5000, https://HOST or postgresql://HOST/DATABASE",
        code="store-scheme",
    )


def _plugin_schemes() -> set[str]:
    """Return the kinds of store that installed packages add to MLflow."""
    from importlib.metadata import entry_points

    return {entry.name.lower() for entry in entry_points(group="mlflow.tracking_store")}
