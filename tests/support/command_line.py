"""The command line as tests call it."""

from collections.abc import Callable
from pathlib import Path

from click.testing import Result

Invoke = Callable[..., Result]
"""Type of the fixture `shufflenet`."""


def small_options(images: Path) -> list[object]:
    """Return options of `train` for 12 iterations on 36 images: three epochs of four batches of 8."""
    return [
        *("--train-dir", images / "train", "--val-dir", images / "val"),
        *("--input-size", 32, "--batch-size", 8, "--total-iters", 12, "--lr", 0.02),
        *("--display-interval", 2, "--val-interval", 4, "--save-interval", 5, "--workers", 0),
        "--no-log-models",  # each takes seconds; tests that need one ask for it
    ]
