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
OF_IMAGES = "--train-dir images/train --val-dir images/val --input-size 32 --batch-size 8 --total-iters 12 --workers 0"
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
    torch.save({"state_dict": {"a.w": torch.zeros(1), "a._orig_mod.w": torch.zeros(1)}}, "strange.pth.tar")


def _hostile() -> None:
    torch.save({"state_dict": {}, "other": Hostile(Path("marker"))}, "strange.pth.tar")


def _fifo_picture() -> None:
    os.mkfifo("pipe.jpg")


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


def _truncated_file() -> None:
    shutil.copytree("images", "other")
    for path in Path("other/train/red").glob("*.png"):
        path.write_bytes(path.read_bytes()[:200])


def _unreadable_validation() -> None:
    shutil.copytree("images", "other")
    for path in Path("other/val").glob("*/*.png"):
        path.write_bytes(b"?")


def _mean(array: Any) -> Callable[[], object]:
    def make() -> None:
        np.save("mean.npy", array)

    make.__name__ = f"mean_{array.dtype}_{'x'.join(map(str, array.shape))}"
    return make


PICTURE = "images/val/red/000.png"


def table(content: str | bytes, *says: str, name: str = "pets.csv") -> Mistake:
    return failing(f"train --train-dir {name}", "--train-dir '", f"/{name}'", *says, files={name: content})


def _class_of_one() -> None:
    write_images(Path("other"), per_class=2)
    Path("other/red/000.png").unlink()


def _entangled() -> None:
    """Write three classes with images of two groups each, such that no choice of groups has all classes."""
    write_images(Path("other"), per_class=4)
    for name, missing in (("blue", 1), ("green", 2), ("red", 3)):
        for number in {0, 1, 2, 3} - {missing}:
            source = Path(f"other/{name}/00{number}.png")
            source.rename(source.with_name(f"{number}.png")) if number else source.unlink()
        Path(f"other/{name}/00{missing}.png").unlink()


def _fifo_table() -> None:
    os.mkfifo("pipe.csv")


def _table_of_groups() -> None:
    Path("table.csv").write_text(f"path,label,group\n{PICTURE},a,1\n")


def _table_of_splits() -> None:
    rows = (f"{PICTURE},a,train", f"{PICTURE.replace('0.', '1.')},b,train", f"{PICTURE.replace('0.', '2.')},a,val")
    Path("table.csv").write_text("\n".join(("path,label,split", *rows)))


def _table_of_slashes() -> None:
    rows = [f"images/val/red/00{number}.png,a/b" for number in range(4)]
    Path("table.csv").write_text("\n".join(("path,label", *rows)))


def _table_of_hidden_images() -> None:
    shutil.copytree("images/val/red", ".hidden")
    for number in range(2):
        os.rename(f".hidden/00{number}.png", f".hidden/{number}.png")
    Path("table.csv").write_text("path,label\n.hidden/0.png,a\n.hidden/1.png,a\n")


def _bytes_as_a_name() -> None:
    write_images(Path("other"), per_class=3)
    os.rename("other/red/000.png", b"other/red/\xff.png")


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
        store.execute(
            "UPDATE runs SET artifact_uri = replace(artifact_uri, (SELECT min(run_uuid) FROM runs WHERE "
            f"run_uuid != '{'1' * 32}'), '{'1' * 32}') WHERE run_uuid = '{'1' * 32}'"
        )
        store.commit()


def _empty() -> None:
    Path("empty").mkdir()


MISTAKES = [
    # ------------------------------------------------------------ any command
    wrong("frobnicate", "'frobnicate'", "there are bench, checkpoints", "--help"),
    wrong("evla", "'evla'", "did you mean eval?"),
    wrong("runs shwo", "'shwo'", "did you mean show?", "runs --help"),
    wrong("train --lerning-rate 1", "--lerning-rate", "train --help"),
    wrong("train --lr", "'--lr'", "requires an argument"),
    wrong("train extra", "extra", "train --help"),
    wrong("eval", "'REF'", "eval --help"),
    wrong("train -v -q", "--verbose and --quiet", "give one of them"),
    wrong("-v train -q", "--verbose and --quiet", "give one of them"),
    wrong("train -v", "SHUFFLENET_QUIET", "--verbose and --quiet", variables={"SHUFFLENET_QUIET": "1"}),
    wrong("completion tcsh", "'tcsh'", "'bash'"),
    # ------------------------------------------------------------ studies
    wrong("tune --param lr=0.1,0.2", "--study is missing", "names the study"),
    wrong("tune --study a/b --param lr=0.1,0.2", "--study (=a/b)", "letters, digits"),
    wrong("tune --study a --param lr", "--param (=lr)", "KEY=a,b,c"),
    wrong("tune --study a --param momentun=0,0.9", "'momentun'", "did you mean momentum?"),
    wrong("tune --study a --param lr=1:0.5", "--param (=lr=1:0.5)", "below the second"),
    wrong("tune --study a --param lr=0,0.1", "--param (=lr=0,0.1)", "--lr (=0.0) must be above 0"),
    wrong("tune --study a --param lr=1,2 --param lr=3,4", "--param names lr twice"),
    wrong("tune --study a --param lr=1,2 --lr 3", "--lr (=3.0)", "varied by --param"),
    wrong("tune --study a --param lr=0.1:1 --sampler grid", "--sampler grid", "lr=0.1:1.0", "list them"),
    wrong("tune --study a --param lr=1,2 --sampler cmaes", "--sampler cmaes", "needs a range"),
    wrong("tune --study a --trials 3", "--trials (=3)", "without --param"),
    wrong("tune --study a --param model=nope,shufflenet_v2_x0_5", "--param (=model=nope", "'nope'"),
    wrong("tune --study a --param lr=1,2", "without torchrun", variables={"RANK": "0", "WORLD_SIZE": "2"}),
    wrong(f"tune --study a --param lr={','.join(map(str, range(1, 900)))} {OF_IMAGES}", "5000 characters"),
    failing("tune --study a --storage sqlite:////no/such/folder/x.db", "study's storage", "--storage names another"),
    failing("compare --study nowhere", "no study 'nowhere'", "`shufflenet runs`"),
    failing("tune show nowhere", "no study 'nowhere'", "'models/nowhere'", "--param begins one"),
    failing("tune stop nowhere", "no study 'nowhere'", "'models/nowhere'", "--param begins one"),
    wrong("train --repeat 3 --resume 0123456789ab", "--resume means one run", "--job NAME"),
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
    config("[batch_size]\nlr = 1", "batch_size (={'lr': 1})", "a whole number"),
    config("lr = [{a = 1}]", "lr (=[{'a': 1}])", "a number"),
    config("batch_size = 'many'", "'many'", "--batch-size", "valid integer"),
    config("batch_size = 1.5", "batch_size (=1.5)", "a whole number"),
    config("batch_size = true", "batch_size (=true)", "a whole number"),
    config("lr = 1979-05-27", "lr (=1979-05-27)", "a number"),
    config("lr = " + "[" * 5000, "nested too deeply"),
    config("#" * 70_000, "larger than 65536 bytes"),
    config('{"run_name": "\\ud800"}', "run_name (='\\ud800')", "half a character", name="config.json"),
    wrong("train --config pipe.jpg", "'pipe.jpg'", "no regular file", make=_fifo_picture),
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
    config("batch_size = [16]", "batch_size (=[16])", "a whole number"),
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
    wrong("train pets", "pets", "--train-dir"),
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
    wrong(
        "train --model shufflenet_oneshot_supernet --compile", "--compile", "shufflenet_oneshot_supernet", "leave it"
    ),
    wrong("train --channel-search", "--channel-search needs --model shufflenet_oneshot_supernet"),
    wrong("train --search models --model shufflenet_v2_x0_5", "--search", "--model", "give one of them"),
    wrong("train --search models --choices 1", "--search", "--choices", "give one of them"),
    wrong("train --search models --scales 1", "--search", "--scales", "give one of them"),
    failing("train --search models", "--search (=models)", "holds no network", "architecture.json"),
    failing("train --search no", "--search (=no)", "the run of a search"),
    wrong("search models", "holds shufflenet_v2_x0_5", "needs a supernet", "shufflenet_oneshot_supernet"),
    wrong("search models --mutations 40", "--mutations (=40)", "--crossovers (=25)", "--population (=50)", "lower one"),
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
    wrong("train {small} --freeze 4", "--freeze (=4)", "at most 3", "backbone"),
    wrong("train {small} --warmup-epochs 3", "--warmup-epochs (=3.0)", "below the length of the run", "epochs"),
    failing("train {small} --teacher no", "--teacher", "'no'", "does not exist"),
    failing("train {small} --teacher strange.pth.tar", "--teacher", "strange.pth.tar", "name a", make=_weights),
    wrong(
        "train --train-dir other --val-dir other --batch-size 8 --teacher models",
        "--teacher",
        "blue",
        "a, b, c",
        "same classes",
        make=_four_classes,
    ),
    # ------------------------------------------------------------ train: images
    failing("train --train-dir no --val-dir no", "no' does not exist", "--train-dir", "one folder per class"),
    failing("train {small} --val-dir no", "no' does not exist", "--val-dir", "one folder per class"),
    failing(f"train --train-dir {'x' * 300} --val-dir no", "xxx", "--train-dir", "cannot be read: File name too long"),
    failing("train --train-dir loop --val-dir no", "loop'", "--train-dir", "cannot be read", make=_loop),
    failing("train --train-dir images/train/red/000.png --val-dir no", "000.png'", "--train-dir", "is a file"),
    failing("train --train-dir images/train/red --val-dir no", "red'", "--train-dir", "one folder per class"),
    wrong("train --val-dir images/val", "--train-dir is missing", "neither folder"),
    wrong("train --group-by x", "--group-by (=x)", "--train-dir, which is missing"),
    wrong("train --train-dir images/train --group-by (", "--group-by (=()", "a regular expression"),
    wrong("train {small} --val-fraction 0.1", "--val-dir (=images/val) and --val-fraction (=0.1)", "give one of them"),
    failing("train --train-dir images", "/images' holds the folders 'train', 'val'", "/images/train'"),
    failing("train --train-dir images/train --group-by xx", "--group-by (=xx)", "matches none", "'blue/000.png'"),
    failing("train --train-dir images/train --group-by png", "36 images are in one group, 'png'", "another --group-by"),
    failing("train --train-dir images/train --group-by '(red)'", "one group only of class 'red'", "another --group-by"),
    failing("train --train-dir other", "one image only of class 'red'", "add images", make=_class_of_one),
    failing("train --train-dir other --group-by '/([123])'", "/other'", "do not divide", "--seed", make=_entangled),
    table("path;label\nimages/a.png;a", "no column 'path'", "'path;label'"),
    table("path,label,path\n", "two columns 'path'"),
    table("", "no column 'path' and no column 'label'", "empty"),
    table("path,label\n", "no row"),
    table("path,label\nx,y,a.png,a\n", "row 2", "4 cells", "quotes"),
    table('path,label\n"a.png,a\n', "line 2", "end of data"),
    table(b"path,label\nx.png,K\xe4tzchen\n", "line 2", "0xE4 is not UTF-8", "save the table"),
    table("path,label,weight\nx.png,a,2\n", "'weight'", "not supported"),
    table(f"path,label\n\n{PICTURE},\n", "row 3", "label is missing", "fill it in"),
    table(f"path,label\n{PICTURE},NaN\n", "row 2", "'NaN'", "missing value"),
    table("path,label\nno.png,a\nno2.png,a", "row 2", "'no.png' does not exist", "1 more file", "remove the row"),
    table("path,label\na\\b.png,a", "row 2", r"'a\\b.png'", "separated by /"),
    table("path,label\nimages,a", "row 2", "'images'", "not a file"),
    table("path,label\n/etc/passwd,a", "row 2", "'/etc/passwd' is absolute"),
    table("path,label\nimages/../../x.png,a", "row 2", "'images/../../x.png' leads out"),
    table(f"path,label\n{PICTURE},a\n./{PICTURE},b", "row 3", "'b', and 'a' in row 2", "keep one"),
    table(f"path,label,split\n{PICTURE},a,eval", "row 2", "'eval'", "train, val and test"),
    table(f"path,label,split\n{PICTURE},a,train", "no row with split val, only with train"),
    table("no Parquet", "not a Parquet file", name="pets.parquet"),
    failing("train --train-dir no.csv", "no.csv' cannot be read: No such file", "--train-dir"),
    failing("train --train-dir pipe.csv", "pipe.csv' is a pipe", make=_fifo_table),
    failing("train --train-dir table.csv --group-by x", "table.csv' has a column 'group'", make=_table_of_groups),
    failing(
        "train --train-dir table.csv --val-fraction 0.5", "has a column 'split'", "leave out", make=_table_of_splits
    ),
    failing("train --train-dir table.csv", "no row with split val of class 'b'", make=_table_of_splits),
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
    ),
    failing(
        "train {small} --train-dir other/train",
        "is not a readable image",
        "other/train/red",
        "--on-bad-image skip",
        make=_truncated_file,
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
        "no file in",
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
        "train --resume models --val-dir other/val",
        "other/val'",
        "--val-dir",
        "of another size in class",
        "--new-run",
        "--changed-data",
        make=_other_images,
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
        "--init-from starts with its weights",
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
        "mlflow runs restore --run-id {run}`",
        "--new-run",
        make=_sql("UPDATE runs SET lifecycle_stage = 'deleted'"),
    ),
    failing(
        "train {small} --job pets --tracking-uri http://127.0.0.1:9", "127.0.0.1:9", "'shufflenet'", "--resume none"
    ),
    failing("train {small} --tracking-uri localhost:5000", "lacks its scheme", "write http://localhost:5000"),
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
    failing("train {small} --tracking-uri ftp://127.0.0.1/x", "--tracking-uri", "ftp://127.0.0.1/x", "such as sqlite:"),
    failing("train {small}", "MLFLOW_TRACKING_URI: ", "ftp://h/x", variables={"MLFLOW_TRACKING_URI": "ftp://h/x"}),
    failing("runs --tracking-uri databricks-uc", "--tracking-uri", "databricks-uc", "write databricks"),
    failing("""train {small} --tracking-uri "'http://127.0.0.1:9'" """, "quotes around it", "write http://127.0.0.1:9"),
    failing("train {small} --tracking-uri 'http://127.0.0.1:9/#/models'", "write http://127.0.0.1:9"),
    failing(
        "train {small} --tracking-uri http://mlflow.example",
        *("http_proxy=ftp://127.0.0.1", "such as http://HOST:3128", "set NO_PROXY=mlflow.example"),
        variables={"HTTP_PROXY": "ftp://127.0.0.1", "http_proxy": "ftp://127.0.0.1", "NO_PROXY": "", "no_proxy": ""},
    ),
    failing("train {small} --tracking-uri sqlite:///.", "sqlite:///.", "is a folder", "sqlite:///./mlflow.db"),
    failing("train {small} --tracking-uri sqlite:///no/x.db", "sqlite:///no/x.db", "create it first"),
    failing(
        "train {small} --tracking-uri postgresql://u:s3cret@127.0.0.1/x",
        "postgresql://127.0.0.1/x",
        *("the Python package psycopg", "is missing; install it"),
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
    failing("eval own", "'own'", "no checkpoint verifies (3 tried)", make=_all_truncated),
    failing("eval own/" + Path(CHECKPOINT).name, "own/", "SHA-256", make=_flipped),
    failing("eval own/" + Path(CHECKPOINT).name, "own/", "is corrupt: the CRC of", make=_flipped_without_a_record),
    failing("eval own/" + Path(CHECKPOINT).name, "own/", "is corrupt", make=_truncated_without_a_record),
    failing("eval strange.pth.tar", "strange.pth.tar", "no state dict", make=_no_weights),
    failing("eval strange.pth.tar", "strange.pth.tar", "holds a list", make=_a_list),
    failing("eval strange.pth.tar", "strange.pth.tar", "'a.w' and 'a._orig_mod.w'", make=_weights_of_two_prefixes),
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
    failing("eval strange.pth.tar", "'class_to_idx'", "'b': 0", make=_saved(class_to_idx={"a": 0, "b": 0})),
    failing("eval strange.pth.tar", "'class_to_idx'", "'d': -1", make=_saved(class_to_idx={"a": 0, "d": -1})),
    failing("eval strange.pth.tar", "strange.pth.tar", "'model'", make=_saved(model={"name": 3})),
    failing("eval strange.pth.tar", "strange.pth.tar", "'iters' is -3", make=_saved(iters=-3)),
    failing("eval strange.pth.tar", "strange.pth.tar", "'best'", make=_saved(best={"val_top1": 1})),
    failing(
        "eval strange.pth.tar",
        "strange.pth.tar",
        "'depth'",
        make=_saved(model={"name": "detnas_voc_fpn_300m", "kwargs": {"depth": 3}}),
    ),
    failing(
        "eval strange.pth.tar",
        "strange.pth.tar",
        "not lists",
        make=_saved(model={"name": "detnas_voc_fpn_300m", "kwargs": {"choices": 3}}),
    ),
    failing(
        "eval strange.pth.tar",
        "cannot be built",
        "not 20, one per unit",
        make=_saved(model={"name": "shufflenet_oneshot", "kwargs": {"choices": [9]}}),
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
    wrong("eval models --split test", "--split test", "images/val'", "leave it out"),
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
        "no file in",
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
    failing("predict models pipe.jpg", "'pipe.jpg'", "pipe", "standard input", make=_fifo_picture),
    failing("predict models empty", "'empty'", "no images", make=_empty),
    # ------------------------------------------------------------ runs, compare
    failing("runs --filter bad", "'bad'", "'shufflenet'"),
    wrong("runs --sort minutes", "--sort minutes", "sort by started"),
    wrong("runs --columns ,", "--columns", "best/val_top1"),
    wrong("runs --limit 0", "--limit (=0)", "from 1 to 50000"),
    failing("runs --experiment no", "'no'", "mlflow.db", "experiments: "),
    failing("runs show no", "'no'", "`shufflenet runs`"),
    failing(f"runs show {NOBODY}", NOBODY),
    failing("runs mend no", "'no'", "`shufflenet runs`"),
    failing(f"runs mend {NOBODY}", NOBODY),
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
    wrong("export models --int8", "--int8 is for --format onnx and openvino, not pt2"),
    wrong("export models --calibration-images 9", "--calibration-images", "--int8"),
    failing("export models --format openvino --output a.onnx", "--output (=a.onnx)", ".xml"),
    failing("data split images/train images/val", "'images/val'", "not empty", "name a new folder"),
    failing("data split images/train images/train/new", "'images/train/new'", "among the classes", "outside"),
    failing("data split images/train /proc/x", "cannot write '/proc/x'", "name another place"),
    failing("data split table.csv new", "'a/b' cannot be the name of a folder", "--manifest", make=_table_of_slashes),
    failing("data split table.csv new", "'.hidden/0.png' is no image", "rename it", make=_table_of_hidden_images),
    failing("data split images/train table.csv --manifest", "'table.csv' exists", "new file", make=_table_of_slashes),
    failing("data split images/train empty/x.csv --manifest", "'empty/x.csv'", "or above", "write it to", make=_empty),
    failing("data split other x.csv --manifest", "not UTF-8", "rename it", make=_bytes_as_a_name),
    wrong("data split images/train new --manifest", "--manifest", ".csv", "'new'"),
    # ------------------------------------------------------------ data
    failing("data digits images", "'images'", "not empty", "name a new folder"),
    failing("data digits /proc/x", "'/proc/x'", "cannot write", "name another folder"),
    failing("data check no", "'no'", "is not a folder", "train and val"),
    failing("data check models", "'models'", "holds no image", "cat/0001.jpg"),
    failing(
        "data check images --against nothing",
        "'nothing'",
        "neither a folder, a table nor a run ID",
        "`shufflenet runs`",
    ),
    failing("data check images --against {run}@best", "@best'", "neither a folder, a table nor a run ID"),
    failing("data check images --out no/page.html", "'no/page.html'", "cannot write", "--out names another file"),
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
    wrong("bench --deploy no.onnx", "--deploy (=no.onnx)", "exists", ".onnx"),
    wrong("bench a.onnx", "--deploy, which is missing"),
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
PROGRESS = ("computing with ", "what was trained until then is kept in ", "iteration ", "validation at iteration ")


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
    after = r"next: shufflenet train --resume .*" if mistake.begins else r"Try '.* --help'\."
    assert not rest or (len(rest) == 1 and re.fullmatch(after, rest[0])), line
    for part in mistake.says:
        assert part.replace("{run}", world.run) in line
    assert len(error) < 2100
    assert _running(here / "mlflow.db") == 0
    assert not list(here.rglob("*.tmp"))
    if not mistake.begins:
        assert _contents(here) == before


# ---------------------------------------------------------------- what only the library meets


CALLS: dict[str, tuple[Callable[[], object], tuple[str, ...]]] = {
    "no classes": (lambda: create_model("shufflenet_v2_x0_5", -1), ("num_classes (=-1)", "at least 1")),
    "classes in words": (lambda: create_model("shufflenet_v2_x0_5", "ten"), ("num_classes (='ten')", "whole number")),  # type: ignore[arg-type]
    "negative iterations": (lambda: save_checkpoint({"state_dict": {}}, -1), ("iters (=-1)", "not negative")),
    "a loss that is a tensor": (
        lambda: save_checkpoint({"state_dict": {}, "loss": torch.ones(2)}, 1),
        ("loss is a Tensor of shape (2,)", "give a number"),
    ),
    "a tag with a slash": (lambda: save_checkpoint({"state_dict": {}}, 1, tag="a/b"), ("tag 'a/b'", "letters, digits")),
    "no state dict": (lambda: save_checkpoint({"weights": {}}, 1), ("'state_dict'", "['weights']")),
    "what is not plain": (
        lambda: save_checkpoint({"state_dict": {}, "path": Path("x")}, 1),
        ("path", "Path"),
    ),
    "a missing file": (lambda: read_checkpoint(Path("no.pth.tar")), ("'no.pth.tar'", "does not exist")),
    "a long name": (lambda: read_checkpoint(Path("x" * 300)), ("xxx", "cannot read", "File name too long")),
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
    "network-not-exported": "test_registered.py::test_a_network_that_fixes_the_size_of_its_batches",
    "registered-lazy": "test_registered.py::test_packages_that_are_wrong",
    "logged-file-lost": "test_long_durable.py::test_a_file_that_never_arrives",
    "manifest-of-another": "test_save_checkpoint.py::test_a_checkpoint_that_was_copied_to_the_name_of_another",
    "logged-file-refused": "test_durable.py::test_a_file_that_another_one_is_in_the_way_of",
    "save-folder-busy": "test_save_checkpoint.py::test_two_processes_do_not_save_in_one_run_s_folder",
    "study-without-runs": "test_tune.py::test_a_study_without_runs_is_named",
    "init-from-qat": "test_qat.py::test_what_does_not_go_together",
    "int8-missing": "test_qat.py::test_what_does_not_go_together",
    "qat-and-amp": "test_option_rules.py::test_pairs_and_references",
    "cmaes-asynchronous": "test_option_rules.py::test_pairs_and_references",
    "qat-other-classes": "test_qat.py::test_what_does_not_go_together",
    "quantization-unknown": "test_qat.py::test_what_does_not_go_together",
    "exported-bin-broken": "test_exported.py::test_weights_that_are_not_whole",
    **dict.fromkeys(
        ("search-differs", "search-images-changed", "search-plan-unreadable", "search-record-damaged"),
        "test_search.py::test_records_that_cannot_be_used",
    ),
    **dict.fromkeys(
        ("search-record-differs", "search-record-unwritable", "search-supernet-differs"),
        "test_search.py::test_records_that_cannot_be_used",
    ),
    **dict.fromkeys(("macs-limit-low", "search-empty"), "test_search.py::test_limits"),
    **dict.fromkeys(
        ("search-classes-differ", "search-without-config", "search-distributed"),
        "test_search.py::test_supernets_of_no_use",
    ),
    **dict.fromkeys(
        ("trust-differs", "trust-record-damaged", "trust-record-differs"),
        "test_search_trust.py::test_comparisons_that_cannot_be_used",
    ),
    "latency-limit-low": "test_search_latency.py::test_limits_and_tables_that_cannot_be_used",
    "latency-table-unusable": "test_search_latency.py::test_limits_and_tables_that_cannot_be_used",
    "trust-too-few": "test_search_trust.py::test_networks_to_compare",
    "trust-epochs-alone": "test_option_rules.py::test_pairs_and_references",
    "search-no-images": "test_search.py::test_images_that_cannot_be_read",
    "search-pixels-unwritable": "test_search.py::test_no_room_for_pixels",
    **dict.fromkeys(("search-worker-died", "search-worker-failed"), "test_search.py::test_workers_that_fail"),
    "too-few-to-hold-out": "test_supernet.py::test_too_few_images_to_hold_out",
    "exported-bin-missing": "test_exported.py::test_files_that_are_not_ours",
    "study-record-damaged": "test_long_tune.py::test_a_record_that_is_damaged",
    "trial-deleted": "test_long_tune.py::test_images_that_lie_elsewhere_and_runs_that_are_gone",
    "trial-not-resumable": "test_long_tune.py::test_images_that_lie_elsewhere_and_runs_that_are_gone",
    "param-fixed": "test_tune.py::test_specs_that_cannot_work",
    "param-word": "test_tune.py::test_specs_that_cannot_work",
    "param-choices": "test_tune.py::test_specs_that_cannot_work",
    "param-range": "test_tune.py::test_specs_that_cannot_work",
    "param-whole": "test_tune.py::test_specs_that_cannot_work",
    "param-ends": "test_tune.py::test_specs_that_cannot_work",
    "study-too-short": "test_tune.py::test_rungs",
    "not-better": "test_better.py::test_the_gate",
    "study-patience": "test_tune.py::test_patience_does_not_go_with_a_study",
    "study-plan-invalid": "test_tune.py::test_plans_survive_json",
    "study-all-failed": "test_tune.py::test_a_study_none_of_whose_trials_can_be_trained",
    "study-differs": "test_tune.py::test_a_small_study",
    "trial-beyond-rung": "nobody: needs an MLflow store that has lost points of a run",
    "study-params-invalid": "nobody: needs a tag of a trial's run that someone has edited",
    "parent-not-created": "test_long_tune.py::test_a_study_without_a_server",
    "tune-package-missing": "nobody: needs an installation without the extra `tune`",
    "pareto-package-missing": "test_search_pareto.py::test_without_pymoo",
    "cmaes-package-missing": "nobody: needs an installation without the extra `tune`",
    "directory-nul": "test_save_checkpoint.py::test_arguments_of_no_use_are_named",
    "directory-type": "test_save_checkpoint.py::test_arguments_of_no_use_are_named",
    "epoch-negative": "test_save_checkpoint.py::test_arguments_of_no_use_are_named",
    "metrics-not-dict": "test_save_checkpoint.py::test_arguments_of_no_use_are_named",
    "reference-nul": "test_save_checkpoint.py::test_references_of_no_use_are_named",
    "reference-type": "test_save_checkpoint.py::test_references_of_no_use_are_named",
    "run-id-type": "test_save_checkpoint.py::test_arguments_of_no_use_are_named",
    "state-too-deep": "test_save_checkpoint.py::test_states_of_no_use_are_named",
    "top-invalid": "test_library.py::test_labels_per_image_are_a_whole_number",
    "value-too-large": "test_save_checkpoint.py::test_arguments_of_no_use_are_named",
    "every-n-steps": "test_long_frameworks.py::test_lightning_refuses_what_it_could_not_load",
    "module-name-taken": "test_long_frameworks.py::test_lightning_refuses_what_it_could_not_load",
    "not-of-trainer": "test_long_frameworks.py::test_hugging_face_unpacks_into_its_folder_only",
    "processes-with-own-runs": "test_long_frameworks.py::test_lightning_in_two_processes",
    "trainer-weights-divided": "nobody: needs several GPUs",
    "weights-divided": "nobody: needs several GPUs",
    "weights-in-parts": "test_long_frameworks.py::test_hugging_face_packs_one_file_of_weights",
    "amp-fp16-on-mps": "nobody: needs an Apple GPU",
    "artifact-not-arrived": "test_long_answers.py::test_an_upload_that_a_portal_takes",
    "artifact-address": "test_trust.py::test_artifacts_elsewhere_are_refused",
    "artifact-folder": "test_trust.py::test_no_command_follows_a_run_into_a_local_folder",
    "artifact-outside": "test_trust.py::test_a_manifest_leads_elsewhere",
    "artifact-server-unknown": "test_trust.py::test_no_command_follows_a_run_to_a_strange_server",
    "journal-not-ours": "test_strange_folders.py::test_a_journal_of_rubbish",
    "checkpoint-being-written": "test_read_once.py::test_a_file_that_is_written_to_while_it_is_read",
    "checkpoint-not-in-run": "test_export.py::test_promoting",
    "checkpoint-not-sendable": "test_delivery.py::test_a_file_that_was_damaged_while_it_waited_is_refused",
    "checkpoint-unwritable": "test_cli.py::test_a_full_disk_is_one_line",
    "option-not-of-trainer": "test_trainer.py::test_mistakes_are_named",
    "option-of-optimizer": "test_trainer.py::test_mistakes_are_named",
    "training-without-classifier": "test_trainer.py::test_mistakes_are_named",
    "num-classes-missing": "test_trainer.py::test_mistakes_are_named",
    "dataset-not-indexed": "test_trainer.py::test_mistakes_are_named",
    "dataset-empty": "test_trainer.py::test_mistakes_are_named",
    "balance-without-labels": "test_trainer.py::test_mistakes_are_named",
    "callbacks-not-list": "test_trainer.py::test_mistakes_are_named",
    "callback-is-class": "test_trainer.py::test_mistakes_are_named",
    "callback-hears-nothing": "test_trainer.py::test_mistakes_are_named",
    "trainer-in-processes": "test_trainer.py::test_mistakes_in_a_job_and_in_items",
    "dataset-item-invalid": "test_trainer.py::test_mistakes_in_a_job_and_in_items",
    "dataset-size-changed": "test_trainer.py::test_an_error_of_a_callback_ends_the_training_which_resumes_bit_for_bit",
    "option-unknown": "test_library.py::test_wrong_options_are_named_before_anything_is_done",
    "config-not-config": "test_library.py::test_wrong_options_are_named_before_anything_is_done",
    "input-unreadable": "test_library.py::test_odd_images_are_named",
    "no-classifier": "test_features.py::test_a_checkpoint_without_a_classifier_is_refused_in_one_line",
    "check-folder-unreadable": "nobody: needs a folder that may not be read, and tests may run as root",
    "class-link-broken": "test_data.py::test_a_class_may_be_a_link_but_not_one_that_leads_nowhere",
    "compile-failed": "test_resume.py::test_a_network_that_cannot_be_compiled",
    "compile-unavailable": "test_resume.py::test_a_network_that_cannot_be_compiled",
    "device-unknown": "nobody: config's rule goes before; for callers of the library",
    "export-failed": "test_export.py::test_output_that_cannot_be_written",
    "calibration-dir-missing": "test_int8.py::test_calibration_images_that_are_not_there",
    "calibration-no-image": "test_int8.py::test_calibration_images_that_are_not_there",
    "bench-json-invalid": "test_deploy.py::test_figures_that_are_none",
    "bench-json-unreadable": "test_deploy.py::test_figures_that_are_none",
    "bench-script-unwritable": "test_deploy.py::test_the_script_cannot_be_written",
    "checkpoint-not-evaluated": "test_exported.py::test_the_way_of_a_file",
    "compare-mixed": "test_exported.py::test_what_a_file_does_not_take",
    "deploy-bench-failed": "test_deploy.py::test_a_file_that_no_runtime_takes",
    "export-not-evaluated": "test_exported.py::test_the_way_of_a_file",
    "export-of-export": "test_exported.py::test_what_a_file_does_not_take",
    "export-without-run": "test_exported.py::test_what_a_file_does_not_take",
    "exported-changed": "test_exported.py::test_a_changed_weight_is_refused",
    "exported-device": "test_exported.py::test_what_a_file_does_not_take",
    "exported-fixed": "test_exported.py::test_what_a_file_does_not_take",
    "exported-settings-changed": "test_exported.py::test_files_that_are_not_ours",
    "exported-settings-invalid": "test_exported.py::test_files_that_are_not_ours",
    "exported-unreadable": "test_exported.py::test_files_that_are_not_ours",
    "exported-without-settings": "test_exported.py::test_files_that_are_not_ours",
    "out-with-exports": "test_exported.py::test_what_a_file_does_not_take",
    "promote-export-without-run": "test_exported.py::test_what_a_file_does_not_take",
    "promote-format": "test_exported.py::test_a_pt2_is_not_promoted",
    "export-int8-differs": "test_int8.py::test_quantised_programs_that_are_broken",
    "export-int8-failed": "test_int8.py::test_what_cannot_be_quantised",
    "export-int8-broken": "test_int8.py::test_quantised_programs_that_are_broken",
    "export-logits-differ": "test_export.py::test_a_program_that_differs_is_no_export",
    "export-package-missing": "test_export.py::test_a_missing_package_is_named",
    "export-shape-differs": "test_export.py::test_a_program_that_differs_is_no_export",
    "export-unwritable": "test_export.py::test_output_that_cannot_be_written",
    "folder-unreadable": "test_checkpoint.py::test_a_folder_that_cannot_be_read",
    "image-subfolder-unreadable": "nobody: needs a folder below that may not be read, and tests may run as root",
    "init-from-and-pretrained": "nobody: config's rule goes before; for callers of the library",
    "journal-entry-types": "test_trust.py::test_a_journal_of_junk",
    "journal-entry-unknown": "nobody: needs a journal that another version wrote",
    "journal-entry-without-run": "nobody: needs a journal that this package did not write",
    "journal-file-missing": "test_trust.py::test_a_journal_of_junk",
    "journal-file-name": "test_trust.py::test_a_journal_of_junk",
    "journal-file-unreadable": "test_durable.py::test_a_link_among_the_files",
    "journal-format": "test_journal.py::test_a_journal_of_a_later_version",
    "journal-logged": "test_trust.py::test_a_journal_of_junk",
    "journal-record": "test_trust.py::test_a_journal_of_junk",
    "journal-run-status": "test_trust.py::test_a_journal_of_junk",
    "journal-status": "test_trust.py::test_a_journal_of_junk",
    "journal-store-unknown": "test_trust.py::test_a_folder_names_a_strange_server",
    "journal-unreadable": "nobody: needs a file that may not be read, and tests may run as root",
    "locked-by-other-process": "test_journal.py::test_one_process_at_a_time",
    "locked-by-this-process": "test_journal.py::test_one_process_at_a_time",
    "logged-param-changed": "test_durable.py::test_contradictions_in_one_journal",
    "logged-model-not-arrived": "test_long_answers.py::test_a_logged_model_whose_files_a_portal_takes",
    "logged-model-refused": "test_export.py::test_models_that_cannot_be_created_do_not_block_delivery",
    "manifest-not-downloaded": "test_unreadable.py::test_no_room_for_a_manifest",
    "manifest-unwritable": "test_saving.py::test_marking_the_best_fails",
    "teacher-changed": "test_training_options.py::test_a_teacher_resumes",
    "mean-image-changed": "test_families.py::test_the_mean_image_travels_in_the_checkpoint",
    "mean-image-unreadable": "nobody: needs a file that may not be read, and tests may run as root",
    "model-arguments-differ": "test_loading.py::test_a_file_that_names_its_network_is_believed",
    "model-does-not-fit": "test_loading.py::test_a_file_that_names_no_network_needs_one",
    "newest-not-downloaded": "test_unreadable.py::test_a_503_for_the_newest_artifact_only",
    "none-verifies-in-run": "test_resolve.py::test_a_corrupt_artifact_is_passed_over_and_the_cache_stays_clean",
    "one-device-many-processes": "nobody: needs several processes with CUDA",
    "out-of-memory": "test_train_failures.py::test_memory_that_runs_out_is_one_line",
    "path-not-unicode": "test_odd_folders.py::test_a_folder_that_is_not_unicode",
    "peer-diverged": "nobody: said by the first process of the job alone",
    "peer-failed": "nobody: said by the first process of the job alone",
    "peers-images-differ": "test_long_distributed.py::test_processes_with_other_options_end_with_one_line",
    "peers-options-differ": "test_long_distributed.py::test_processes_with_other_options_end_with_one_line",
    "process-lost": "test_distributed.py::test_pytorchs_error_for_a_lost_process",
    "promote-other-file": "test_export.py::test_a_file_of_another_run",
    "table-column-type": "test_table.py::test_wrong_parquet_files",
    "table-too-large": "test_table.py::test_tables_of_absurd_size",
    "table-too-many-rows": "test_table.py::test_tables_of_absurd_size",
    "published-weights-cache": "test_torchvision.py::test_a_damaged_cache_is_named",
    "published-weights-damaged": "test_torchvision.py::test_a_damaged_cache_is_named",
    "published-weights-empty": "test_torchvision.py::test_a_cache_without_weights_is_named",
    "published-weights-not-fetched": "test_torchvision.py::test_a_failed_download_is_one_line",
    "read-back-differs": "nobody: the disk returns other bytes than it was given",
    "refused-not-taken": "test_exchanges.py::test_refused_entries_stay_if_the_journal_cannot_be_written",
    "refused-entry-not-kept": "nobody: the disk fills up at that very moment",
    "registered-model-no-checkpoint": "test_resolve.py::test_registered_models",
    "rendezvous-timed-out": "test_distributed.py::test_a_signal_ends_the_wait_for_the_others",
    "run-not-created": "test_exchanges.py::test_a_creation_is_never_dropped",
    "run-config-invalid": "nobody: the run's configuration is written by this package",
    "run-has-writer": "test_writer.py::test_a_fresh_writer_elsewhere_is_respected",
    "run-id-ambiguous": "test_ids.py::test_prefixes_of_no_run_or_several",
    "run-id-invalid": "test_trust.py::test_a_run_id_stays_below_its_folder",
    "run-id-unknown": "test_ids.py::test_prefixes_of_no_run_or_several",
    "run-images-unknown": "test_data_check.py::test_a_run_that_does_not_say_what_it_was_trained_on",
    "run-resumed-meanwhile": "test_writer.py::test_a_silent_writer_elsewhere_is_watched_before_its_run_is_mended",
    "run-still-trained": "test_writer.py::test_a_run_whose_writer_is_gone_is_mended",
    "run-taken-over": "test_writer.py::test_the_loser_sends_nothing_more_and_can_go_on_as_its_own_run",
    "run-without-checkpoint": "test_resolve.py::test_a_missing_checkpoint_lists_what_exists",
    "run-without-writer": "test_writer.py::test_a_silent_writer_elsewhere_is_watched_before_its_run_is_mended",
    "save-dir-of-other-run": "test_launchers.py::test_a_run_without_a_checkpoint_restarts_by_its_id",
    "checkpoint-of-other-run": "test_save_checkpoint.py::test_no_file_of_another_run_is_overwritten",
    "monitor-mode": "test_save_checkpoint.py::test_a_metric_that_is_not_there",
    "monitor-not-metric": "test_save_checkpoint.py::test_a_metric_that_is_not_there",
    "save-not-delivered": "test_save_checkpoint.py::test_a_run_that_does_not_exist",
    "save-not-journaled": "test_delivery.py::test_save_checkpoint_where_the_journal_cannot_be_read",
    "save-not-noted": "nobody: needs a full disk while the checkpoint itself can be written",
    "save-refused": "test_save_checkpoint.py::test_a_metric_that_mlflow_refuses",
    "state-is-module": "test_save_checkpoint.py::test_a_state_that_is_no_dict",
    "sync-interrupted": "test_delivery.py::test_a_run_started_offline",
    "upload-not-listed": "test_delivery.py::test_elsewhere_the_size_is_confirmed",
    "upload-sha256-differs": "test_delivery.py::test_a_damaged_upload_is_not_committed",
    "upload-size-differs": "test_delivery.py::test_elsewhere_the_size_is_confirmed",
    "worker-died": "test_train_failures.py::test_a_dead_worker_is_an_error_and_loses_nothing",
    "workers-not-started": "nobody: needs a limit on processes, which does not hold for root",
    "classes-beyond-network": "test_own_networks.py::test_states_that_are_refused",
    "classes-not-all": "test_own_networks.py::test_states_that_are_refused",
    "classes-twice": "test_own_networks.py::test_states_that_are_refused",
    "classes-type": "test_own_networks.py::test_states_that_are_refused",
    "model-arguments-not-plain": "test_registered.py::test_arguments_must_be_plain",
    "model-not-registered": "test_registered.py::test_training_resuming_and_evaluating",
    "model-registered-twice": "test_registered.py::test_names_that_are_taken",
    "network-not-known": "test_own_networks.py::test_commands_say_that_they_need_a_network",
    "preprocess-invalid": "test_own_networks.py::test_inputs_that_are_refused",
    "preprocess-key-unknown": "test_own_networks.py::test_inputs_that_are_refused",
    "preprocess-type": "test_own_networks.py::test_inputs_that_are_refused",
    "registered-arguments": "test_registered.py::test_packages_that_are_wrong",
    "registered-fails": "test_registered.py::test_packages_that_are_wrong",
    "registered-no-function": "test_registered.py::test_packages_that_are_wrong",
    "registered-outputs": "test_registered.py::test_networks_that_cannot_be_trained",
    "registered-preprocess": "test_registered.py::test_packages_that_are_wrong",
    "registered-returns": "test_registered.py::test_packages_that_are_wrong",
    "registered-without-head": "test_registered.py::test_packages_that_are_wrong",
    "registered-without-weights": "test_registered.py::test_options_that_it_cannot_take",
    "stages-unknown": "test_registered.py::test_options_that_it_cannot_take",
    "state-model-differs": "test_own_networks.py::test_states_that_are_refused",
    "state-model-invalid": "test_own_networks.py::test_states_that_are_refused",
    "state-not-dict": "test_save_checkpoint.py::test_a_state_that_is_no_dict",
    "two-networks-saved": "test_own_networks.py::test_two_networks_are_refused",
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
