"""Join the processes that `torchrun`, or another launcher that sets `VARIABLES`, has started."""

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore

from shufflenet_mlflow.errors import ConfigError, LostProcessError
from shufflenet_mlflow.runtime.deadlines import within
from shufflenet_mlflow.runtime.distributed import World, losses_reported
from shufflenet_mlflow.runtime.signals import StopFlag

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

TIMEOUT = timedelta(minutes=30)
"""Time that processes wait for one another: the leader may be fetching a checkpoint."""

_POLL_SECONDS = 0.02

_WAY_OUT = "torchrun sets all of these, and without RANK this process trains alone"


@contextmanager
def joined(stop: StopFlag) -> Iterator[World]:
    """Yield the processes that this one was started with; a world of one if it was started alone.

    Args:
        stop: ends the wait for the others.

    Raises:
        ConfigError: the environment is not what a launcher sets.
        LostProcessError: the others do not answer.
        StopRequested: a signal has arrived.
    """
    if not all(map(os.environ.get, VARIABLES)):
        yield World(stop=stop)
        return
    world = _world_of_environment(stop)
    if world.size == 1:
        yield world
        return
    if torch.cuda.is_available() and world.local_rank < torch.cuda.device_count():
        torch.cuda.set_device(world.local_rank)
    with losses_reported(), stop.at_once():
        # In a thread: PyTorch waits for the others in native code, where no signal is heard.
        within(2 * TIMEOUT.total_seconds(), partial(_join, world))
    try:
        yield world
    finally:
        with suppress(RuntimeError):
            dist.destroy_process_group()


def _join(world: World) -> None:
    """Wait for the other processes, and form the group with them."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store = _store_of_attempt(world)
    if store is None:
        dist.init_process_group(backend, timeout=TIMEOUT)
    else:
        dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=world.rank, world_size=world.size)


def _world_of_environment(stop: StopFlag) -> World:
    """Return what the launcher's variables say about this process."""
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank = int(os.environ.get("LOCAL_RANK") or rank)
        int(os.environ["MASTER_PORT"])  # PyTorch reads it
    except ValueError as error:
        names = "RANK, WORLD_SIZE, LOCAL_RANK or MASTER_PORT"
        raise ConfigError(
            f"the environment's {names} is not a number ({error}); {_WAY_OUT}", code="launcher-variable-not-number"
        ) from error
    if not 0 <= rank < size:
        raise ConfigError(
            f"the environment's RANK (={rank}) must be at least 0 and below its WORLD_SIZE (={size}); {_WAY_OUT}",
            code="launcher-rank-invalid",
        )
    return World(rank, size, local_rank, stop)


def _store_of_attempt(world: World) -> Store | None:
    """Return the part of torchrun's key-value store that belongs to this attempt; None if there is no such store.

    torchrun keeps one store for all attempts at a job. Restarted processes would find the addresses of their dead
    predecessors in it, and wait for them.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=TIMEOUT)
    return PrefixStore(name_attempt(store, world.rank, world.size, world.stop), store)


def name_attempt(store: Store, rank: int, size: int, stop: StopFlag) -> str:
    """Agree on a name for this attempt that no earlier attempt had.

    The store may hold keys of any earlier attempt, and torchrun's count of restarts differs between machines. So each
    process writes a random number, and the first process answers it with the number and the name; answers to other
    numbers are stale.

    Raises:
        LostProcessError: the others do not answer.
        StopRequested: a signal has arrived.
    """
    store = PrefixStore("shufflenet", store)
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    own = secrets.token_hex(8)
    others = range(1, size)
    asked, answered, taken = "asked/{}", "answered/{}", "taken/{}"

    def read(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    if rank != 0:
        store.set(asked.format(rank), own)
    while True:
        stop.check()
        if rank == 0:
            for other in others:
                if number := read(asked.format(other)):
                    store.set(answered.format(other), f"{number} {own}")
            if all(read(taken.format(other)) == own for other in others):
                return own
        else:
            number, _, name = read(answered.format(rank)).partition(" ")
            if number == own:
                store.set(taken.format(rank), name)
                return name
        if time.monotonic() > deadline:
            raise LostProcessError(
                f"process {rank}: the other processes of this job did not start within {TIMEOUT}; "
                "see what they printed, then start the job again",
                code="rendezvous-timed-out",
            )
        time.sleep(_POLL_SECONDS)
