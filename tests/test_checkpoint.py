"""The checkpoint file: atomic, verified, plain, and loaded only when it fits."""

import contextlib
import json
import os
import pickle
import random
import resource
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shufflenet_mlflow import load_checkpoint
from shufflenet_mlflow.checkpoints.folders import list_checkpoints
from shufflenet_mlflow.checkpoints.manifest import CheckpointManifest, manifest_path, read_manifest
from shufflenet_mlflow.checkpoints.names import checkpoint_name, newest_first, parse_name
from shufflenet_mlflow.checkpoints.plain import bare_key
from shufflenet_mlflow.checkpoints.verification import read_checkpoint, verify_checkpoint
from shufflenet_mlflow.checkpoints.writing import write_checkpoint
from shufflenet_mlflow.errors import (
    CheckpointError,
    ConfigError,
    CorruptCheckpointError,
    UnsafeCheckpointError,
)
from shufflenet_mlflow.runtime import files
from shufflenet_mlflow.runtime.files import remove_temporaries, write_atomically
from tests.support.payloads import Hostile, assert_equal_payloads


def small_model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def small_state() -> dict[str, Any]:
    torch.manual_seed(0)
    return {"state_dict": small_model().state_dict(), "epoch": 3, "loss": 0.25}


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("iters", "tag", "name"),
    [
        (0, "", "checkpoint-000000.pth.tar"),
        (150, "bnps-", "bnps-checkpoint-000150.pth.tar"),
        (1_234_567, "", "checkpoint-1234567.pth.tar"),
    ],
)
def test_names(iters: int, tag: str, name: str) -> None:
    assert checkpoint_name(iters, tag) == name
    assert parse_name(name) == (iters, tag, 1)


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint-.pth.tar",
        "checkpoint-12.pth",
        "x.pth.tar",
        "checkpoint-12.pth.tar.json",
        ".checkpoint-000012.pth.tar",
    ],
)
def test_foreign_names(name: str) -> None:
    assert parse_name(name) is None


def test_newest_is_by_number_not_by_text() -> None:
    names = ["checkpoint-999999.pth.tar", "checkpoint-1000000.pth.tar", "checkpoint-000100.pth.tar", "readme"]
    assert newest_first(names) == [names[1], names[0], names[2]]


def test_at_one_iteration_the_reestimated_state_is_the_newest() -> None:
    names = ["checkpoint-000010.pth.tar", "bnps-checkpoint-000010.pth.tar", "x-checkpoint-000010.pth.tar"]
    assert newest_first(names) == [names[1], names[2], names[0]]


@pytest.mark.parametrize("tag", ["../", "a/b", ".hidden", "a b"])
def test_tags_that_do_not_belong_into_a_file_name(tag: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the tag"):
        write_checkpoint(small_state(), 1, tag, directory=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("iters", [-1, 3.0, "3"])
def test_invalid_numbers_of_iterations(iters: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"iters \(={iters!r}\) must be an integer, and not negative"):
        write_checkpoint(small_state(), iters, directory=tmp_path)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- writing and reading


def test_a_written_checkpoint_reads_back_equal(tmp_path: Path) -> None:
    state = {**small_state(), "nested": {"list": [1, 2.5, "x", None, True], "tuple": (1, torch.ones(2))}}
    path, manifest = write_checkpoint(state, 7, directory=tmp_path, run_id="r" * 32, val_top1=0.5)
    payload = read_checkpoint(path)
    for key in state:
        assert_equal_payloads(payload[key], dict(state[key]) if key == "state_dict" else state[key])
    assert payload["format_version"] == 1
    assert (payload["iters"], payload["run_id"]) == (7, "r" * 32)
    assert payload["created_at"].endswith("+00:00")
    assert (manifest.path, manifest.iters, manifest.epoch, manifest.loss, manifest.val_top1) == (
        "checkpoints/checkpoint-000007.pth.tar",
        7,
        3,
        0.25,
        0.5,
    )
    assert read_manifest(path) == manifest
    assert manifest.bytes == path.stat().st_size
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [path.name, path.name + ".json"]


def test_it_is_an_ordinary_zip_that_torch_reads_weights_only(tmp_path: Path) -> None:
    path, _ = write_checkpoint(small_state(), 1, directory=tmp_path)
    assert zipfile.is_zipfile(path)
    assert torch.load(path, weights_only=True)["epoch"] == 3


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_keys_are_bare(prefix: str, tmp_path: Path) -> None:
    state = small_state()
    wrapped = {prefix + key: value for key, value in state["state_dict"].items()}
    path, _ = write_checkpoint({"state_dict": wrapped}, 1, directory=tmp_path)
    assert list(read_checkpoint(path)["state_dict"]) == list(state["state_dict"])


def test_inner_compiled_modules_are_bare_too() -> None:
    assert bare_key("features._orig_mod.0.weight") == "features.0.weight"


def test_a_small_view_does_not_drag_its_storage_along(tmp_path: Path) -> None:
    view = torch.zeros(1_000_000)[:3]
    path, _ = write_checkpoint({"state_dict": {"w": view}}, 1, directory=tmp_path)
    assert path.stat().st_size < 10_000


def test_not_finite_values_are_null_in_the_record(tmp_path: Path) -> None:
    path, manifest = write_checkpoint(small_state(), 1, directory=tmp_path, loss=float("nan"), val_top1=float("inf"))
    assert (manifest.loss, manifest.val_top1) == (None, None)
    assert read_manifest(path) == manifest


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"epoch": 1}, "needs a 'state_dict', .*; this state has"),
        ({"state_dict": {}, "args": object()}, r"state\['args'\] holds a builtins.object"),
        ({"state_dict": {}, "x": {"y": [1, {2}]}}, r"state\['x'\]\['y'\]\[1\] holds a builtins.set"),
        ({"state_dict": {}, "x": {(1, 2): 3}}, r"state\['x'\] has the key \(1, 2\)"),
        ({"state_dict": {"a.w": 1, "a._orig_mod.w": 2}}, "differ only in their prefix, 'a.w' and"),
        ({"state_dict": {}, "loss": torch.ones(2)}, r"loss is a Tensor of shape \(2,\); give a number"),
        ({"state_dict": {}, "epoch": "3"}, "epoch is a str; give a number"),
    ],
)
def test_objects_that_are_not_plain_data_are_refused(state: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_checkpoint(state, 1, directory=tmp_path)


def test_every_phase_of_a_write_can_fail_without_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each system call of the write fails in turn; a file of the same name stays readable all the time."""
    first, _ = write_checkpoint(small_state(), 1, directory=tmp_path)
    newer = {**small_state(), "epoch": 4}
    calls: list[str] = []
    fail_at = 0

    def faulty(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            calls.append(name)
            if len(calls) == fail_at:
                raise OSError(28, "No space left on device")
            return original(*arguments, **keywords)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(files.os, name, faulty(name, getattr(os, name)))
    write_checkpoint(newer, 2, directory=tmp_path)
    total = len(calls)
    assert calls.count("replace") == 2
    assert calls.count("fsync") >= 4
    for fail_at in range(1, total + 1):  # noqa: B007 - read by the closure above
        calls.clear()
        with pytest.raises(CheckpointError, match="No space left on device; earlier checkpoints are intact"):
            write_checkpoint(newer, 1, directory=tmp_path)
        verify_checkpoint(first)
        assert read_checkpoint(first)["epoch"] in (3, 4)
        assert not [entry for entry in tmp_path.iterdir() if entry.name.endswith(".tmp")]


def test_a_full_disk(tmp_path: Path) -> None:
    first, _ = write_checkpoint(small_state(), 1, directory=tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(CheckpointError, match="File too large; earlier checkpoints are intact"):
            write_checkpoint({"state_dict": {"w": torch.randn(100_000)}}, 2, directory=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [first.name, first.name + ".json"]


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("")
    with pytest.raises(CheckpointError, match="choose another folder with --save-dir"):
        write_checkpoint(small_state(), 1, directory=tmp_path / "models")


def test_a_folder_whose_name_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="File name too long; earlier checkpoints are intact"):
        write_checkpoint(small_state(), 1, directory=tmp_path / ("x" * 300))
    assert list_checkpoints(tmp_path / ("x" * 300)) == []


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_folder: Path) -> None:  # root may read everything
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(CheckpointError, match="cannot read the folder '.*': Permission denied"):
        list_checkpoints(tmp_path)


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint-000001.pth.tar"

    def write(file: Any) -> None:
        file.write(b"half")
        file.flush()
        assert [entry.name for entry in tmp_path.iterdir()] != [target.name]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(target, write)
    assert not list(tmp_path.iterdir())


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    path, _ = write_checkpoint(small_state(), 1, directory=tmp_path)
    (tmp_path / f".{path.name}.0123456789abcdef.tmp").write_bytes(b"half")
    (tmp_path / ".mine.tmp").write_bytes(b"")
    remove_temporaries(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".mine.tmp", path.name, path.name + ".json"]


# ---------------------------------------------------------------- verification


@pytest.mark.parametrize("with_record", [True, False])
def test_flipped_bits_and_truncations_are_detected_or_change_nothing(with_record: bool, tmp_path: Path) -> None:
    path, _ = write_checkpoint(small_state(), 1, directory=tmp_path)
    original, payload = path.read_bytes(), read_checkpoint(path)
    if not with_record:
        manifest_path(path).unlink()
    generator = random.Random(0)
    detected = 0
    for trial in range(150):
        damaged = bytearray(original)
        if trial % 5:
            damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        else:
            del damaged[generator.randrange(len(damaged)) :]
        path.write_bytes(damaged)
        try:
            assert_equal_payloads(read_checkpoint(path), payload)
        except CheckpointError:
            detected += 1
    assert detected == 150 if with_record else detected > 60


def test_no_single_bit_of_the_directory_changes_a_tensor(tmp_path: Path) -> None:
    """Flip every bit from the tensor's entry on, without a manifest: some make PyTorch read an empty tensor."""
    path, _ = write_checkpoint({"state_dict": {"w": torch.arange(4.0)}}, 1, directory=tmp_path)
    manifest_path(path).unlink()
    original, payload = path.read_bytes(), read_checkpoint(path)
    directory = original.rindex(b"PK\x01\x02", 0, original.rindex(b"/data/0"))
    for bit in range(8 * directory, 8 * len(original)):
        damaged = bytearray(original)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with contextlib.suppress(CheckpointError):
            assert_equal_payloads(read_checkpoint(path), payload)


def test_a_record_that_cannot_be_read_is_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, _ = write_checkpoint(small_state(), 1, directory=tmp_path)
    manifest_path(path).write_text("{}")
    verify_checkpoint(path)
    assert f"the manifest {manifest_path(path)} cannot be used" in caplog.text


def test_a_flipped_bit_in_a_tensor_is_named(tmp_path: Path) -> None:
    path, _ = write_checkpoint({"state_dict": {"w": torch.zeros(5000)}}, 1, directory=tmp_path)
    manifest_path(path).unlink()
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    assert torch.load(path, weights_only=True)["state_dict"]["w"].any()  # torch itself does not notice
    with pytest.raises(CorruptCheckpointError, match=r"is corrupt: the CRC of '.*/data/0' is wrong"):
        verify_checkpoint(path)


def test_size_and_hash_come_from_the_record(tmp_path: Path) -> None:
    first, _ = write_checkpoint(small_state(), 1, directory=tmp_path)
    second, _ = write_checkpoint({**small_state(), "epoch": 9}, 2, directory=tmp_path)
    first.write_bytes(second.read_bytes())  # a sound file, but not the recorded one
    with pytest.raises(CorruptCheckpointError, match="its SHA-256 is not the recorded"):
        verify_checkpoint(first)
    first.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(CorruptCheckpointError, match="its manifest says"):
        verify_checkpoint(first)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 nothing behind", b"hello", b"\x80\x02}q\x00."])
def test_invalid_checkpoints(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-000001.pth.tar"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(small_model(), path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read_checkpoint(tmp_path / "checkpoint-000001.pth.tar")


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_checkpoint_never_runs(legacy: bool, tmp_path: Path) -> None:
    path, marker = tmp_path / "checkpoint-000001.pth.tar", tmp_path / "it ran"
    torch.save({"state_dict": {}, "x": Hostile(marker)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UnsafeCheckpointError, match=r"is refused: it holds a posix.mkdir"):
        read_checkpoint(path)
    assert not marker.exists()
    with open(path, "wb") as file:
        pickle.dump(Hostile(marker), file)
    with pytest.raises(CheckpointError):
        read_checkpoint(path)
    assert not marker.exists()


def test_a_tensor_of_several_names_is_stored_once(tmp_path: Path) -> None:
    weight = torch.randn(1000, 100)
    large = torch.randn(100, 1000)
    state = {"a": weight, "b": weight, "part": large[:10], "again": large[:10]}
    path, manifest = write_checkpoint({"state_dict": state}, 1, directory=tmp_path)
    assert manifest.bytes < 4 * (weight.numel() + large[:10].numel()) + 5_000
    loaded = read_checkpoint(path)["state_dict"]
    assert_equal_payloads(loaded, {key: value.clone() for key, value in state.items()})


def test_manifests_of_later_versions_are_read() -> None:
    """Unknown keys are ignored, but the checksum still covers them."""
    manifest = CheckpointManifest("checkpoints/checkpoint-000003.pth.tar", 3, 1, 0.5, None, "0" * 64, 9)
    later = {**json.loads(manifest.to_json()), "é": [1, 0.1]}
    line = json.dumps({**later, "crc32": f"{zlib.crc32(json.dumps(later).encode()):08x}"})
    assert CheckpointManifest.from_json(line) == manifest == CheckpointManifest.from_json(manifest.to_line())
    for damaged in (line.replace("[1, 0.1]", "[1, 0.2]"), line.replace('"bytes": 9', '"bytes": 8')):
        with pytest.raises(CheckpointError, match="a damaged checkpoint manifest"):
            CheckpointManifest.from_json(damaged)
