"""Every rule on an option's value, in every command: broken rules are named at once, and nothing is left behind.

The commands run in a process of their own in which torch and MLflow cannot be imported, each in an empty folder. An
option that a command gains must be in `BROKEN`, or in `WITHOUT_RULE` if any text will do.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import pytest

from shufflenet_mlflow.cli.option import Option
from shufflenet_mlflow.config import EXCLUSIONS, RULES
from tests.test_settings import commands

DRIVER = """
import json, os, sys
from tempfile import TemporaryDirectory
from click.testing import CliRunner
from shufflenet_mlflow.cli import main

for name in ("torch", "torchvision", "mlflow", "numpy", "cv2", "matplotlib"):
    sys.modules[name] = None  # importing it is an error

def answer(words, variables, files, outside):
    for name, text in files.items():
        open(os.path.join(outside, name), "w").write(text)
    words = [word.replace("{outside}", outside) for word in words]
    result = CliRunner(env={**variables, "SHUFFLENET_CACHE_DIR": outside + "/cache"}).invoke(main, words)
    left = os.listdir() + (["the cache folder"] if os.path.exists(outside + "/cache") else [])
    error = None if isinstance(result.exception, SystemExit) else repr(result.exception)
    return [result.exit_code, result.stdout, result.stderr, left, error]

with TemporaryDirectory() as outside:
    for line in sys.stdin:
        with TemporaryDirectory() as folder:
            os.chdir(folder)
            print(json.dumps(answer(*json.loads(line), outside)))
            os.chdir(outside)
"""

DIGITS = "9" * 20
RUN, OTHER_RUN = "0123456789ab", "ba9876543210"
TWENTY = ",".join(["1"] * 20)

ARGUMENTS = {
    "bench": [],
    "checkpoints ls": ["x"],
    "checkpoints promote": ["x", "--name", "net"],
    "checkpoints prune": ["x"],
    "checkpoints pull": ["x"],
    "checkpoints verify": ["x"],
    "compare": [RUN, OTHER_RUN],
    "data check": ["x"],
    "data digits": ["x"],
    "data mean": ["x"],
    "data split": ["x", "y"],
    "eval": ["x"],
    "export": ["x"],
    "models": [],
    "predict": ["x", "x.jpg"],
    "recipes": [],
    "runs": [],
    "runs log-bench": [RUN, "x.json"],
    "runs mend": [RUN],
    "runs show": [RUN],
    "search": ["x"],
    "sync": ["x"],
    "train": [],
    "tune": ["--study", "x", "--param", "schedule=linear,cosine"],
    "tune show": ["x"],
    "tune stop": ["x"],
}
"""Command -> words without which it does not start."""


@dataclass(frozen=True)
class Case:
    """A command that breaks a rule."""

    words: list[str]
    says: tuple[str, ...]
    """Texts that the error line must contain."""
    status: int = 2
    variables: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    shows: tuple[str, ...] = ("",)
    """The line must hold one of these."""


COUNTS = ("0", "-1", DIGITS)

BROKEN: dict[str, tuple[str, ...]] = {
    "--alias": ("v1", "latest", "a/b", "", "x" * 101),
    "--amp": ("fp8",),
    "--asynchronous": ("perhaps",),
    "--augment": ("wild",),
    "--balance": ("loss",),
    "--batch-size": COUNTS,
    "--bn-images": COUNTS,
    "--calibration-images": ("0", "-1", "100001", DIGITS),
    "--changed-data": ("perhaps",),
    "--choices": ("a", ",", "1,2", TWENTY[:-1] + "4", TWENTY.replace("1", "0.5")),
    "--clip-norm": ("-1", "nan", "inf"),
    "--columns": (",", "name,,lr"),
    "--compile": ("perhaps",),
    "--crossovers": ("-1", "10001", DIGITS),
    "--cutmix": ("-0.1", "101", "nan"),
    "--deploy": ("no.onnx", "x"),
    "--direction": ("up",),
    "--device": ("tpu", "cuda:", f"cuda:{DIGITS}", "CPU"),
    "--display-interval": COUNTS,
    "--ema-decay": ("1", "nan", "inf", "-0.5"),
    "--epochs": COUNTS,
    "--erasing": ("-0.1", "1.1", "nan"),
    "--format": ("tf",),
    "--freeze": ("5", "-1", "stem", "1,2"),
    "--group-by": ("(", "*", "[z-a]"),
    "--generation": ("0", "10001", DIGITS),
    "--generations": ("-1", "10001", DIGITS),
    "--grace": ("-1", "nan", "inf", DIGITS),
    "--head-lr-factor": ("0", "-1", "nan", "inf"),
    "--int8": ("perhaps",),
    "--if-better": ("runs:/x", "models:/net", f"{RUN}@x", f"{RUN}@{DIGITS}"),
    "--init-from": ("runs:/x", "models:/net", f"{RUN}@x", f"{RUN}@{DIGITS}"),
    "--input-size": ("0", "50", "-32", "7200", DIGITS),
    "--iterations": COUNTS,
    "--job": ("a/b", "-", "x" * 101, "é"),
    "--keep-best": COUNTS,
    "--keep-every": COUNTS,
    "--keep-last": COUNTS,
    "--label-smooth": ("-0.1", "1", "nan"),
    "--latency-limit": ("0", "-1", "nan", "inf", "1e7"),
    "--layer-decay": ("0", "-1", "1.1", "nan"),
    "--limit": ("0", "-1", "50001", DIGITS),
    "--log-to": ("moon",),
    "--lr": ("0", "-1", "nan", "inf", "1e400"),
    "--macs-limit": ("0", "-1", "nan", "inf", "1e16"),
    "--mean-image": ("mean.txt", "mean"),
    "--max-parallel": ("0", "65", DIGITS),
    "--metric": ("top1", "loss"),
    "--micro-batch-size": ("1", *COUNTS),
    "--mixup": ("-0.1", "101", "nan"),
    "--model": ("shufflenet",),
    "--momentum": ("-0.1", "1", "nan", DIGITS),
    "--mutation-probability": ("0", "1.1", "nan"),
    "--mutations": ("-1", "10001", DIGITS),
    "--name": ("a/b", "a@b", " ", "x" * 101),
    "--new-run": ("perhaps",),
    "--no-log-models": ("perhaps",),
    "--no-system-metrics": ("perhaps",),
    "--num-classes": ("0", "-1", "1000001", DIGITS),
    "--on-bad-image": ("ignore",),
    "--on-save-error": ("ignore",),
    "--optimizer": ("adam",),
    "--output": ("mean.txt",),  # of `data mean`
    "--param": ("lr", "lr=", "lr=0.1,x", "lr=1:0.5", "epochs=1,2", "momentun=0.5,0.9", "recipe=old,paper", "lr=0:1"),
    "--patience": ("-1", DIGITS),
    "--population": ("0", "10001", DIGITS),
    "--channel-search": ("perhaps", "true"),  # the default network has no paths
    "--pretrained": ("perhaps", "true"),  # the default network has none
    "--recipe": ("old",),
    "--reduction": ("1", "101", DIGITS),
    "--repeat": ("0", "1", "1001", DIGITS),
    "--requeue": ("perhaps",),
    "--resume": ("runs:/x", "models:/net", f"{RUN}@x", f"{RUN}@{DIGITS}"),
    "--rungs": ("0", "11", DIGITS),
    "--sampler": ("bayes",),
    "--save-interval": COUNTS,
    "--scales": ("a", ",", "1,2", TWENTY[:-1] + "2.1", TWENTY[:-1] + "0", TWENTY[:-1] + "nan"),
    "--schedule": ("steps",),
    "--score-images": COUNTS,
    "--search": ("runs:/x", "models:/net", f"{RUN}@x", f"{RUN}@{DIGITS}"),
    "--seed": ("-1", DIGITS),
    "--sort": ("minutes", " "),
    "--split": ("all", "Train"),
    "--storage": ("postgres", "/tmp/study.db"),
    "--study": ("a/b", "-x", "x" * 81),
    "--sync-bn": ("perhaps",),
    "--take-over": ("perhaps",),
    "--teacher": ("runs:/x", "models:/net", f"{RUN}@x", f"{RUN}@{DIGITS}"),
    "--qat": ("runs:/x", "models:/net", f"{RUN}@x", f"{RUN}@{DIGITS}"),
    "--time-budget": ("0", "-1", "nan", "inf"),
    "--pareto": ("perhaps",),
    "--top": COUNTS,
    "--threads": ("0", "-1", "1001", DIGITS),
    "--total-iters": COUNTS,
    "--trials": ("0", "10001", DIGITS),
    "--trust": ("0", "3", "1001", DIGITS),
    "--trust-epochs": ("0", "10001", DIGITS),
    "--tracking-uri": ("http://", "http://[::1", "http://127.0.0.1:99999", "sqlite://x", "localhost:5000"),
    "--val-fraction": ("0", "1", "-0.2", "20", "nan", "inf"),
    "--val-interval": COUNTS,
    "--warmup-epochs": ("-1", "nan", "inf"),
    "--weight-decay": ("-1", "nan", "inf"),
    "--workers": ("-1", "1001", DIGITS),
}
"""Option -> values that cannot work."""

WITHOUT_RULE = {
    *(
        "--against",
        "--cache-dir",
        "--calibration-dir",
        "--experiment",
        "--filter",
        "--out",
        "--run-name",
        "--save-dir",
        "--train-dir",
        "--val-dir",
    ),
    *(
        "--config",
        "--ascending",
        "--debug",
        "--dry-run",
        "--json",
        "--manifest",
        "--quiet",
        "--refused",
        "--verbose",
        "--version",
        "--help",
        "--help-all",
    ),
}
"""Any text will do, or the folder or file says whether it will; or they take no value."""

STATUS_1 = {"--if-better", "--tracking-uri", "--search", "--resume", "--init-from", "--qat", "--teacher"}
"""A reference that is not understood, and an address that is none, end with status 1."""

VALUE_NOT_SHOWN = {"--choices", "--scales", "--columns", "--sort", "--pretrained", "--param", "--channel-search"}
"""The message names the wrong number or column among several."""


def name_of(parameter: click.Parameter) -> str:
    return max(parameter.opts, key=len)


def cases_of(words: str, command: click.Command) -> Iterator[Case]:
    """Broken values of each of the command's options."""
    required = [*words.split(), *ARGUMENTS[words]]
    for parameter in command.params:
        name = name_of(parameter)
        if not isinstance(parameter, click.Option) or name in WITHOUT_RULE:
            continue
        if name == "--output" and words != "data mean":
            continue
        values = list(BROKEN[name])
        if isinstance(parameter.type, (click.types.IntParamType, click.types.FloatParamType)):
            values.append("many")
        if isinstance(parameter.type, click.types.IntParamType):
            values += ["1.5", "nan", "1e3"]
        if name == "--batch-size" and words in ("train", "tune", "bench", "search"):
            values.append("1")
        for value in values:
            more = ["--model", "shufflenet_oneshot"] if name in ("--choices", "--scales") else []
            given = [name, value] if parameter.metavar != "" else [f"{name}={value}"]
            shows = ("",) if name in VALUE_NOT_SHOWN else (value, *_as_float(value))
            yield Case([*required, *given, *more], (name.lstrip("-"),), 1 if name in STATUS_1 else 2, shows=shows)


def _as_float(text: str) -> list[str]:
    try:
        return [f"{float(text)})"]
    except ValueError:
        return []


def ask(cases: list[Case]) -> list[Any]:
    """Status, stdout, stderr, files left, and the exception that was no exit, of each."""
    lines = "".join(json.dumps([case.words, case.variables, case.files]) + "\n" for case in cases)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "SHUFFLENET_"))}
    ran = subprocess.run(
        [sys.executable, "-c", DRIVER], input=lines, capture_output=True, text=True, env=environment, check=False
    )
    assert ran.returncode == 0, ran.stderr
    answers = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(answers) == len(cases)
    return answers


def run(cases: list[Case]) -> list[str]:
    """Return the problems with the answers."""
    return [
        f"{case.words} {case.variables or ''}{case.files or ''}: {problem}"
        for case, answer in zip(cases, ask(cases), strict=True)
        for problem in problems(case, *answer)
    ]


def problems(case: Case, status: int, stdout: str, stderr: str, left: list[str], error: str | None) -> Iterator[str]:
    if error is not None:
        yield f"goes on: {error}"
    if status != case.status:
        yield f"status {status}"
    if left:
        yield f"leaves {left}"
    first, *rest = stderr.splitlines() or [""]
    if stdout or not first.startswith("Error: ") or len(rest) > 1 or (rest and not rest[0].startswith("Try '")):
        yield f"prints {stdout!r} {stderr!r}"
    if not any(text in first for text in case.shows):
        yield f"shows none of {case.shows}: {first}"
    for text in case.says:
        if text not in first:
            yield f"does not say {text!r}: {first}"


WORKING: dict[str, tuple[str, ...]] = {
    "--alias": ("champion", "v1a", "x" * 100),
    "--batch-size": ("2", str(10**12)),
    "--bn-images": ("1", str(10**12)),
    "--generation": ("1", "10000"),
    "--generations": ("0", "10000"),
    "--latency-limit": ("0.001", "1e6"),
    "--macs-limit": ("1", "330e6"),
    "--mutation-probability": ("1e-9", "1"),
    "--mutations": ("0", "25"),
    "--population": ("1", "10000"),
    "--score-images": ("1", str(10**12)),
    "--search": ("models", RUN, f"runs:/{RUN}"),
    "--trust": ("4", "1000"),
    "--trust-epochs": ("1", "10000"),
    "--max-parallel": ("1", "64"),
    "--param": ("lr=log:1e-9:1", "batch-size=int:2:9", "recipe=paper,modern", "--lr=0.1,0.2"),
    "--reduction": ("2", "100"),
    "--rungs": ("1", "10"),
    "--storage": ("sqlite:///studies.db", "postgresql+psycopg2://u:p@host/x"),
    "--study": ("a.b-c_D", "0" * 80),
    "--time-budget": ("0.1", "1e9"),
    "--trials": ("1", "10000"),
    "--choices": (TWENTY, f"[{TWENTY}]"),
    "--columns": ("name, lr,best/val_top1,tags.job",),
    "--device": ("auto", "cpu", "cuda", "cuda:7"),
    "--clip-norm": ("0", "1e9"),
    "--cutmix": ("0", "100"),
    "--ema-decay": ("0", "0.9999"),
    "--erasing": ("0", "1"),
    "--freeze": ("none", "backbone", "0", "4"),
    "--grace": ("0", "1e6"),
    "--head-lr-factor": ("1e-9", "1e6"),
    "--group-by": ("a", r"(?i)patient(\d+)/"),
    "--input-size": ("32", "7168"),
    "--iterations": ("1",),
    "--job": ("a.b-c_D", "0" * 100),
    "--keep-every": ("1", str(10**12)),
    "--label-smooth": ("0", "0.999"),
    "--layer-decay": ("1e-9", "1"),
    "--limit": ("1", "50000"),
    "--lr": ("1e-12", "1e20"),
    "--mean-image": ("mean.npy", "mean.XML"),
    "--micro-batch-size": ("2",),
    "--mixup": ("0", "100"),
    "--momentum": ("0", "0.999"),
    "--name": ("my pets", "x" * 100),
    "--num-classes": ("1", "1000000"),
    "--output": ("mean.npy", "x.XML"),
    "--patience": ("0", str(10**12)),
    "--repeat": ("2", "1000"),
    "--resume": ("auto", "none", "models", RUN, f"runs:/{RUN}@best", f"{RUN}@100", "models:/net@champion"),
    "--scales": (",".join(["0.2"] * 20), ",".join(["2"] * 20)),
    "--seed": ("0", str(2**63 - 1)),
    "--sort": ("started", "tags.x"),
    "--qat": ("models", RUN, f"runs:/{RUN}@best", "models:/net@champion"),
    "--teacher": ("models", RUN, f"runs:/{RUN}@best", "models:/net@champion"),
    "--threads": ("1", "1000"),
    "--top": ("1",),
    "--val-fraction": ("1e-9", "0.999"),
    "--total-iters": ("1", str(10**12)),
    "--tracking-uri": ("http://host:5000", "https://u:p@host/path", "sqlite:///x/y.db", "postgresql://u:p@host/x"),
    "--warmup-epochs": ("0", "0.5", "1e6"),
    "--weight-decay": ("0", "1e3"),
    "--workers": ("0", "1000"),
}
"""Option -> the extremes of what can work."""

NEEDED_BESIDE = {
    "--trust-epochs": ["--trust", "4"],
    "--choices": ["--model", "shufflenet_oneshot"],
    "--scales": ["--model", "shufflenet_oneshot"],
    "--mean-image": ["--model", "shufflenet_v2_large"],
    "--val-fraction": ["--train-dir", "x"],
    "--group-by": ["--train-dir", "x"],
}
"""Option -> words without which it cannot work."""

COMMANDS = {words: command for words, command in commands().items() if words in ARGUMENTS}


def test_every_command_and_option_is_covered() -> None:
    groups = {"", "checkpoints", "data", "completion"}
    assert commands().keys() - groups == ARGUMENTS.keys()
    options = {
        name_of(parameter)
        for command in commands().values()
        for parameter in command.params
        if isinstance(parameter, click.Option)
    }
    assert options - WITHOUT_RULE - BROKEN.keys() == set()
    assert BROKEN.keys() - options == set()
    assert not BROKEN.keys() & WITHOUT_RULE
    assert {f"--{name.replace('_', '-')}" for name in RULES} - BROKEN.keys() == set()


@pytest.mark.parametrize("words", COMMANDS)
def test_broken_rules(words: str) -> None:
    cases = list(cases_of(words, COMMANDS[words]))
    assert not (wrong := run(cases)), "\n".join(wrong)


@pytest.mark.parametrize("words", COMMANDS)
def test_extremes_are_taken(words: str) -> None:
    """The control of the tests above: with them the command goes on, to torch, to MLflow or to what is not there."""
    cases = []
    for parameter in COMMANDS[words].params:
        name = name_of(parameter)
        more = NEEDED_BESIDE.get(name, []) if words != "data split" else []
        for value in WORKING.get(name, ()):
            cases.append(Case([*words.split(), *ARGUMENTS[words], name, value, *more], (), status=-1))
    for case, (status, _stdout, stderr, _left, error) in zip(cases, ask(cases), strict=True):
        went_on = error is not None and "None in sys.modules" in error
        not_there = status == 1 and not stderr.startswith("Error: --")
        needs_neither = status == 0  # `recipes`
        assert went_on or not_there or needs_neither or "nothing says what to keep" in stderr, (
            case.words,
            stderr,
            error,
        )


@pytest.mark.parametrize("words", COMMANDS)
def test_values_of_a_wrong_type_in_files_and_variables(words: str) -> None:
    cases = []
    for option in COMMANDS[words].params:
        if not isinstance(option, Option) or not option.in_files:
            continue
        name, is_flag = name_of(option), option.metavar == ""
        key = name.lstrip("-").replace("-", "_")
        is_number = isinstance(option.type, (click.types.IntParamType, click.types.FloatParamType))
        wrong: list[Any] = [[[1]], {"a": 1}]
        if not option.is_list:
            wrong.append([16])
        if not is_number:
            wrong.append(7)
        if not is_flag:
            wrong.append(True)
        for value in wrong:
            file = {"options.json": json.dumps({key: value})}
            more = [*words.split(), *ARGUMENTS[words], "--config", "{outside}/options.json"]
            cases.append(Case(more, (key, "options.json"), files=file))
        if is_number or is_flag:
            variable = {f"SHUFFLENET_{key.upper()}": "many"}
            cases.append(Case([*words.split(), *ARGUMENTS[words]], (name, *variable, "many"), variables=variable))
        if is_number:
            value = BROKEN[name][0]
            variable = {f"SHUFFLENET_{key.upper()}": value}
            cases.append(Case([*words.split(), *ARGUMENTS[words]], (name, *variable), variables=variable))
    assert not (wrong_answers := run(cases)), "\n".join(wrong_answers)


ONESHOT = ["--model", "shufflenet_oneshot"]

PAIRS = [
    Case(["train", "--epochs", "3", "--total-iters", "4"], ("--epochs (=3)", "--total-iters (=4)")),
    Case(
        ["train", "--search", "x", "--model", "shufflenet_v2_x0_5"], ("--search (=x)", "--model (=shufflenet_v2_x0_5)")
    ),
    Case(["train", "--search", "x", "--choices", TWENTY], ("--search (=x)", "--choices")),
    Case(["train", "--search", "x", "--scales", TWENTY], ("--search (=x)", "--scales")),
    Case(["search", "x", "--macs-limit", "3e8", "--latency-limit", "5"], ("--macs-limit (=3", "--latency-limit (=5")),
    Case(["search", "x", "--pareto", "--top", "5"], ("--pareto", "--top (=5)")),
    Case(["search", "x", "--trust-epochs", "3"], ("--trust-epochs (=3)", "--trust, which is missing")),
    Case(["train", "--init-from", "x", "--pretrained"], ("--init-from (=x)", "--pretrained")),
    Case(["train", "--qat", "x", "--init-from", "y"], ("--qat (=x)", "--init-from (=y)")),
    Case(["train", "--qat", "x", "--pretrained"], ("--qat (=x)", "--pretrained")),
    Case(["train", "--qat", "x", "--sync-bn"], ("--qat (=x)", "--sync-bn")),
    Case(["train", "--qat", "x", "--amp", "bf16"], ("--amp (=bf16)", "--qat")),
    Case(["train", "--val-dir", "x", "--val-fraction", "0.1"], ("--val-dir (=x)", "--val-fraction (=0.1)")),
    Case(["train", "--val-dir", "x", "--group-by", "y"], ("--val-dir (=x)", "--group-by (=y)")),
    Case(["train", "--val-fraction", "0.1"], ("--val-fraction (=0.1)", "--train-dir, which is missing")),
    Case(["tune", *ARGUMENTS["tune"], "--asynchronous", "--generation", "4"], ("--asynchronous", "--generation (=4)")),
    Case(
        ["tune", "--study", "x", "--param", "lr=0.1:0.2", "--asynchronous", "--sampler", "cmaes"],
        ("--sampler cmaes", "--asynchronous"),
    ),
    Case(["tune", "--study", "x", "--asynchronous"], ("--asynchronous", "without --param")),
    Case(["data", "split", "x", "y", "--manifest"], ("--manifest", "'y'")),
    Case(["train", "--pretrained"], ("shufflenet_v2_x0_5", "--init-from")),
    Case(
        ["train", "--channel-search", *ONESHOT],
        ("--channel-search needs", "_supernet, not shufflenet_oneshot"),
    ),
    Case(["train", "--search", "x", "--channel-search"], ("--channel-search needs --model",)),
    Case(["train", "--pretrained", "--model", "shufflenet_v2_x1_0"], ("shufflenet_v2_x1_0", "--init-from")),
    Case(["train", "--mean-image", "mean.npy"], ("--mean-image 'mean.npy'", "shufflenet_v2_large")),
    *(
        Case([*words, "--mean-image", "m.npy", "--model", "shufflenet_v2_x1_0"], ("--mean-image 'm.npy'", "x1_0"))
        for words in (["train", "--resume", RUN], ["eval", "x"], ["export", "x"], ["predict", "x", "x.jpg"])
    ),
    *(
        Case([*words, "--choices", TWENTY], (f"--choices (={TWENTY})", "needs --model shufflenet_oneshot"))
        for words in (["train"], ["train", "--resume", "none"], ["bench"], ["eval", "x"], ["predict", "x", "x.jpg"])
    ),
    Case(["eval", "x", "--model", "shufflenet_v2_x1_0", "--choices", TWENTY], ("shufflenet_v2_x1_0", "choices")),
    Case(["train", "--resume", RUN, "--choices", "1,2"], ("choices", "not 20")),
    Case(["checkpoints", "prune", "x"], ("nothing says what to keep", "--keep-last")),
    Case(["compare", RUN], (RUN, "two runs or more")),
    Case(["compare", RUN, RUN], (RUN, "given twice")),
    *(Case([*words, "--choices", TWENTY + ",1", *ONESHOT], ("21, not 20",)) for words in (["train"], ["bench"])),
    *(
        Case([*words, ref, *more], (ref, "checkpoint"), status=1)
        for ref in ("", "runs:/x", "models:/net", f"{RUN}/../x")[1:3]
        for words, more in (
            (["eval"], []),
            (["predict"], ["x.jpg"]),
            (["export"], []),
            (["checkpoints", "ls"], []),
            (["checkpoints", "pull"], []),
            (["checkpoints", "verify"], []),
            (["checkpoints", "promote"], ["--name", "net"]),
            (["checkpoints", "prune"], ["--keep-last", "1"]),
        )
    ),
    *(Case(["runs", "show", run], (run, "`shufflenet runs`"), status=1) for run in ("no", "runs:/x", "0123")),
    Case(["compare", RUN, "no"], ("'no'", "`shufflenet runs`"), status=1),
]


def test_pairs_and_references() -> None:
    assert len(EXCLUSIONS) == 13  # all are above
    assert not (wrong := run(PAIRS)), "\n".join(wrong)


def test_a_process_of_its_own(tmp_path: Path) -> None:
    """As a person starts it; `-X importtime` lists every module on stderr."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "SHUFFLENET_"))}
    for words in (["train", "--lr", "0"], ["eval", "x", "--device", "tpu"], ["runs", "--limit", "0"]):
        command = [sys.executable, "-X", "importtime", "-m", "shufflenet_mlflow", *words]
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
        modules = {
            line.rpartition("|")[2].strip() for line in ran.stderr.splitlines() if line.startswith("import time")
        }
        assert (ran.returncode, ran.stdout, list(tmp_path.iterdir())) == (2, "", [])
        assert modules & {"torch", "mlflow", "numpy", "rich"} == set()
        assert sum(line.startswith("Error: ") for line in ran.stderr.splitlines()) == 1


def test_options_that_a_checkpoint_may_supply_are_left_to_it(tmp_path: Path) -> None:
    """Where training may continue a run, the network that takes the choices may be the run's."""
    for found_by in (["--resume", RUN], ["--save-dir", "models"], ["--job", "pets"]):
        [problem, *_] = run([Case(["train", "--choices", TWENTY, *found_by], ())])
        assert "goes on: ModuleNotFoundError" in problem
