"""Staging: a copy of the training state, taken so that training goes on while the copy is written."""

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shufflenet_mlflow.checkpoints.plain import compact, to_plain


class StagingBuffer:
    """Memory for one copy of a state, reused from copy to copy.

    On a GPU the memory is pinned and copying is queued on the device, so that neither the loop nor the device waits;
    `wait_until_copied` does. `take` waits until the previous copy has been given back with `release`.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._used = 0
        self._free = threading.Semaphore()
        self._copied: Any = None

    def take(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state as plain containers whose tensors lie in this buffer.

        Raises:
            CheckpointError: it holds something that is neither a tensor nor plain.
        """
        while not self._free.acquire(timeout=1.0):  # without a timeout, signals would not be handled
            pass
        try:
            return self._copy(state)
        except BaseException:
            self.release()
            raise

    def _copy(self, state: Mapping[str, Any]) -> dict[str, Any]:
        sources: list[Tensor] = []
        targets: list[Tensor] = []
        self._used = 0

        def stage(tensor: Tensor) -> Tensor:
            if tensor.layout != torch.strided or not tensor.numel():
                return compact(tensor).clone()
            target = self._buffer_like(tensor)
            sources.append(tensor)
            targets.append(target)
            return target

        payload = to_plain(state, convert=stage)
        del self._buffers[self._used :]
        if targets:
            with torch.no_grad():
                torch._foreach_copy_(targets, sources, non_blocking=True)
        self._copied = None
        if any(source.is_cuda for source in sources):
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()
        return payload  # type: ignore[no-any-return]  # a dict, as `state` is a mapping

    def _buffer_like(self, tensor: Tensor) -> Tensor:
        number, self._used = self._used, self._used + 1
        if number < len(self._buffers):
            buffer = self._buffers[number]
            if buffer.shape == tensor.shape and buffer.dtype == tensor.dtype:
                return buffer
            del self._buffers[number:]
        # Contiguous, whatever the network's memory format.
        self._buffers.append(torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda))
        return self._buffers[number]

    def wait_until_copied(self) -> None:
        """Wait until the device has finished the last copy."""
        if self._copied is not None:
            self._copied.synchronize()

    def release(self) -> None:
        """Give the last copy's memory back."""
        self._free.release()
