"""Parsing of the REF that commands take: a file, a folder, a run's checkpoint or a registered model."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shufflenet_mlflow.config import DEFAULT_SAVE_ROOT
from shufflenet_mlflow.errors import UnresolvedError

ID_LENGTH = 32
LONGEST_NUMBER = 18
"""The most digits of an iteration."""
_RUN_ID = re.compile(r"[0-9a-f]{6,32}")
_RUN = re.compile(r"(?P<scheme>runs:/)?(?P<id>[0-9a-f]{6,32})(?:@(?P<which>[^/]*)|/(?P<path>.+))?/?")
_MODEL = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")

EXPORT_SUFFIXES = (".onnx", ".xml", ".pt2")
"""Suffixes of exported files."""

FORMS = (
    "a checkpoint file, a folder of checkpoints, a run ID (6 characters of it or more), runs:/ID, runs:/ID@latest, "
    "runs:/ID@best, runs:/ID@ITERS, models:/NAME@ALIAS or models:/NAME/VERSION"
)


@dataclass(frozen=True)
class RunReference:
    """A checkpoint of an MLflow run."""

    run_id: str
    """May be abbreviated: `tracking.run_ids` finds the full ID."""
    which: Literal["latest", "best"] | int | None = None
    """An integer means the checkpoint after that many iterations; None means the best or the latest, as the command
    prefers."""
    artifact: str | None = None
    """An artifact path, such as `checkpoints/checkpoint-000100.pth.tar`; overrides `which`."""

    @property
    def is_latest(self) -> bool:
        """Whether the newest checkpoint is meant, whichever that is; a run ID alone may mean it."""
        return self.which in (None, "latest") and self.artifact is None

    @property
    def is_bare(self) -> bool:
        """Whether it is a run ID alone."""
        return self.which is None and self.artifact is None


@dataclass(frozen=True)
class ModelReference:
    """A version of a registered model that was made from a checkpoint."""

    name: str
    alias: str | None
    version: str = ""
    """Used if there is no alias."""


Reference = Path | RunReference | ModelReference


def is_run_id(text: str, *, whole: bool = True) -> bool:
    """Whether `text` looks like an MLflow run ID or, unless it has to be `whole`, like an abbreviated one."""
    return _RUN_ID.fullmatch(text) is not None and (len(text) == ID_LENGTH or not whole)


def is_exported(ref: object) -> bool:
    """Whether `ref` is an exported file that exists."""
    return isinstance(ref, str | os.PathLike) and str(ref).lower().endswith(EXPORT_SUFFIXES) and os.path.isfile(ref)


def run_folder(root: Path, run_id: str) -> Path:
    """Return the folder of a run below `root`, never one outside it: a file or a server says what the ID is.

    Raises:
        UnresolvedError: the ID cannot be a folder's name.
    """
    if not re.fullmatch(r"[\w-]{1,100}", run_id):
        raise UnresolvedError(f"{run_id[:100]!r} is not a run ID; `shufflenet runs` lists them", code="run-id-invalid")
    return root / run_id


def default_folder(run_id: str | None) -> Path:
    """Return the folder of a script's checkpoints: `models/RUN_ID`, or `models` without a run."""
    root = Path(DEFAULT_SAVE_ROOT)
    return run_folder(root, run_id) if run_id is not None else root


def parse_reference(ref: str | Path) -> Reference:
    """Parse a REF; an existing path wins over a look-alike run ID.

    Raises:
        UnresolvedError: it is empty, or begins with `runs:` or `models:` but has none of the known forms.
    """
    if not isinstance(ref, str | os.PathLike):
        raise UnresolvedError(f"{ref!r} is neither text nor a path; a checkpoint is {FORMS}", code="reference-type")
    if "\0" in str(ref):
        raise UnresolvedError(f"{str(ref)!r} holds a NUL character; a checkpoint is {FORMS}", code="reference-nul")
    if not str(ref):
        raise UnresolvedError(f"the checkpoint is empty text; a checkpoint is {FORMS}", code="reference-empty")
    if isinstance(ref, Path) or os.path.exists(ref):
        return Path(ref)
    match = _RUN.fullmatch(ref)
    if match and (is_run_id(match["id"]) or match["scheme"] or not match["path"]):
        which = match["which"] or None
        if which in (None, "latest", "best"):
            return RunReference(match["id"], which, match["path"])  # type: ignore[arg-type]
        if which.isdecimal() and len(which) <= LONGEST_NUMBER:
            return RunReference(match["id"], int(which))
        raise UnresolvedError(
            f"{ref!r}: after @ comes latest, best or a number of iterations", code="reference-selector"
        )
    if match := _MODEL.fullmatch(ref):
        return ModelReference(match["name"], match["alias"], match["version"] or "")
    if ref.startswith(("runs:", "models:")):
        raise UnresolvedError(f"{ref!r} is not understood; a checkpoint is {FORMS}", code="reference-syntax")
    return Path(ref)
