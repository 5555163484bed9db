"""The mark of a network: its name, arguments and input, on the module itself, for the checkpoints that it is saved in.

A mark is plain data in an attribute, so that copies and pickles of the module have it, and no state dict does.
"""

from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

_ATTRIBUTE = "_shufflenet_mlflow"

Mark = dict[str, Any]
"""`name`, `kwargs` without `num_classes`, and `preprocess`, as in a checkpoint. Of a network that another package
registers also `package`, `head`, the name of its classifier, and `class_layers`, those that depend on the classes."""


def set_mark(module: nn.Module, values: Mark) -> None:
    """Mark a module, in place of any earlier mark."""
    module.__dict__[_ATTRIBUTE] = values


def mark_of(module: nn.Module) -> Mark | None:
    """Return the mark of a module, also through what wraps it; None if it has none."""
    found = unwrapped(module).__dict__.get(_ATTRIBUTE)
    return found if isinstance(found, dict) else None


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside DataParallel, DDP, torch.compile or an average of weights; otherwise itself."""
    while True:
        if isinstance(module, (DataParallel, DistributedDataParallel, AveragedModel)):
            module = module.module
        elif isinstance(inner := module.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module):  # torch.compile's
            module = inner
        else:
            return module
