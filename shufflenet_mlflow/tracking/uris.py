"""Addresses of tracking stores."""

import os
from pathlib import Path
from urllib.parse import urlsplit

from shufflenet_mlflow.errors import TrackingError
from shufflenet_mlflow.tracking.redaction import redact


def is_server(uri: str) -> bool:
    """Whether the store is reached over a network, and may be away."""
    return uri.startswith(("http://", "https://"))


def stored_uri(uri: str) -> str:
    """Return the store's address as a process in another folder can use it; without credentials."""
    prefix, found, rest = uri.partition("sqlite:///")
    if found and not prefix:
        path, mark, query = rest.partition("?")
        return redact(f"sqlite:///{Path(path).absolute()}{mark}{query}")
    return redact(uri)


def uri_of_journal(stored: str | None, asked: str | None) -> str | None:
    """Return the store of a journal: the one asked for, or else the one that the journal names.

    The environment's address is used if it differs only in its credentials, which a journal does not contain.
    """
    from_environment = os.environ.get("MLFLOW_TRACKING_URI")
    if asked or stored is None or (from_environment and stored_uri(from_environment) == stored):
        return asked or from_environment
    return stored


def uri_in_force(tracking_uri: str | None) -> str:
    """Return the store's address: the given one, or else the one that MLflow itself would use."""
    return tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"


def store_file(uri: str) -> Path | None:
    """Return the file of an embedded store; None for any other store."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None


def _check_database_file(uri: str) -> None:
    """Refuse a database file that cannot exist; MLflow would try to open it for minutes."""
    check_address(uri)
    path = store_file(uri)
    if path is None:
        return
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
    if store_file(uri) is not None:
        return
    try:
        parts = urlsplit(redact(uri))  # a password may contain anything
        complete = not is_server(uri) or (parts.hostname and parts.port != 0)
    except ValueError:  # a port beyond 65535, half a bracket
        complete = False
    if not complete or (uri.startswith("sqlite:") and uri.partition("?")[0] != "sqlite://"):
        raise TrackingError(
            f"the tracking store {redact(uri)} is not an address; give one such as sqlite:///FOLDER/mlflow.db or http://HOST:5000",
            code="store-address",
        )
