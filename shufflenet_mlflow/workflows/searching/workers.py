"""Processes that score candidates; results come in the order of the candidates, not of their ends."""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import torch

from shufflenet_mlflow.data.workers import start_worker
from shufflenet_mlflow.errors import SearchError, ShuffleNetError
from shufflenet_mlflow.models.search_space import Genes
from shufflenet_mlflow.runtime.signals import StopFlag
from shufflenet_mlflow.runtime.threads import threads_used
from shufflenet_mlflow.workflows.searching.evolution import Candidate

THREADS = 1
"""Threads that a process computes with on a CPU: scores must not depend on the machine's number of cores."""
LOOK_SECONDS = 0.2
"""Seconds between two looks for a signal."""


class Scoring(Protocol):
    """Scores one network; it can be sent to another process."""

    def correct(self, genes: Genes) -> int:
        """Return how many images the network classifies correctly."""


class Scores(Protocol):
    """Whatever scores candidates."""

    def of(self, candidates: Sequence[Candidate]) -> Iterator[int]:
        """Yield how many images each candidate classifies correctly, in their order."""


class HereOnly:
    """Scores candidates in this process."""

    def __init__(self, scorer: Scoring, stop: StopFlag) -> None:
        self._scorer, self._stop = scorer, stop

    def of(self, candidates: Sequence[Candidate]) -> Iterator[int]:
        for candidate in candidates:
            with threads_used(THREADS), self._stop.at_once():
                correct = self._scorer.correct(candidate.genes)
            yield correct


class Several:
    """Scores candidates in several processes, each of which takes the next one when it is done."""

    def __init__(self, scorer: Scoring, count: int, stop: StopFlag) -> None:
        self._stop = stop
        context = multiprocessing.get_context("spawn")
        self._processes: dict[Connection, Any] = {}
        dies_with_parent = threading.current_thread() is threading.main_thread()
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(scorer, theirs, os.getpid(), dies_with_parent), name="search worker", daemon=True
            )
            process.start()
            theirs.close()
            self._processes[ours] = process

    def of(self, candidates: Sequence[Candidate]) -> Iterator[int]:
        waiting, done = deque(enumerate(candidates)), {}
        at_work: dict[Connection, int] = {}
        for number in range(len(candidates)):
            while number not in done:
                for connection in self._processes:
                    if waiting and connection not in at_work:
                        at_work[connection], candidate = waiting.popleft()
                        self._send(connection, candidate.genes)
                for ready in wait([*at_work], LOOK_SECONDS):
                    assert isinstance(ready, Connection)  # noqa: S101 - there is nothing else to wait for
                    done[at_work.pop(ready)] = self._receive(ready)
                self._stop.check()
            yield done.pop(number)

    def _send(self, connection: Connection, genes: Genes) -> None:
        try:
            connection.send(genes)
        except OSError as error:
            raise self._died(connection) from error

    def _receive(self, connection: Connection) -> int:
        try:
            answer = connection.recv()
        except (EOFError, OSError) as error:
            raise self._died(connection) from error
        if isinstance(answer, int):
            return answer
        if isinstance(answer, ShuffleNetError):
            raise answer
        raise SearchError(f"a process that scores candidates failed: {answer}", code="search-worker-failed")

    def _died(self, connection: Connection) -> SearchError:
        process = self._processes[connection]
        process.join(1)
        return SearchError(
            f"a process that scores candidates died (exit status {process.exitcode}), perhaps because memory ran "
            "out; the same command goes on, with fewer --workers",
            code="search-worker-died",
        )

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        for connection, process in self._processes.items():
            connection.close()
            process.kill()
            process.join()


@contextmanager
def scores_by(scorer: Scoring, workers: int, stop: StopFlag) -> Iterator[Scores]:
    """Yield what scores candidates with so many processes; with 0 or 1, it is this one."""
    if workers <= 1:
        yield HereOnly(scorer, stop)
        return
    several = Several(scorer, workers, stop)
    try:
        yield several
    finally:
        several.close()


def _work(scorer: Scoring, connection: Connection, parent: int, dies_with_parent: bool) -> None:
    """Score what comes, until the main process is gone."""
    start_worker(parent, dies_with_parent)
    torch.set_num_threads(THREADS)
    with suppress(EOFError, OSError):
        while True:
            genes = connection.recv()
            try:
                answer: object = scorer.correct(genes)
            except ShuffleNetError as error:
                answer = error
            except Exception as error:  # noqa: BLE001 - the main process reports it
                answer = f"{type(error).__name__}: {error}"
            connection.send(answer)
