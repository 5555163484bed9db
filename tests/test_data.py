"""Image folders, the order of samples, files that cannot be read."""

import os
import shutil
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets.folder import IMG_EXTENSIONS

from shufflenet_mlflow.data.augment import AUGMENTATIONS
from shufflenet_mlflow.data.digits import write_digits
from shufflenet_mlflow.data.folder import (
    IMAGE_SUFFIXES,
    NEW_SUFFIXES,
    list_images,
    require_images_only,
    with_same_classes,
)
from shufflenet_mlflow.data.listing import Sample, Samples
from shufflenet_mlflow.data.loader import (
    BadImageLog,
    Batch,
    ImageDataset,
    batches_of,
    make_loader,
)
from shufflenet_mlflow.data.preprocess import Preprocess, eval_transform
from shufflenet_mlflow.data.sampler import (
    EvalBatches,
    ReestimationBatches,
    SampleOrder,
    TrainBatches,
)
from shufflenet_mlflow.data.workers import worker_death
from shufflenet_mlflow.errors import BadImageError, DataError
from tests.support.images import write_images

# ---------------------------------------------------------------- folders


def test_listing(images: Path) -> None:
    listing = list_images(images / "train")
    assert listing.classes == ("blue", "green", "red")
    assert listing.class_to_idx == {"blue": 0, "green": 1, "red": 2}
    assert len(listing) == 36
    assert listing.samples[12].path == "green/000.png"
    assert listing.samples[12].label == 1


def test_the_content_of_every_file_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file's content counts even if its size is the same; in large sets only the size does."""
    write_images(tmp_path / "a", per_class=2)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first, copy = list_images(tmp_path / "a"), list_images(tmp_path / "b")
    assert first.content_digest == copy.content_digest != first.digest
    picture = tmp_path / "b" / "red" / "001.png"
    content = bytearray(picture.read_bytes())
    content[-20] ^= 1
    picture.write_bytes(content)
    changed = list_images(tmp_path / "b")
    assert changed.digest == first.digest
    assert changed.content_digest != first.content_digest
    monkeypatch.setattr("shufflenet_mlflow.data.listing.CONTENT_UP_TO", 1000)
    assert list_images(tmp_path / "b").content_digest == first.digest


def test_the_digest_depends_on_content_only(tmp_path: Path) -> None:
    first = list_images(write_images(tmp_path / "a"))
    copy = list_images(write_images(tmp_path / "elsewhere" / "b"))
    assert first.digest == copy.digest
    assert len(first.digest) <= 36
    (tmp_path / "a" / "red" / "003.png").unlink()
    assert list_images(tmp_path / "a").digest != first.digest


def test_images_lie_at_any_depth_and_hidden_files_are_passed_over(tmp_path: Path) -> None:
    write_images(tmp_path, per_class=2)
    deep = tmp_path / "red" / "deep" / "er"
    deep.mkdir(parents=True)
    (tmp_path / "red" / "000.png").rename(deep / "x.PNG")
    for hidden in ("red/.DS_Store", "red/Thumbs.db", ".ipynb_checkpoints/x.png", "red/.cache/y.png"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).write_bytes(b"?")
    (tmp_path / "blue" / "loop").symlink_to(tmp_path / "blue")
    (tmp_path / "blue" / "up").symlink_to(tmp_path)
    listing = list_images(tmp_path)
    assert listing.classes == ("blue", "green", "red")
    assert [sample.path for sample in listing.samples if sample.label == 2] == ["red/001.png", "red/deep/er/x.PNG"]
    assert not listing.foreign
    assert len(listing) == 6


def test_images_are_what_torchvision_takes_for_images() -> None:
    assert set(IMAGE_SUFFIXES) - set(NEW_SUFFIXES) == set(IMG_EXTENSIONS)


def test_links_that_lead_nowhere_are_listed_and_named_when_they_are_decoded(tmp_path: Path) -> None:
    write_images(tmp_path, per_class=1)
    (tmp_path / "red" / "nowhere.png").symlink_to("gone.png")
    (tmp_path / "red" / "circle.png").symlink_to("circle.png")
    (tmp_path / "red" / "through_a_file.png").symlink_to("000.png/x.png")
    found = {sample.path: sample.bytes for sample in list_images(tmp_path).samples if sample.label == 2}
    assert found.keys() == {f"red/{name}.png" for name in ("000", "circle", "nowhere", "through_a_file")}
    assert [found[f"red/{name}.png"] for name in ("circle", "nowhere", "through_a_file")] == [0, 0, 0]


def test_a_class_may_be_a_link_but_not_one_that_leads_nowhere(tmp_path: Path) -> None:
    """Otherwise a class on a disk that is not mounted would silently be missing."""
    write_images(tmp_path / "photos")
    write_images(tmp_path / "disk", classes=("violet",))
    (tmp_path / "photos" / "violet").symlink_to(tmp_path / "disk" / "violet")
    assert list_images(tmp_path / "photos").classes == ("blue", "green", "red", "violet")
    (tmp_path / "disk").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="the link 'violet' is broken; restore its target or remove the link"):
        list_images(tmp_path / "photos")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_files_without_permission_are_named(tmp_path: Path) -> None:
    write_images(tmp_path, per_class=1)
    picture, folder = tmp_path / "blue" / "000.png", tmp_path / "red"
    picture.chmod(0)
    [batch] = batches_of(loader_of(tmp_path, replace_bad=False))
    assert [str(bad) for bad in batch.bad] == [f"{str(picture)!r} is not a readable image (Permission denied)"]
    folder.chmod(0)
    with pytest.raises(DataError, match=f"the folder '{folder}' cannot be read: Permission denied"):
        list_images(tmp_path)
    folder.chmod(0o700)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--train-dir '.*nowhere' does not exist"):
        list_images(tmp_path / "nowhere", option="--train-dir")


def test_a_file_instead_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(DataError, match="is a file"):
        list_images(tmp_path / "x")


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no class folders; it needs one folder per class"):
        list_images(tmp_path)


def test_class_without_images(tmp_path: Path) -> None:
    write_images(tmp_path)
    (tmp_path / "violet").mkdir()
    with pytest.raises(DataError, match="no image in class 'violet'"):
        list_images(tmp_path)


def test_non_image_file_is_named(tmp_path: Path) -> None:
    write_images(tmp_path)
    (tmp_path / "red" / "notes.txt").write_text("hello")
    listing = list_images(tmp_path)
    assert len(listing) == 36
    with pytest.raises(DataError, match=r"'red/notes.txt'; remove them or pass --on-bad-image skip"):
        require_images_only(listing, option="--train-dir")


def test_differing_classes_are_listed(tmp_path: Path) -> None:
    train = list_images(write_images(tmp_path / "train"))
    val = list_images(write_images(tmp_path / "val", classes=("blue", "red", "violet")))
    with pytest.raises(DataError, match="it lacks 'green'; it also has 'violet'"):
        with_same_classes(train.class_to_idx, val, expected_in="train", option="--val-dir")
    with_same_classes(train.class_to_idx, train, expected_in="train", option="--val-dir")


def test_digits(tmp_path: Path) -> None:
    folder = write_digits(tmp_path / "digits")
    train, val = list_images(folder / "train"), list_images(folder / "val")
    assert train.classes == val.classes == tuple("0123456789")
    assert (len(train), len(val)) == (1442, 355)
    # Sizes do not depend on the compression library, so the digest is the same on every machine.
    assert train.digest == "69d644f671c2cb9789cdbcb761dffa9c"
    with Image.open(folder / "train" / "3" / "0001.png") as image:
        assert image.size == (32, 32)
    with pytest.raises(DataError, match="exists and is not empty"):
        write_digits(folder)


# ---------------------------------------------------------------- order and batches


def test_an_epoch_is_a_permutation_and_epochs_differ() -> None:
    order = SampleOrder(num_samples=30, batch_size=10, seed=1)
    epochs = [[key for i in range(3) for key in order.batch(3 * epoch + i)] for epoch in range(2)]
    for number, keys in enumerate(epochs):
        assert {epoch for epoch, _ in keys} == {number}
        assert sorted(index for _, index in keys) == list(range(30))
    assert [index for _, index in epochs[0]] != [index for _, index in epochs[1]]
    other_seed = SampleOrder(num_samples=30, batch_size=10, seed=2)
    assert other_seed.batch(0) != order.batch(0)


def test_batches_from_any_iteration() -> None:
    order = SampleOrder(num_samples=37, batch_size=5, seed=0)
    whole = list(TrainBatches(order, 0, 40))
    for start in (1, 6, 7, 8, 39):
        assert list(TrainBatches(order, start, 40)) == whole[start:]
    assert len(TrainBatches(order, 40, 40)) == 0


def test_starting_late_is_fast() -> None:
    order = SampleOrder(num_samples=1000, batch_size=10, seed=0)
    epoch, _ = order.batch(10**9)[0]
    assert epoch == 10**7


def test_fewer_images_than_a_batch() -> None:
    with pytest.raises(DataError, match=r"7 images, fewer than one batch of 8; use --batch-size 7"):
        SampleOrder(num_samples=7, batch_size=8, seed=0)
    with pytest.raises(DataError, match=r"1 image, fewer than one batch of 8; add images"):
        SampleOrder(num_samples=1, batch_size=8, seed=0)


def test_evaluation_sees_every_image_once() -> None:
    keys = [key for batch in EvalBatches(23, 5) for key in batch]
    assert keys == [(0, index) for index in range(23)]
    assert len(EvalBatches(23, 5)) == len(list(EvalBatches(23, 5))) == 5


def load(dataset: ImageDataset, order: SampleOrder, workers: int, start: int = 0) -> list[Batch]:
    loader = make_loader(dataset, TrainBatches(order, start, 8), workers=workers, pin_memory=False)
    return list(batches_of(loader))


@pytest.mark.timeout(60)
def test_workers_are_not_forked_while_a_thread_chooses_the_temporary_folder(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would inherit the lock under which it does so, and wait for it for ever."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_name_sequence", None)
    is_held = threading.Event()

    def hold() -> None:
        with tempfile._once_lock:  # type: ignore[attr-defined]
            is_held.set()
            time.sleep(1.0)

    holder = threading.Thread(target=hold)
    holder.start()
    is_held.wait()
    listing = list_images(images / "train")
    dataset = ImageDataset(
        listing, AUGMENTATIONS["release"].transform(Preprocess("bgr255", 32)), seed=5, replace_bad=True
    )
    assert len(load(dataset, SampleOrder(len(listing), 8, seed=5), 2)) == 8
    holder.join()


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_are_the_same_bits_whatever_the_workers(images: Path, workers: int) -> None:
    listing = list_images(images / "train")
    transform = AUGMENTATIONS["release"].transform(Preprocess("bgr255", 32))
    dataset = ImageDataset(listing, transform, seed=5, replace_bad=True)
    order = SampleOrder(len(listing), 8, seed=5)
    torch.manual_seed(0)
    alone = load(dataset, order, 0)
    torch.manual_seed(1)
    spread = load(dataset, order, workers, start=3)
    for one, other in zip(alone[3:], spread, strict=True):
        assert torch.equal(one.images_NCHW, other.images_NCHW)
        assert torch.equal(one.labels_N, other.labels_N)
    # The same image looks different in another epoch.
    first = {index: image for (_, index), image in zip(order.batch(0), alone[0].images_NCHW, strict=True)}
    later = {index: image for (_, index), image in zip(order.batch(5), alone[5].images_NCHW, strict=True)}
    for index in first.keys() & later.keys():
        assert not torch.equal(first[index], later[index])


def test_loading_does_not_draw_from_the_global_generator(images: Path) -> None:
    listing = list_images(images / "train")
    dataset = ImageDataset(listing, AUGMENTATIONS["release"].transform(Preprocess("bgr255", 32)), replace_bad=True)
    before = torch.get_rng_state()
    for workers in (0, 1):
        load(dataset, SampleOrder(len(listing), 8, seed=0), workers)
    assert torch.equal(torch.get_rng_state(), before)


def test_reestimation_goes_through_the_data_once() -> None:
    batches = list(ReestimationBatches(SampleOrder(37, 5, seed=0), count=1000))
    indices = [index for batch in batches for _, index in batch]
    assert len(indices) == len(set(indices)) == 35


# ---------------------------------------------------------------- bad files


@pytest.fixture
def folder_with_bad_files(tmp_path: Path) -> Path:
    folder = write_images(tmp_path / "bad", per_class=4)
    (folder / "green" / "001.png").write_bytes(b"not an image at all")
    whole = (folder / "green" / "002.png").read_bytes()
    (folder / "green" / "002.png").write_bytes(whole[: len(whole) // 2])
    return folder


def loader_of(folder: Path, *, replace_bad: bool, workers: int = 0) -> "DataLoader[object]":
    listing = list_images(folder)
    dataset = ImageDataset(listing, eval_transform(Preprocess("bgr255", 32)), replace_bad=replace_bad)
    return make_loader(dataset, EvalBatches(len(listing), 6), workers=workers, pin_memory=False)  # type: ignore[return-value]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_file_is_named(folder_with_bad_files: Path, workers: int) -> None:
    log = BadImageLog(skip=False)
    loader = loader_of(folder_with_bad_files, replace_bad=False, workers=workers)
    with pytest.raises(BadImageError, match=r"green/001.png' is not a readable image \(cannot identify") as caught:
        for batch in batches_of(loader):
            log.new_in(batch)
    assert "\n" not in str(caught.value)


def test_bad_files_are_left_out_and_counted(folder_with_bad_files: Path) -> None:
    log = BadImageLog(skip=True)
    batches = list(batches_of(loader_of(folder_with_bad_files, replace_bad=False)))
    for batch in batches:
        log.new_in(batch)
        log.new_in(batch)  # a second sight of the same file is no news
    assert sum(len(batch.labels_N) for batch in batches) == 10
    assert sorted(os.path.basename(path) for path in log.seen) == ["001.png", "002.png"]


def test_training_batches_keep_their_size(folder_with_bad_files: Path) -> None:
    batches = list(batches_of(loader_of(folder_with_bad_files, replace_bad=True)))
    assert [len(batch.labels_N) for batch in batches] == [6, 6]
    # Samples 5 and 6 are unreadable: the next readable one, sample 7, replaces both.
    assert torch.equal(batches[0].images_NCHW[5], batches[1].images_NCHW[1])


def test_dead_workers_are_told_from_other_errors() -> None:
    error = worker_death(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. \nmore"))
    assert "a data loading process died (DataLoader worker (pid 7) is killed by signal: Killed. )" in str(error)
    assert worker_death(RuntimeError("something else")) is None


class _Lost:
    """A batch whose arrival fails as when the process that sent it is gone."""

    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def __reduce__(self) -> tuple[object, ...]:
        return _fail, (self.error,)


def _fail(error: type[Exception]) -> None:
    raise error


def _lose(_items: object, error: type[Exception]) -> _Lost:
    return _Lost(error)


@pytest.mark.parametrize("error", [EOFError, ConnectionResetError, ConnectionRefusedError, FileNotFoundError])
def test_a_lost_connection_is_a_dead_worker(error: type[Exception]) -> None:
    """Even if the system does not report its death yet."""
    loader = DataLoader(range(4), num_workers=1, collate_fn=partial(_lose, error=error))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=rf"a data loading process died \({error.__name__} when") as caught:
        list(batches_of(loader))  # type: ignore[arg-type]
    assert caught.value.code == "worker-died"


def test_pipes_are_not_opened(tmp_path: Path) -> None:
    write_images(tmp_path)
    os.mkfifo(tmp_path / "red" / "z.jpg")
    listing = list_images(tmp_path)
    assert len(listing) == 36
    assert listing.foreign == ("red/z.jpg",)


def test_broken_links_are_named_when_they_are_read(tmp_path: Path) -> None:
    write_images(tmp_path, per_class=1)
    (tmp_path / "red" / "gone.png").symlink_to("nowhere.png")
    [batch] = batches_of(loader_of(tmp_path, replace_bad=False))
    path = str(tmp_path / "red" / "gone.png")
    assert [str(bad) for bad in batch.bad] == [f"{path!r} is not a readable image (No such file or directory)"]


def test_an_endless_strip_is_a_bad_image(tmp_path: Path) -> None:
    write_images(tmp_path, per_class=1)
    Image.new("RGB", (1, 60_000)).save(tmp_path / "red" / "strip.png")
    listing = list_images(tmp_path)
    dataset = ImageDataset(listing, eval_transform(Preprocess("bgr255", 224)), replace_bad=False)
    [bad] = [bad for index in range(len(listing)) for bad in dataset[0, index].bad]
    assert str(bad).endswith("is not a readable image (1x60000 pixels are too long and thin to be resized)")


def test_an_impossible_folder_name() -> None:
    with pytest.raises(DataError, match="cannot be read: File name too long"):
        list_images("x" * 5000)


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
