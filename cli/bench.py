"""`shufflenet bench`."""

from typing import Any

import click

from shufflenet_mlflow.config import AMP_DTYPES
from shufflenet_mlflow.runtime.text import counted

from .commands import TrainingCommand
from .completing import NETWORK, ImageSet
from .errors import UsageError
from .options import (
    architecture_options,
    cache_dir_option,
    common_options,
    config_option,
    device_option,
    flag,
    json_option,
    option,
    options,
)
from .say import say


@click.command(
    cls=TrainingCommand, usual=("model", "train_dir", "input_size", "batch_size", "device", "deploy", "log_to")
)
@options(
    option(
        "--model",
        metavar="NAME",
        type=NETWORK,
        help="Network; `shufflenet models` lists them.  [default: shufflenet_v2_x0_5]",
    ),
    architecture_options,
    option("--num-classes", type=int, metavar="N", help="Width of the classifier.  [default: the number of classes]"),
    option(
        "--input-size", type=int, metavar="PIXELS", help="Input size, a multiple of 32.  [default: 224; digits: 64]"
    ),
    section="Network",
)
@option(
    "--train-dir",
    metavar="DIR",
    type=ImageSet(),
    section="Data",
    help="Images: one folder per class, or a table.  [default: digits]",
)
@option("--batch-size", type=int, metavar="N", section="Training", help="Images per iteration.  [default: 64]")
@options(
    device_option,
    option("--workers", type=int, metavar="N", help="Processes that decode images.  [default: as in training]"),
    option("--threads", type=int, metavar="N", help="Threads that compute.  [default: as in training, and others]"),
    option("--amp", type=click.Choice(list(AMP_DTYPES)), help="Mixed precision.  [default: off]"),
    flag("--compile", help="Use torch.compile."),
    section="Machine",
)
@click.argument("files", metavar="[FILE]...", nargs=-1, type=click.Path())
@click.option(
    "--deploy",
    multiple=True,
    metavar="FILE",
    type=click.Path(),
    help="Measure exported files (.onnx, .xml, .pt2) instead of a training; further FILEs may follow.",
)
@option(
    "--log-to",
    type=click.Choice(("source", "none")),
    section="MLflow",
    help="Where the figures of exported files go: the run they are from, or none.  [default: source]",
)
@option("--iterations", type=int, metavar="N", help="Iterations to measure, of each part.  [default: 20]")
@option(
    "--tracking-uri",
    metavar="URI",
    section="MLflow",
    help="MLflow store to measure with, or with --deploy to log to.  [default: a temporary one, or the usual one]",
)
@cache_dir_option
@config_option
@json_option
@common_options
def bench(as_json: bool, files: tuple[str, ...], deploy: tuple[str, ...], **values: Any) -> None:
    """Measure where training spends its time on this machine.

    Names the bottleneck of an iteration: data, step, checkpoint or tracking.

    With --deploy it measures exported files instead: size, time to load, median and 95th percentile of the latency at
    batch 1 and 8, with one thread and with all, and memory, side by side. Latencies are measured three times; if the
    three differ by more than 5 %, that is said. The figures go to the run that a file is from.

    Otherwise nothing is kept. With --tracking-uri it makes a run there, and deletes it and its checkpoints afterwards.

    \b
    Examples:
      shufflenet bench
      shufflenet bench --model shufflenet_v2_x1_0 --train-dir pets/train
      shufflenet bench --train-dir pets/train --device cuda --amp bf16 --json
      shufflenet bench --deploy pets.onnx pets.int8.onnx
    """
    log_to = values.pop("log_to")
    if deploy:
        _bench_deploy((*deploy, *files), log_to != "none", values["tracking_uri"], as_json=as_json)
        return
    if files or log_to:
        raise UsageError("FILE and --log-to are for --deploy, which is missing.", code="files-without-deploy")
    iterations, tracking_uri, cache_dir = (values.pop(name) for name in ("iterations", "tracking_uri", "cache_dir"))
    given = {name: value for name, value in values.items() if value is not None}

    from .stopping import stop_flag

    with stop_flag("stopping after this iteration; again to stop at once") as stop:
        from shufflenet_mlflow.workflows.bench import BenchRequest, described, run_bench

        from .console import ConsoleReporter, next_steps
        from .tables import print_json, print_table

        request = BenchRequest(given, iterations or BenchRequest.iterations, tracking_uri, cache_dir)
        result = run_bench(request, reporter=ConsoleReporter(), stop=stop)
    if as_json:
        print_json(result.to_dict())
        return
    for line in described(result):
        say(line)
    say()
    rows = [[part.name, f"{part.milliseconds:.2f}", part.detail] for part in result.parts]
    whole = ["iteration", f"{result.milliseconds:.2f}", f"{result.images_per_second:.0f} images/s in total"]
    print_table(["", "ms", ""], [*rows, whole])
    if len(result.by_threads) > 1:
        speeds = ", ".join(f"{threads}: {speed:.0f} images/s" for threads, speed in result.by_threads.items())
        say("", f"Threads  {speeds}; training uses {result.threads}.")
    say("", f"The first step took {result.first_step_seconds:.1f} s.")
    say(f"Bottleneck: {result.bottleneck}. What would help: {result.advice}.")
    next_steps("shufflenet train with the same options")


def _bench_deploy(files: tuple[str, ...], log: bool, tracking_uri: str | None, *, as_json: bool) -> None:
    from shufflenet_mlflow.workflows.bench_deploy import TITLES, run_deploy_bench

    from .console import ConsoleReporter, next_steps
    from .tables import print_json, print_table

    reporter = ConsoleReporter()
    result = run_deploy_bench(files, log=log, tracking_uri=tracking_uri, reporter=reporter)
    if as_json:
        print_json(result.to_dict())
        return
    machine = result.document["machine"]
    say(f"{machine['cpu']}, {counted(machine['cores'], 'core')}")
    print_table(TITLES, [[str(value) for value in row] for row in result.rows()])
    if unsteady := result.unsteady():
        reporter.warn(f"the machine is not quiet: {'; '.join(unsteady[:3])}" + "; and others" * (len(unsteady) > 3))
    for run_id in dict.fromkeys(run_id for run_id in result.logged_to if run_id):
        say(f"logged to run {run_id}")
    next_steps("python bench_device.py FILE > FILE.json    on the device; then shufflenet runs log-bench RUN FILE.json")
