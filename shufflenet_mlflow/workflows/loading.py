"""Load the network of a checkpoint reference, for all commands that take one."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shufflenet_mlflow.checkpoints.names import FINAL_TAG
from shufflenet_mlflow.checkpoints.references import is_exported
from shufflenet_mlflow.checkpoints.schema import is_own
from shufflenet_mlflow.config import check_types, option
from shufflenet_mlflow.errors import ConfigError
from shufflenet_mlflow.export.exported import ExportedFile, open_exported
from shufflenet_mlflow.models.loaded import LoadedModel, model_from_payload
from shufflenet_mlflow.models.spec import ModelSpec
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.tracking.connection import Connection
from shufflenet_mlflow.tracking.resolve import resolve, run_of
from shufflenet_mlflow.workflows.options import check_request


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint's network, on the CPU, and its origin."""

    network: LoadedModel
    payload: Mapping[str, Any]
    """The checkpoint's other entries, without tensors."""
    path: Path
    run_id: str | None
    """The run that it belongs to."""
    iters: int
    exported: ExportedFile | None = None
    """The exported file in the place of a checkpoint; its network runs on the CPU."""

    @property
    def source(self) -> str:
        """Name of the checkpoint in messages."""
        return source_of(self.path) if self.exported is None else f"the file {str(self.path)!r}"

    def device(self, requested: str) -> str:
        """Return the device to run on, as `--device` takes it.

        Raises:
            ConfigError: an exported file would have to leave the CPU.
        """
        if self.exported is None:
            return requested
        if requested not in ("auto", "cpu"):
            raise ConfigError(
                f"--device (={requested}): {self.source} runs on the CPU here; leave it out", code="exported-device"
            )
        return "cpu"


def source_of(path: Path) -> str:
    """Return the name of a checkpoint in messages."""
    return f"the checkpoint {str(path)!r}"


def usable_config(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Return the checkpoint's configuration; empty if it is missing or invalid: no command depends on it."""
    config = payload.get("config", {})
    if not isinstance(config, dict):  # a script's own
        return {}
    try:
        check_types(config)
    except ConfigError:
        return {}
    usable = config.get("batch_size", 1) >= 1 and config.get("workers", 0) >= 0
    return config if usable else {}


@dataclass(frozen=True)
class ModelRequest:
    """A checkpoint and its network; None means what the checkpoint itself says."""

    ref: str
    model: str | None = None
    choices: str | None = None
    scales: str | None = None
    input_size: int | None = None
    mean_image: str | None = None
    tracking_uri: str | None = None
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        check_request(vars(self))

    def load(self, store: Connection, reporter: Reporter | None = None) -> LoadedCheckpoint:
        """Load the network of the checkpoint that `ref` names.

        Raises:
            ShuffleNetError: as `resolve`, `read_checkpoint` and `model_from_payload` do.
        """
        if is_exported(self.ref):
            return self._load_exported(Path(self.ref))
        requested = ModelSpec.from_options(vars(self))
        resolved = resolve(self.ref, tracking_uri=store, cache_dir=self.cache_dir, reporter=reporter, prefer_best=True)
        payload = resolved.checkpoint.read()
        network = model_from_payload(
            payload,
            source_of(resolved.path),
            requested=requested,
            input_size=self.input_size,
            mean_image=self.mean_image,
        )
        own = is_own(payload)
        if network.spec.is_supernet and reporter is not None and not resolved.path.name.startswith(FINAL_TAG):
            reporter.warn(
                f"{source_of(resolved.path)} holds BN statistics of many paths: only the last checkpoint of a "
                "supernet's run can be evaluated, on its published path"
            )
        return LoadedCheckpoint(
            network,
            {key: value for key, value in payload.items() if not key.endswith("state_dict")} if own else {},
            resolved.path,
            run_of(resolved.checkpoint) or resolved.run_id,
            payload.get("iters", resolved.iters) if own else resolved.iters,
        )

    def _load_exported(self, path: Path) -> LoadedCheckpoint:
        exported, network = open_exported(path)
        fixed = {"model": network.spec.name, "input_size": network.preprocess.input_size}
        for name in _OF_CHECKPOINTS:
            given = getattr(self, name)
            if given is not None and given != fixed.get(name):
                raise ConfigError(
                    f"{option(name)} (={given}) is for checkpoints: {str(path)!r} is {network.spec.name} for "
                    f"{network.preprocess.input_size} px; leave it out",
                    code="exported-fixed",
                )
        return LoadedCheckpoint(network, {}, path, exported.text("run_id"), exported.iters, exported)


_OF_CHECKPOINTS = ("model", "choices", "scales", "input_size", "mean_image")
