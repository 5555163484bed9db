"""Meaningless figures and warnings of libraries are not printed."""

import json
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.command_line import Invoke, small_options
from tests.support.images import write_images


@pytest.mark.long
def test_top5_is_shown_only_where_it_says_something(images: Path, shufflenet: Invoke, tmp_path: Path) -> None:
    """With five classes or fewer it is always 1; JSON documents and MLflow have it in any case."""
    six = tuple("abcdef")
    write_images(tmp_path / "train", six, 4)
    write_images(tmp_path / "val", six, 2)
    for folder, shown in ((images, False), (tmp_path, True)):
        trained = shufflenet("train", *small_options(folder), "--run-name", "r", "--save-dir", f"{folder.name}-1")
        assert ("top5" in trained.stderr) == shown, trained.stderr
        other = json.loads(shufflenet("train", *small_options(folder), "--total-iters", 2, "--json").stdout)["run_id"]
        run_id = next(line for line in trained.stdout.splitlines() if line.startswith("run ID")).split()[-1]
        assert ("top5" in shufflenet("eval", run_id).stdout) == shown
        assert ("top5" in shufflenet("runs", "show", run_id).stdout) == shown
        assert ("top5" in shufflenet("compare", run_id, other, "--out", "page").stdout) == shown
        assert ("top5" in Path("page/compare.html").read_text()) == shown
        if shown:
            continue
        for command in (("eval", run_id), ("runs", "show", run_id), ("compare", run_id, other)):
            assert "top5" in shufflenet(*command, "--json").stdout


@pytest.mark.parametrize("workers", [0, 1])
def test_what_pillow_remarks_about_a_file_is_in_the_log(
    images: Path, shufflenet: Invoke, tmp_path: Path, workers: int
) -> None:
    """It names the file, and Python's own way of printing a warning is never seen."""
    for part in ("train", "val"):
        write_images(tmp_path / part, ("a", "b"), 8)
        path = tmp_path / part / "a" / "twice.tif"
        Image.fromarray(np.full((40, 40, 3), 3, np.uint8)).save(path)
        width = struct.pack("<HHII", 256, 4, 1, 40)
        assert width in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(width, struct.pack("<HHIHH", 256, 3, 2, 40, 40)))
    options = [*small_options(tmp_path), "--workers", workers, "--total-iters", 2, "--no-system-metrics"]
    quiet = shufflenet("train", *options)
    assert "Metadata" not in quiet.stderr
    with warnings.catch_warnings():
        told = shufflenet("train", *options, "--verbose")
    lines = [line for line in told.stderr.splitlines() if "Metadata" in line]
    assert lines
    assert all("twice.tif: Metadata Warning, tag 256 had too many entries" in line for line in lines)
    assert "site-packages" not in quiet.stderr
