"""Files of weights as the original ShuffleNet release wrote them, and a network of each family to put into one."""

from pathlib import Path

import torch
from torch import nn

FAMILIES = [
    "shufflenet_v1_x0_5_g3",
    "shufflenet_v1_x0_5_g8",
    "shufflenet_v2_x0_5",
    "shufflenet_v2_plus_small",
    "shufflenet_oneshot",
    "detnas_coco_fpn_300m",
    "torchvision/shufflenet_v2_x0_5",
]
"""A small network of each family; those of the large families are in `test_long_giants`."""


def write_original(
    path: Path, model: nn.Module, *, prefix: str = "module.", bare: bool = False, legacy: bool = False
) -> Path:
    """Write weights as the original release's scripts do, or as one of their variants."""
    state_dict = {prefix + key: value for key, value in model.state_dict().items()}
    torch.save(state_dict if bare else {"state_dict": state_dict}, path, _use_new_zipfile_serialization=not legacy)
    return path
