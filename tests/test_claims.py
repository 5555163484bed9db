"""Files whose checksums are right and whose content is not: each is refused, quickly and in one line."""

import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shufflenet_mlflow import get_latest_model
from shufflenet_mlflow.checkpoints.verification import verify_checkpoint
from shufflenet_mlflow.errors import CorruptCheckpointError

Edit = Callable[[str, bytes], bytes]


def rewrite(path: Path, edit: Edit, compression: int = zipfile.ZIP_STORED) -> None:
    """Write the members of a zip file again, each with valid checksums."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, edit(name.partition("/")[2], data))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.save({"state_dict": {"w": torch.ones(1)}}, tmp_path / "checkpoint-000001.pth.tar")
    path = tmp_path / "checkpoint-000002.pth.tar"
    torch.save({"state_dict": {"w": torch.ones(77), "v": torch.zeros(3, 5)}}, path)
    return path


def refused(path: Path, says: str) -> None:
    began = time.monotonic()
    with pytest.raises(CorruptCheckpointError, match=says) as caught:
        verify_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 20
    assert get_latest_model(path.parent)[1] == 1


def test_a_file_written_again_is_valid(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda _name, data: data)
    verify_checkpoint(checkpoint)


def test_a_storage_shorter_than_claimed(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda name, data: data[:100] if name == "data/0" else data)
    refused(checkpoint, "its storage 0 has 100 bytes, and its pickle claims 77 x 4")


def test_a_tensor_beyond_its_storage(checkpoint: Path) -> None:
    """The size of the tensor, the second 77 in the pickle, becomes 78."""

    def edit(name: str, data: bytes) -> bytes:
        head, separator, rest = data.partition(b"QK\x00K\x4d")
        return head + b"QK\x00K\x4e" + rest if name == "data.pkl" and separator else data

    rewrite(checkpoint, edit)
    refused(checkpoint, "a tensor reaches beyond the end of its storage 0")


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_compressed_members_are_not_decompressed(compression: int, checkpoint: Path) -> None:
    rewrite(checkpoint, lambda name, data: bytes(100_000_000) if name == "data/0" else data, compression)
    refused(checkpoint, "PyTorch does not write a member like")


def test_a_missing_storage(checkpoint: Path) -> None:
    with zipfile.ZipFile(checkpoint) as archive:
        members = {name: archive.read(name) for name in archive.namelist() if not name.endswith("data/1")}
    with zipfile.ZipFile(checkpoint, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    refused(checkpoint, "the storage 1 is missing")


def test_a_huge_pickle(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda name, data: bytes(65 << 20) if name == "data.pkl" else data)
    refused(checkpoint, "more than PyTorch writes")
