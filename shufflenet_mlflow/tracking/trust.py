"""Addresses that the user has named on this machine: no other one is contacted because a file or a server says so.

MLflow sends its credentials (`MLFLOW_TRACKING_TOKEN`, a user and password, `~/.mlflow/credentials`, netrc) to whichever
address it is given, and creates or migrates whichever database. A folder of checkpoints names its store, and a run
names the place of its artifacts; either may come from a stranger.
"""

import contextlib
import os
import re
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

import platformdirs

from shufflenet_mlflow.errors import TrackingError
from shufflenet_mlflow.tracking.paths import file_of
from shufflenet_mlflow.tracking.redaction import redact
from shufflenet_mlflow.tracking.uris import is_server, stored_uri, uri_in_force

FILE_NAME = "stores"

_LONGEST = 2000
_DEFAULT_PORTS = {"http": 80, "https": 443}
_UNAMBIGUOUS = re.compile(r"[!-\[\]-~]+")
"""Visible ASCII without a backslash: any two parsers read the same host from it."""


def stores_file() -> Path:
    """Return the file of addresses, one per line, which the user may edit."""
    return platformdirs.user_config_path("shufflenet-mlflow") / FILE_NAME


def remember_store(uri: str) -> None:
    """Note a store that the user has named. What cannot be written is asked for again."""
    uri = stored_uri(uri)
    if len(uri) > _LONGEST or "\n" in uri or uri in _remembered():
        return
    path = stores_file()
    with contextlib.suppress(OSError, UnicodeError):
        path.parent.mkdir(parents=True, exist_ok=True)
        # One write to a file opened for appending: nothing is lost when two processes do it at once.
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, f"{uri}\n".encode())
        finally:
            os.close(descriptor)


def uri_of_journal(stored: str | None, asked: str | None) -> str | None:
    """Return the store of a journal: the one asked for, or else the one that the journal names.

    The address in the environment is used if it differs only in its credentials, which a journal does not contain.

    Raises:
        TrackingError: the user has never named the journal's store on this machine.
    """
    if asked or stored is None:
        return asked or os.environ.get("MLFLOW_TRACKING_URI")
    if stored == stored_uri(uri_in_force(None)):
        return os.environ.get("MLFLOW_TRACKING_URI")
    if stored not in _remembered():
        raise TrackingError(
            f"the journal names the store {redact(stored)}, to which nothing was logged from this machine yet: it "
            f"was not contacted; if it is yours, add --tracking-uri {redact(stored)}",
            code="journal-store-unknown",
        )
    return stored


def check_artifact_address(artifact_uri: str, owner: str, tracking_uri: str) -> None:
    """Refuse a place of artifacts that could expose credentials or local files.

    Anyone who may create an experiment on a server chooses where its artifacts are, and every client follows.

    Args:
        owner: ID of the run or logged model. MLflow puts its artifacts into a folder `OWNER/artifacts`.

    Raises:
        TrackingError: it is a server that the user has not named, or a local folder that is not the owner's.
    """
    scheme = artifact_uri.partition(":")[0].lower() if re.match(r"[A-Za-z][\w+.-]*:", artifact_uri) else "file"
    if scheme in ("runs", "models"):  # MLflow would look for another run's, without this check
        raise TrackingError(
            f"the artifacts of {owner} are said to be at {redact(artifact_uri)}, which is not a place; the server's "
            "administrator can say why",
            code="artifact-address",
        )
    if scheme == "file":
        _check_folder(artifact_uri, owner)
    elif scheme in ("http", "https", "mlflow-artifacts"):
        _check_host(artifact_uri, owner, tracking_uri)


def _check_folder(artifact_uri: str, owner: str) -> None:
    parts = file_of(artifact_uri).parts
    if parts[-2:] != (owner, "artifacts") or not re.fullmatch(r"[\w-]+", owner):
        raise TrackingError(
            f"the artifacts of {owner} are said to be in the local folder {artifact_uri}, and only a folder "
            f"{owner}/artifacts is read or written; the server's administrator can say why",
            code="artifact-folder",
        )


def _check_host(artifact_uri: str, owner: str, tracking_uri: str) -> None:
    try:
        place, store = urlsplit(artifact_uri), urlsplit(redact(tracking_uri))
        if not place.netloc:
            return  # by way of the tracking server
        if place.scheme == "mlflow-artifacts":
            place = place._replace(scheme=store.scheme)
        named = [store] if is_server(tracking_uri) else []
        named += [urlsplit(uri) for uri in _remembered() if is_server(uri)]
        known = _UNAMBIGUOUS.fullmatch(artifact_uri) and _origin(place) in map(_origin, named)
    except ValueError:
        known = False
    if not known:
        raise TrackingError(
            f"the artifacts of {owner} are said to be at {redact(artifact_uri)}, a server that you have not named; if "
            f"you trust it, add its address, such as http://HOST:5000, as a line to {str(stores_file())!r}",
            code="artifact-server-unknown",
        )


def _origin(parts: SplitResult) -> tuple[str, str | None, int | None]:
    return parts.scheme, parts.hostname, parts.port or _DEFAULT_PORTS.get(parts.scheme)


def _remembered() -> frozenset[str]:
    try:
        return frozenset(stores_file().read_text("utf-8").splitlines())
    except (OSError, UnicodeError):
        return frozenset()
