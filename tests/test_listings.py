"""Listings of large folders, kept between starts."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from shufflenet_mlflow.data import folder, kept
from shufflenet_mlflow.data.folder import list_images
from shufflenet_mlflow.data.listing import ImageListing, Sample, Samples


def contents(listing: ImageListing) -> tuple[object, ...]:
    return listing.root, listing.classes, list(listing.samples), listing.foreign, listing.digest


@pytest.fixture(autouse=True)
def _keep_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "KEPT_FROM", 1)
    monkeypatch.setattr(kept, "_SETTLED_SECONDS", -60.0)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for name in ("cat/1.jpg", "cat/deep/2.jpg", "dog/1.jpg", "dog/notes.txt", "dog/" + os.fsdecode(b"\xff.jpg")):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode("utf-8", "surrogateescape"))
    settle(root)
    return root


def settle(root: Path) -> None:
    """As if the folders had not been touched for a while, but for the time that nobody can put back."""
    for path in (root, *root.rglob("*")):
        if path.is_dir():
            os.utime(path, (time.time() - 60, time.time() - 60))


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that were gone through."""
    seen: list[str] = []
    original = folder._files_below

    def counted(root: str, below: str, stamps: kept.Stamps) -> list[folder._File]:
        seen.append(below)
        return original(root, below, stamps)

    monkeypatch.setattr(folder, "_files_below", counted)
    return seen


def test_a_listing_is_kept(photos: Path, tmp_path: Path, walked: list[str]) -> None:
    first = list_images(photos, cache_dir=tmp_path / "cache")
    assert walked == ["cat", "dog"]
    again = list_images(photos, cache_dir=tmp_path / "cache")
    assert walked == ["cat", "dog"]
    assert contents(again) == contents(first) == contents(list_images(photos))
    assert [sample.path for sample in again.samples][:2] == ["cat/1.jpg", "cat/deep/2.jpg"]


def add(root: Path) -> None:
    (root / "dog" / "3.jpg").write_bytes(b"3")


def remove(root: Path) -> None:
    (root / "cat" / "deep" / "2.jpg").unlink()


def rename(root: Path) -> None:
    (root / "cat" / "1.jpg").rename(root / "cat" / "0.jpg")


def new_class(root: Path) -> None:
    (root / "emu").mkdir()
    (root / "emu" / "1.jpg").write_bytes(b"1")


def replace_class(root: Path) -> None:
    """By one whose time stamp is that of the old one, as `cp -a` leaves it."""
    stamp = (root / "dog").stat()
    (root / "dog").rename(root.parent / "old")
    add_to = root / "dog"
    add_to.mkdir()
    (add_to / "9.jpg").write_bytes(b"9")
    os.utime(add_to, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    os.utime(root, (time.time() - 60, time.time() - 60))


def unpack_over(root: Path) -> None:
    """As `tar` and `rsync -a` do: a file more, and the folder's time put back."""
    folder_status = (root / "dog").stat()
    add(root)
    os.utime(root / "dog", ns=(folder_status.st_atime_ns, folder_status.st_mtime_ns))


def overwrite_all(root: Path) -> None:
    """In place: no folder changes."""
    for path in root.rglob("*.jpg"):
        path.write_bytes(b"longer than before: " + path.read_bytes())


@pytest.mark.parametrize("change", [add, remove, rename, new_class, replace_class, unpack_over, overwrite_all])
def test_what_has_changed_is_noticed(change: object, photos: Path, tmp_path: Path) -> None:
    before = list_images(photos, cache_dir=tmp_path / "cache")
    assert callable(change)
    change(photos)
    after = list_images(photos, cache_dir=tmp_path / "cache")
    assert contents(after) == contents(list_images(photos))
    assert after.digest != before.digest


def test_a_folder_that_has_just_changed_is_not_kept(
    photos: Path, tmp_path: Path, walked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may change again within one tick of the file system's clock."""
    monkeypatch.setattr(kept, "_SETTLED_SECONDS", 2.0)
    add(photos)
    for _ in range(2):
        list_images(photos, cache_dir=tmp_path / "cache")
    assert walked == ["cat", "dog"] * 2


def test_old_listings_go(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, walked: list[str]) -> None:
    monkeypatch.setattr(kept, "MOST_KEPT", 2)
    copies = [Path(shutil.copytree(photos, tmp_path / name)) for name in "abc"]
    for age, copy in enumerate(copies):
        list_images(copy, cache_dir=tmp_path / "cache")
        newest = max((tmp_path / "cache" / "listings").iterdir(), key=os.path.getmtime)
        os.utime(newest, (age, age))
    list_images(copies[2], cache_dir=tmp_path / "cache")
    assert walked == ["cat", "dog"] * 3
    list_images(copies[0], cache_dir=tmp_path / "cache")
    assert walked == ["cat", "dog"] * 4
    assert len(list((tmp_path / "cache" / "listings").iterdir())) == 2


def test_small_folders_are_not_kept(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "KEPT_FROM", 5)
    list_images(photos, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other"])
def test_a_damaged_listing_is_made_again(damage: str, photos: Path, tmp_path: Path) -> None:
    expected = contents(list_images(photos, cache_dir=tmp_path / "cache"))
    [path] = (tmp_path / "cache" / "listings").iterdir()
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[len(content) // 3] ^= 255
    elif damage == "empty":
        content = bytearray()
    else:
        np.save(tmp_path / "other.npy", np.zeros(3))
        content = bytearray((tmp_path / "other.npy").read_bytes())
    path.write_bytes(content)
    assert contents(list_images(photos, cache_dir=tmp_path / "cache")) == expected


def test_a_cache_that_cannot_be_written_is_done_without(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    assert len(list_images(photos, cache_dir=tmp_path / "cache")) == 4


def test_samples() -> None:
    rows = [("a/é.jpg", 0, 5), ("a/b.jpg", 0, 1 << 40), ("c/" + os.fsdecode(b"\xff.png"), 7, 0)]
    samples = Samples.of(rows)
    expected = [Sample(*row) for row in rows]
    assert list(samples) == expected
    assert samples[-1] == expected[-1]
    assert samples[1:] == expected[1:]
    assert len(Samples.of([])) == 0
    with pytest.raises(IndexError):
        samples[3]
