"""`shufflenet data mean` and `shufflenet data split`."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shufflenet_mlflow.config import DEFAULT_BATCH_SIZE, DEFAULT_VAL_FRACTION, SPLITS
from shufflenet_mlflow.data.datasets import columns_divide, list_folder, list_whole, rows_of
from shufflenet_mlflow.data.division import Division, divide, groups_of
from shufflenet_mlflow.data.loader import BadImageLog, default_workers
from shufflenet_mlflow.data.mean import check_output, mean_image, write_mean_image
from shufflenet_mlflow.data.preprocess import REFERENCE_SIZE, Preprocess
from shufflenet_mlflow.data.split_files import write_folders, write_table
from shufflenet_mlflow.errors import DataError
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.runtime.signals import StopFlag


@dataclass(frozen=True)
class MeanSummary:
    """A mean image and its origin."""

    path: Path
    n: int
    """Number of images."""
    input_size: int
    mean_BGR: tuple[float, float, float]
    """Mean over all pixels, on the 0-255 scale."""

    def to_dict(self) -> dict[str, Any]:
        """Return the document of `data mean --json`."""
        return {
            "mean_image": str(self.path),
            "n": self.n,
            "input_size": self.input_size,
            "mean_bgr": list(self.mean_BGR),
        }


def run_mean(
    folder: Path,
    output: Path,
    *,
    input_size: int | None,
    workers: int | None,
    skip_bad: bool,
    reporter: Reporter,
    stop: StopFlag,
) -> MeanSummary:
    """Average the images in `folder` and write the mean image to `output`.

    Raises:
        ShuffleNetError: see `shufflenet_mlflow.errors`.
    """
    check_output(output)
    size = Preprocess("bgr255", REFERENCE_SIZE if input_size is None else input_size).input_size
    listing = list_folder(str(folder), "train", option="DIR", skip_bad=skip_bad, cache_dir=None, reporter=reporter)
    bad_images = BadImageLog(skip=skip_bad)
    mean_HWC = mean_image(
        listing,
        size,
        workers=default_workers(len(listing), DEFAULT_BATCH_SIZE, size) if workers is None else workers,
        bad_images=bad_images,
        reporter=reporter,
        stop=stop,
    )
    write_mean_image(output, mean_HWC)
    blue, green, red = (float(value) for value in mean_HWC.mean((0, 1), dtype=float))
    return MeanSummary(output, len(listing) - len(bad_images.seen), size, (blue, green, red))


@dataclass(frozen=True)
class SplitSummary:
    """Divided images, as they were written."""

    path: Path
    """The folder, or the table."""
    counts: Mapping[str, int]
    """Split -> number of images."""
    written_as: str
    """`hard links`, `symbolic links`, `copies` or `table`."""

    def to_dict(self) -> dict[str, Any]:
        """Return the document of `data split --json`."""
        return {"out": str(self.path), **self.counts, "written_as": self.written_as}


def run_split(
    source: Path,
    out: Path,
    *,
    val_fraction: float | None,
    group_by: str | None,
    seed: int | None,
    as_table: bool,
    skip_bad: bool,
    reporter: Reporter,
) -> SplitSummary:
    """Divide the images of a folder or a table as `train` would, and write them to `out`.

    A table with a column `split` says itself what is for what.

    Raises:
        DataError: see `list_whole`, `divide`, `write_folders` and `write_table`.
    """
    whole = list_whole(str(source), option="DIR", skip_bad=skip_bad, reporter=reporter)
    inside = os.path.realpath(out).startswith(os.path.realpath(whole.root) + os.sep)
    if inside and whole.table is None and not as_table:
        raise DataError(
            f"OUT {str(out)!r} lies in {str(whole.root)!r}, among the classes; name a folder outside of it",
            code="split-into-itself",
        )
    division = Division(DEFAULT_VAL_FRACTION if val_fraction is None else val_fraction, group_by, seed or 0)
    if whole.splits is not None:
        if val_fraction is not None or group_by is not None:
            raise columns_divide(str(source), "DIR")
        present = [split for split in SPLITS if split in set(whole.splits)]
        sides = {split: rows_of(whole, split, option="DIR") for split in present}
    else:
        divided = divide(whole, division, option="DIR")
        if divided.groups is not None:
            reporter.note(f"{str(source)!r} has {divided.groups_in_words()}")
        sides = {"train": divided.train, "val": divided.val}
    counts = {split: len(listing) for split, listing in sides.items()}
    if not as_table:
        return SplitSummary(out, counts, write_folders(out, sides))
    groups = groups_of(whole, division, option="DIR")
    names = None if groups is None else dict(zip((sample.path for sample in whole.samples), groups, strict=True))
    write_table(out, sides, names, images=whole.root)
    return SplitSummary(out, counts, "table")
