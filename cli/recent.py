"""Runs and aliases that commands have met lately, for completion.

Importing MLflow and opening an embedded store takes about three seconds, longer than anyone waits at TAB. So commands
that have a store open note what they see in a small file in the cache folder.
"""

import contextlib
import json
from collections.abc import Mapping
from itertools import islice
from typing import Any

from shufflenet_mlflow.config import default_cache_dir
from shufflenet_mlflow.runtime.files import write_atomically
from shufflenet_mlflow.tracking.uris import stored_uri, uri_in_force

FILE_NAME = "recent.json"
MOST = 50
"""Runs, and aliases, that are kept of a store."""
MOST_STORES = 20
_MOST_BYTES = 1 << 20


def recent(kind: str, uri: str | None) -> dict[str, str]:
    """Return what was met in a store, newest first, with a description: `runs` by ID, `aliases` as NAME@ALIAS."""
    found = _read().get(stored_uri(uri_in_force(uri)))
    entries = found.get(kind) if isinstance(found, dict) else None
    if not isinstance(entries, dict):
        return {}
    return {key: str(text) for key, text in entries.items() if f"{key}{text}".isprintable()}


def remember(
    uri: str | None, *, runs: Mapping[str, str] | None = None, aliases: Mapping[str, str] | None = None
) -> None:
    """Note runs and aliases of a store. Nobody depends on it: what cannot be written is not."""
    entries = {
        "runs": _merged(runs or {}, recent("runs", uri)),
        "aliases": _merged(aliases or {}, recent("aliases", uri)),
    }
    store = stored_uri(uri_in_force(uri))
    stores = {store: entries, **{other: found for other, found in _read().items() if other != store}}
    document = json.dumps(dict(islice(stores.items(), MOST_STORES))).encode()
    path = default_cache_dir() / FILE_NAME
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(document))


def _merged(new: Mapping[str, str], known: Mapping[str, str]) -> dict[str, str]:
    """Return the new entries, with the description they had if they have none now, then the others."""
    described = {key: text or known.get(key, "") for key, text in new.items()}
    return dict(islice({**described, **{key: known[key] for key in known if key not in new}}.items(), MOST))


def _read() -> dict[str, Any]:
    """Return what the file holds; nothing if it is damaged, too large, or not a file."""
    path = default_cache_dir() / FILE_NAME
    try:
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:  # opening a pipe would wait for ever
            return {}
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}
