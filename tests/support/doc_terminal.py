"""A terminal that runs a documentation page from top to bottom, in a folder with the data that the pages use."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from shufflenet_mlflow import create_model
from tests.support.doc_pages import Fence


def picture(size: tuple[int, int], brightest: int, rng: np.random.Generator) -> Image.Image:
    pixels = rng.integers(0, 150, (size[1], size[0], 3), dtype=np.uint8)
    pixels[:, :, brightest] += 100
    return Image.fromarray(pixels)


def write_page_data(folder: Path) -> None:
    """Write the data that the pages use, the same each time.

    `pets/train`, `val`, `test` with `cat` and `dog`; `photos`; `imagenet/val` with 1,000 classes;
    `ShuffleNetV2.1.0x.pth.tar` as the original release wrote it.
    """
    rng = np.random.default_rng(0)
    for split, per_class in (("train", 40), ("val", 12), ("test", 12)):
        for label, name in enumerate(("cat", "dog")):
            (folder / "pets" / split / name).mkdir(parents=True)
            for number in range(1, per_class + 1):
                image = picture((44, 36), label, rng)
                image.save(folder / "pets" / split / name / f"{number:04}.jpg")
    (folder / "photos").mkdir()
    for label, name in enumerate(("cat", "dog", "garden")):
        picture((64, 48), label % 2, rng).save(folder / "photos" / f"{name}.jpg")
    for number in range(1000):
        (folder / "imagenet" / "val" / f"n{number:08}").mkdir(parents=True)
        shutil.copy(folder / "photos" / "garden.jpg", folder / "imagenet" / "val" / f"n{number:08}" / "1.jpg")
    torch.manual_seed(0)
    weights = create_model("shufflenet_v2_x1_0").state_dict()
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in weights.items()}}, folder / "ShuffleNetV2.1.0x.pth.tar"
    )


PLACEHOLDERS = {"RUN_ID": 0, "OTHER_RUN_ID": 1}
"""Name -> index among the runs of the folder's store: those with checkpoints, newest first, then those without."""

_RUN_ID = """\
import sqlite3, sys
query = "SELECT run_uuid FROM runs WHERE lifecycle_stage = 'active' ORDER BY run_uuid IN \
(SELECT run_uuid FROM tags WHERE key = 'checkpoint.latest') DESC, start_time DESC"
print(sqlite3.connect(sys.argv[1]).execute(query).fetchall()[int(sys.argv[2])][0])"""

_PROLOGUE = """\
set -euo pipefail
if [ -f {state} ]; then . {state}; fi
_run_id() {{ {python} -S -c {code} {database} "$1"; }}
"""

_EPILOGUE = """
{{ declare -px; printf 'cd %q\\n' "$PWD"; }} > {state}
"""


@dataclass
class Terminal:
    """Run blocks one after the other, as in one terminal: the working directory and exported variables are kept.

    Args:
        folder: the working directory of the first block.
        scratch: a folder for files of the terminal itself.
    """

    folder: Path
    scratch: Path

    def __post_init__(self) -> None:
        self._groups: list[int] = []

    def run(self, fence: Fence, environment: dict[str, str], timeout: float = 900) -> str:
        """Run a block.

        Returns:
            What the block printed.

        Raises:
            AssertionError: the block failed; the message has page, line, commands and output.
        """
        state = shlex.quote(str(self.scratch / "state"))
        prologue = _PROLOGUE.format(
            state=state,
            python=shlex.quote(sys.executable),
            code=shlex.quote(_RUN_ID),
            database=shlex.quote(str(self.folder / "mlflow.db")),
        )
        # Looked up when the command begins, so that a block may train and then use what it trained.
        names = [name for name in PLACEHOLDERS if re.search(rf"\b{name}\b", fence.text)]
        if fence.language == "python":
            edits = "".join(f' -e "s/\\b{name}\\b/$(_run_id {PLACEHOLDERS[name]})/g"' for name in names)
            body = f"printf %s {shlex.quote(fence.text)} | sed -e '' {edits} | python -"
        else:
            body = fence.text
            for name in names:
                body = re.sub(rf"\b{name}\b", f"$(_run_id {PLACEHOLDERS[name]})", body)
        output = self.scratch / "output"
        with output.open("wb") as sink:
            process = subprocess.Popen(
                ["bash", "-c", prologue + body + _EPILOGUE.format(state=state)],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=sink,  # not a pipe: what a block leaves in the background would keep it open
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._groups.append(process.pid)
            try:
                status: int | str = process.wait(timeout)
            except subprocess.TimeoutExpired:
                status = f"none after {timeout:.0f} s"
        printed = output.read_text(errors="replace")
        assert status == 0, f"{fence.where}: exit status {status}\n\n{fence.text}\n{printed}"
        return printed

    def close(self) -> None:
        """End the processes that blocks have left in the background."""
        for signum in (signal.SIGTERM, signal.SIGKILL):
            for group in self._groups:
                with suppress(ProcessLookupError):
                    os.killpg(group, signum)
            time.sleep(0.5 if signum == signal.SIGTERM and self._groups else 0)


def errors_in(text: str, folder: str) -> list[str]:
    """Return the lines with errors, with placeholders for the folder and for run IDs."""
    lines = [line for line in text.replace(folder, "FOLDER").splitlines() if line.startswith("Error: ")]
    return [re.sub(r"\b[0-9a-f]{32}\b", "ID", line) for line in lines]
