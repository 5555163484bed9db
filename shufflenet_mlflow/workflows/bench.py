"""`shufflenet bench`: where the time of an iteration goes: data, step, checkpoint, tracking."""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from shufflenet_mlflow.checkpoints.retention import Retention
from shufflenet_mlflow.config import RunConfig
from shufflenet_mlflow.data.loader import PREFETCHED
from shufflenet_mlflow.errors import TrackingError
from shufflenet_mlflow.runtime.compiler import compile_failure, compiled
from shufflenet_mlflow.runtime.context import JobContext
from shufflenet_mlflow.runtime.devices import choose_device, finish, keep_freed_memory, usable_cores
from shufflenet_mlflow.runtime.progress import LoggingReporter, Reporter
from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.runtime.text import counted
from shufflenet_mlflow.runtime.threads import threads_used
from shufflenet_mlflow.tracking.artifacts import RunArtifacts
from shufflenet_mlflow.tracking.client import connect, mlflow_errors, prepare_environment
from shufflenet_mlflow.tracking.journal import Journal
from shufflenet_mlflow.tracking.journal_file import new_provisional_id
from shufflenet_mlflow.tracking.paths import file_uri, store_uri
from shufflenet_mlflow.tracking.run import make_run, new_run
from shufflenet_mlflow.tracking.session import TrackingSession
from shufflenet_mlflow.tracking.store import TrackedMetrics, TrackedStore
from shufflenet_mlflow.training.keeping import NoMetrics, NoStore
from shufflenet_mlflow.training.loop import TrainingLoop
from shufflenet_mlflow.workflows.message_kinds import MESSAGE_KINDS
from shufflenet_mlflow.workflows.options import check_training
from shufflenet_mlflow.workflows.training.attempts import Attempt
from shufflenet_mlflow.workflows.training.config import Plan, choose, complete_config
from shufflenet_mlflow.workflows.training.data import list_data
from shufflenet_mlflow.workflows.training.description import constants, environment
from shufflenet_mlflow.workflows.training.request import TrainRequest
from shufflenet_mlflow.workflows.training.state import fresh_state

EXPERIMENT = "shufflenet-bench"

_SECONDS = 30.0
"""Seconds after which a measurement ends, however few iterations it had."""
_WARM_UP = 3
_SAVES = 3
_WORTH_SAYING = 0.9
"""Share of the time that another number of threads may take at most to be recommended."""
_POINTS = 20

Timings = dict[str, float]
"""Part -> seconds; `bytes` is the size of a checkpoint."""


@dataclass(frozen=True)
class BenchRequest:
    """A measurement to make."""

    options: Mapping[str, Any]
    """Options of `train`; those not given have its defaults."""
    iterations: int = 20
    tracking_uri: str | None = None
    """Store to measure with, in which a run is created and deleted again; None: a temporary embedded one."""
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        check_training({**self.options, "iterations": self.iterations, "tracking_uri": self.tracking_uri})


@dataclass(frozen=True)
class Part:
    """Part of an iteration, or its share of something that happens now and then."""

    name: str
    milliseconds: float
    """Milliseconds per iteration."""
    detail: str


@dataclass(frozen=True)
class BenchResult:
    """Milliseconds per iteration, and where they go."""

    model: str
    input_size: int
    batch_size: int
    workers: int
    threads: int
    device: str
    cores: int
    memory_gb: float
    torch: str
    first_step_seconds: float
    """Seconds of the first step, compilation included."""
    parts: tuple[Part, ...]
    milliseconds: float
    """Milliseconds of whole iterations: data and step as in training, with shares of checkpoint and tracking."""
    images_per_second: float
    by_threads: Mapping[str, float]
    """Threads -> images per second; on the CPU, and unless the number was given, several are tried."""
    bottleneck: str
    """Name of a part."""
    advice: str

    def to_dict(self) -> dict[str, Any]:
        """Return the document of `bench --json`."""
        return {**asdict(self), "parts": [asdict(part) for part in self.parts]}


def run_bench(request: BenchRequest, *, reporter: Reporter, stop: StopFlag) -> BenchResult:
    """Measure a few iterations of the training that these options describe; nothing is kept.

    Raises:
        ShuffleNetError: see `shufflenet_mlflow.errors`.
        StopRequested: a signal arrived.
    """
    prepare_environment()
    options = {**request.options}
    options.setdefault("val_dir", options.get("train_dir"))
    planned, trainer = bare_training(options, request.cache_dir, JobContext.alone(reporter, stop))
    bench = _Bench(trainer, request.iterations)
    used = trainer.config.threads or torch.get_num_threads()
    try:
        with threads_used(used):
            load = bench.loading()
            first, convert, step = bench.stepping()
            by_threads = {used: bench.training()}
        for threads in _other_threads(used, bench.device, is_given=options.get("threads") is not None):
            with threads_used(threads):
                by_threads[threads] = bench.training()
    except RuntimeError as error:
        problem = compile_failure(error)
        if problem is None:
            raise
        raise problem from error
    save, point = _bookkeeping(request, trainer)
    seconds = {"load": load, "convert": convert, "step": step, "whole": by_threads[used], **save, **point}
    return _result(planned, seconds, first, by_threads)


def _other_threads(used: int, device: torch.device, *, is_given: bool) -> list[int]:
    """Return the numbers of threads to compare with the one that training uses: one, half of the cores, and all."""
    if is_given or device.type != "cpu":
        return []
    cores = usable_cores()
    return sorted({1, max(1, cores // 2), cores} - {used})


def bare_training(options: Mapping[str, Any], cache_dir: Path | None, context: JobContext) -> tuple[Plan, TrainingLoop]:
    """Return the training loop of these options, from its beginning, with nothing kept."""
    request = TrainRequest(options=options, cache_dir=cache_dir)
    attempt = Attempt(resume="none", is_fork=False, save_dir=None, job=None)
    choices = choose(request, attempt, context.world)
    data = list_data(choices, cache_dir, LoggingReporter())
    plan = Plan(complete_config(choices, data, context.world), choices.spec, data)
    device = choose_device(plan.config.device)
    keep_freed_memory(device)
    trainer = TrainingLoop(
        config=plan.config,
        data=data,
        state=fresh_state(plan, device, context.world, fetch_pretrained=False),
        constants=constants(plan, environment(plan, device, context.world)),
        store=NoStore(),
        sink=NoMetrics(),
        context=context,
    )
    return plan, trainer


class _Bench:
    """Times iterations of training, one part at a time."""

    def __init__(self, trainer: TrainingLoop, iterations: int) -> None:
        self.trainer, self.iterations = trainer, iterations
        # Batches that the workers load in advance would not be measured.
        self._warm_up = _WARM_UP + PREFETCHED * trainer.config.workers
        self.device = trainer.state.device
        self._context = trainer.context
        self.network = compiled(trainer.state.model) if trainer.config.compile else trainer.state.model
        trainer.state.model.train()

    def _mean(self, name: str, act: Callable[[], object]) -> float:
        """Return the mean seconds of `act`, after a warm-up."""
        iterations = max(self.iterations, 2 * self.trainer.config.workers)  # workers deliver in turn
        with self._context.reporter.phase(f"measuring {name}", self._warm_up + iterations) as phase:
            began, done = time.perf_counter(), 0
            for number in range(self._warm_up + iterations):
                if number == self._warm_up:
                    finish(self.device)
                    began = time.perf_counter()
                self._context.stop.check()
                act()
                phase.advance()
                done = number - self._warm_up + 1
                if done > 0 and time.perf_counter() - began > _SECONDS:
                    break
            finish(self.device)
            return (time.perf_counter() - began) / done

    def _batches(self) -> Iterator[Any]:
        """Yield enough batches for any loop below, and those that the workers load in advance."""
        return self.trainer.batches(0, 10 * (self._warm_up + self.iterations))

    def loading(self) -> float:
        """Return the seconds to load a batch, with nothing else to do."""
        batches = self._batches()
        return self._mean("data", lambda: self.trainer.fetch(batches))

    def stepping(self) -> tuple[float, float, float]:
        """Return the seconds of the first step, of the conversion to float, and of a later step, which includes it."""
        parts = self.trainer.fetch(self._batches())
        began = time.perf_counter()
        self.trainer.step(self.network, parts)
        finish(self.device)
        first = time.perf_counter() - began
        step = self._mean("the step", lambda: self.trainer.step(self.network, parts))
        convert = self._mean("conversion", lambda: [self.trainer.to_input(part) for part in parts])
        return first, convert, step

    def training(self) -> float:
        """Return the seconds of an iteration as training does it."""
        batches = self._batches()
        return self._mean("both", lambda: self.trainer.step(self.network, self.trainer.fetch(batches)))


def _bookkeeping(request: BenchRequest, trainer: TrainingLoop) -> tuple[Timings, Timings]:
    """Return what a checkpoint and a metric point cost the loop, and how long they take in the background."""
    with tempfile.TemporaryDirectory() as scratch:
        uri = request.tracking_uri or store_uri(Path(scratch, "mlflow.db"))
        client = connect(uri)
        if request.tracking_uri is None and client.get_experiment_by_name(EXPERIMENT) is None:
            client.create_experiment(EXPERIMENT, artifact_location=file_uri(Path(scratch, "artifacts")))
        run_id, _ = make_run(client, new_run(experiment=EXPERIMENT, name="bench", tags={}), mark=new_provisional_id())
        try:
            with TrackingSession(
                client,
                Journal(Path(scratch, "saved")),
                run_id,
                MESSAGE_KINDS,
                is_new=True,
                reporter=trainer.context.reporter,
                stop=trainer.context.stop,
            ) as session:
                save = _saving(trainer, session)
                metrics = TrackedMetrics(session.recorder)
                began = time.perf_counter()
                for number in range(_POINTS):
                    metrics.log({"train/loss": 1.0, "train/top1": 0.0, "train/top5": 0.0, "train/lr": 0.1}, number)
                logged = (time.perf_counter() - began) / _POINTS
                began = time.perf_counter()
            delivered = time.perf_counter() - began
        finally:
            with suppress(TrackingError), mlflow_errors(f"delete run {run_id}"):
                artifacts = RunArtifacts(client, run_id)
                for manifest in artifacts.manifests():
                    artifacts.delete(manifest.file_name)
                client.delete_run(run_id)
    return save, {"log": logged, "deliver": delivered}


def _saving(trainer: TrainingLoop, session: TrackingSession) -> Timings:
    store = TrackedStore(
        session.journal.directory,
        session.recorder,
        retention=Retention(),
        continue_on_error=False,
        reporter=trainer.context.reporter,
    )
    stalls, whole, size = [], [], 0
    for number in range(1, _SAVES + 1):
        trainer.context.stop.check()
        began = time.perf_counter()
        state = {**trainer.constants, **trainer.state.state_dict(), "iters": number, "epoch": 0, "sampler_state": {}}
        store.save(state, number, "", val_top1=None)
        stalls.append(time.perf_counter() - began)
        path = store.finish()
        whole.append(time.perf_counter() - began)
        size = path.stat().st_size if path is not None else 0
    return {"stall": sum(stalls) / _SAVES, "save": sum(whole) / _SAVES, "bytes": float(size)}


def _result(planned: Plan, seconds: Timings, first: float, by_threads: Mapping[int, float]) -> BenchResult:
    """Put the result together.

    Args:
        first: seconds of the first step.
        by_threads: threads -> seconds of an iteration; the first is what training uses.
    """
    config = planned.config
    batch = config.batch_size
    used, fastest = next(iter(by_threads)), min(by_threads, key=by_threads.__getitem__)
    workers = counted(config.workers, "worker") if config.workers else "no workers"
    parts = _, _, checkpoint, tracking = (
        Part("data", 1e3 * seconds["load"], f"{batch / seconds['load']:.0f} images/s with {workers}"),
        Part(
            "step",
            1e3 * seconds["step"],
            f"{batch / seconds['step']:.0f} images/s; {1e3 * seconds['convert']:.2f} ms of it to device and float",
        ),
        Part(
            "checkpoint",
            1e3 * seconds["stall"] / config.save_interval,
            f"{1e3 * seconds['stall']:.1f} ms every {counted(config.save_interval, 'iteration')}; "
            f"{seconds['bytes'] / 1e6:.1f} MB "
            f"on the disk after {seconds['save']:.2f} s",
        ),
        Part(
            "tracking",
            1e3 * seconds["log"] / config.display_interval,
            f"{1e3 * seconds['log']:.2f} ms every {counted(config.display_interval, 'iteration')}; "
            f"MLflow had everything "
            f"{seconds['deliver']:.1f} s after the last",
        ),
    )
    milliseconds = 1e3 * seconds["whole"] + checkpoint.milliseconds + tracking.milliseconds
    bottleneck = max(parts, key=lambda part: part.milliseconds).name
    device = choose_device(config.device)
    return BenchResult(
        model=config.model,
        input_size=config.input_size,
        batch_size=batch,
        workers=config.workers,
        threads=used,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        cores=usable_cores(),
        memory_gb=round(psutil.virtual_memory().total / 1e9, 1),
        torch=torch.__version__,
        first_step_seconds=first,
        parts=parts,
        milliseconds=milliseconds,
        images_per_second=1e3 * batch / milliseconds,
        by_threads={str(threads): batch / by_threads[threads] for threads in sorted(by_threads)},
        bottleneck=bottleneck,
        advice=(
            f"pass --threads {fastest}"
            if by_threads[fastest] < _WORTH_SAYING * by_threads[used]
            else _advice(bottleneck, config, device)
        ),
    )


def _advice(bottleneck: str, config: RunConfig, device: torch.device) -> str:
    """Return what would help."""
    cores = usable_cores()
    if bottleneck == "data":
        if config.workers < cores:
            return f"raise --workers (now {config.workers}, of {cores} cores), or store smaller images"
        return f"all {cores} cores decode: store the images no larger than needed, or add cores"
    if bottleneck == "step":
        if device.type == "cuda":
            return (
                "try --amp bf16, --compile and a larger --batch-size, in this order"
                if config.amp == "off"
                else "try --compile and a larger --batch-size"
            )
        return "the network takes the time: use a GPU, a smaller network, or a smaller --input-size"
    option = "--save-interval" if bottleneck == "checkpoint" else "--display-interval"
    return f"raise {option}"


def described(result: BenchResult) -> list[str]:
    """Return a description of what was measured."""
    return [
        f"{result.model}, {result.input_size} px, batches of {result.batch_size}",
        f"{result.device}, {counted(result.cores, 'core')}, {result.memory_gb:g} GB, torch {result.torch}",
    ]
