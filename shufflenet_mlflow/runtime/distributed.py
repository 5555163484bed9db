"""The processes that train one network together, and their collectives.

The first process, the leader, resolves, writes and tracks; the others compute. A signal or an error that reaches one
ends all of them at the same point, so that none waits for the others for ever.
"""

import inspect
import io
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shufflenet_mlflow import errors
from shufflenet_mlflow.errors import ConfigError, LostProcessError, PeerFailedError, ShuffleNetError
from shufflenet_mlflow.runtime.signals import StopFlag, StopRequested

Value = TypeVar("Value")

_CHUNK = 1 << 28
"""Bytes in one broadcast."""

_ERROR = 1 << 8
"""Sent by a process that has failed; above all signal numbers."""


class World:
    """The processes of this job. With one process, collectives return what they are given.

    Args:
        rank: this process's number; 0 is the leader.
        size: how many there are.
        local_rank: this process's number on its machine.
        stop: a signal that one process has received stops all of them.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, stop: StopFlag | None = None) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self.stop = stop if stop is not None else StopFlag()

    @property
    def is_leader(self) -> bool:
        """Whether this process writes and tracks."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by its sum over all processes."""
        if self.size > 1:
            with losses_reported():
                dist.all_reduce(tensor)
        return tensor

    def highest(self, number: int) -> int:
        """Return the highest of the processes' numbers."""
        if self.size == 1:
            return number
        highest = torch.tensor(number)
        with losses_reported():
            dist.all_reduce(highest, dist.ReduceOp.MAX)
        return int(highest)

    def gather(self, value: Value) -> list[Value]:
        """Return every process's value, which must be small, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with losses_reported():
            dist.all_gather_object(values, value)
        return values

    def from_leader(self, value: Value) -> Value:
        """Return the leader's value, which must be small."""
        return self.gather(value if self.is_leader else None)[0]  # type: ignore[return-value]

    def on_leader(self, act: Callable[[], Value], *, signals: bool = True) -> Value:
        """Run `act` in the leader; return its result, or raise its error, in every process.

        Args:
            act: returns plain values, tensors or dataclasses of them; of any size.
            signals: a signal interrupts it, and stops all processes; otherwise that is left to the next collective.

        Raises:
            StopRequested: a signal has arrived at one of the processes.
            ShuffleNetError: in the leader, as `act` raises it.
            PeerFailedError: in the other processes, if `act` failed.
        """
        result: Value | None = None
        with self.sync_errors(signals=signals):
            if self.is_leader:
                with self.stop.at_once() if signals else nullcontext():
                    result = act()
        return self._broadcast(result)  # type: ignore[return-value]

    def _broadcast(self, value: Value) -> Value:
        """Return the leader's value."""
        if self.size == 1:
            return value
        data = _packed(value) if self.is_leader else torch.empty(0, dtype=torch.uint8)
        length = self.from_leader(len(data))
        if not self.is_leader:
            data = torch.empty(length, dtype=torch.uint8)
        with losses_reported():
            for first in range(0, length, _CHUNK):
                dist.broadcast(data[first : first + _CHUNK], 0)
        if self.is_leader:
            return value
        # From a process of the same job, which the collectives of PyTorch trust as well.
        received: Value = torch.load(io.BytesIO(data.numpy().data), weights_only=False)
        return received

    def wrap(
        self, model: nn.Module, device: torch.device, images_NCHW: Tensor, *, uses_parts: bool = False
    ) -> nn.Module:
        """Return the network wrapped so that its backward pass averages the gradients of all processes.

        Args:
            images_NCHW: two or more, of any content, for a first backward pass, after which PyTorch buckets gradients
                differently and adds them in another order. A resumed run must be past that, like an uninterrupted one.
            uses_parts: a pass may leave out parameters, the same in all processes; they get no gradient.
        """
        if self.size == 1:
            return model
        # The running statistics of BN are kept equal by `RunningStatistics`.
        known = inspect.signature(DistributedDataParallel).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        devices = [device] if device.type == "cuda" else None
        with losses_reported():
            settings = {buffers: False, "find_unused_parameters": uses_parts}
            wrapped = DistributedDataParallel(model, device_ids=devices, **settings)  # type: ignore[arg-type]
            kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
            outputs = wrapped(images_NCHW)
            several = (outputs,) if isinstance(outputs, Tensor) else outputs
            torch.stack([output.sum() for output in several]).sum().backward()  # type: ignore[no-untyped-call]
        for buffer, before in kept:
            buffer.copy_(before)
        model.zero_grad(set_to_none=True)
        return wrapped

    @contextmanager
    def sync_errors(self, *, signals: bool = True) -> Iterator[None]:
        """If the block fails or is stopped in one process, end it in all of them.

        Args:
            signals: also if a signal has arrived meanwhile; otherwise that is left to the next collective, unless the
                block raises StopRequested.

        Raises:
            StopRequested: a signal has arrived at one of the processes.
            ShuffleNetError: in the leader, the error that it can report, of whichever process failed.
            PeerFailedError: in the other processes.
        """
        failure: ShuffleNetError | None = None
        try:
            yield
        except StopRequested:
            if self.size == 1:
                raise
            signals = True  # the block itself has given up because of it
        except (LostProcessError, PeerFailedError):
            raise
        except ShuffleNetError as error:
            if self.size == 1:
                raise
            failure = error
        self.raise_if_any_failed(failure, signals=signals)

    def barrier_before_exit(self) -> None:
        """Wait for each other at the end of a job that was stopped.

        A launcher ends all processes once one of them has left, and the leader has to deliver first.
        """
        with suppress(LostProcessError):  # it has left with an error of its own
            self.gather(None)

    def raise_if_any_failed(self, failure: ShuffleNetError | None = None, *, signals: bool = True) -> None:
        """Return if no process was told to stop and none has failed; all of them have to take part.

        Args:
            failure: why this process cannot go on.
            signals: as for `sync_errors`.

        Raises:
            StopRequested, ShuffleNetError, PeerFailedError: as `sync_errors` does.
        """
        signum = (self.stop.signum or 0) if signals else 0
        highest = self.highest(signum if failure is None or signum else _ERROR)
        if highest == 0:
            return
        if highest < _ERROR:
            self.stop.set(highest)
            raise StopRequested(highest)
        if self.size == 1 and failure is not None:
            raise failure
        failures = self.gather(_described(failure))
        if failure is not None and self.is_leader:
            raise failure
        rank, (kind, code, text, status, host) = next(
            (rank, described) for rank, described in enumerate(failures) if described is not None
        )
        if self.is_leader:
            raise _rebuilt(kind, code, f"process {rank} on {host}: {text}")
        raise PeerFailedError(text, status, code="peer-failed") from failure

    def synced_batches(self, count: int, fetch: Callable[[], Value]) -> Iterator[Value]:
        """Yield what `fetch` returns, `count` times, as long as no process has a reason to stop."""
        for _ in range(count):
            failure, value = None, None
            try:
                value = fetch()
            except StopRequested:
                pass  # the others have to hear of it
            except (LostProcessError, PeerFailedError):
                raise
            except ShuffleNetError as error:
                failure = error
            self.raise_if_any_failed(failure)
            yield value  # type: ignore[misc]  # fetched, or the line above has raised
        self.raise_if_any_failed()

    def device(self, name: str) -> str:
        """Return the device that this process uses when the user named `name`.

        Raises:
            ConfigError: one device was named for several processes.
        """
        if self.size == 1 or name in ("cpu", "mps"):
            return name
        if ":" in name:
            raise ConfigError(
                f"--device {name} is one device, and there are {self.size} processes; use cuda",
                code="one-device-many-processes",
            )
        if name == "auto" and not torch.cuda.is_available():
            return "cpu"
        return f"cuda:{self.local_rank}"


def loss_of_process(error: RuntimeError) -> LostProcessError | None:
    """Return the error to raise if `error` is PyTorch's report of a lost process; None for any other error."""
    text = str(error)
    signs = ("Connection closed", "Connection reset", "Broken pipe", "gloo", "NCCL", "Timed out waiting", "TCPStore")
    if not isinstance(error, dist.DistError) and not any(sign in text for sign in signs):
        return None
    first = re.sub(r"^\[\S+:\d+\] ", "", text.splitlines()[0]) if text else type(error).__name__
    return LostProcessError(
        f"process {os.environ.get('RANK', '0')} has lost another process of this job ({first[:200]}); start the job "
        "again to resume from the last checkpoint",
        code="process-lost",
    )


@contextmanager
def losses_reported() -> Iterator[None]:
    """Raise LostProcessError where PyTorch raises its own error because another process is gone."""
    try:
        yield
    except RuntimeError as error:
        loss = loss_of_process(error)
        if loss is None:
            raise
        raise loss from error


def _packed(value: Any) -> Tensor:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)


def _described(failure: ShuffleNetError | None) -> tuple[str, str, str, int, str] | None:
    if failure is None:
        return None
    return type(failure).__name__, failure.code, str(failure), failure.exit_status, socket.gethostname()


def _rebuilt(kind: str, code: str, text: str) -> ShuffleNetError:
    error: ShuffleNetError = getattr(errors, kind)(text, code=code)
    return error
