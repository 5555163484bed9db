"""`shufflenet search`: the best networks on the paths of a supernet, within a limit of multiply-accumulates."""

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shufflenet_mlflow.config import format_numbers
from shufflenet_mlflow.config.search import TRUST_EPOCHS, SearchPlan, completed
from shufflenet_mlflow.data.holding_out import HeldOut, some_of_each_class
from shufflenet_mlflow.data.identity import DataIdentity
from shufflenet_mlflow.errors import ConfigError, SearchError
from shufflenet_mlflow.models.loaded import LoadedModel, model_from_payload
from shufflenet_mlflow.models.paths import MacsTable, macs_table, scaled_limit
from shufflenet_mlflow.models.search_space import NETWORK, SUPERNET, network_of
from shufflenet_mlflow.models.spec import ModelSpec
from shufflenet_mlflow.runtime.context import JobContext
from shufflenet_mlflow.runtime.devices import choose_device, usable_cores
from shufflenet_mlflow.runtime.files import sha256_of, write_atomically
from shufflenet_mlflow.runtime.progress import Reporter
from shufflenet_mlflow.runtime.serialization import to_json
from shufflenet_mlflow.runtime.signals import StopFlag, StopRequested
from shufflenet_mlflow.runtime.text import counted
from shufflenet_mlflow.tracking.client import prepare_environment
from shufflenet_mlflow.tracking.connection import Connection
from shufflenet_mlflow.tracking.journal import Journal
from shufflenet_mlflow.tracking.journal_file import read_pending
from shufflenet_mlflow.tracking.names import ARCHITECTURE_FILE, PARETO_FILE, SEARCH_SUPERNET_TAG, SEARCH_TAG
from shufflenet_mlflow.tracking.resolve import resolve, run_of
from shufflenet_mlflow.workflows.delivering import deliver_folders
from shufflenet_mlflow.workflows.eval_images import list_images_of_supernet
from shufflenet_mlflow.workflows.loading import source_of, usable_config
from shufflenet_mlflow.workflows.searching.brief_training import BriefTraining
from shufflenet_mlflow.workflows.searching.evolution import Scored, propose
from shufflenet_mlflow.workflows.searching.images import SearchImages, identity, pixels_file
from shufflenet_mlflow.workflows.searching.latency import NS, LatencyTable, Measured, Timer, kept_table
from shufflenet_mlflow.workflows.searching.pareto import pymoo
from shufflenet_mlflow.workflows.searching.record import Record
from shufflenet_mlflow.workflows.searching.report import SearchReport
from shufflenet_mlflow.workflows.searching.request import SHOWN, SearchRequest, best_folder
from shufflenet_mlflow.workflows.searching.runs import BestCandidates, SearchRun
from shufflenet_mlflow.workflows.searching.scoring import Scorer
from shufflenet_mlflow.workflows.searching.trust import Compared, Trust, TrustRecord, random_networks
from shufflenet_mlflow.workflows.searching.workers import THREADS, HereOnly, Scores, scores_by

MOST_WORKERS = 8
"""Processes by default, each of which takes half a gigabyte."""


@dataclass(frozen=True)
class SearchSummary:
    """A search as this command leaves it."""

    report: SearchReport
    folder: Path
    run_id: str | None = None
    """The search's run; None until MLflow has created it."""
    stopped_by: int | None = None
    """The signal that ended the command."""
    pending: int = 0
    """Entries of the search's runs that have not reached MLflow."""
    front_run_ids: tuple[str | None, ...] = ()
    """The runs of the front's networks; None for one that MLflow has not created yet."""

    def front_folder(self, place: int) -> Path:
        """Return the folder of the network with this place in the front, from 1 on."""
        return best_folder(self.folder, place, of_front=True)

    def to_dict(self) -> dict[str, Any]:
        """Return the document of `search --json`."""
        document = self.report.to_dict()
        for entry, run_id in zip(document["front"] or (), self.front_run_ids, strict=True):
            folder = self.front_folder(entry["place"])
            entry |= {"run_id": run_id, "folder": str(folder) if folder.exists() else None}
        return {
            "run_id": self.run_id,
            **document,
            "save_dir": str(self.folder),
            "pending": self.pending,
        }


@dataclass(frozen=True)
class Supernet:
    """A supernet's checkpoint, and what its training says of the images."""

    network: LoadedModel
    config: Mapping[str, Any]
    path: Path
    sha256: str
    iters: int
    run_id: str | None
    trained_on: DataIdentity

    @classmethod
    def load(cls, ref: str, store: Connection, cache_dir: Path | None, reporter: Reporter) -> "Supernet":
        """Load the supernet that `ref` names; a run ID alone means its latest checkpoint.

        Raises:
            ConfigError: it is another network, or no training of this project has written it.
            ShuffleNetError: as `resolve` and `read_checkpoint` do.
        """
        resolved = resolve(ref, tracking_uri=store, cache_dir=cache_dir, reporter=reporter)
        payload, source = resolved.checkpoint.read(), source_of(resolved.path)
        network = model_from_payload(payload, source)
        if not network.spec.is_supernet:
            raise ConfigError(
                f"{source} holds {network.spec.name}, and a search needs a supernet; `shufflenet train --model "
                f"{SUPERNET}` trains one",
                code="search-not-supernet",
            )
        config = usable_config({key: value for key, value in payload.items() if key == "config"})
        if "train_dir" not in config or network.class_to_idx is None:
            raise ConfigError(
                f"{source} does not say which images it was trained on; search on one that `shufflenet train` wrote",
                code="search-without-config",
            )
        run_id = run_of(resolved.checkpoint) or resolved.run_id
        with open(resolved.path, "rb") as file:
            sha256 = sha256_of(file)
        trained_on = DataIdentity.from_payload(payload.get("data", {}), "train")
        return cls(network, config, resolved.path, sha256, payload["iters"], run_id, trained_on)

    @property
    def input_size(self) -> int:
        """Height and width of its input."""
        return self.network.preprocess.input_size

    def constants(self, scored: Scored) -> dict[str, Any]:
        """Return the entries, besides the weights, of the checkpoint of a network on it."""
        spec = ModelSpec.of(NETWORK, *network_of(scored.genes))
        named = {"model": NETWORK, **scored.options, "scales": format_numbers(spec.scales or ())}
        return {
            "model": spec.to_entry(self.network.num_classes),
            "preprocess": self.network.preprocess.to_dict(),
            "class_to_idx": dict(self.network.class_to_idx or {}),
            "config": {**self.config, **named},
        }


def run_search(request: SearchRequest, *, reporter: Reporter, stop: StopFlag) -> SearchSummary:
    """Begin a search, or go on with one, until it is complete.

    Raises:
        ConfigError: an option cannot work, or the search was begun with others.
        SearchError: its record cannot be used, or no network is within the limit.
        ShuffleNetError: see `shufflenet_mlflow.errors`.
        StopRequested: a signal arrived before there was a search.
    """
    prepare_environment()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            "a search starts its processes itself (--workers); start it without torchrun", code="search-distributed"
        )
    if request.grace is not None:
        stop.grace = request.grace
    context, store = JobContext.alone(reporter, stop), Connection(request.tracking_uri)
    with stop.at_once():
        options = completed(request.options)
        if options["pareto"]:
            pymoo()
        supernet = Supernet.load(request.ref, store, request.cache_dir, reporter)
        held = _images_of(request, supernet, options, reporter)
        plan, table = _plan(request, supernet, options, held, reporter)
        folder = request.folder(supernet.sha256)
    search = _Search(request, supernet, held, plan, table, folder, store, context)
    return search.run()


def _images_of(request: SearchRequest, supernet: Supernet, options: Mapping[str, Any], reporter: Reporter) -> HeldOut:
    held = list_images_of_supernet(request.train_dir, supernet.config, cache_dir=request.cache_dir, reporter=reporter)
    if held.train.class_to_idx != supernet.network.class_to_idx:
        raise ConfigError(
            f"{str(held.train.source)!r} has other classes than {source_of(supernet.path)}; name its training images "
            "with --train-dir",
            code="search-classes-differ",
        )
    if supernet.trained_on.is_known and (change := supernet.trained_on.difference(held.train)) is not None:
        reporter.warn(
            f"{str(held.train.source)!r} no longer holds the images that the supernet was trained on: {change}; it may "
            "have been trained on some of those that are held out now"
        )
    images = request.options.get("score_images")
    if images is None:
        return held
    return held._replace(scoring=some_of_each_class(held.scoring, images, options["seed"]))


def _plan(
    request: SearchRequest, supernet: Supernet, options: Mapping[str, Any], held: HeldOut, reporter: Reporter
) -> tuple[SearchPlan, MacsTable]:
    """Return the plan, and what every network costs.

    Raises:
        ConfigError: no network is within the limit.
    """
    classes, size = supernet.network.num_classes, supernet.input_size
    table = macs_table(classes, size, widths=supernet.network.spec.has_widths)
    latency_limit, limit = request.options.get("latency_limit"), request.options.get("macs_limit")
    if latency_limit is None:
        limit = scaled_limit(classes, size) if limit is None else int(limit)
    span = (
        f"networks at {size} px with {counted(classes, 'class', 'classes')} cost {table.lowest:,} to {table.highest:,}"
    )
    if limit is not None and limit < table.lowest:
        raise ConfigError(f"--macs-limit (={limit:,}) is below every network; {span}", code="macs-limit-low")
    if limit is not None and limit >= table.highest:
        reporter.note(f"--macs-limit (={limit:,}) leaves out nothing; {span}")
    plan = SearchPlan(
        macs_limit=limit,
        latency_limit=latency_limit,
        score_images=len(held.scoring),
        supernet=supernet.sha256,
        bn_digest=identity(held.train),
        score_digest=identity(held.scoring),
        device=choose_device(request.device).type,
        **{**options, "bn_images": min(options["bn_images"], len(held.train))},
    )
    return plan, table


@dataclass
class _Search:
    """A search whose options and images have been found to work."""

    request: SearchRequest
    supernet: Supernet
    held: HeldOut
    plan: SearchPlan
    table: MacsTable
    folder: Path
    store: Connection
    context: JobContext
    latency: LatencyTable | None = field(init=False)
    """By which candidates are limited; None where it is multiply-accumulates."""
    trusted: TrustRecord = field(init=False)
    """The networks that were trained to see how far scores can be trusted."""

    def run(self) -> SearchSummary:
        """Work until it is complete, or a signal has arrived."""
        with ExitStack() as closing:
            journal = Journal(self.folder)  # which keeps other processes out of the folder
            closing.callback(journal.close)
            self.latency = self._latency()
            record = Record(self.folder, self.plan)
            self.trusted = TrustRecord(self.folder, self.request.trust_epochs)
            run = None if self._is_complete() else self._open_run(journal)
            if run is not None:
                closing.pop_all()  # the run closes it
        if run is None:
            return self._summary(self._report(record, is_complete=True))
        stopped_by, report = None, self._report(record, is_complete=False)
        try:
            with run:
                run.describe(report)
                report = self._evolve(record, run)
        except StopRequested as request:
            stopped_by, report = request.signum, self._report(record, is_complete=False)
        if stopped_by is None:
            self._complete(report)
        return self._summary(report, stopped_by)

    def _complete(self, report: SearchReport) -> None:
        """Write down what the search has found; the last file says that it is complete."""
        assert report.best is not None  # noqa: S101 - a search without candidates is not complete
        found = {ARCHITECTURE_FILE: report.architecture(report.best)}
        if report.front:
            found = {PARETO_FILE: report.pareto(), **found}
        for name, content in found.items():
            text = to_json(content).encode()
            write_atomically(self.folder / name, lambda file, text=text: file.write(text))  # type: ignore[misc]

    def _timer(self) -> Timer:
        network = self.supernet.network
        return Timer(network.num_classes, self.supernet.input_size, self.request.device, self.table.has_widths)

    def _latency(self) -> LatencyTable | None:
        """Return the table of latencies, if they are limited.

        Raises:
            ConfigError: no network is within the limit.
        """
        limit = self.plan.latency_limit
        if limit is None:
            return None
        table = kept_table(self.folder, self._timer(), self.context)
        span = f"networks take {table.lowest / NS:.3g} to {table.highest / NS:.3g} ms here"
        if limit * NS < table.lowest:
            raise ConfigError(f"--latency-limit (={limit:g}) is below every network; {span}", code="latency-limit-low")
        if limit * NS >= table.highest:
            self.context.reporter.note(f"--latency-limit (={limit:g}) leaves out nothing; {span}")
        return table

    def _summary(self, report: SearchReport, stopped_by: int | None = None) -> SearchSummary:
        """Deliver what still waits, and return the search as it stands."""
        context, folders = self.context, self._folders(report)
        pending = deliver_folders(folders, self.request.tracking_uri, context.reporter, context.stop)
        run_id = read_pending(self.folder).run_id
        of_front = (best_folder(self.folder, place, of_front=True) for place, _ in enumerate(report.front, 1))
        front = tuple(read_pending(folder).run_id if folder.exists() else None for folder in of_front)
        return SearchSummary(report, self.folder, run_id, stopped_by or context.stop.signum, pending, front)

    def _is_complete(self) -> bool:
        """Whether everything has been done and written down; the last file to appear says so."""
        return (self.folder / ARCHITECTURE_FILE).exists() and len(self.trusted.compared) >= (self.request.trust or 0)

    def _open_run(self, journal: Journal) -> SearchRun:
        supernet = {"run_id": self.supernet.run_id, "checkpoint": self.supernet.path.name}
        tags = {SEARCH_TAG: json.dumps(self.plan.to_dict()), SEARCH_SUPERNET_TAG: json.dumps(supernet)}
        name = self.request.run_name or f"search {self.folder.name}"
        return SearchRun(self.request, journal, self.store, self.context, name=name, tags=tags)

    def _report(self, record: Record, *, is_complete: bool) -> SearchReport:
        classes = self.supernet.network.num_classes
        trust = Trust(tuple(self.trusted.compared)) if self.trusted.compared else None
        return SearchReport(
            self.plan,
            tuple(record.scored),
            classes,
            self.supernet.input_size,
            is_complete,
            trust,
            self.latency,
            Measured.read(self.folder),
        )

    def _evolve(self, record: Record, run: SearchRun) -> SearchReport:
        """Score generation after generation, then write down the best."""
        network, config, stop = self.supernet.network, self.supernet.config, self.context.stop
        images = SearchImages(self.held, network.preprocess, config["augment"], config["on_bad_image"] == "skip")
        with stop.at_once():
            batches = images.decode(self.plan, self.context)
        with pixels_file(self.folder, batches) as pixels:
            del batches
            scorer = Scorer(self.supernet.path, pixels, network.preprocess, self.request.device)
            with scores_by(scorer, self._workers(), stop) as scores:
                self._score_all(record, run, scores, scorer)
            self._compare(scorer)
            self._measure(self._report(record, is_complete=False))
            report = self._report(record, is_complete=True)
            run.tell(report)
            self._write_best(report, run, scorer)
        self._write_result(report, run)
        return report

    def _workers(self) -> int:
        if self.request.workers is not None:
            return self.request.workers
        return min(usable_cores(), MOST_WORKERS) if self.plan.device == "cpu" else 1

    def _score_all(self, record: Record, run: SearchRun, scores: Scores, scorer: Scorer) -> None:
        done, plan = 0, self.plan
        with self.context.reporter.phase("searching", plan.candidates, len(record.scored)) as phase:
            for generation in range(plan.generations + 1):
                before = record.scored[:done]
                candidates = propose(plan, self.table, generation, before, self.latency)
                if not candidates:
                    break
                new = [one for number, one in enumerate(candidates, done) if not record.matches(number, one)]
                for candidate, correct in zip(new, scores.of(new), strict=True):
                    record.append(Scored(**vars(candidate), correct=correct, images=scorer.images))
                    phase.advance()
                done += len(candidates)
                run.tell(self._report(record, is_complete=False))
        if not record.scored:
            raise SearchError(f"no network within {plan.limit} was found; raise it", code="search-empty")
        if len(record.scored) < plan.candidates:
            self.context.reporter.note(
                f"{counted(len(record.scored), 'candidate')} instead of {plan.candidates:,}: hardly any others are "
                f"within {plan.limit}"
            )

    def _measure(self, report: SearchReport) -> None:
        """Measure the networks that the search is for as wholes, once."""
        if self.latency is None or Measured.read(self.folder) is not None:
            return
        best = [scored.genes for scored in report.chosen(SHOWN)]
        Measured.of(self.latency, best, self._timer(), self.context).write(self.folder)

    def _compare(self, scorer: Scorer) -> None:
        """Train random networks, as many as are missing, and write down what they inherit beside it."""
        networks = random_networks(self.plan, self.table, self.request.trust or 0, self.latency)
        done, workers = self.trusted, min(self._workers(), len(networks))
        done.require_same(networks)
        new = networks[len(done.compared) :]
        if not new:
            return
        epochs = done.compared[0].epochs if done.compared else self.request.trust_epochs or TRUST_EPOCHS
        training = BriefTraining(
            self.held,
            self.supernet.network.preprocess,
            self.supernet.config,
            epochs=epochs,
            bn_images=self.plan.bn_images,
            seed=self.plan.seed,
            device=self.request.device,
            images=scorer.images,
            threads=THREADS,
            decoders=0 if workers > 1 else self.supernet.config.get("workers", 0),
        )
        inherited = HereOnly(scorer, self.context.stop)
        with (
            self.context.reporter.phase("training random networks", len(networks), len(done.compared)) as phase,
            scores_by(training, workers, self.context.stop) as trained,
        ):
            for network, correct in zip(new, trained.of(new), strict=True):
                [without] = inherited.of([network])
                done.append(
                    Compared(network.index, epochs, network.genes, network.macs, without, correct, scorer.images)
                )
                phase.advance()

    def _write_best(self, report: SearchReport, run: SearchRun, scorer: Scorer) -> None:
        best = BestCandidates(
            self.request,
            self.folder,
            report,
            run.run,
            self.store.uri,
            self.supernet.iters,
            self.supernet.constants,
            lambda scored: scorer.network(scored.genes).cpu().state_dict(),
        )
        for rank, scored in enumerate(report.chosen(SHOWN), 1):
            self.context.stop.check()
            best.write(rank, scored)

    def _write_result(self, report: SearchReport, run: SearchRun) -> None:
        from shufflenet_mlflow.workflows.searching.figures import figures_of  # matplotlib: not before the end

        figures = figures_of(report, SHOWN)
        for name, text in figures.items():
            write_atomically(self.folder / name, lambda file, text=text: file.write(text.encode()))  # type: ignore[misc]
        run.tell_end(report, figures)

    def _folders(self, report: SearchReport) -> list[Path]:
        """Return the folders of the runs, the search's first."""
        of_front = self.plan.pareto
        below = (best_folder(self.folder, rank, of_front=of_front) for rank, _ in enumerate(report.chosen(SHOWN), 1))
        return [self.folder, *(folder for folder in below if folder.exists())]
