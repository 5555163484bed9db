"""`train` for scripts of your own."""

import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from shufflenet_mlflow.config import TrainConfig, check_names, check_options
from shufflenet_mlflow.errors import ConfigError
from shufflenet_mlflow.runtime.progress import Reporter, reporter_of
from shufflenet_mlflow.runtime.signals import CallersStopFlag, StopRequested
from shufflenet_mlflow.tracking.client import ActiveRun, prepared_environment, uri_of_caller
from shufflenet_mlflow.training.trainer import Callback, check_callbacks
from shufflenet_mlflow.workflows.train import carry_out
from shufflenet_mlflow.workflows.training.request import TrainRequest
from shufflenet_mlflow.workflows.training.run import TrainSummary


def train(
    config: TrainConfig | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    progress: bool | Reporter = True,
    resume: str | Path = "auto",
    new_run: bool = False,
    changed_data: bool = False,
    take_over: bool = False,
    save_dir: str | Path | None = None,
    job: str | None = None,
    grace: float | None = None,
    requeue: bool = False,
    tracking_uri: str | None = None,
    experiment: str | None = None,
    run_name: str | None = None,
    cache_dir: str | Path | None = None,
    no_log_models: bool = False,
    no_system_metrics: bool = False,
    **options: Any,
) -> TrainSummary:
    """Train a network, or continue training one, as `shufflenet train` does, in this process.

    Checkpoints, metrics and models go to an MLflow run of its own; if a run is active, it is a child of that one.

    Args:
        config: the options of the training.
        callbacks: instances of `Callback`; under `torchrun` those of every process are called.
        progress: print progress on stderr; with False, report to the log `shufflenet_mlflow`.
        resume: `auto` continues what is in `save_dir`, or the run of `job`; `none` starts anew; or a reference as for
            `read_checkpoint`: its run is continued, and options that are not given are the run's.
        new_run: continue as a run of its own.
        changed_data: resume although the images have changed since.
        take_over: resume although another process is training the run; that one stops.
        save_dir: folder for checkpoints; by default `models/RUN_ID`.
        job: name by which `resume="auto"` finds the run in MLflow, from any machine.
        grace: seconds to finish uploads after a signal; by default 20.
        requeue: have Slurm start the job again after its warning, SIGUSR1.
        tracking_uri: where the run is; by default as MLflow does.
        experiment: name of MLflow's experiment; by default that of the active run, or the one that MLflow was set to,
            or `shufflenet`.
        run_name: name of the run; by default network, data and size.
        cache_dir: where remote files land; by default `SHUFFLENET_CACHE_DIR`, or the user's cache folder.
        no_log_models: log the best and the final checkpoint as no MLflow models.
        no_system_metrics: log no CPU, memory and GPU usage.
        options: fields of `TrainConfig`, over those of `config`.

    Returns:
        How it ended: `run_id`, `iters`, `epoch`, `loss`, `validation` and `val_top1`, `best`, `checkpoint`, `save_dir`;
        `result.stop_reason` if a callback ended it.

    Raises:
        ConfigError: an option does not exist or cannot work.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is saved and sent; `resume=run_id` goes on. Again Ctrl-C
            raises it at once. After SIGTERM, SIGHUP or SIGUSR1 SystemExit. In another thread than the main one signals
            are not handled: end it with `Trainer.stop` in a callback.
        ShuffleNetError: see `shufflenet_mlflow.errors`; the run, if there was one by then, is marked FAILED.
    """
    given = _options(config, options)
    check_callbacks(callbacks)
    uri = tracking_uri or uri_of_caller()
    request = TrainRequest(
        given,
        resume=os.fspath(resume),
        new_run=new_run,
        changed_data=changed_data,
        take_over=take_over,
        save_dir=None if save_dir is None else Path(save_dir),
        tracking_uri=uri,
        experiment=experiment,
        run_name=run_name,
        cache_dir=None if cache_dir is None else Path(cache_dir),
        job=job,
        grace=grace,
        requeue=requeue,
        no_log_models=no_log_models,
        no_system_metrics=no_system_metrics,
        parent=ActiveRun.in_store(uri),
    )
    reporter = reporter_of(progress)
    stop = CallersStopFlag(lambda name: reporter.note(f"{name}: stopping once the checkpoint is saved"))
    with prepared_environment(), stop:
        try:
            summary = carry_out(request, reporter=reporter, stop=stop, callbacks=callbacks)
        except StopRequested:
            stop.raise_received("stopped before there was a run")
            raise
    where = summary.run_id or str(summary.save_dir)
    stop.raise_received(f"stopped at iteration {summary.iters}, which is saved; train(resume={where!r}) goes on")
    return summary


def _options(config: TrainConfig | None, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given, as the command line takes them.

    Raises:
        ConfigError: one does not exist or cannot work, or two exclude each other.
    """
    if config is not None and not isinstance(config, TrainConfig):
        raise ConfigError(
            f"config (={config!r}) must be a TrainConfig; TrainConfig.from_dict makes one of a dict",
            code="config-not-config",
        )
    check_names(options, *(entry.name for entry in fields(TrainRequest)), "callbacks", "progress")
    plain = TrainConfig(**options)
    given = {name: getattr(plain, name) for name, value in options.items() if value is not None}
    if config is not None:
        before = config.given()
        if "epochs" in given or "total_iters" in given:
            before = {name: value for name, value in before.items() if name not in ("epochs", "total_iters")}
        given = {**before, **given}
    check_options(given)
    return given
