"""The processes that train one network together, and how they agree on what happens next.

The first of them, the leader, resolves, writes and tracks; the others compute. A signal or an error that reaches one of
them ends all of them at the same point, so that none waits for the others for ever.
"""

import inspect
import io
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
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
"""What a process says that has failed; above all signals."""


class World:
    """The processes of this job. Alone, nothing here communicates, and every collective returns what it is given.

    Args:
        rank: this process's number; 0 is the leader.
        size: how many there are.
        local_rank: this process's number on its machine.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank

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
        """The highest of the processes' numbers."""
        if self.size == 1:
            return number
        highest = torch.tensor(number)
        with losses_reported():
            dist.all_reduce(highest, dist.ReduceOp.MAX)
        return int(highest)

    def gather(self, value: Value) -> list[Value]:
        """Every process's value, which is small, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with losses_reported():
            dist.all_gather_object(values, value)
        return values

    def from_leader(self, value: Value) -> Value:
        """The leader's value, which is small."""
        return self.gather(value if self.is_leader else None)[0]  # type: ignore[return-value]

    def payload_from_leader(self, payload: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """The leader's checkpoint, of any size; None if it has none."""
        if self.size == 1:
            return payload
        data = _packed(payload) if payload is not None else torch.empty(0, dtype=torch.uint8)
        length = self.from_leader(len(data))
        if not length:
            return None
        if not self.is_leader:
            data = torch.empty(length, dtype=torch.uint8)
        with losses_reported():
            for first in range(0, length, _CHUNK):
                dist.broadcast(data[first : first + _CHUNK], 0)
        if self.is_leader:
            return payload
        loaded: Mapping[str, Any] = torch.load(io.BytesIO(data.numpy().data), weights_only=True)
        return loaded

    def wrap(self, model: nn.Module, device: torch.device, images_NCHW: Tensor) -> nn.Module:
        """The network whose backward pass leaves the mean of all processes' gradients.

        Args:
            images_NCHW: two or more, of any content: after its first backward pass PyTorch puts gradients together
                in another way, and adds them up in another order. A run that is resumed has to be past that, as the
                undisturbed one is.
        """
        if self.size == 1:
            return model
        # The running statistics of BN are kept equal by `RunningStatistics`.
        known = inspect.signature(DistributedDataParallel).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        devices = [device] if device.type == "cuda" else None
        with losses_reported():
            wrapped = DistributedDataParallel(model, device_ids=devices, **{buffers: False})  # type: ignore[arg-type]
            kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
            outputs = wrapped(images_NCHW)
            several = (outputs,) if isinstance(outputs, Tensor) else outputs
            torch.stack([output.sum() for output in several]).sum().backward()  # type: ignore[no-untyped-call]
        for buffer, before in kept:
            buffer.copy_(before)
        model.zero_grad(set_to_none=True)
        return wrapped

    @contextmanager
    def sync_errors(self, stop: StopFlag, *, signals: bool = True) -> Iterator[None]:
        """If the block fails or is stopped in one process, that happens in all of them.

        The leader then raises an error that it can report; another process raises `PeerFailedError`.

        Args:
            signals: also if a signal has arrived meanwhile; otherwise that is left to the next time.
        """
        problem: ShuffleNetError | None = None
        try:
            yield
        except StopRequested:
            if self.size == 1:
                raise
        except (LostProcessError, PeerFailedError):
            raise
        except ShuffleNetError as error:
            if self.size == 1:
                raise
            problem = error
        self.raise_if_any_failed(stop, problem, signals=signals)

    def barrier_before_exit(self) -> None:
        """Wait for each other at the end of a job that was stopped.

        A launcher ends all processes once one of them has left, and the leader has to deliver first.
        """
        with suppress(LostProcessError):  # it has left with an error of its own
            self.gather(None)

    def raise_if_any_failed(
        self, stop: StopFlag, problem: ShuffleNetError | None = None, *, signals: bool = True
    ) -> None:
        """Go on, unless a process has been told to stop or has failed: then none does.

        Args:
            problem: why this process cannot go on.

        Raises:
            StopRequested: a signal has arrived at one of them.
            ShuffleNetError: this process is the leader, and one has failed.
            ElsewhereError: this process is another, and one has failed.
        """
        signum = (stop.signum or 0) if signals else 0
        highest = self.highest(signum if problem is None or signum else _ERROR)
        if highest == 0:
            return
        if highest < _ERROR:
            stop.set(highest)
            raise StopRequested(highest)
        if self.size == 1 and problem is not None:
            raise problem
        said = self.gather(_described(problem))
        if problem is not None and self.is_leader:
            raise problem
        rank, (kind, code, text, status, host) = next(
            (rank, what) for rank, what in enumerate(said) if what is not None
        )
        if self.is_leader:
            raise _rebuilt(kind, code, f"process {rank} on {host}: {text}")
        raise PeerFailedError(text, status, code="peer-failed") from problem

    def synced_batches(self, stop: StopFlag, rounds: int, fetch: Callable[[], Value]) -> Iterator[Value]:
        """What `fetch` returns, `rounds` times, as long as no process has a reason to stop."""
        for _ in range(rounds):
            problem, value = None, None
            try:
                value = fetch()
            except (LostProcessError, PeerFailedError):
                raise
            except ShuffleNetError as error:
                problem = error
            self.raise_if_any_failed(stop, problem)
            yield value  # type: ignore[misc]  # fetched, or settling has raised
        self.raise_if_any_failed(stop)

    def device(self, name: str) -> str:
        """The device that this process is to use where the user named `name`.

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
    """What to say if `error` is PyTorch's report that another process is gone; None for any other error."""
    text = str(error)
    signs = ("Connection closed", "Connection reset", "Broken pipe", "gloo", "NCCL", "Timed out waiting", "TCPStore")
    if not isinstance(error, dist.DistError) and not any(sign in text for sign in signs):
        return None
    first = text.splitlines()[0] if text else type(error).__name__
    return LostProcessError(
        f"process {os.environ.get('RANK', '0')} has lost another process of this job ({first[:200]}); what was trained "
        "since the last checkpoint is trained again when the job is started again",
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


def _packed(payload: Mapping[str, Any]) -> Tensor:
    buffer = io.BytesIO()
    torch.save(dict(payload), buffer)
    return torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)


def _described(problem: ShuffleNetError | None) -> tuple[str, str, str, int, str] | None:
    if problem is None:
        return None
    return type(problem).__name__, problem.code, str(problem), problem.exit_status, socket.gethostname()


def _rebuilt(kind: str, code: str, text: str) -> ShuffleNetError:
    error: ShuffleNetError = getattr(errors, kind)(text, code=code)
    return error
