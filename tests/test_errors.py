"""Every error that a user can cause, and a check that none is missing here.

To add one: a `Mistake(command, exit status, what its line must hold ...)` below, in the section of its command. What it
must hold is the value, the place (option, file, run) and the way out. The command runs in a folder of its own which has
`images/train` and `images/val`, a trained run in `mlflow.db` with its checkpoints in `models`, and what `files` and
`make` write; {run} stands for the run's ID, {small} for the options of a short training. Errors that no command reaches
are in `CALLS`. A new `raise` that is in neither fails `test_the_list_of_errors_is_complete`, which prints its key; if
nobody can cause it, or another test does, it goes into `ELSEWHERE` with the reason or with that test.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from shufflenet_mlflow import create_model, save_checkpoint
from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.cli import main
from shufflenet_mlflow.data.preprocess import Preprocess
from shufflenet_mlflow.errors import ShuffleNetError
from shufflenet_mlflow.models.blocks import require_splittable
from shufflenet_mlflow.models.shufflenet_v1 import GroupedUnit
from tests.support.command_line import Invoke
from tests.support.error_sites import Recorder, recorder
from tests.support.images import write_images
from tests.support.payloads import Hostile

__all__ = ["recorder"]  # a fixture

CHECKPOINT = "models/bnps-checkpoint-000004.pth.tar"
NOBODY = "0" * 32
TORCHRUN = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29600"}


@dataclass(frozen=True, eq=False)
class Mistake:
    """A mistake that a user makes, and the error that it must give."""

    command: str
    status: int
    says: tuple[str, ...]
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    make: Callable[[], object] | None = None
    begins: bool = False
    """Whether it is found out once work has begun, so that a run and its checkpoints may be there."""

    def __str__(self) -> str:
        preparation = self.make.__name__.lstrip("_") if self.make else ""
        variables = " ".join(f"{name}={value}" for name, value in self.variables.items())
        files = " ".join(f"{name}:{content!r}" for name, content in self.files.items())
        text = " ".join(filter(None, (variables, self.command, preparation, files)))
        return text.encode("ascii", "backslashreplace").decode()[:120]


def wrong(command: str, *says: str, status: int = 2, **more: Any) -> Mistake:
    return Mistake(command, status, says, **more)


def failing(command: str, *says: str, **more: Any) -> Mistake:
    return wrong(command, *says, status=1, **more)


def config(content: str | bytes, *says: str, name: str = "pets.toml") -> Mistake:
    return wrong(f"train --config {name} --lr 0", name, *says, files={name: content})


# ---------------------------------------------------------------- what users make


def _saved(name: str = "strange.pth.tar", **changes: Any) -> Callable[[], object]:
    """Save a checkpoint with some entries changed; None removes one."""

    def make() -> None:
        payload = {**read_checkpoint(Path(CHECKPOINT)), **changes}
        torch.save({key: value for key, value in payload.items() if value is not None}, name)

    make.__name__ = repr(changes)
    return make


def _weights() -> None:
    torch.save({"state_dict": create_model("shufflenet_v2_x0_5", 3).state_dict()}, "strange.pth.tar")


def _weights_of_two_prefixes() -> None:
    torch.save({"state_dict": {"w": torch.zeros(1), "module.w": torch.zeros(1)}}, "strange.pth.tar")


def _hostile() -> None:
    torch.save({"state_dict": {}, "other": Hostile(Path("marker"))}, "strange.pth.tar")


def _own_models() -> None:
    """Copy the models, so that they can be changed."""
    shutil.copytree("models", "own")


def _truncated() -> None:
    _own_models()
    path = Path("own") / Path(CHECKPOINT).name
    path.write_bytes(path.read_bytes()[:-100])


def _all_truncated() -> None:
    _own_models()
    for path in Path("own").glob("*.tar"):
        path.write_bytes(path.read_bytes()[:-100])


def _flipped() -> None:
    _own_models()
    path = Path("own") / Path(CHECKPOINT).name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _flipped_without_a_record() -> None:
    _flipped()
    for path in Path("own").glob("*.json"):
        path.unlink()


def _truncated_without_a_record() -> None:
    _truncated()
    for path in Path("own").glob("*.json"):
        path.unlink()


def _other_images() -> None:
    write_images(Path("other/train"), seed=7)
    write_images(Path("other/val"), per_class=5, seed=8)


def _other_classes() -> None:
    write_images(Path("other/train"), classes=("blue", "green", "violet"), per_class=3)
    write_images(Path("other/val"), classes=("blue", "green", "violet"), per_class=3)


def _four_classes() -> None:
    write_images(Path("other"), classes=("a", "b", "c", "d"), per_class=3)


def _class_without_images() -> None:
    write_images(Path("other"), per_class=3)
    Path("other/yellow").mkdir()


def _foreign_file() -> None:
    write_images(Path("other"), per_class=3)
    Path("other/red/notes.txt").write_text("no image")


def _nothing_readable() -> None:
    shutil.copytree("images", "other")
    for path in Path("other").glob("*/*/*.png"):
        path.write_bytes(b"?")


def _unreadable_file() -> None:
    shutil.copytree("images", "other")
    for path in Path("other/train/red").glob("*.png"):
        path.write_bytes(b"?")


def _unreadable_validation() -> None:
    shutil.copytree("images", "other")
    for path in Path("other/val").glob("*/*.png"):
        path.write_bytes(b"?")


def _mean(array: Any) -> Callable[[], object]:
    def make() -> None:
        np.save("mean.npy", array)

    make.__name__ = f"mean_{array.dtype}_{'x'.join(map(str, array.shape))}"
    return make


def _sql(statement: str) -> Callable[[], object]:
    def make() -> None:
        with sqlite3.connect("mlflow.db") as store:
            store.execute(statement)

    make.__name__ = statement
    return make


def _pipe() -> None:
    os.mkfifo("pipe")


def _loop() -> None:
    os.symlink("loop", "loop")


def _folder_for_a_journal() -> None:
    Path("own/spool.jsonl").mkdir(parents=True)


def _no_weights() -> None:
    torch.save({"a": 1}, "strange.pth.tar")


def _a_list() -> None:
    torch.save([1], "strange.pth.tar")


def _weights_and_four_classes() -> None:
    _weights()
    _four_classes()


def _folder_for_a_mean() -> None:
    Path("mean.npy").mkdir()


def _second_run() -> None:
    with contextlib.closing(sqlite3.connect("mlflow.db")) as store:
        names = [row[1] for row in store.execute("PRAGMA table_info(runs)") if row[1] != "run_uuid"]
        columns = ", ".join(names)
        store.execute(f"INSERT INTO runs (run_uuid, {columns}) SELECT '{'1' * 32}', {columns} FROM runs")
        store.commit()


def _empty() -> None:
    Path("empty").mkdir()


MISTAKES = [
    # ------------------------------------------------------------ any command
    wrong("frobnicate", "'frobnicate'", "there are bench, checkpoints", "--help"),
    wrong("evla", "'evla'", "did you mean eval?"),
    wrong("runs shwo", "'shwo'", "did you mean show?", "runs --help"),
    wrong("train --lerning-rate 1", "'--lerning-rate'", "train --help"),
    wrong("train --lr", "'--lr'", "requires an argument"),
    wrong("train extra", "extra", "train --help"),
    wrong("eval", "'REF'", "eval --help"),
    wrong("train -v -q", "--verbose and --quiet", "give one of them"),
    wrong("-v train -q", "--verbose and --quiet", "give one of them"),
    wrong("train -v", "SHUFFLENET_QUIET", "--verbose and --quiet", variables={"SHUFFLENET_QUIET": "1"}),
    wrong("completion tcsh", "'tcsh'", "'bash'"),
    # ------------------------------------------------------------ files of options
    wrong("train --config no.toml", "'no.toml'", "--config", "No such file"),
    wrong("train --config images", "'images'", "--config", "Is a directory"),
    config("lr = = 1", "--config", "not TOML", "line 1"),
    config(b"\xff\xfe", "--config", "not TOML"),
    config("{", "not JSON", "line 1", name="config.json"),
    config("[1]", "holds no options", "an object", name="config.json"),
    config("bach_size = 3", "'bach_size'", "did you mean batch_size?"),
    config("qqqq = 3", "'qqqq'", "without their hyphens"),
    config("[train]\nlr = 1", "train is", "at the top of the file"),
    config("[batch_size]\nlr = 1", "batch_size is a table", "at the top of the file"),
    config("lr = [{a = 1}]", "lr is", "list"),
    config("batch_size = 'many'", "'many'", "--batch-size", "valid integer"),
    config("batch_size = 1.5", "'1.5'", "--batch-size", "valid integer"),
    config("batch_size = true", "'true'", "--batch-size", "valid integer"),
    config("lr = 1979-05-27", "lr is"),
    wrong("train --config pets.toml", "--momentum (=nan)", "from pets.toml", files={"pets.toml": "momentum = nan"}),
    wrong("train --config pets.toml", "--momentum (=2.0)", "is from pets.toml", files={"pets.toml": "momentum = 2"}),
    wrong("train", "'pets.toml'", "SHUFFLENET_CONFIG", variables={"SHUFFLENET_CONFIG": "pets.toml"}),
    wrong("train", "'fast'", "--lr", "SHUFFLENET_LR", variables={"SHUFFLENET_LR": "fast"}),
    wrong("train", "--lr (=-1.0)", "above 0", "SHUFFLENET_LR", variables={"SHUFFLENET_LR": "-1"}),
    wrong(
        "train --config pets.toml",
        "--epochs (=2)",
        "--total-iters (=3)",
        "give one",
        "from pets.toml",
        files={"pets.toml": "epochs = 2\ntotal_iters = 3"},
    ),
    config("batch_size = [16]", "batch_size (=[16])", "a number"),
    config("save_dir = 7", "save_dir (=7)", "text"),
    config("compile = 1", "compile (=1)", "true or false"),
    config(r'train_dir = "a\u0000b"', "train_dir", r"'a\x00b'", "null"),
    # ------------------------------------------------------------ train: numbers
    wrong("train --lr fast", "'fast'", "'--lr'", "valid float"),
    *(wrong(f"train --lr {lr}", f"--lr (={float(lr)})", "above 0") for lr in ("-1", "0", "nan", "inf", "1e400")),
    *(wrong(f"train --momentum {x}", f"--momentum (={float(x)})", "at least 0 and below 1") for x in ("1", "nan")),
    *(wrong(f"train --weight-decay {x}", f"--weight-decay (={float(x)})", "at least 0") for x in ("-1", "nan", "inf")),
    *(wrong(f"train --label-smooth {x}", f"--label-smooth (={float(x)})", "below 1") for x in ("1", "nan")),
    *(wrong(f"train --ema-decay {x}", f"--ema-decay (={float(x)})", "above 0 and below 1") for x in ("1", "nan")),
    *(wrong(f"train --seed {x}", f"--seed (={x})", "below 2**63") for x in ("-1", "9" * 30)),
    *(wrong(f"train --grace {x}", f"--grace (={float(x)})", "at least 0") for x in ("-1", "nan", "inf")),
    *(wrong(f"train --{name} 0", f"--{name} (=0)", "at least 1") for name in ("keep-last", "keep-best", "keep-every")),
    *(
        wrong(f"train --{name}-interval 0", f"--{name}-interval (=0)", "at least 1")
        for name in ("display", "val", "save")
    ),
    *(wrong(f"train --{name} 0", "0", f"--{name}", "at least 1") for name in ("epochs", "total-iters", "num-classes")),
    wrong("train --epochs 3 --total-iters 4", "--epochs (=3)", "--total-iters (=4)", "give one of them"),
    *(wrong(f"train --workers {n}", f"--workers (={n})", "from 0 to 1000") for n in (-1, 10**11)),
    *(wrong(f"train --batch-size {n}", f"--batch-size (={n})", "at least 2") for n in (-3, 1)),
    wrong("train --micro-batch-size 1", "--micro-batch-size (=1)", "at least 2"),
    wrong("train --batch-size 3 --micro-batch-size 2", "--batch-size (=3)", "2 micro-batches", "raise it to 4"),
    failing("train {small} --batch-size 37", "36 images", "--batch-size 36 or less"),
    *(wrong(f"train --input-size {n}", f"--input-size (={n})", "a multiple of 32") for n in (0, 50, 64000)),
    wrong("train {small} --num-classes 2", "--num-classes (=2)", "3 classes", "images/train", "raise it"),
    wrong(f"train {{small}} --num-classes {10**12}", "--num-classes (=1000000000000)", "at most 1000000"),
    # ------------------------------------------------------------ train: words
    wrong("train --amp fp8", "'fp8'", "'--amp'", "'bf16'"),
    wrong("train --augment wild", "'wild'", "'--augment'", "'shift'"),
    wrong("train --on-bad-image ignore", "'ignore'", "'--on-bad-image'", "'fail', 'skip'"),
    wrong("train --on-save-error maybe", "'maybe'", "'--on-save-error'", "'continue'"),
    wrong("train --compile=perhaps", "'perhaps'", "'--compile'", "true"),
    wrong("train --device tpu", "--device (=tpu)", "auto, cpu, mps, cuda or cuda:N"),
    wrong(f"train --device cuda:{10**20}", f"(=cuda:{10**20})", "--device", "cuda:N"),
    wrong("train --device cuda:99", "--device cuda:99", "CUDA devices", "use auto or cpu"),
    wrong("train --device mps", "--device mps", "no Apple GPU", "use auto or cpu"),
    wrong("train --device cpu --sync-bn", "--sync-bn", "cpu", "leave it out"),
    *(wrong(f"train --job {job}", f"--job (={job})", "letters, digits") for job in ("a/b", "-", "x" * 101)),
    wrong("train --new-run", "--new-run", "--resume"),
    # ------------------------------------------------------------ train: networks
    wrong("train --model shufflenet_v2_x3_0", "'shufflenet_v2_x3_0'", "'--model'", "did you mean"),
    wrong("train --model nothing", "'nothing'", "'--model'", "`shufflenet models`"),
    wrong("train --choices 1,2", "--choices (=1,2)", "needs --model shufflenet_oneshot"),
    wrong("train --model shufflenet_v2_x1_0 --choices 1,2", "shufflenet_v2_x1_0", "choices", "shufflenet_oneshot"),
    wrong("train --model shufflenet_oneshot --choices 1,2", "choices", "there are 2, not 20"),
    wrong("train --model shufflenet_oneshot --choices a", "--choices (=a)", "whole numbers with commas"),
    wrong("train --model shufflenet_oneshot --scales a", "--scales (=a)", "numbers with commas"),
    wrong("train --model shufflenet_oneshot --choices ,", "--choices (=,)", "numbers with commas"),
    wrong(f"train --model shufflenet_oneshot --choices {'9,' * 20}", "choices: 9", "0, 1, 2"),
    wrong(f"train --model shufflenet_oneshot --scales {'1,' * 19}nan", "scales: nan", "0.2, 0.4"),
    wrong("train --model shufflenet_oneshot --scales 1", "scales", "there are 1, not 20"),
    wrong("train --pretrained", "shufflenet_v2_x0_5", "--init-from FILE", "torchvision/"),
    wrong("train --pretrained --init-from models", "--init-from", "--pretrained", "give one of them"),
    failing("train --init-from nowhere", "'nowhere'", "a checkpoint is"),
    wrong("train {small} --init-from models --model shufflenet_v2_x1_0", "shufflenet_v2_x0_5", "leave --model out"),
    wrong(
        "train --model shufflenet_v2_large --mean-image mean.npy --input-size 64",
        "16x16",
        "64x64",
        "`shufflenet data mean DIR --input-size 64`",
        make=_mean(np.linspace(0, 255, 768, dtype=np.float32).reshape(16, 16, 3)),
    ),
    # ------------------------------------------------------------ train: images
    failing("train --train-dir no --val-dir no", "no' does not exist", "--train-dir", "one folder per class"),
    failing("train {small} --val-dir no", "no' does not exist", "--val-dir", "one folder per class"),
    failing(f"train --train-dir {'x' * 300} --val-dir no", "xxx", "--train-dir", "cannot be read: File name too long"),
    failing("train --train-dir loop --val-dir no", "loop'", "--train-dir", "cannot be read", make=_loop),
    failing("train --train-dir images/train/red/000.png --val-dir no", "000.png'", "--train-dir", "is a file"),
    failing("train --train-dir images/train/red --val-dir no", "red'", "--train-dir", "one folder per class"),
    wrong("train --train-dir images/train", "--val-dir is missing", "give both folders"),
    wrong("train --val-dir images/val", "--train-dir is missing", "give both folders"),
    failing(
        "train --train-dir other --val-dir images/val",
        "yellow",
        "--train-dir",
        "add images or remove the folder",
        make=_class_without_images,
    ),
    failing(
        "train --train-dir other --val-dir images/val",
        "notes.txt",
        "--train-dir",
        "--on-bad-image skip",
        make=_foreign_file,
    ),
    failing("train {small} --val-dir other/val", "'violet'", "--val-dir", "images/train'", make=_other_classes),
    failing(
        "train {small} --train-dir other/train",
        "is not a readable image",
        "other/train/red",
        "--on-bad-image skip",
        make=_unreadable_file,
        begins=True,
    ),
    failing(
        "train {small} --train-dir other/train --on-bad-image skip",
        "no file",
        "other/train'",
        make=_nothing_readable,
        begins=True,
    ),
    failing(
        "train {small} --val-dir other/val --on-bad-image skip",
        "none of the 15 files",
        "other/val'",
        make=_unreadable_validation,
        begins=True,
    ),
    wrong("train --mean-image mean.npy", "'mean.npy'", "--mean-image", "shufflenet_v2_large", "leave it out"),
    failing("train --model shufflenet_v2_large --mean-image no.npy", "'no.npy'", "does not exist", "data mean DIR"),
    # ------------------------------------------------------------ train: runs and folders
    failing("train --resume no", "'no'", "a checkpoint is"),
    failing("train --resume {run}@7", "{run}", "iteration 7", "it has: 3, 4"),
    failing("train --resume models --seed 5", "--seed (0 -> 5)", "leave them out", "--resume none"),
    failing("train --resume models --lr 0.5", "--lr (0.02 -> 0.5)", "leave them as they were", "--new-run"),
    failing("train --resume none --save-dir models", "'models'", "--save-dir", "--resume auto", "starts a new run"),
    failing(
        "train --resume models/checkpoint-000003.pth.tar --new-run --save-dir models",
        "--save-dir 'models'",
        "name another",
    ),
    failing("train --save-dir models --new-run", "'models'", "--save-dir", "--resume models"),
    failing(
        "train --resume models --train-dir other/train", "other/train'", "--train-dir", "--new-run", make=_other_images
    ),
    failing(
        "train --resume models --train-dir other/train", "'violet'", "--val-dir", "other/train", make=_other_classes
    ),
    failing(
        "train --resume strange.pth.tar --new-run",
        "strange.pth.tar",
        "lacks optimizer_state_dict",
        "--init-from",
        make=_weights,
    ),
    failing(
        "train --resume strange.pth.tar --new-run",
        "--lr (='x')",
        "strange.pth.tar",
        "type float",
        make=_saved(config={"lr": "x"}),
    ),
    failing(
        "train --resume strange.pth.tar --new-run",
        "cannot be resumed from",
        "weights only",
        make=_saved(meter_state=[1.0]),
        begins=True,
    ),
    failing(
        "train --resume models/checkpoint-000003.pth.tar --save-dir new",
        "{run}",
        "iteration 4",
        "--resume {run}",
        "--new-run",
        begins=True,
    ),
    failing(
        "train --resume models --save-dir new",
        "{run}",
        "--new-run",
        "--tracking-uri",
        make=_sql("DELETE FROM runs"),
        begins=True,
    ),
    failing(
        "train --resume models --save-dir new",
        "{run}",
        "was deleted",
        "`mlflow runs restore`",
        make=_sql("UPDATE runs SET lifecycle_stage = 'deleted'"),
        begins=True,
    ),
    failing(
        "train {small} --job pets --tracking-uri http://127.0.0.1:9", "127.0.0.1:9", "'shufflenet'", "--resume none"
    ),
    failing("train {small} --save-dir /proc/x", "'/proc/x'", "--save-dir"),
    failing("train {small} --save-dir /dev/null", "'/dev/null'", "--save-dir"),
    failing("train {small} --lr 1e20 --save-interval 1", "iteration", "learning rate of", "lower --lr", begins=True),
    failing(
        "train {small} --experiment gone",
        "'gone'",
        "`mlflow experiments restore",
        "--experiment",
        make=_sql("UPDATE experiments SET lifecycle_stage = 'deleted', name = 'gone' WHERE name = 'shufflenet'"),
    ),
    # ------------------------------------------------------------ stores
    failing("train {small} --tracking-uri gopher://x", "gopher://x", "tracking store", "sqlite"),
    failing("train {small} --tracking-uri ./mlruns", "./mlruns", "use sqlite:///FOLDER/mlflow.db"),
    *(
        failing(f"train {{small}} --tracking-uri {uri}", uri, "is not an address", "http://HOST:5000")
        for uri in ("http://", "http://[::1", "http://127.0.0.1:99999", "sqlite://x")
    ),
    failing("train {small} --tracking-uri sqlite:///.", "sqlite:///.", "is a folder", "sqlite:///./mlflow.db"),
    failing("train {small} --tracking-uri sqlite:///no/x.db", "sqlite:///no/x.db", "create it first"),
    failing(
        "train {small} --tracking-uri postgresql://u:s3cret@127.0.0.1/x",
        "postgresql://127.0.0.1/x",
        "No module named 'psycopg",
    ),
    failing(
        "runs --tracking-uri sqlite:///text.db", "text.db", "not a database", files={"text.db": "no database" * 100}
    ),
    failing(
        "train {small} --tracking-uri sqlite:///text.db",
        "text.db",
        "not a database",
        files={"text.db": "no database" * 100},
    ),
    *(
        failing(f"{command} --tracking-uri {uri}", "127.0.0.1:9", "refused")
        for command in (f"eval {NOBODY}", "runs", f"runs show {NOBODY}", "eval models:/net@best")
        for uri in ("http://u:s3cret@127.0.0.1:9",)
    ),
    # ------------------------------------------------------------ references
    failing("eval ''", "empty text", "a checkpoint is"),
    failing("eval no", "'no'", "does not exist", "a checkpoint is"),
    failing(f"eval {'x' * 5000}", "xxx", "does not exist", "models:/NAME/VERSION"),
    failing("eval images", "'images'", "without checkpoints", "--save-dir"),
    failing("eval runs:/x", "'runs:/x'", "a checkpoint is"),
    failing("eval models:/net", "'models:/net'", "models:/NAME@ALIAS"),
    failing("eval {run}@x", "{run}@x", "latest, best or a number"),
    failing("eval {run}@7", "{run}", "iteration 7", "it has: 3, 4"),
    failing("eval runs:/{run}/x", "{run}", "'x'", "checkpoint-{iters}"),
    failing(f"eval {NOBODY}", NOBODY),
    failing("eval models:/net@best", "models:/net@best"),
    failing("eval {run} --cache-dir /dev/null/x", "'/dev/null/x/runs/", "--cache-dir", "SHUFFLENET_CACHE_DIR"),
    failing(
        "eval {run}@best",
        "{run}",
        "checkpoint.best",
        "not a checkpoint manifest",
        make=_sql("UPDATE tags SET value = '[]' WHERE key = 'checkpoint.best'"),
    ),
    failing(
        "eval {run}@best",
        "{run}",
        "checkpoint.best",
        "not a checkpoint manifest",
        make=_sql("UPDATE tags SET value = '{\"path\": 3}' WHERE key = 'checkpoint.best'"),
    ),
    failing("eval {run}@best", "{run}", "checkpoint.best", make=_sql("DELETE FROM tags WHERE key = 'checkpoint.best'")),
    *(
        failing(
            "eval {run}@best",
            "{run}",
            "checkpoint.best",
            message,
            make=_sql(f"UPDATE tags SET value = json_set(value, '$.{key}', 'x') WHERE key = 'checkpoint.best'"),
        )
        for key, message in (("iters", "not a checkpoint manifest"), ("crc32", "a damaged checkpoint manifest"))
    ),
    # ------------------------------------------------------------ files
    failing("eval images/val/red/000.png", "000.png'", "not a readable checkpoint"),
    failing("eval /dev/null", "'/dev/null'", "not a file"),
    failing("eval pipe", "'pipe'", "not a file", make=_pipe),
    failing("eval empty.pth.tar", "'empty.pth.tar'", "it is empty", files={"empty.pth.tar": ""}),
    failing("eval text.pth.tar", "'text.pth.tar'", "not a readable checkpoint", files={"text.pth.tar": "hello"}),
    failing("eval zip.pth.tar", "'zip.pth.tar'", "corrupt", files={"zip.pth.tar": b"PK\x03\x04 nothing behind"}),
    failing("eval strange.pth.tar", "'strange.pth.tar'", "is refused", "save it again", make=_hostile),
    failing("eval own/" + Path(CHECKPOINT).name, "own/", "its manifest says", make=_truncated),
    failing("eval own", "'own'", "none of its 3 checkpoints verifies", make=_all_truncated),
    failing("eval own/" + Path(CHECKPOINT).name, "own/", "SHA-256", make=_flipped),
    failing("eval own/" + Path(CHECKPOINT).name, "own/", "is corrupt: the CRC of", make=_flipped_without_a_record),
    failing("eval own/" + Path(CHECKPOINT).name, "own/", "is corrupt", make=_truncated_without_a_record),
    failing("eval strange.pth.tar", "strange.pth.tar", "no state dict", make=_no_weights),
    failing("eval strange.pth.tar", "strange.pth.tar", "holds a list", make=_a_list),
    failing("eval strange.pth.tar", "strange.pth.tar", "differ only in their prefix", make=_weights_of_two_prefixes),
    failing("eval strange.pth.tar", "strange.pth.tar", "the key 1", make=_saved(state_dict={1: torch.zeros(1)})),
    failing(
        "eval strange.pth.tar", "strange.pth.tar", "'w'", make=_saved(state_dict={"w": torch.zeros(2).to_sparse()})
    ),
    failing(
        "eval strange.pth.tar",
        "strange.pth.tar",
        "does not fit the network",
        make=_saved(state_dict={"w": torch.zeros(1)}),
    ),
    failing("eval strange.pth.tar", "strange.pth.tar", "format 99", "upgrade", make=_saved(format_version=99)),
    failing("eval strange.pth.tar", "strange.pth.tar", "'config'", "is a str", make=_saved(config="x")),
    failing("eval strange.pth.tar", "strange.pth.tar", "'class_to_idx'", "'a'", make=_saved(class_to_idx={"a": "x"})),
    failing("eval strange.pth.tar", "strange.pth.tar", "'model'", make=_saved(model={"name": 3})),
    failing("eval strange.pth.tar", "strange.pth.tar", "'iters' is -3", make=_saved(iters=-3)),
    failing("eval strange.pth.tar", "strange.pth.tar", "'best'", make=_saved(best={"val_top1": 1})),
    failing(
        "eval strange.pth.tar",
        "strange.pth.tar",
        "'depth'",
        make=_saved(model={"name": "detnas", "kwargs": {"depth": 3}}),
    ),
    failing(
        "eval strange.pth.tar",
        "strange.pth.tar",
        "not lists",
        make=_saved(model={"name": "detnas", "kwargs": {"choices": 3}}),
    ),
    failing(
        "eval strange.pth.tar", "strange.pth.tar", "'nothing'", make=_saved(model={"name": "nothing", "kwargs": {}})
    ),
    failing(
        "eval strange.pth.tar",
        "strange.pth.tar",
        "preprocessing",
        make=_saved(preprocess={"mode": "x", "input_size": 32}),
    ),
    # ------------------------------------------------------------ eval
    wrong(
        "eval strange.pth.tar",
        "strange.pth.tar",
        "does not name its network",
        "--model shufflenet_v2_x0_5",
        make=_weights,
    ),
    wrong("eval strange.pth.tar --model shufflenet_v2_x0_5", "strange.pth.tar", "--val-dir is missing", make=_weights),
    wrong("eval models --model shufflenet_v2_x1_0", "models/", "shufflenet_v2_x0_5", "leave --model out"),
    wrong("eval models --model shufflenet_v2_x1_0 --choices 0", "choices", "shufflenet_v2_x1_0", "shufflenet_oneshot"),
    wrong("eval models --scales 1", "--scales (=1)", "needs --model shufflenet_oneshot"),
    failing("eval models --val-dir no", "no'", "--val-dir", "does not exist"),
    failing("eval models --val-dir other/val", "'violet'", "--val-dir", "it lacks 'red'", make=_other_classes),
    failing(
        "eval strange.pth.tar --model shufflenet_v2_x0_5 --val-dir other",
        "4 classes",
        "--val-dir",
        "3",
        make=_weights_and_four_classes,
    ),
    failing(
        "eval models --val-dir other/val --on-bad-image skip",
        "none of the 15 files",
        "other/val'",
        make=_unreadable_validation,
        begins=True,
    ),
    wrong("eval models --batch-size 0", "--batch-size (=0)", "at least 1"),
    wrong("eval models --workers -1", "--workers (=-1)", "from 0 to 1000"),
    wrong("eval models --device tpu", "--device (=tpu)", "auto, cpu, mps, cuda or cuda:N"),
    wrong("eval models --input-size 50", "--input-size (=50)", "a multiple of 32"),
    wrong("eval models --log-to moon", "'moon'", "'--log-to'", "'source'"),
    failing(
        "eval strange.pth.tar --model shufflenet_v2_x0_5 --val-dir images/val --log-to source",
        "strange.pth.tar",
        "--log-to new",
        "--log-to none",
        make=_weights,
    ),
    # ------------------------------------------------------------ predict
    wrong("predict models", "IMAGE", "predict --help"),
    failing("predict models -", "standard input is empty", "one a line"),
    failing("predict models 'no/*.png'", "'no/*.png'", "no image"),
    wrong("predict models - -", "standard input (-)", "only once"),
    wrong("predict models images --json --format csv", "--json and --format csv", "exclude each other"),
    failing("predict models no.png", "'no.png'", "does not exist"),
    failing("predict models empty", "'empty'", "no images", make=_empty),
    # ------------------------------------------------------------ runs, compare
    failing("runs --filter bad", "'bad'", "'shufflenet'"),
    wrong("runs --sort minutes", "--sort minutes", "sort by started"),
    wrong("runs --columns ,", "--columns", "best/val_top1"),
    wrong("runs --limit 0", "--limit (=0)", "from 1 to 50000"),
    failing("runs --experiment no", "'no'", "mlflow.db", "experiments: "),
    failing("runs show no", "'no'", "`shufflenet runs`"),
    failing(f"runs show {NOBODY}", NOBODY),
    wrong("compare {run}", "{run}", "two runs or more", "`shufflenet runs`"),
    wrong("compare {run} {run}", "{run}", "given twice", "name another"),
    failing(f"compare {{run}} {NOBODY}", NOBODY),
    failing(
        f"compare {{run}} {'1' * 32} --out /dev/null/x",
        "'/dev/null/x'",
        "cannot write to",
        "--out",
        make=_second_run,
    ),
    wrong("compare", "'RUN...'", "compare --help"),
    # ------------------------------------------------------------ checkpoints
    failing("checkpoints ls no", "'no'"),
    failing(f"checkpoints ls {NOBODY}", NOBODY),
    failing("checkpoints verify images", "'images'", "no checkpoints", "--save-dir"),
    failing("checkpoints pull models --output /proc/x", "'/proc/x/", "--output"),
    wrong("checkpoints prune {run}", "nothing says what to keep", "--keep-last"),
    wrong("checkpoints prune {run} --keep-last 0", "--keep-last (=0)", "at least 1"),
    wrong("checkpoints promote {run}", "'--name'", "promote --help"),
    wrong("checkpoints promote {run} --name a/b", "--name (=a/b)", "without / : @"),
    wrong("checkpoints promote {run} --name net --alias v1", "--alias (=v1)", "letters, digits"),
    failing(
        "checkpoints promote strange.pth.tar --name net",
        "strange.pth.tar",
        "belongs to no run",
        "--format mlflow",
        make=_weights,
    ),
    # ------------------------------------------------------------ sync
    failing("sync no", "'no'", "is not a folder", "--save-dir"),
    failing(
        "sync own",
        "'own'",
        "cannot keep a journal",
        begins=True,
        make=_folder_for_a_journal,
    ),
    # ------------------------------------------------------------ export
    wrong("export models --format tf", "'tf'", "'--format'", "'onnx'"),
    failing("export models --output no/x.pt2", "'no/x.pt2'", "--output", "create it"),
    failing("export models --output images", "'images'", "--output names a file"),
    failing("export models --format mlflow --output images", "'images'", "exists already", "--output"),
    # ------------------------------------------------------------ data
    failing("data digits images", "'images'", "not empty", "name a new folder"),
    failing("data digits /proc/x", "'/proc/x'", "cannot write", "name another folder"),
    failing("data mean no", "no'", "does not exist", "one folder per class"),
    wrong("data mean images/train --output x.txt", "--output (=x.txt)", ".npy", ".xml"),
    failing("data mean images/train --output /proc/x.npy", "'/proc/x.npy'", "cannot write"),
    failing("data mean images/train --output /dev/null/x.npy", "'/dev/null/x.npy'", "cannot write"),
    wrong("data mean images/train --output images", "--output (=images)", ".npy"),
    wrong("data mean images/train --input-size 50", "--input-size (=50)", "a multiple of 32"),
    wrong("data mean images/train --workers -2", "--workers (=-2)", "from 0 to 1000"),
    failing(
        "data mean other/train --on-bad-image skip --workers 0",
        "none of the files",
        "other/train'",
        make=_nothing_readable,
    ),
    *(
        failing(f"train --model shufflenet_v2_large --mean-image {name}", f"'{name}'", message, files={name: content})
        for name, content, message in (
            ("mean.npy", b"hello", "does not hold"),
            ("mean.xml", "<opencv_storage></opencv_storage>", "does not hold"),
        )
    ),
    failing(
        "train --model shufflenet_v2_large --mean-image mean.npy",
        "'mean.npy'",
        "of shape (224, 224)",
        "(height, width, 3)",
        make=_mean(np.ones((224, 224), np.float32)),
    ),
    failing(
        "train --model shufflenet_v2_large --mean-image mean.npy",
        "'mean.npy'",
        "0 to 1000",
        "0-255",
        make=_mean(np.linspace(0, 1000, 48, dtype=np.float32).reshape(4, 4, 3)),
    ),
    failing("data mean images/train --output mean.npy", "'mean.npy'", "it is a folder", make=_folder_for_a_mean),
    failing(
        "train --model shufflenet_v2_large --mean-image mean.npy",
        "'mean.npy'",
        "is not a file",
        make=_folder_for_a_mean,
    ),
    # ------------------------------------------------------------ bench
    wrong("bench --iterations 0", "--iterations (=0)", "at least 1"),
    failing("bench --train-dir no", "no'", "--train-dir", "does not exist"),
    wrong("bench --batch-size 0", "--batch-size (=0)", "at least 2"),
    wrong("bench --device tpu", "--device (=tpu)", "auto, cpu, mps, cuda or cuda:N"),
    failing("bench --tracking-uri gopher://x", "gopher://x", "sqlite"),
    # ------------------------------------------------------------ processes of a distributed job
    wrong("train", "RANK", "'x'", "WORLD_SIZE", variables={**TORCHRUN, "RANK": "x"}),
    wrong("train", "RANK (=3)", "WORLD_SIZE (=2)", "below", variables={**TORCHRUN, "RANK": "3"}),
]

# ---------------------------------------------------------------- the folder they are made in


@dataclass(frozen=True)
class World:
    """A trained run, which each test copies."""

    folder: Path
    run: str


SMALL = (
    "--train-dir images/train --val-dir images/val --input-size 32 --batch-size 8 --total-iters 4 --lr 0.02 "
    "--save-interval 3 --workers 0 --no-log-models --no-system-metrics"
)


@pytest.fixture(scope="module")
def world(images: Path, tmp_path_factory: pytest.TempPathFactory, empty_database: Path, cache_dir: Path) -> World:
    folder = tmp_path_factory.mktemp("world")
    shutil.copy(empty_database, folder / "mlflow.db")
    (folder / "images").symlink_to(images)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.setenv("SHUFFLENET_CACHE_DIR", str(cache_dir))
        result = CliRunner().invoke(main, ["train", *SMALL.split(), "--save-dir", "models", "--json"])
    assert result.exit_code == 0, result.output
    return World(folder, json.loads(result.stdout)["run_id"])


@pytest.fixture
def here(world: World, workplace: Path, images: Path) -> Path:
    """Copy the world into the working directory."""
    shutil.copy(world.folder / "mlflow.db", "mlflow.db")
    for name in ("images", "models"):
        Path(name).symlink_to(world.folder / name)
    return workplace


def _words(command: str, world: World) -> list[str]:
    return shlex.split(command.replace("{run}", world.run).replace("{small}", SMALL))


def _contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "mlflow.db-" not in path.name}


def _running(database: Path) -> int:
    with contextlib.closing(sqlite3.connect(database)) as store:
        return int(store.execute("SELECT count(*) FROM runs WHERE status = 'RUNNING'").fetchone()[0])


ALLOWED_BEFORE = ("Warning: ", "fetching ")
PROGRESS = ("iteration ", "validation at iteration ")


@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_every_mistake_is_one_line(
    mistake: Mistake,
    world: World,
    here: Path,
    shufflenet: Invoke,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, content in mistake.files.items():
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if mistake.make is not None:
        mistake.make()
    for name, value in mistake.variables.items():
        monkeypatch.setenv(name, value)
    before = _contents(here)
    recorder.pending.clear()
    result = shufflenet(*_words(mistake.command, world))
    recorder.shown(str(mistake), result.stderr)
    recorder.tried.add(mistake)

    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == mistake.status, result.output
    if "--json" in mistake.command:
        assert json.loads(result.stdout)["error"].keys() == {"code", "message"}
    else:
        assert result.stdout == ""
    assert "s3cret" not in result.output
    shown_before, _, line = result.stderr.rpartition("Error: ")
    allowed = ALLOWED_BEFORE + PROGRESS * mistake.begins
    assert all(text.startswith(allowed) for text in shown_before.splitlines()), result.stderr
    error, *rest = line.splitlines()
    assert not rest or (mistake.status == 2 and len(rest) == 1 and re.fullmatch(r"Try '.* --help'\.", rest[0])), line
    for part in mistake.says:
        assert part.replace("{run}", world.run) in line
    assert len(error) < 2100
    assert _running(here / "mlflow.db") == 0
    assert not list(here.rglob("*.tmp"))
    if not mistake.begins:
        assert _contents(here) == before


# ---------------------------------------------------------------- what only the library meets


CALLS: dict[str, tuple[Callable[[], object], tuple[str, ...]]] = {
    "no classes": (lambda: create_model("shufflenet_v2_x0_5", 0), ("num_classes (=0)", "at least 1")),
    "classes in words": (lambda: create_model("shufflenet_v2_x0_5", "ten"), ("num_classes (='ten')", "whole number")),  # type: ignore[arg-type]
    "negative iterations": (lambda: save_checkpoint({"state_dict": {}}, -1), ("iters (=-1)", "not negative")),
    "a loss that is a tensor": (
        lambda: save_checkpoint({"state_dict": {}, "loss": torch.tensor(0.5)}, 1),
        ("loss is a Tensor", "loss.item()"),
    ),
    "a tag with a slash": (lambda: save_checkpoint({"state_dict": {}}, 1, tag="a/b"), ("tag 'a/b'", "letters, digits")),
    "no state dict": (lambda: save_checkpoint({"weights": {}}, 1), ("'state_dict'", "['weights']")),
    "what is not plain": (
        lambda: save_checkpoint({"state_dict": {}, "path": Path("x")}, 1),
        ("path", "Path"),
    ),
    "a missing file": (lambda: read_checkpoint(Path("no.pth.tar")), ("'no.pth.tar'", "does not exist")),
    "a long name": (lambda: read_checkpoint(Path("x" * 300)), ("xxx", "cannot open", "File name too long")),
    "a mode": (lambda: Preprocess("hsv", 32), ("'hsv'", "there is bgr255")),
    "a mean image for another mode": (
        lambda: Preprocess("bgr255", 32, np.zeros((32, 32, 3), np.float32)),
        ("bgr255_mean", "not bgr255"),
    ),
    "widths of a unit": (lambda: require_splittable(6, 8), ("in_channels (=6)", "out_channels (=8)")),
    "widths of a grouped unit": (
        lambda: GroupedUnit(6, 8, stride=1, groups=3),
        ("in_channels (=6)", "out_channels (=8)"),
    ),
    "groups": (lambda: GroupedUnit(6, 8, stride=2, groups=4), ("6 -> ", "4 groups")),
}


@pytest.mark.parametrize("call", CALLS)
def test_calls_that_no_command_makes(call: str, here: Path, recorder: Recorder) -> None:
    before = _contents(here)
    recorder.pending.clear()
    function, says = CALLS[call]
    with pytest.raises(ShuffleNetError) as caught:
        function()
    text = str(caught.value)
    recorder.shown(call, text)
    recorder.tried.add(call)
    assert "\n" not in text
    for part in says:
        assert part in text
    assert _contents(here) == before


# ---------------------------------------------------------------- nothing is missing


ELSEWHERE: dict[str, str] = {
    "amp-fp16-on-mps": "nobody: needs an Apple GPU",
    "checkpoint-being-written": "test_read_once.py::test_a_file_that_is_written_to_while_it_is_read",
    "checkpoint-not-in-run": "test_export.py::test_promoting",
    "checkpoint-not-sendable": "test_delivery.py::test_a_file_that_was_damaged_while_it_waited_is_refused",
    "checkpoint-unwritable": "test_cli.py::test_a_full_disk_is_one_line",
    "class-link-broken": "test_data.py::test_a_class_may_be_a_link_but_not_one_that_leads_nowhere",
    "compile-failed": "test_resume.py::test_a_network_that_cannot_be_compiled",
    "compile-unavailable": "test_resume.py::test_a_network_that_cannot_be_compiled",
    "device-unknown": "nobody: config's rule goes before; for callers of the library",
    "export-failed": "test_export.py::test_output_that_cannot_be_written",
    "export-logits-differ": "test_export.py::test_a_program_that_differs_is_no_export",
    "export-package-missing": "test_export.py::test_a_missing_package_is_named",
    "export-shape-differs": "test_export.py::test_a_program_that_differs_is_no_export",
    "export-unwritable": "test_export.py::test_output_that_cannot_be_written",
    "folder-unreadable": "test_checkpoint.py::test_a_folder_that_cannot_be_read",
    "image-subfolder-unreadable": "nobody: needs a folder below that may not be read, and tests may run as root",
    "init-from-and-pretrained": "nobody: config's rule goes before; for callers of the library",
    "journal-entry-unknown": "nobody: needs a journal that another version wrote",
    "journal-entry-without-run": "nobody: needs a journal that this package did not write",
    "journal-format": "test_journal.py::test_a_journal_of_a_later_version",
    "journal-unreadable": "nobody: needs a file that may not be read, and tests may run as root",
    "locked-by-other-process": "test_journal.py::test_one_process_at_a_time",
    "locked-by-this-process": "test_journal.py::test_one_process_at_a_time",
    "logged-model-refused": "test_export.py::test_models_that_cannot_be_created_do_not_block_delivery",
    "logged-model-run-deleted": "test_export.py::test_models_of_a_deleted_run_wait",
    "manifest-unwritable": "test_saving.py::test_marking_the_best_fails",
    "mean-image-changed": "test_families.py::test_the_mean_image_travels_in_the_checkpoint",
    "mean-image-unreadable": "nobody: needs a file that may not be read, and tests may run as root",
    "model-arguments-differ": "test_loading.py::test_a_file_that_names_its_network_is_believed",
    "model-does-not-fit": "test_loading.py::test_a_file_that_names_no_network_needs_one",
    "none-verifies-in-run": "test_resolve.py::test_a_corrupt_artifact_is_passed_over_and_the_cache_stays_clean",
    "one-device-many-processes": "nobody: needs several processes with CUDA",
    "out-of-memory": "test_train_failures.py::test_memory_that_runs_out_is_one_line",
    "peer-diverged": "nobody: said by the first process of the job alone",
    "peer-failed": "nobody: said by the first process of the job alone",
    "peers-images-differ": "test_long_distributed.py::test_processes_with_other_options_end_with_one_line",
    "peers-options-differ": "test_long_distributed.py::test_processes_with_other_options_end_with_one_line",
    "process-lost": "test_distributed.py::test_pytorchs_error_for_a_lost_process",
    "promote-other-file": "test_export.py::test_a_file_of_another_run",
    "published-weights-cache": "test_torchvision.py::test_a_damaged_cache_is_named",
    "published-weights-damaged": "test_torchvision.py::test_a_damaged_cache_is_named",
    "published-weights-empty": "test_torchvision.py::test_a_cache_without_weights_is_named",
    "published-weights-not-fetched": "test_torchvision.py::test_a_failed_download_is_one_line",
    "read-back-differs": "nobody: the disk returns other bytes than it was given",
    "refused-entry-not-kept": "nobody: the disk fills up at that very moment",
    "registered-model-no-checkpoint": "test_resolve.py::test_registered_models",
    "rendezvous-timed-out": "test_distributed.py::test_a_signal_ends_the_wait_for_the_others",
    "run-config-invalid": "nobody: the run's configuration is written by this package",
    "run-id-ambiguous": "test_ids.py::test_prefixes_of_no_run_or_several",
    "run-id-unknown": "test_ids.py::test_prefixes_of_no_run_or_several",
    "save-dir-of-other-run": "test_launchers.py::test_a_run_without_a_checkpoint_restarts_by_its_id",
    "save-not-delivered": "test_delivery.py::test_save_checkpoint_notes_what_it_could_not_bring",
    "run-without-checkpoint": "test_resolve.py::test_a_missing_checkpoint_lists_what_exists",
    "save-not-journaled": "test_delivery.py::test_save_checkpoint_notes_what_it_could_not_bring",
    "sync-interrupted": "test_delivery.py::test_a_run_started_offline",
    "upload-not-listed": "test_delivery.py::test_elsewhere_the_size_is_confirmed",
    "upload-sha256-differs": "test_delivery.py::test_a_damaged_upload_is_not_committed",
    "upload-size-differs": "test_delivery.py::test_elsewhere_the_size_is_confirmed",
    "worker-died": "test_train_failures.py::test_a_dead_worker_is_an_error_and_loses_nothing",
    "zip-member-invalid": "test_checkpoint.py::test_no_single_bit_of_the_directory_changes_a_tensor",
}
"""Code -> the test that provokes it, or why nobody can, in a test."""


def test_the_list_of_errors_is_complete(recorder: Recorder) -> None:
    """Every call that makes an error was reached above, is tested elsewhere, or cannot be reached by users."""
    if recorder.tried != {*MISTAKES, *CALLS}:
        pytest.skip("needs the whole list")
    missing = recorder.sites.keys() - recorder.reached.keys() - ELSEWHERE.keys()
    assert not missing, "in no list:\n" + "\n".join(sorted(missing))
    obsolete = ELSEWHERE.keys() - recorder.sites.keys()
    assert not obsolete, "no longer in the code:\n" + "\n".join(sorted(obsolete))
    reached = {key: recorder.reached[key] for key in ELSEWHERE.keys() & recorder.reached.keys()}
    assert not reached, f"reached after all: {reached}"


@pytest.mark.parametrize("key", ELSEWHERE)
def test_tests_elsewhere_exist(key: str) -> None:
    where = ELSEWHERE[key]
    if where.startswith("nobody: "):
        return
    name, _, function = where.partition("::")
    assert re.search(rf"^def {function}\(", (Path(__file__).parent / name).read_text(), re.M), where


def test_mistakes_differ() -> None:
    names = [str(mistake) for mistake in MISTAKES]
    assert sorted(names) == sorted(set(names))
