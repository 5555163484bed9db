"""`shufflenet data`."""

import sys
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

import click

from shufflenet_mlflow.config import check_rule
from shufflenet_mlflow.runtime.text import counted, name_some

from .commands import Group
from .completing import Folder, ImageSet
from .errors import UsageError
from .options import (
    bad_image_option,
    common_options,
    config_option,
    division_options,
    json_option,
    option,
    tracking_uri_option,
)
from .say import say

if TYPE_CHECKING:
    from shufflenet_mlflow.data.checking.report import CheckReport

MOST_CLASSES = 8
MOST_GROUPS = 3
"""Classes of a part, and images or groups of a finding, that are named."""


@click.group(cls=Group)
def data() -> None:
    """Check images; write data sets and mean images.

    \b
    Examples:
      shufflenet data check pets
      shufflenet data digits digits
      shufflenet data split photos pets
      shufflenet data mean pets/train --output pets-mean.npy
    """


@data.command()
@click.argument("folder", metavar="DIR", type=Folder(path_type=Path))
@json_option
@common_options
def digits(folder: Path, as_json: bool) -> None:
    """Write the bundled handwritten digits to DIR, as DIR/train and DIR/val.

    They are 1,797 images of ten classes from scikit-learn, a fifth of them for validation. DIR must be new or empty.

    \b
    Example:
      shufflenet data digits digits
    """
    from shufflenet_mlflow.data.digits import write_digits
    from shufflenet_mlflow.data.folder import list_images

    from .console import next_steps
    from .tables import print_json

    write_digits(folder)
    counts = {part: len(list_images(folder / part)) for part in ("train", "val")}
    if as_json:
        print_json({"directory": str(folder), **counts})
        return
    say(f"{folder}: {counted(counts['train'], 'image')} in train, {counts['val']} in val")
    train, val = (quote(f"{folder}/{part}") for part in ("train", "val"))
    next_steps(f"shufflenet train --train-dir {train} --val-dir {val} --input-size 64")


@data.command()
@click.argument("folder", metavar="DIR", type=ImageSet(path_type=Path))
@click.argument("out", metavar="OUT", type=Folder(path_type=Path))
@division_options
@option("--seed", type=int, metavar="N", section="Data", help="Random seed, as of train.  [default: 0]")
@bad_image_option
@click.option("--manifest", is_flag=True, help="Write a table, the file OUT (.csv), instead of folders.")
@config_option
@json_option
@common_options
def split(
    folder: Path,
    out: Path,
    val_fraction: float | None,
    group_by: str | None,
    seed: int | None,
    on_bad_image: str | None,
    manifest: bool,
    as_json: bool,
) -> None:
    """Divide the images of DIR into training and validation images, as train does without --val-dir.

    DIR holds one folder per class, or is a table of images. OUT must be new; it gets the folders train and val, whose
    files are links to those in DIR where the file system has links, or copies.

    \b
    Examples:
      shufflenet data split photos pets
      shufflenet data split photos pets --group-by 'patient[0-9]+'
      shufflenet data split photos photos.csv --manifest
    """
    if manifest != (out.suffix.lower() == ".csv"):
        raise UsageError(
            f"--manifest and an OUT that ends in .csv belong together, and OUT is {str(out)!r}", code="manifest-suffix"
        )
    from shufflenet_mlflow.workflows.data import run_split

    from .console import ConsoleReporter, next_steps
    from .tables import print_json

    summary = run_split(
        folder,
        out,
        val_fraction=val_fraction,
        group_by=group_by,
        seed=seed,
        as_table=manifest,
        skip_bad=on_bad_image == "skip",
        reporter=ConsoleReporter(),
    )
    if as_json:
        print_json(summary.to_dict())
        return
    counts = ", ".join(f"{count:,} {name}" for name, count in summary.counts.items())
    say(f"{out}: {counts} images ({summary.written_as})")
    if manifest:
        next_steps(f"shufflenet train --train-dir {quote(str(out))}")
    else:
        train, val = (quote(f"{out}/{side}") for side in ("train", "val"))
        next_steps(f"shufflenet train --train-dir {train} --val-dir {val}")


@data.command()
@click.argument("folder", metavar="DIR", type=ImageSet(path_type=Path))
@option("--output", type=click.Path(path_type=Path), help="File to write, .npy or .xml.  [default: mean.npy]")
@option("--input-size", type=int, metavar="PIXELS", help="Input size, a multiple of 32.  [default: 224]")
@option(
    "--workers",
    type=int,
    metavar="N",
    help="Processes that decode images.  [default: one per core, at most 16]",
)
@bad_image_option
@config_option
@json_option
@common_options
def mean(
    folder: Path,
    output: Path | None,
    input_size: int | None,
    workers: int | None,
    on_bad_image: str | None,
    as_json: bool,
) -> None:
    """Compute the mean image of DIR, one folder per class or a table, for shufflenet_v2_large.

    \b
    Example:
      shufflenet data mean pets/train --output pets-mean.npy
      shufflenet train --config pets.toml --mean-image pets-mean.npy
    """
    output = output or Path("mean.npy")
    check_rule("mean_image", output, field="output")
    from shufflenet_mlflow.workflows.data import run_mean

    from .console import ConsoleReporter, next_steps
    from .stopping import stop_flag
    from .tables import print_json

    with stop_flag() as stop:
        summary = run_mean(
            folder,
            output,
            input_size=input_size,
            workers=workers,
            skip_bad=on_bad_image == "skip",
            reporter=ConsoleReporter(),
            stop=stop,
        )
    if as_json:
        print_json(summary.to_dict())
        return
    blue, green, red = summary.mean_BGR
    say(f"{output}: mean of {counted(summary.n, 'image')}, {summary.input_size}x{summary.input_size} pixels")
    say(f"per channel: blue {blue:.2f}, green {green:.2f}, red {red:.2f}")
    next_steps(
        f"shufflenet train --model shufflenet_v2_large --mean-image {quote(str(output))} "
        f"--train-dir {quote(str(folder))} --val-dir DIR"
        + (f" --input-size {summary.input_size}" if input_size is not None else "")
        + (" --on-bad-image skip" if on_bad_image == "skip" else "")
    )


@data.command()
@click.argument("directory", metavar="DIR", type=ImageSet(path_type=Path))
@option("--against", metavar="DIR|RUN", help="Images, or a run's training images, to compare with.  [default: none]")
@option("--out", type=click.Path(path_type=Path), metavar="FILE", help="HTML page with pictures.  [default: none]")
@tracking_uri_option
@config_option
@json_option
@common_options
def check(directory: Path, against: str | None, out: Path | None, tracking_uri: str | None, as_json: bool) -> None:
    """Check the images of DIR before they are trained on. The exit status is 1 if there are problems.

    DIR has one folder per class, or train and val that have those, or is a table of images. Problems make a training
    fail or its figures wrong: images that cannot be read, the same or a similar image in both parts, in two classes or
    in what --against names, and classes that are missing, empty or alike in name. Remarks are the rest: duplicates
    within a class, tiny, extreme or one-coloured images, imbalance, other files.

    \b
    Examples:
      shufflenet data check pets
      shufflenet data check pets --out pets.html
      shufflenet data check pets/test --against 01234567
    """
    from shufflenet_mlflow.workflows.data_check import CheckRequest, run_check

    from .console import ConsoleReporter, next_steps
    from .stopping import stop_flag
    from .tables import print_json

    with stop_flag() as stop:
        report = run_check(CheckRequest(directory, against, out, tracking_uri), reporter=ConsoleReporter(), stop=stop)
    if as_json:
        print_json({**report.to_dict(), "written": str(out) if out is not None else None})
    else:
        say(*_check_lines(report))
        if out is not None:
            say(f"written  {out}")
        elif report.findings:
            named = f" --against {quote(against)}" if against is not None else ""
            next_steps(f"shufflenet data check {quote(str(directory))}{named} --out check.html    shows the images")
    if report.problems:
        sys.exit(1)


def _check_lines(report: "CheckReport") -> list[str]:
    lines = []
    for part in report.parts:
        counts = report.counts(part)
        named = name_some([f"{name} {count:,}" for name, count in counts.items()], MOST_CLASSES)
        lines.append(
            f"{part.root}: {counted(len(part.files), 'image')} of {counted(len(counts), 'class', 'classes')}: {named}"
        )
        if sizes := report.sizes(part):
            smallest, middle, largest = (f"{width}x{height}" for width, height in sizes)
            modes = ", ".join(f"{mode} {count:,}" for mode, count in report.channels(part).items())
            lines.append(f"  {smallest} to {largest} pixels, median {middle}; {modes}")
    for finding in report.findings:
        lines += ["", f"{'PROBLEM' if finding.is_problem else 'remark '}  {finding.text}"]
        for group in finding.groups[:MOST_GROUPS]:
            shown = name_some([look.image.shown for look in group])
            reason = group[0].problem
            lines.append(f"  {shown}" + (f"  ({reason})" if reason is not None else ""))
        if len(finding.groups) > MOST_GROUPS:
            lines.append(f"  and {len(finding.groups) - MOST_GROUPS:,} more; --json lists them all")
    remarks = len(report.findings) - report.problems
    against = f", compared with {report.against}" if report.against is not None else ""
    return [
        *lines,
        "",
        f"{counted(report.problems, 'problem')}, {counted(remarks, 'remark')} on "
        f"{counted(len(report.looks), 'image')}{against}",
    ]
