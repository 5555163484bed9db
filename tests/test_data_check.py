"""`shufflenet data check`, and the warnings of images that were trained on."""

import json
import shutil
import time
import unicodedata
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image, ImageEnhance

from shufflenet_mlflow.data.checking.duplicates import similar_images
from shufflenet_mlflow.data.checking.folders import ImageFile
from shufflenet_mlflow.data.checking.images import Look
from shufflenet_mlflow.data.digests import DIGEST_BYTES, pack, unpack
from shufflenet_mlflow.data.folder import list_images
from tests.support.command_line import Invoke, small_options
from tests.support.images import write_images


def scene(seed: int, size: int = 64) -> Image.Image:
    """Draw something with large and small shapes, as photographs have."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (3, 3, 3)).astype(np.float32)
    pixels = cv2.resize(pixels, (size, size), interpolation=cv2.INTER_CUBIC)
    for _ in range(8):
        centre, colour = rng.integers(0, size, 2).tolist(), rng.integers(0, 256, 3).tolist()
        pixels = cv2.circle(pixels, centre, int(rng.integers(3, size // 3)), colour, -1)
    return Image.fromarray(np.clip(pixels + rng.normal(0, 4, pixels.shape), 0, 255).astype(np.uint8))


def write_scenes(folder: Path, seeds: range) -> None:
    folder.mkdir(parents=True)
    for seed in seeds:
        scene(seed).save(folder / f"{seed:04}.png")


@pytest.fixture
def pets(workplace: Path) -> Path:
    """Write `pets/train` and `pets/val`, 12 and 4 images of two classes, without a flaw."""
    for number, (part, count) in enumerate((("train", 12), ("val", 4))):
        for label, name in enumerate(("cat", "dog")):
            begin = 1000 * number + 100 * label
            write_scenes(Path("pets") / part / name, range(begin, begin + count))
    return Path("pets")


def checked(shufflenet: Invoke, *arguments: object, status: int) -> dict[str, Any]:
    """Return findings by their kind, from the JSON document."""
    result = shufflenet("data", "check", *arguments, "--json")
    assert result.exit_code == status, result.output
    document = json.loads(result.stdout)
    assert document["problems"] == sum(finding["problem"] for finding in document["findings"])
    return {finding["kind"]: finding for finding in document["findings"]}


def names_of(finding: dict[str, Any]) -> list[list[str]]:
    return [
        [str(Path(image["path"]).relative_to(Path.cwd() / "pets")) for image in group] for group in _absolute(finding)
    ]


def _absolute(finding: dict[str, Any]) -> list[list[dict[str, Any]]]:
    return [[{**image, "path": str(Path(image["path"]).absolute())} for image in group] for group in finding["groups"]]


def test_a_set_without_flaws_has_no_findings(pets: Path, shufflenet: Invoke) -> None:
    result = shufflenet("data", "check", pets, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["problems"], document["findings"]) == (0, [])
    train, val = document["parts"]
    assert (train["name"], train["images"], train["classes"]) == ("train", 24, {"cat": 12, "dog": 12})
    assert (val["name"], val["images"], val["classes"]) == ("val", 8, {"cat": 4, "dog": 4})
    assert train["sizes"] == {"smallest": [64, 64], "median": [64, 64], "largest": [64, 64]}
    assert train["channels"] == {"RGB": 24}
    alone = shufflenet("data", "check", pets / "train")
    assert alone.exit_code == 0
    assert "pets/train: 24 images of 2 classes: cat 12, dog 12" in alone.stdout
    assert "0 problems, 0 remarks on 24 images" in alone.stdout


def test_every_kind_of_flaw_is_named(pets: Path, shufflenet: Invoke) -> None:
    train, val = pets / "train", pets / "val"
    (train / "cat" / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    (train / "cat" / "notes.txt").write_text("notes")
    (train / "list.csv").write_text("notes")
    Image.new("RGB", (64, 64), (9, 9, 9)).save(train / "cat" / "black.png")
    scene(1, 400).crop((0, 0, 400, 20)).save(train / "dog" / "long.png")
    shutil.copy(train / "cat" / "0000.png", train / "cat" / "again.png")
    shutil.copy(train / "cat" / "0001.png", val / "cat" / "shared.png")
    shutil.copy(train / "cat" / "0002.png", train / "dog" / "other.png")
    scene(3).resize((90, 90)).save(val / "cat" / "similar.jpg", quality=60)
    scene(4).resize((48, 48)).save(train / "dog" / "similar.jpg", quality=60)
    scene(5).resize((48, 48)).save(train / "cat" / "similar.jpg", quality=60)
    (train / "bird").mkdir()
    (train / "Dog").mkdir()
    shutil.copytree(train / "cat", train / unicodedata.normalize("NFC", "Kätzchen"))
    shutil.rmtree(train / unicodedata.normalize("NFC", "Kätzchen"))
    found = checked(shufflenet, pets, status=1)
    assert {kind: finding["problem"] for kind, finding in found.items()} == {
        **dict.fromkeys(("names-alike", "class-missing", "class-empty", "unreadable"), True),
        **dict.fromkeys(("same-in-parts", "similar-in-parts", "same-in-classes", "similar-in-classes"), True),
        **dict.fromkeys(("same-repeated", "similar-repeated", "constant", "tiny", "extreme", "other-files"), False),
        "not-images": True,
    }
    assert names_of(found["unreadable"]) == [["train/cat/broken.jpg"]]
    assert found["unreadable"]["groups"][0][0]["reason"]
    assert names_of(found["same-in-parts"]) == [["train/cat/0001.png", "val/cat/shared.png"]]
    assert names_of(found["similar-in-parts"]) == [["train/cat/0003.png", "val/cat/similar.jpg"]]
    assert names_of(found["same-in-classes"]) == [["train/cat/0002.png", "train/dog/other.png"]]
    assert names_of(found["similar-in-classes"]) == [["train/cat/0004.png", "train/dog/similar.jpg"]]
    assert names_of(found["same-repeated"]) == [["train/cat/0000.png", "train/cat/again.png"]]
    assert names_of(found["similar-repeated"]) == [["train/cat/0005.png", "train/cat/similar.jpg"]]
    assert names_of(found["constant"]) == [["train/cat/black.png"]]
    assert names_of(found["tiny"]) == names_of(found["extreme"]) == [["train/dog/long.png"]]
    assert "'Dog' and 'dog'" in found["names-alike"]["text"]
    assert found["class-missing"]["text"] == "val lacks the class 'Dog', 'bird'"
    assert found["class-empty"]["text"] == "no image in the class 'Dog', 'bird' in train"


def test_two_forms_of_one_name_are_one_class(pets: Path, shufflenet: Invoke) -> None:
    composed, decomposed = (unicodedata.normalize(form, "Kätzchen") for form in ("NFC", "NFD"))
    (pets / "train" / "cat").rename(pets / "train" / composed)
    (pets / "val" / "cat").rename(pets / "val" / decomposed)
    assert checked(shufflenet, pets, status=0) == {}  # as training takes them
    shutil.copytree(pets / "val" / decomposed, pets / "train" / decomposed)
    assert ascii(decomposed) in checked(shufflenet, pets, status=1)["names-alike"]["text"]


def test_imbalance_and_small_classes(workplace: Path, shufflenet: Invoke) -> None:
    write_scenes(Path("pets/cat"), range(60))
    write_scenes(Path("pets/dog"), range(100, 106))
    found = checked(shufflenet, "pets", status=0)
    assert found["imbalance"]["text"] == "'cat' has 10 times as many images as 'dog' (60 and 6)"
    assert found["few-images"]["text"] == "fewer than 10 images of 'dog'"


def test_planted_duplicates_among_many_images(workplace: Path, shufflenet: Invoke) -> None:
    """20 copies and 20 resized and compressed ones among 600: all are found, nothing else is, in seconds."""
    write_scenes(Path("pets/cat"), range(600))
    copies = Path("pets/dog")
    copies.mkdir()
    for seed in range(0, 200, 10):
        shutil.copy(f"pets/cat/{seed:04}.png", copies / f"{seed:04}-same.png")
    for number, seed in enumerate(range(205, 405, 10)):
        size = (40, 56, 80, 130)[number % 4]
        scene(seed).resize((size, size)).save(copies / f"{seed:04}-similar.jpg", quality=60)
    began = time.monotonic()
    found = checked(shufflenet, "pets", status=1)
    assert time.monotonic() - began < 60
    assert names_of(found["same-in-classes"]) == [
        [f"cat/{seed:04}.png", f"dog/{seed:04}-same.png"] for seed in range(0, 200, 10)
    ]
    assert names_of(found["similar-in-classes"]) == [
        [f"cat/{seed:04}.png", f"dog/{seed:04}-similar.jpg"] for seed in range(205, 405, 10)
    ]
    assert "similar-repeated" not in found


def test_copies_in_grey_and_in_other_light_are_similar(workplace: Path, shufflenet: Invoke) -> None:
    write_scenes(Path("pets/cat"), range(30))
    Path("pets/dog").mkdir()
    scene(1).convert("L").save("pets/dog/0001.png")
    ImageEnhance.Brightness(scene(2)).enhance(0.7).save("pets/dog/0002.png")
    scene(3).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save("pets/dog/0003.png")  # is another picture
    found = checked(shufflenet, "pets", status=1)
    assert names_of(found["similar-in-classes"]) == [
        [f"{name}/000{seed}.png" for name in ("cat", "dog")] for seed in (1, 2)
    ]


def test_groups_reach_across_the_blocks_in_which_images_are_compared() -> None:
    """Chains of similar images are one group, wherever its members stand."""
    rng = np.random.default_rng(0)
    count = 2500
    bits = rng.integers(0, 2, (count, 64)).astype(bool)
    colours = rng.integers(0, 256, (count, 192)).astype(np.uint8)
    chain = [2400, 7, 1100, 2000, 30]
    for before, after in pairwise(chain):
        bits[after], colours[after] = bits[before], colours[before]
        bits[after, :9] ^= True
    looks = [
        Look(ImageFile("", Path(), f"x/{n}"), str(n).encode(), None, 9, 9, "L", 50.0, bits[n], colours[n])
        for n in range(count)
    ]
    (group,) = similar_images(looks)
    assert [int(look.image.path[2:]) for look in group] == sorted(chain)


def test_the_page_holds_the_images_and_runs_nothing(pets: Path, shufflenet: Invoke) -> None:
    hostile = pets / "train" / "<img src=x onerror=alert(1)>"
    shutil.copytree(pets / "train" / "cat", hostile)
    result = shufflenet("data", "check", pets, "--out", "check.html")
    assert result.exit_code == 1, result.output
    assert "written  check.html" in result.stdout
    page = Path("check.html").read_text()
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert page.count("data:image/jpeg;base64,") > 24  # 12 pairs, and examples of the classes
    assert "http" not in page
    again = shufflenet("data", "check", pets)
    assert "--out check.html    shows the images" in again.stderr
    assert "\n  and 9 more; --json lists them all" in again.stdout


# ---------------------------------------------------------------- what was trained on


def test_against_a_folder(pets: Path, shufflenet: Invoke) -> None:
    assert checked(shufflenet, pets / "val", "--against", pets / "train", status=0).keys() == {"few-images"}
    shutil.copy(pets / "train" / "cat" / "0001.png", pets / "val" / "dog" / "shared.png")
    scene(3).resize((90, 90)).save(pets / "val" / "cat" / "similar.jpg", quality=60)
    found = checked(shufflenet, pets / "val", "--against", pets / "train", status=1)
    assert names_of(found["same-in-reference"]) == [["val/dog/shared.png", "train/cat/0001.png"]]
    assert names_of(found["similar-in-reference"]) == [["val/cat/similar.jpg", "train/cat/0003.png"]]
    assert found.keys() == {"same-in-reference", "similar-in-reference", "few-images"}
    own = checked(shufflenet, pets / "val", "--against", pets / "val", status=1)
    assert len(own["same-in-reference"]["groups"]) == 10


def test_against_a_run(
    small_train: Callable[..., dict[str, Any]], images: Path, workplace: Path, shufflenet: Invoke, client: MlflowClient
) -> None:
    """With the training folder on this machine or, by digests alone, without."""
    shutil.copytree(images, "mine")
    run_id = small_train("--train-dir", "mine/train", "--val-dir", "mine/val")["run_id"]
    write_images(Path("new"), per_class=10, seed=5)
    assert checked(shufflenet, "new", "--against", run_id, status=0) == {}
    shutil.copy("mine/train/red/003.png", "new/red/copy.png")
    found = checked(shufflenet, "new", "--against", run_id[:12], status=1)["same-in-reference"]
    assert found["text"] == f"1 image is also among those of run {run_id}"
    assert [image["path"] for image in found["groups"][0]] == [
        "new/red/copy.png",
        str(workplace / "mine/train/red/003.png"),
    ]
    write_images(Path("mine/train/later"), classes=("red",), seed=9)  # it was not trained on
    shutil.copytree("mine/train/later/red", "new/red/later")
    assert len(checked(shufflenet, "new", "--against", run_id, status=1)["same-in-reference"]["groups"]) == 1
    shutil.rmtree("mine")
    found = checked(shufflenet, "new", "--against", run_id, status=1)["same-in-reference"]
    assert [[image["path"] for image in group] for group in found["groups"]] == [["new/red/copy.png"]]


def test_a_run_that_does_not_say_what_it_was_trained_on(
    workplace: Path, shufflenet: Invoke, client: MlflowClient
) -> None:
    write_images(Path("new"))
    run_id = client.create_run(client.create_experiment("old")).info.run_id
    result = shufflenet("data", "check", "new", "--against", run_id)
    assert result.exit_code == 1
    assert f"run {run_id} does not say which images it was trained on" in result.stderr
    write_images(Path("trained"), seed=3)
    client.set_tag(run_id, "config", json.dumps({"train_dir": str(Path("trained").absolute())}))  # as of version 0.1
    shutil.copy("trained/red/003.png", "new/red/copy.png")
    assert "same-in-reference" in checked(shufflenet, "new", "--against", run_id, status=1)
    client.log_text(run_id, '{"train": "no digests"}', "images.json")
    assert "images.json of run" in shufflenet("data", "check", "new", "--against", run_id).stderr


@pytest.mark.long
def test_eval_warns_of_images_that_were_trained_on(
    small_train: Callable[..., dict[str, Any]], images: Path, workplace: Path, shufflenet: Invoke
) -> None:
    run_id = small_train()["run_id"]
    assert "training images" not in shufflenet("eval", run_id).stderr
    shutil.copytree(images / "val", "test")
    for number in range(2):
        shutil.copy(images / "train" / "red" / f"{number:03}.png", f"test/red/copy-{number}.png")
    result = shufflenet("eval", run_id, "--val-dir", "test")
    assert result.exit_code == 0, result.output
    assert "2 of 17 images in 'test' are among the training images of the run" in result.stderr
    assert f"shufflenet data check DIR --against {run_id[:12]}" in result.stderr


def test_train_warns_of_validation_images_that_are_trained_on(
    images: Path, workplace: Path, shufflenet: Invoke
) -> None:
    shutil.copytree(images, "mine")
    shutil.copy("mine/train/red/003.png", "mine/val/red/copy.png")
    result = shufflenet("train", *small_options(Path("mine")), "--total-iters", 1)
    assert result.exit_code == 0, result.output
    assert "1 of 16 validation images is among the training images" in result.stderr


def test_digests_survive_packing_and_do_not_depend_on_names(images: Path, tmp_path: Path) -> None:
    listing = list_images(images / "train")
    packed = pack(listing.image_digests)
    assert unpack(packed) == set(listing.image_digests)
    assert len(packed) == 8 * len(listing)
    shutil.copytree(images / "train" / "red", tmp_path / "other" / "crimson")
    assert set(list_images(tmp_path / "other").image_digests) < unpack(packed)
    with pytest.raises(ValueError, match="no whole number"):
        unpack("AAAA"[: DIGEST_BYTES - 2])


def test_a_table_is_checked_by_its_rows(shufflenet: Invoke, pets: Path) -> None:
    """One image is in both splits and with two labels, one does not exist."""
    rows = [f"{path.relative_to('pets')},{path.parent.name},{path.parts[1]}" for path in sorted(pets.rglob("*.png"))]
    table = pets / "pets.csv"
    table.write_text("\n".join(["path,label,split", *rows]))
    assert not {kind for kind, found in checked(shufflenet, table, status=0).items() if found["problem"]}
    shutil.copy(pets / "train" / "cat" / "0000.png", pets / "copy.png")
    table.write_text("\n".join(["path,label,split", *rows, "copy.png,dog,val", "gone.png,dog,train"]))
    found = checked(shufflenet, table, "--against", pets / "train", status=1)
    assert {kind for kind, finding in found.items() if finding["problem"]} >= {
        *("unreadable", "same-in-parts", "same-in-classes", "same-in-reference"),
    }
    [[entry]] = found["unreadable"]["groups"]
    assert entry["path"] == "pets/gone.png"
    assert entry["class"] == "dog"
    result = shufflenet("data", "check", table)
    assert "train/cat/0000.png" in result.output
    assert "pets.csv: 25 images of 2 classes" in result.output
    rest = checked(shufflenet, pets / "val", "--against", table, status=1)
    assert "same-in-reference" in rest
