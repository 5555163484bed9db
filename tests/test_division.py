"""One folder is divided into training and validation images: the same way everywhere, and for good."""

import csv
import json
import os
import random
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient

from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.data.datasets import list_sides
from shufflenet_mlflow.data.division import Division, Sides, divide
from shufflenet_mlflow.data.folder import list_images
from shufflenet_mlflow.data.listing import ImageListing, Samples
from shufflenet_mlflow.errors import DataError, ResumeError
from shufflenet_mlflow.workflows.train import run_training
from shufflenet_mlflow.workflows.training.request import TrainRequest
from tests.support.command_line import Invoke
from tests.support.images import write_images
from tests.support.training import Reporter, StopFlag

RULE = Division()
PINNED = ["a/00001.jpg", "a/00006.jpg", "a/00011.jpg", "b/00003.jpg", "b/00009.jpg", "b/00010.jpg", "ä/2.jpg"]


def listing_of(*paths: str) -> ImageListing:
    """Return a listing of files that need not exist, whose classes are the first folders."""
    classes = sorted({path.split("/")[0] for path in paths})
    samples = [(path, classes.index(path.split("/")[0]), 1) for path in sorted(paths)]
    return ImageListing(Path("photos"), tuple(classes), Samples.of(samples))


def many(count: int, classes: str = "ab") -> list[str]:
    return [f"{name}/{number:05}.jpg" for name in classes for number in range(count)]


def paths(listing: ImageListing) -> set[str]:
    return {sample.path for sample in listing.samples}


def val_of(listing: ImageListing, rule: Division = RULE) -> set[str]:
    sides = divide(listing, rule, option="DIR")
    assert paths(sides.train) | paths(sides.val) == paths(listing)
    assert len(sides.train) + len(sides.val) == len(listing)
    return paths(sides.val)


def test_each_class_has_about_its_share() -> None:
    for fraction in (0.1, 0.2, 0.5):
        val = val_of(listing_of(*many(2000)), Division(fraction))
        counts = Counter(path[0] for path in val)
        for name in "ab":
            assert abs(counts[name] / 2000 - fraction) < 0.03


def test_the_same_seed_gives_the_same_and_another_seed_another() -> None:
    listing = listing_of(*many(500))
    assert val_of(listing) == val_of(listing)
    other = val_of(listing, Division(seed=1))
    assert 0.1 < len(other & val_of(listing)) / len(other) < 0.3  # as chance has it


def test_the_sides_are_the_same_everywhere() -> None:
    """Pinned: another hash would move the images of every run there is."""
    assert sorted(val_of(listing_of(*many(12), *("ä/1.jpg", "ä/2.jpg")))) == PINNED


def test_images_that_are_added_move_no_other() -> None:
    known = many(50, "abcdefgh")
    val = val_of(listing_of(*known))
    added = [f"{name}/more {number}.jpg" for name in "abcdefgh" for number in range(5)]
    assert val_of(listing_of(*known, *added)) - set(added) == val


def test_a_larger_fraction_only_adds_validation_images() -> None:
    listing = listing_of(*many(300))
    assert val_of(listing, Division(0.1)) < val_of(listing, Division(0.2)) < val_of(listing, Division(0.6))


@pytest.mark.parametrize("fraction", [1e-9, 0.2, 1 - 1e-9])
def test_every_class_is_on_both_sides(fraction: float) -> None:
    listing = listing_of(*(f"{number}/{name}.jpg" for number in range(100) for name in "xy"))
    sides = divide(listing, Division(fraction), option="DIR")
    for side in (sides.train, sides.val):
        assert side.classes == listing.classes
        assert sorted(side.samples.labels.tolist()) == list(range(100))


def test_what_is_moved_for_a_small_class_has_the_hash_closest_to_the_fraction() -> None:
    listing = listing_of(*many(5))
    smallest = val_of(listing, Division(1e-9))
    assert len(smallest) == 2
    for fraction in np.linspace(0.01, 0.99, 50):
        assert smallest <= val_of(listing, Division(float(fraction)))


def test_no_group_is_divided() -> None:
    names = [f"{name}/patient{number % 40}-{number}.jpg" for name in "ab" for number in range(400)]
    sides = divide(listing_of(*names), Division(group_by=r"patient(\d+)"), option="DIR")
    train, val = ({path.split("/")[1].split("-")[0] for path in paths(side)} for side in (sides.train, sides.val))
    assert not train & val
    assert len(train | val) == 40
    assert 3 <= len(val) <= 14
    assert (sides.groups, sides.alone) == (40, 0)


def test_groups_move_together_so_that_every_class_is_on_both_sides() -> None:
    """Patients have images of several classes; whatever the seed, no class may be missing and no patient divided."""
    rng = random.Random(0)
    for seed in range(200):
        names = {f"{name}/p{patient}-{rng.random()}.jpg" for name in "abc" for patient in rng.sample(range(9), 4)}
        sides = divide(listing_of(*names), Division(group_by="p[0-9]", seed=seed), option="DIR")
        assert set(sides.train.samples.labels.tolist()) == set(sides.val.samples.labels.tolist()) == {0, 1, 2}
        train, val = ({path[2:4] for path in paths(side)} for side in (sides.train, sides.val))
        assert not train & val


def test_images_without_a_group_stand_alone() -> None:
    names = [*many(200), *(f"{name}/burst{number % 3}-{number}.jpg" for name in "ab" for number in range(30))]
    listing = listing_of(*names)
    sides = divide(listing, Division(group_by=r"(burst\d)-"), option="DIR")
    assert (sides.groups, sides.alone) == (3, 400)
    assert {path for path in paths(sides.val) if "burst" not in path} == {
        path for path in val_of(listing) if "burst" not in path
    }


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_the_form_of_unicode_does_not_matter(form: Any) -> None:
    names = [f"Kätzchen/{number} é.jpg" for number in range(60)] + [f"b/{number}.jpg" for number in range(60)]
    listing = listing_of(*(unicodedata.normalize(form, name) for name in names))
    for rule in (RULE, Division(group_by=unicodedata.normalize("NFD", r"\d é"))):
        val = {unicodedata.normalize("NFC", path) for path in val_of(listing, rule)}
        assert val == val_of(listing_of(*names), rule)


@pytest.mark.parametrize(
    ("names", "rule", "says"),
    [
        (["a/1.jpg", *many(9, "b")], RULE, "one image only of class 'a'"),
        (many(9), Division(group_by="0"), "all of its 18 images are in one group, '0'"),
        (["a/x1.jpg", "a/x2.jpg", *many(9, "b")], Division(group_by="x"), "one group only of class 'a'"),
        (
            [f"{name}/{group}.jpg" for name, groups in (("a", "12"), ("b", "23"), ("c", "13")) for group in groups],
            Division(group_by="[123]"),
            "do not divide so that class",
        ),
        (many(9, "ab"), Division(group_by="x*"), "matches none of the paths in DIR 'photos', such as 'a/00000.jpg'"),
        (["train/a/1.jpg", "val/a/2.jpg"], RULE, "'train', 'val', which are not classes; give DIR 'photos/train'"),
    ],
)
def test_what_cannot_be_divided(names: list[str], rule: Division, says: str) -> None:
    with pytest.raises(DataError) as caught:
        divide(listing_of(*names), rule, option="DIR")
    assert says in str(caught.value)


# ---------------------------------------------------------------- data split


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Forty small images of two classes, with odd names."""
    folder = write_images(tmp_path / "photos", classes=("Kätzchen", "a dog, 'old'"), per_class=20)
    for number in range(5):
        os.rename(folder / f"Kätzchen/{number:03}.png", folder / f'Kätzchen/burst "{number}", é.png')
    return folder


def sides_of(folder: Path, **rule: Any) -> Sides:
    asked = {"val_fraction": None, "group_by": None, "seed": 0, **rule}
    return list_sides(str(folder), None, **asked, skip_bad=False, cache_dir=None, reporter=Reporter())


def test_validation_images_that_are_not_used_are_named(tmp_path: Path) -> None:
    for name in ("Train", "other", "val"):
        write_images(tmp_path / name, per_class=3)
    for name, warned in (("Train", True), ("other", False)):
        reporter = Reporter()
        rule = {"val_fraction": None, "group_by": None, "seed": 0}
        list_sides(str(tmp_path / name), None, **rule, skip_bad=False, cache_dir=None, reporter=reporter)
        assert bool(reporter.warnings) == warned
        assert not warned or f"{str(tmp_path / 'val')!r} is not used; --val-dir names" in reporter.warnings[0]


def refuse(*_: object) -> None:
    raise OSError(95, "Operation not supported")


@pytest.mark.parametrize(("refused", "kind"), [((), "hard"), (("link",), "symbolic"), (("link", "symlink"), "copies")])
def test_split_writes_the_division_of_train(
    refused: tuple[str, ...], kind: str, photos: Path, shufflenet: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in refused:
        monkeypatch.setattr(os, name, refuse)
    result = shufflenet("data", "split", photos, "pets", "--val-fraction", 0.3, "--seed", 7, "--json")
    assert result.exit_code == 0, result.output
    sides = sides_of(photos, val_fraction=0.3, seed=7)
    document = json.loads(result.stdout)
    assert document["out"] == "pets"
    assert (document["train"], document["val"]) == (len(sides.train), len(sides.val))
    assert document["written_as"].startswith(kind)
    for name, side in (("train", sides.train), ("val", sides.val)):
        assert list_images(Path("pets") / name).content_digest == side.content_digest
    written = next(Path("pets/val").rglob("*.png"))
    original = photos / written.relative_to("pets/val")
    assert written.samefile(original) == (kind != "copies")
    assert written.is_symlink() == (kind == "symbolic")


def test_split_writes_nothing_if_a_file_cannot_be_written(
    photos: Path, shufflenet: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    for function, name in ((os, "link"), (os, "symlink"), (shutil, "copy2")):
        monkeypatch.setattr(function, name, refuse)
    result = shufflenet("data", "split", photos, "pets")
    assert result.exit_code == 1
    assert "cannot write 'pets': Operation not supported" in result.stderr
    assert [path.name for path in Path().iterdir() if "pets" in path.name] == []


def test_split_writes_a_table_that_train_takes(photos: Path, shufflenet: Invoke) -> None:
    table = photos.parent / "pets.csv"
    result = shufflenet("data", "split", photos, table, "--manifest", "--group-by", "burst")
    assert result.exit_code == 0, result.output
    assert "1 group and 35 images without one" in result.stderr
    rows = list(csv.DictReader(table.read_text("utf-8").splitlines()))
    expected = sides_of(photos, group_by="burst")
    assert {row["path"] for row in rows if row["split"] == "val"} == {f"photos/{path}" for path in paths(expected.val)}
    assert {row["group"] for row in rows} == {"", "burst"}
    found = sides_of(table)
    assert found.division is None
    assert paths(found.val) == {f"photos/{path}" for path in paths(expected.val)}
    assert found.train.class_to_idx == expected.train.class_to_idx
    # The table as folders again: no group, no fraction, and the same sides.
    result = shufflenet("data", "split", table, "again")
    assert result.exit_code == 0, result.output
    assert len(list_images("again/val")) == len(expected.val)


# ---------------------------------------------------------------- training


@pytest.fixture
def train(images: Path) -> Callable[..., Any]:
    """Train on one folder, six iterations unless told otherwise."""

    def train(folder: Path | None, reporter: Reporter | None = None, /, **options: Any) -> Any:
        request = {
            name: options.pop(name) for name in ("resume", "save_dir", "new_run", "changed_data") & options.keys()
        }
        given: dict[str, Any] = {"input_size": 32, "batch_size": 8, "total_iters": 6, "val_interval": 3, "workers": 0}
        if folder is not None:
            given["train_dir"] = str(folder)
        if "resume" in request:
            given = {"train_dir": str(folder)} if folder is not None else {}
        return run_training(
            TrainRequest(options={**given, **options}, no_log_models=True, no_system_metrics=True, **request),
            reporter=reporter or Reporter(),
            stop=StopFlag(),
        )

    return train


def test_a_run_keeps_its_division(
    train: Callable[..., Any], tmp_path: Path, shufflenet: Invoke, client: MlflowClient
) -> None:
    photos = write_images(tmp_path / "photos", per_class=12)
    reporter = Reporter()
    summary = train(photos, reporter, val_fraction=0.3, group_by=r"0[01]\d", seed=3, save_dir=Path("models"))
    sides = sides_of(photos, val_fraction=0.3, group_by=r"0[01]\d", seed=3)
    assert (
        f"no --val-dir: {str(photos)!r} is divided into {len(sides.train)} training and {len(sides.val)} validation "
        "images (--val-fraction 0.3; 12 groups)"
    ) in reporter.notes
    payload = read_checkpoint(summary.result.checkpoint)
    assert {name: payload["config"][name] for name in ("val_dir", "val_fraction", "group_by")} == {
        "val_dir": None,
        "val_fraction": 0.3,
        "group_by": r"0[01]\d",
    }
    assert payload["data"]["val_content_digest"] == sides.val.content_digest
    assert payload["data"]["train_content_digest"] == sides.train.content_digest
    run = client.get_run(summary.run_id)
    assert {"val_fraction": "0.3", "group_by": r"0[01]\d", "train_dir": str(photos)}.items() <= run.data.params.items()
    inputs = {entry.tags[0].value: entry.dataset for entry in run.inputs.dataset_inputs}
    assert inputs["validation"].digest == sides.val.content_digest
    assert json.loads(inputs["training"].source)["uri"] == str(photos)

    # Evaluation takes the very same images; the other side on request; and other images are said to be others.
    result = shufflenet("eval", f"{summary.run_id}@latest", "--json", "--log-to", "none")
    assert result.exit_code == 0, result.output
    assert "no longer holds" not in result.stderr
    assert json.loads(result.stdout)["n"] == len(sides.val)
    assert json.loads(result.stdout)["top1"] == pytest.approx(summary.result.val_top1)
    result = shufflenet("eval", "models", "--json", "--log-to", "none", "--split", "train")
    assert json.loads(result.stdout)["n"] == len(sides.train)
    moved = shutil.copytree(photos, tmp_path / "moved")
    result = shufflenet("eval", "models", "--json", "--log-to", "none", "--val-dir", moved, "--split", "val")
    assert json.loads(result.stdout)["n"] == len(sides.val)
    for number in range(20):
        shutil.copy(photos / "red/000.png", photos / f"red/new{number}.png")
    result = shufflenet("eval", "models", "--json", "--log-to", "none")
    assert "no longer holds the run's val images: " in result.stderr and "in class 'red'" in result.stderr


def test_resuming_keeps_the_division(train: Callable[..., Any], tmp_path: Path, shufflenet: Invoke) -> None:
    photos = write_images(tmp_path / "photos", per_class=12)
    whole = train(photos, save_dir=Path("whole"))
    begun = train(photos, save_dir=Path("begun"), save_interval=3)
    resumed = {"resume": f"{begun.run_id}@3", "new_run": True}
    last = train(None, **resumed, save_dir=Path("elsewhere"))  # on another machine, by the run's ID alone
    first, second = (read_checkpoint(summary.result.checkpoint) for summary in (whole, last))
    assert all((first["state_dict"][name] == tensor).all() for name, tensor in second["state_dict"].items())
    assert first["data"] == second["data"]

    # The same sides in two folders, as `data split` writes them, are the same images.
    assert shufflenet("data", "split", photos, "pets").exit_code == 0
    sides = {f"{part}_dir": str(Path("pets", part)) for part in ("train", "val")}
    again = train(None, resume="begun", save_dir=Path("begun"), **sides)
    assert again.was_complete

    for asked in ({"val_fraction": 0.4}, {"group_by": r"0[01]\d"}):
        with pytest.raises(ResumeError, match="cannot be continued with changed --(val-fraction|group-by)"):
            train(None, resume="begun", save_dir=Path("begun"), **asked)

    for name in ("blue", "green", "red"):
        for number in range(20):
            shutil.copy(photos / name / "000.png", photos / name / f"added{number}.png")
    with pytest.raises(ResumeError, match=r"--train-dir '.*photos' does not hold the images that .* --changed-data"):
        train(None, resume="begun", save_dir=Path("begun"))
    reporter = Reporter()
    train(None, reporter, resume="begun", save_dir=Path("begun"), changed_data=True)
    assert any("holds other validation images than before" in text for text in reporter.warnings)


def test_validation_images_from_elsewhere_end_the_division(train: Callable[..., Any], images: Path) -> None:
    begun = train(images / "train", save_dir=Path("begun"))
    fork = {"resume": begun.run_id, "new_run": True, "save_dir": Path("fork"), "total_iters": 8}
    config = read_checkpoint(train(None, **fork, val_dir=str(images / "val")).result.checkpoint)["config"]
    assert (config["val_fraction"], config["val_dir"]) == (None, str(images / "val"))
    fork |= {"resume": "fork", "save_dir": Path("again"), "total_iters": 9}
    config = read_checkpoint(train(None, **fork, val_fraction=0.3).result.checkpoint)["config"]
    assert (config["val_fraction"], config["val_dir"]) == (0.3, None)


def test_copies_on_both_sides_of_a_division(train: Callable[..., Any], tmp_path: Path, shufflenet: Invoke) -> None:
    photos = write_images(tmp_path / "photos", per_class=12)
    for name in ("blue", "green", "red"):
        for number in range(8):
            shutil.copy(photos / name / "000.png", photos / name / f"copy{number}.png")
    reporter = Reporter()
    run_id = train(photos, reporter).run_id
    assert any("among the training images, so the accuracy on them is too high" in text for text in reporter.warnings)
    evaluated = shufflenet("eval", run_id).stderr
    assert "of the run, so its accuracy on them is too high; `shufflenet data check DIR` names them" in evaluated
    assert "training images" not in shufflenet("eval", run_id, "--split", "train").stderr
    report = shufflenet("data", "check", photos)
    assert "within one class; dividing the folder can part them" in report.stdout
