"""The images of a training run: listed, and compared with those of the checkpoint."""

from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import Any

from shufflenet_mlflow.data.datasets import list_sides
from shufflenet_mlflow.data.division import Sides
from shufflenet_mlflow.data.folder import NEW_SUFFIXES, same_names, with_same_classes
from shufflenet_mlflow.data.headers import bad_headers
from shufflenet_mlflow.data.holding_out import hold_out
from shufflenet_mlflow.data.identity import DataIdentity
from shufflenet_mlflow.data.listing import ImageListing
from shufflenet_mlflow.data.sampler import BalancedOrder, SampleOrder
from shufflenet_mlflow.errors import BadImageError, DataError, ResumeError
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.runtime.text import counted
from shufflenet_mlflow.training.data import TrainData
from shufflenet_mlflow.workflows.training.attempts import Attempt
from shufflenet_mlflow.workflows.training.config import Choices, stored_preprocess

SIDES = {"train": "training", "val": "validation"}
"""Side as entries of a checkpoint name it -> as messages do."""


@dataclass
class Listed:
    """Images that this process has listed and checked; a study's trials share them."""

    sides: dict[tuple[Any, ...], Sides] = field(default_factory=dict)
    """By what was asked for."""
    checked: set[tuple[str, str]] = field(default_factory=set)
    """Digests of the listings whose files have been looked into."""

    def is_checked(self, data: TrainData) -> bool:
        """Whether these images have been looked into; from now on they have."""
        digests = data.train.digest, data.val.digest
        known = digests in self.checked
        self.checked.add(digests)
        return known


def list_data(choices: Choices, cache_dir: Path | None, reporter: Reporter, listed: Listed | None = None) -> TrainData:
    """List the training and validation images, unless that has been done.

    Raises:
        DataError: a folder cannot be used, the two have different classes, or there are too few images.
    """
    folders, division = (choices.train_dir, choices.val_dir), ("val_fraction", "group_by")
    asked = {name: choices.options.get(name) for name in division}
    key = (*folders, *asked.values(), choices.seed, choices.skip_bad_images)
    known = {} if listed is None else listed.sides
    if key not in known:
        known[key] = list_sides(
            *folders,
            **asked,
            seed=choices.seed,
            skip_bad=choices.skip_bad_images,
            cache_dir=cache_dir,
            reporter=reporter,
        )
    sides = known[key]
    train, val = sides.train.without_columns(), sides.val.without_columns()
    if choices.spec.is_supernet:
        train, scoring = hold_out(sides.train, sides.division, choices.seed, option="--train-dir")
        reporter.note(f"{counted(len(scoring), 'training image')} held out, on which a search scores its networks")
    if len(train.classes) == 1:
        reporter.note(f"{str(train.source)!r} has one class only; a classifier needs at least two")
    if choices.train_dir is not None and train.digest == val.digest and train.root == val.root:
        reporter.warn("--train-dir and --val-dir are the same folder: validation says nothing about other images")
    order = SampleOrder(len(train), choices.batch_size, choices.seed)
    if choices.options.get("balance", choices.recipe["balance"]) == "sampler":
        order = BalancedOrder(len(train), choices.batch_size, choices.seed, labels=train.samples.labels)
    return TrainData(train, val, order, choices.micro_batches, choices.preprocess, sides.division)


def warn_of_overlap(data: TrainData, reporter: Reporter) -> None:
    """Say how many validation images are training images too; only of sets whose content is read anyway."""
    train, val = data.train, data.val
    if train.digest == val.digest or not (train.is_small and val.is_small):
        return
    trained_on = set(train.image_digests)
    known = sum(digest in trained_on for digest in val.image_digests)
    if known:
        reporter.warn(
            f"{known:,} of {counted(len(val), 'validation image')} {'is' if known == 1 else 'are'} among the training "
            "images, so the accuracy on them is too high; `shufflenet data check` names them"
        )


def named_as_before(attempt: Attempt, data: TrainData) -> TrainData:
    """Return the data with names, labels and order as in the checkpoint, if only their form of Unicode differs; without
    the formats that version 0.1 left out, if the run began without them.

    A folder that was copied from another system may have its names in the other form.
    """
    point, train = attempt.resume_point, data.train
    if point is None:
        return data
    stored, classes = point.payload.get("data", {}), point.payload["class_to_idx"]
    train = _as_before(stored.get("train_digest"), train)
    if not same_names(classes, train.class_to_idx):
        return data
    with suppress(DataError):  # of the same names in another order, which `check_same_data` refuses
        train = with_same_classes(classes, train, expected_in="", option="")
        val = _as_before(stored.get("val_digest"), data.val)
        val = with_same_classes(train.class_to_idx, val, expected_in="", option="")
        return replace(data, train=train, val=val, order=data.order.over(train.samples.labels))
    return data


def check_same_classes(attempt: Attempt, data: TrainData) -> None:
    """Compare the classes with those of the checkpoint, of which not even a fork may have others.

    Raises:
        DataError: they differ.
    """
    point = attempt.resume_point
    if point is None:
        return
    ref = f"runs:/{point.run_id}" if point.run_id is not None else str(point.path)
    with_same_classes(
        point.payload["class_to_idx"],
        data.train,
        expected_in=f"the checkpoint {str(point.path)!r}",
        option="--train-dir",
        way_out=f"`shufflenet train --init-from {quote(ref)}` trains its weights on other classes, as a new run",
    )


def _as_before(digest: object, listing: ImageListing) -> ImageListing:
    """Return the listing in the form in which it has that digest, if it has in one.

    Its names can be in another form of Unicode, and version 0.1 left out images of some formats.
    """
    found = listing.in_form_of(digest)
    if digest is None or found.digest == digest or listing.table is not None:
        return found
    older = listing.without(NEW_SUFFIXES).in_form_of(digest)
    return older if older.digest == digest else listing


def check_headers(attempt: Attempt, data: TrainData, reporter: Reporter, *, skip: bool) -> None:
    """Find unreadable files before the first iteration, validation images first; only count them if they are skipped.

    A run that continues on the images that it began with has done so already.

    Raises:
        BadImageError: there is one, and it is not to be skipped.
    """
    point = attempt.own_point
    stored = point.payload.get("data", {}) if point is not None else {}
    if all(
        stored.get(f"{part}_digest") == listing.digest for part, listing in (("train", data.train), ("val", data.val))
    ):
        return
    bad = bad_headers([data.val, data.train], data.preprocess.reading)
    if bad and skip:
        reporter.warn(f"{counted(len(bad), 'file is', 'files are')} not readable, and will be skipped")
    elif bad:
        more = f" (and {counted(len(bad) - 1, 'more file', 'more files')})" if len(bad) > 1 else ""
        raise BadImageError(f"{bad[0]}{more}; remove it or pass --on-bad-image skip", code="image-header-unreadable")


def check_same_data(
    attempt: Attempt, data: TrainData, reporter: Reporter, *, may_differ: bool, is_leader: bool = True
) -> dict[str, tuple[Any, Any]]:
    """Compare images and mean image with those that the checkpoint was trained on; only a fork may have others.

    Args:
        may_differ: `--changed-data`: take others, though the run is the same.
        is_leader: only the leader reads the files' content; the others compare their listings with its own.

    Returns:
        What differs: name -> (then, now).

    Raises:
        ResumeError: the training images, the validation images, or the mean images differ.
    """
    point = attempt.resume_point
    if point is None:
        return {}
    may_differ = may_differ or attempt.is_fork
    changes: dict[str, tuple[Any, Any]] = {}
    if not data.preprocess.has_mean_of(stored_preprocess(point)):
        if not may_differ:
            raise ResumeError(
                "--mean-image is not the one that the run began with; leave it out, pass --new-run, or take it with "
                "--changed-data",
                code="mean-image-changed",
            )
        changes["mean_image_content"] = ("another", "this one")
    stored = point.payload.get("data", {})
    unknown = []
    for part, listing in (("train", data.train), ("val", data.val)):
        before = DataIdentity.from_payload(stored, part)
        if not before.is_known:
            unknown.append(SIDES[part])
            continue
        change = before.difference(listing, with_content=is_leader)
        if change is None:
            continue
        is_divided = listing.source == data.train.source
        source = f"--{'train' if is_divided else part}-dir {str(listing.source)!r}"
        words = f"{SIDES[part]} " if is_divided and part == "val" else ""
        if not may_differ:
            text = (
                f"{source} does not hold the {words}images that the run began with: {change}; "
                "put them back, pass --new-run, or take them with --changed-data"
            )
            if part == "train":
                raise ResumeError(text, code="train-images-changed")
            raise ResumeError(text, code="val-images-changed")
        reporter.warn(f"{source} holds other {words}images than before: {change}")
        changes[f"{part}_images"] = before.shown, DataIdentity.of(listing, with_content=is_leader).shown
    if unknown:
        reporter.note(f"the checkpoint does not say which {' and '.join(unknown)} images it was trained with")
    return changes
