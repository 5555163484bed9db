"""PyTorch's compiler: `torch.compile` of a network, and leaving out the compiler where it is not used."""

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from shufflenet_mlflow.errors import ConfigError


def import_compiler_late() -> None:
    """Let optimizers of this process work without PyTorch's compiler, whose import takes one to two seconds.

    Some of their methods are marked as never to be compiled, and `step` breaks the compiled graph: each imports the
    compiler when it is first called, only to be excluded from it. From here on they are called as they are. Whatever
    does compile still imports the compiler by itself.
    """
    for method in vars(Optimizer).values():
        plain, code = getattr(method, "__wrapped__", None), getattr(method, "__code__", None)
        if plain is not None and code is not None and code.co_filename == torch._compile.__file__:
            plain.__dynamo_disable = plain
    for kind in (SGD, Adam, AdamW):
        step = vars(kind).get("step")
        plain, code = getattr(step, "__wrapped__", None), getattr(step, "__code__", None)
        if plain is not None and code is not None and code.co_name == "_use_grad":
            kind.step = torch.no_grad()(plain)  # type: ignore[method-assign]


def compiled(network: nn.Module) -> nn.Module:
    """Return `network` compiled by `torch.compile`, which happens with the first batch; PyTorch caches the result.

    Each batch size is compiled separately: whether PyTorch would compile one version for all sizes depends on the sizes
    that it has seen, and a resumed run has not seen the same ones.

    Raises:
        ConfigError: PyTorch cannot compile here at all.
    """
    try:
        return torch.compile(network, dynamic=False)  # type: ignore[return-value]
    except RuntimeError as error:
        raise ConfigError(
            f"--compile: {str(error).splitlines()[0]}; leave it out", code="compile-unavailable"
        ) from error


def compile_failure(error: RuntimeError) -> ConfigError | None:
    """Return the error to raise if `error` is a failure to compile; None for any other error."""
    if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return None
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return ConfigError(
        f"--compile: the network cannot be compiled here ({reason}); leave it out", code="compile-failed"
    )
