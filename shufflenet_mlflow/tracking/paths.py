"""Every URI that is made of a path, and every path that is taken from a URI.

MLflow and SQLAlchemy read the same text in different ways: whether `%41` in a sqlite URI means `A` depends on
SQLAlchemy's version, `?` ends the file's name, MLflow creates the folder that is named before either decodes it, and
decodes the plain paths that it makes of the working directory for artifacts. So the URI of a store is kept and shown
with the path as it is, and MLflow is given one that means this path whatever the versions.
"""

import os
import re
from functools import cache
from hashlib import sha256
from pathlib import Path
from urllib.parse import quote, unquote

from shufflenet_mlflow.errors import TrackingError

DEFAULT_STORE = "sqlite:///mlflow.db"

_EMBEDDED = re.compile(r"sqlite(\+pysqlite)?:///(?!file:|:memory:)(?P<path>.+?)(?P<query>\?[A-Za-z_]\w*=[^?/]*)?", re.S)
"""A query has the form `?name=value`; any other question mark is one in the path."""


def store_file(uri: str) -> Path | None:
    """Return the file of an embedded store; None for any other store.

    That is the path as it stands in the URI. If only the percent-decoded one exists, it is that one: MLflow and other
    programs write a blank as `%20`.
    """
    found = _EMBEDDED.fullmatch(uri)
    if found is None:
        return None
    written, decoded = Path(found["path"]), Path(unquote(found["path"]))
    if written != decoded:
        for exists in (os.path.isfile, lambda path: os.path.isdir(path.parent)):  # unlike Path's, these never raise
            for path in (written, decoded):
                if exists(path):
                    return path
    return written


def store_uri(path: Path, query: str = "") -> str:
    """Return the URI of the embedded store in a file, as it is kept and shown: with the absolute path as it is."""
    return f"sqlite:///{path.absolute()}{query}"


def query_of(uri: str) -> str:
    """Return the query of an embedded store's URI, with its question mark; may be empty."""
    found = _EMBEDDED.fullmatch(uri)
    return (found["query"] or "") if found is not None else ""


def for_mlflow(uri: str) -> str:
    """Return the URI of a store that MLflow and SQLAlchemy, of any version, take for the same file.

    It is absolute: MLflow keeps connections by the URI's text, and the working directory may change.
    """
    file = store_file(uri)
    if file is None:
        return uri
    path, query = str(file.absolute()), query_of(uri)
    if not re.search("[%?]", path):
        return f"sqlite:///{path}{query}"
    # MLflow makes the folder named in `sqlite:///…` without decoding it, and leaves the other spelling alone.
    if _is_decoded():
        return f"sqlite+pysqlite:///{path.replace('%', '%25').replace('?', '%3F')}{query}"
    return f"sqlite+pysqlite:///file:{quote(path)}?uri=true{query.replace('?', '&')}"


@cache
def _is_decoded() -> bool:
    """Whether SQLAlchemy decodes paths, as it does from 2.1 on; then SQLite itself is not asked to do it again."""
    from sqlalchemy.engine import make_url

    return make_url("sqlite:///%41").database == "A"


def as_typed_for_mlflow(uri: str) -> str:
    """Return the URI as it may be typed after `mlflow` in the same folder; a plain relative one stays as it is."""
    file = store_file(uri)
    plain = file is not None and not file.is_absolute() and not re.search("[%?]", str(file))
    return uri if plain else for_mlflow(uri)


def mlflow_needs_uri() -> bool:
    """Whether MLflow, without being told, would look for `mlflow.db` in another folder than this one."""
    return file_uri(Path.cwd()) != f"file://{Path.cwd()}"


def read_only_uri(file: Path) -> str:
    """Return the URI with which Python's `sqlite3` opens a database that must exist."""
    return f"{file_uri(file)}?mode=ro"


def file_uri(path: Path) -> str:
    """Return the URI of a file or folder, percent-encoded; MLflow gets the same path back out of it."""
    return path.absolute().as_uri()


def file_of(uri: str) -> Path:
    """Return the path that MLflow takes a `file:` URI, or a plain path among the addresses of artifacts, for."""
    from mlflow.utils.file_utils import local_file_uri_to_path

    return Path(str(local_file_uri_to_path(uri)))  # type: ignore[no-untyped-call]


def require_unicode(path: Path) -> None:
    """Raise TrackingError for a path that is no text, which neither a URI nor a database can hold."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise TrackingError(
            f"the name of {str(path)!r} is not valid UTF-8, and MLflow cannot keep anything there; rename the "
            "folder, or change to another one",
            code="path-not-unicode",
        ) from error


def artifact_root() -> str | None:
    """Return the folder for the artifacts of a new embedded store; None for MLflow's own, `./mlruns`, as a plain path.

    Where a URI differs from the path, MLflow would later decode the path, or cut it at `#` and `?`.
    """
    require_unicode(Path.cwd())
    return file_uri(Path("mlruns")) if mlflow_needs_uri() else None


def artifact_location(experiment: str) -> str | None:
    """Return the folder for the artifacts of a new experiment in an embedded store; None for MLflow's own.

    Args:
        experiment: its name.
    """
    root = artifact_root()
    if root is None:
        return None
    is_plain = re.fullmatch(r"[A-Za-z][\w-]{0,99}", experiment, re.ASCII)
    return f"{root}/{experiment if is_plain else sha256(experiment.encode()).hexdigest()[:16]}"
