"""Train, kill, resume, sync and evaluate several runs while everything around them goes wrong; then check each run.

An hour of it: `make soak`, or `python -m tests.support.soak --minutes 60 --seed 7`. The seed chooses what happens; when
exactly a process meets it depends on the machine.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from mlflow import MlflowClient
from mlflow.entities import Run

from shufflenet_mlflow.checkpoints.verification import read_checkpoint
from shufflenet_mlflow.tracking.journal_file import JOURNAL_NAME, scan
from tests.support.command_line import small_options
from tests.support.disturbances import Disturbances, small_disk
from tests.support.images import write_images
from tests.support.metrics import steps, values
from tests.support.mlflow_server import Server
from tests.support.proxy import Proxy

ITERATIONS, SAVE_EVERY, VALIDATE_EVERY = 240, 20, 80
OPTIONS: tuple[object, ...] = (
    *("--total-iters", ITERATIONS, "--save-interval", SAVE_EVERY, "--val-interval", VALIDATE_EVERY),
    *("--keep-last", 4, "--save-dir", "m", "--json"),
)
EXPERIMENT = "soak"
LIMIT_SECONDS = 240.0
"""A command that takes longer hangs; training takes a few seconds, and every wait in it is bounded."""
END_SECONDS = 60.0
"""Seconds that a process may take to end after a signal."""


def patience() -> float:
    """Return by how much longer everything may take while other processes want this machine's cores, too."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


DISK_MEBIBYTES = 2000
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
ATTEMPTS = 8
"""Attempts that a run may need to finish once everything works again."""


@dataclass
class Outcome:
    """How one command ended."""

    words: tuple[str, ...]
    status: int | None
    """None if it did not end in time."""
    seconds: float
    out: str
    err: str
    sent: int | None = None
    """Signal that was sent to it."""

    def __str__(self) -> str:
        sent = f", after {signal.Signals(self.sent).name}" if self.sent else ""
        last = self.err.strip().splitlines()[-1:] or [""]
        return f"{' '.join(self.words[:2])}: status {self.status}{sent}, {self.seconds:.0f} s: {last[0][:160]}"

    def complaint(self) -> str | None:
        """Return what is wrong with how it ended, or None."""
        if self.status is None:
            return "it did not end"
        if "Traceback (most recent call last)" in self.err + self.out:
            return "it printed a traceback"
        if "<html" in self.err.lower() or "<!doctype" in self.err.lower():
            return "it printed a page of HTML"
        allowed = {0, 1} if self.sent is None else {0, 1, -self.sent, 128 + self.sent}
        if self.status not in allowed:
            return "unexpected status"
        if self.status == 1 and '"error"' not in self.out and "Error: " not in self.err:
            return "status 1 without a reason"
        return None


@dataclass
class Subject:
    """One run, with the folders (each with its own cache: another machine) in which it was trained."""

    name: str
    folder: Path
    machines: list[Path] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    finished: bool = False

    def new_machine(self) -> Path:
        """Return a folder where nothing of the run is."""
        self.machines.append(self.folder / f"{self.name}-{len(self.machines)}")
        self.machines[-1].mkdir(parents=True)
        return self.machines[-1]


class Soak:
    """Several runs against one server through one proxy.

    Args:
        folder: scratch space; the checkpoints are on a small disk below it, where one can be mounted.
        subjects: runs at the same time.
    """

    def __init__(self, folder: Path, *, seed: int, minutes: float, subjects: int = 2) -> None:
        self.folder, self.seed, self.seconds, self.count = folder, seed, 60 * minutes, subjects
        self.images = folder / "images"
        for split, per_class in (("train", 12), ("val", 6)):
            write_images(self.images / split, per_class=per_class, seed=per_class)
        self.subjects: list[Subject] = []
        self.problems: list[str] = []
        self._mutex = threading.Lock()

    # ------------------------------------------------------------------ commands

    def command(self, machine: Path, uri: str, *words: object, sent: int | None = None, after: float = 0.0) -> Outcome:
        """Run `shufflenet WORDS` on a machine; if a signal is to be sent, send it after so many seconds."""
        texts = tuple(map(str, words))
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")},
            "MLFLOW_TRACKING_URI": uri,
            "MLFLOW_EXPERIMENT_NAME": EXPERIMENT,
            "SHUFFLENET_CACHE_DIR": str(machine / "cache"),
            "OMP_NUM_THREADS": "1",
        }
        began = time.monotonic()
        logs = Path(tempfile.mkdtemp(dir=self.folder))
        with open(logs / "out", "wb") as out, open(logs / "err", "wb") as err:
            process = subprocess.Popen(
                [sys.executable, "-m", "shufflenet_mlflow", *texts],
                cwd=machine,
                env=environment,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
            status = self._wait(process, sent, after)
        text = {name: (logs / name).read_text("utf-8", "replace") for name in ("out", "err")}
        return Outcome(texts, status, time.monotonic() - began, text["out"], text["err"], sent)

    def _wait(self, process: "subprocess.Popen[bytes]", sent: int | None, after: float) -> int | None:
        if sent is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(after)
            process.send_signal(sent)
        try:
            return process.wait(patience() * (LIMIT_SECONDS if sent is None else END_SECONDS))
        except subprocess.TimeoutExpired:
            for member in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            process.wait()
            return None

    def note(self, subject: Subject, outcome: Outcome) -> Outcome:
        """Keep an outcome, and complain if it is not one of the allowed ones."""
        subject.outcomes.append(outcome)
        print(f"  {subject.name}: {outcome}", flush=True)
        complaint = outcome.complaint()
        if complaint is not None:
            self.complain(subject, f"{complaint}: {outcome}\n{outcome.err[-3000:]}")
        return outcome

    def complain(self, subject: Subject, text: str) -> None:
        """Note something that must not be."""
        with self._mutex:
            self.problems.append(f"{subject.name}: {text}")
        print(f"PROBLEM {subject.name}: {text}", flush=True)

    # ------------------------------------------------------------------ the time of trouble

    def train(
        self,
        subject: Subject,
        machine: Path,
        uri: str,
        run_id: str | None,
        *,
        sent: int | None = None,
        after: float = 0.0,
    ) -> None:
        """Train on a machine: the same command again, or from the run ID where nothing of the run is yet."""
        journal = machine / "m" / JOURNAL_NAME
        is_known = journal.exists() and scan(journal).run is not None
        resume = ("--resume", run_id) if run_id is not None and not is_known else ()
        words = ("train", *small_options(self.images), *OPTIONS, "--run-name", subject.name, *resume)
        outcome = self.note(subject, self.command(machine, uri, *words, sent=sent, after=after))
        subject.finished = outcome.status == 0

    def run_id(self, subject: Subject) -> str | None:
        """Return the ID of the subject's run, if its machines have heard of it."""
        for outcome in reversed(subject.outcomes):
            for word in outcome.err.replace(";", " ").replace(",", " ").split():
                if len(word) == 32 and all(character in "0123456789abcdef" for character in word):
                    return word
        return None

    def live(self, subject: Subject, uri: str, until: float) -> None:
        """Do to one run, at random, what people and schedulers do, until it has finished or time is up."""
        choose = random.Random(f"{self.seed} {subject.name}")
        subject.new_machine()
        while not subject.finished and time.monotonic() < until:
            run_id = self.run_id(subject)
            action = choose.choices(
                ["train", "elsewhere", "sync", "eval", "runs", "verify"], [10, 5 if run_id else 0, 4, 1, 1, 1]
            )[0]
            machine = subject.machines[-1]
            if action in ("train", "elsewhere"):
                sent = choose.choice([None, *SIGNALS, *SIGNALS])
                machine = subject.new_machine() if action == "elsewhere" else machine
                self.train(subject, machine, uri, run_id, sent=sent, after=choose.uniform(2.0, 30.0))
            elif action == "sync":
                self.note(subject, self.command(choose.choice(subject.machines), uri, "sync", "m"))
            elif run_id is not None:
                words = {
                    "eval": ("eval", run_id, "--val-dir", self.images / "val", "--batch-size", 8, "--json"),
                    "runs": ("runs", "--json"),
                    "verify": ("checkpoints", "verify", run_id, "--json"),
                }[action]
                self.note(subject, self.command(machine, uri, *words))

    def trouble(self, server: Server, proxy: Proxy, disk: Path | None) -> None:
        """Let runs live while everything is disturbed; a run that has finished makes room for another."""
        until = time.monotonic() + self.seconds
        home = disk if disk is not None else self.folder / "machines"
        disturbances = Disturbances(server, proxy, server.folder / "server.db", disk, self.seed)
        numbers = iter(range(10_000))

        def live_on() -> None:
            while time.monotonic() < until:
                with self._mutex:
                    subject = Subject(f"subject-{next(numbers)}", home)
                    self.subjects.append(subject)
                try:
                    self.live(subject, proxy.uri, until)
                except Exception as error:  # noqa: BLE001 - the others go on
                    self.complain(subject, f"the soak itself failed: {type(error).__name__}: {error}")

        threads = [threading.Thread(target=live_on) for _ in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        disturbances.close()
        print("happened:", dict(disturbances.happened), "requests:", dict(proxy.modes), flush=True)

    # ------------------------------------------------------------------ the end

    def settle(self, subject: Subject, uri: str) -> None:
        """Finish a run, now that everything works, and deliver what each of its folders still holds."""
        for attempt in range(ATTEMPTS):
            if subject.finished:
                break
            run_id = self.run_id(subject)
            elsewhere = attempt > 2 and run_id is not None
            machine = subject.new_machine() if elsewhere else subject.machines[-1]
            self.train(subject, machine, uri, run_id)
        if not subject.finished:
            self.complain(subject, "it cannot be finished")
        for machine in subject.machines:
            if (machine / "m").is_dir():
                self.note(subject, self.command(machine, uri, "sync", "m"))

    def check(self, subject: Subject, client: MlflowClient, runs: list[Run], expected: "Expected") -> None:
        """Check that a run is there once, whole and verified."""
        if len(runs) != 1:
            self.complain(subject, f"{len(runs)} runs: {[(run.info.run_id, run.info.status) for run in runs]}")
            return
        run_id = runs[0].info.run_id
        if runs[0].info.status != "FINISHED":
            self.complain(subject, f"its status is {runs[0].info.status}")
        for name, points in expected.metrics.items():
            found = steps(client, run_id, name)
            if len(found) != len(set(found)):
                twice = sorted(step for step, times in Counter(found).items() if times > 1)
                self.complain(subject, f"{name} has points twice: {twice}")
            if dict(zip(sorted(found), values(client, run_id, name), strict=True)) != points:
                missing, surplus = sorted(set(points) - set(found)), sorted(set(found) - set(points))
                self.complain(subject, f"{name} differs from the undisturbed run: lacks {missing}, has also {surplus}")
        latest = json.loads(runs[0].data.tags.get("checkpoint.latest", "{}"))
        if latest.get("iters") != ITERATIONS:
            self.complain(subject, f"latest is {latest}")
        machine = Path(tempfile.mkdtemp(prefix=f"{subject.name}-checked-", dir=self.folder))
        verified = self.note(subject, self.command(machine, client.tracking_uri, "checkpoints", "verify", run_id))
        pulled = self.note(
            subject, self.command(machine, client.tracking_uri, "checkpoints", "pull", run_id, "--output", "pulled")
        )
        if verified.status != 0 or pulled.status != 0:
            self.complain(subject, f"not verified, or not pulled: {verified.out}{verified.err}{pulled.err}")
            return
        [path] = (machine / "pulled").glob("*.pth.tar")
        weights = read_checkpoint(path)["state_dict"]
        if not all(torch.equal(value, weights[key]) for key, value in expected.weights.items()):
            self.complain(subject, "its weights are not those of the undisturbed run")

    def run(self) -> list[str]:
        """Do everything; return what must not be."""
        print(f"seed {self.seed}: {self.count} runs at a time, {self.seconds / 60:g} minutes, in {self.folder}")
        expected = self.undisturbed()
        home = self.folder / "server"
        home.mkdir()
        server = Server(home)
        proxy = Proxy(server)
        try:
            with small_disk(self.folder / "disk", DISK_MEBIBYTES) as mounted:
                self.trouble(server, proxy, self.folder / "disk" if mounted else None)
                for subject in self.subjects:
                    self.settle(subject, proxy.uri)
                client = MlflowClient(server.uri)
                experiment = client.get_experiment_by_name(EXPERIMENT)
                assert experiment is not None
                runs = list(client.search_runs([experiment.experiment_id], max_results=1000))
                for subject in self.subjects:
                    named = [run for run in runs if run.info.run_name == subject.name]
                    self.check(subject, client, named, expected)
        finally:
            proxy.close()
            server.kill()
        print(f"{len(self.subjects)} runs, {sum(len(s.outcomes) for s in self.subjects)} commands, "
              f"{len(self.problems)} problems; seed {self.seed}")  # fmt: skip
        return self.problems

    def undisturbed(self) -> "Expected":
        """Return what a run looks like that nothing disturbs."""
        machine = Subject("undisturbed", self.folder).new_machine()
        uri = f"sqlite:///{machine}/mlflow.db"
        outcome = self.command(machine, uri, "train", *small_options(self.images), *OPTIONS)
        assert outcome.status == 0, outcome.err
        document: dict[str, Any] = json.loads(outcome.out)
        client = MlflowClient(uri)
        names = ("train/loss", "train/top1", "val/loss", "val/top1")
        metrics = {
            name: dict(
                zip(
                    sorted(steps(client, document["run_id"], name)),
                    values(client, document["run_id"], name),
                    strict=True,
                )
            )
            for name in names
        }
        return Expected(metrics, read_checkpoint(machine / document["checkpoint"])["state_dict"])


@dataclass(frozen=True)
class Expected:
    """Points, name -> step -> value, and final weights of a run that nothing disturbed."""

    metrics: dict[str, dict[int, float]]
    weights: dict[str, torch.Tensor]


def main() -> None:
    """Soak for as long as asked; exit with status 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--folder", type=Path, help="kept afterwards; by default a temporary one, removed")
    options = parser.parse_args()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # below `nohup`, the commands would ignore it
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        folder.mkdir(parents=True, exist_ok=True)
        problems = Soak(folder.absolute(), seed=options.seed, minutes=options.minutes).run()
    for problem in problems:
        print(problem)
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
