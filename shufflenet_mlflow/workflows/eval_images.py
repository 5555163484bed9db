"""The images of an evaluation: those that the user names, or those that the run was validated on."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shufflenet_mlflow.data.datasets import evaluation_names, list_folder, list_whole, rows_of
from shufflenet_mlflow.data.division import Division, divide
from shufflenet_mlflow.data.holding_out import HeldOut, hold_out
from shufflenet_mlflow.data.identity import DataIdentity
from shufflenet_mlflow.data.listing import ImageListing
from shufflenet_mlflow.errors import ConfigError
from shufflenet_mlflow.models.search_space import SUPERNETS
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.tracking.names import CONFIG_TAG
from shufflenet_mlflow.workflows.loading import LoadedCheckpoint

if TYPE_CHECKING:
    from shufflenet_mlflow.tracking.client import Run


def as_its_run(loaded: LoadedCheckpoint, run: "Run | None") -> LoadedCheckpoint:
    """Return an exported file with the configuration of its run, which is not in the file; others unchanged."""
    if loaded.exported is None or run is None:
        return loaded
    try:
        config = json.loads(run.data.tags.get(CONFIG_TAG, ""))
    except ValueError:
        return loaded
    return replace(loaded, payload={**loaded.payload, "config": config})


@dataclass(frozen=True)
class EvalImages:
    """The images of an evaluation."""

    directory: str | None
    """Folder or table; None for the bundled digits."""
    part: str | None
    """Such as `val`, if they are not all of it."""
    listing: ImageListing

    @property
    def names(self) -> tuple[str, ...]:
        """Names for them, the best first; see `evaluation_names`."""
        return tuple(evaluation_names(self.directory, self.part))


def list_images_of(
    val_dir: str | None,
    split: str | None,
    loaded: LoadedCheckpoint,
    trained: Mapping[str, Any],
    *,
    skip_bad: bool,
    cache_dir: Path | None,
    reporter: Reporter,
) -> EvalImages:
    """List the images to evaluate on.

    A run that divided its images is evaluated on the validation images of the same division.

    Args:
        val_dir: folder or table that the user names; None for the run's.
        split: `train`, `val` or `test`; None for the validation images, or for all where nothing divides them.
        trained: the checkpoint's configuration, as far as it can be used.
        skip_bad, cache_dir, reporter: see `list_folder`.

    Raises:
        ConfigError: neither the user nor the checkpoint names images, or nothing divides them as `split` asks.
        DataError: they cannot be listed or divided.
    """
    if val_dir is not None:
        whole = list_whole(val_dir, option="--val-dir", skip_bad=skip_bad, reporter=reporter)
        side = _side(whole, split or "val", trained, option="--val-dir", is_whole=split is None)
        return EvalImages(val_dir, _part(whole, split or "val", is_whole=split is None), side.without_columns())
    if "val_dir" not in trained:
        raise ConfigError(
            f"--val-dir is missing: {loaded.source} does not say which images it was validated on",
            code="val-dir-missing",
        )
    part = split or "val"
    is_of_train = trained["val_dir"] is None or part == "train"
    directory, option = trained.get("train_dir" if is_of_train else "val_dir"), "--val-dir"
    named = None if part == "val" else part
    if directory is None:
        if part == "test":
            raise _unknown(part, "the bundled digits")
        listing = list_folder(None, part, option=option, skip_bad=skip_bad, cache_dir=cache_dir, reporter=reporter)
    else:
        option = "the run's --train-dir" if is_of_train else option
        whole = list_whole(directory, option=option, skip_bad=skip_bad, reporter=reporter)
        has_own_val = trained["val_dir"] is not None and part != "test"
        listing = _side(whole, part, trained, option=option, is_whole=has_own_val)
        named = _part(whole, part, is_whole=has_own_val)
    if part == "train" and trained.get("model") in SUPERNETS:
        listing = _held_out(listing, trained, option).train
    listing = listing.without_columns()
    before = DataIdentity.from_payload(_data_of(loaded), part)
    change = before.difference(listing.in_form_of(before.digest)) if before.is_known else None
    if change is not None:
        reporter.warn(f"{str(listing.source)!r} no longer holds the run's {part} images: {change}")
    return EvalImages(directory, named, listing)


def _part(whole: ImageListing, split: str, *, is_whole: bool) -> str | None:
    """Return the split that an evaluation is named after; None if it is of all images."""
    return None if is_whole and whole.splits is None else split


def list_images_of_supernet(
    train_dir: str | None, trained: Mapping[str, Any], *, cache_dir: Path | None, reporter: Reporter
) -> HeldOut:
    """List the images that a supernet was trained on, and those that its training held out.

    Args:
        train_dir: where they are now; None for where they were.
        trained: the checkpoint's configuration.
        cache_dir, reporter: see `list_folder`.

    Raises:
        DataError: they cannot be listed or divided.
    """
    directory, option = train_dir or trained["train_dir"], "--train-dir" if train_dir else "the run's --train-dir"
    skip_bad = trained["on_bad_image"] == "skip"
    if directory is None:
        whole = list_folder(None, "train", option=option, skip_bad=skip_bad, cache_dir=cache_dir, reporter=reporter)
    else:
        whole = list_whole(directory, option=option, skip_bad=skip_bad, reporter=reporter)
        whole = _side(whole, "train", trained, option=option, is_whole=trained["val_dir"] is not None)
    return _held_out(whole, trained, option)


def _held_out(listing: ImageListing, trained: Mapping[str, Any], option: str) -> HeldOut:
    """Divide the training images as the supernet's training did."""
    division = Division(group_by=trained.get("group_by"))
    return hold_out(listing, division, trained.get("seed", 0), option=option)


def _data_of(loaded: LoadedCheckpoint) -> Mapping[str, Any]:
    data = loaded.payload.get("data")
    return data if isinstance(data, dict) else {}


def _side(whole: ImageListing, split: str, trained: Mapping[str, Any], *, option: str, is_whole: bool) -> ImageListing:
    """Return the images of a split: as a table says, or as the run divided its images.

    Args:
        is_whole: the split is all of them, unless a table says otherwise.
    """
    if whole.splits is not None:
        return rows_of(whole, split, option=option)
    if is_whole:
        return whole
    if trained.get("val_fraction") is None or split == "test":
        raise _unknown(split, repr(str(whole.source)))
    division = Division(trained["val_fraction"], trained.get("group_by"), trained.get("seed", 0))
    sides = divide(whole, division, option=option)
    return sides.train if split == "train" else sides.val


def _unknown(split: str, source: str) -> ConfigError:
    return ConfigError(
        f"--split {split}: neither the run nor a column 'split' says which images of {source} those are; leave it out",
        code="split-unknown",
    )
