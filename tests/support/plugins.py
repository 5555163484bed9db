"""Packages that register networks, installed for one test: a module, and metadata with its entry points."""

import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

SOURCE = '''
import torch
from torch import nn


class TinyNet(nn.Module):
    """Convolutions with a token of its own; the linear layer after the classifier's is not the classifier."""

    def __init__(self, num_classes, width):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, width, 1, 1))
        self.conv = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.classify = nn.Linear(2 * width, num_classes)
        self.mix = nn.Linear(width, 2 * width)

    def forward(self, x):
        return self.classify(self.mix((self.conv(x) + self.token).mean((2, 3))))


INPUT = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "input_size": 32}


def tiny(num_classes, width=8, pretrained=False):
    model = TinyNet(num_classes, width)
    if pretrained:
        nn.init.constant_(model.token, 5.0)
    return model, INPUT


def from_torchvision(num_classes, name):
    from torchvision.models import get_model

    return get_model(name, weights=None, num_classes=num_classes), "rgb_256"


def needs_numbers(num_classes):
    rates = [x.item() for x in torch.linspace(0, 1, 2)]  # fails without memory
    return TinyNet(num_classes, 8 + int(rates[0])), "rgb_256"


def raises(num_classes):
    raise RuntimeError("no luck\\nat all")


def bare(num_classes):
    return TinyNet(num_classes, 8)


def strange_input(num_classes):
    return TinyNet(num_classes, 8), "rgb"


def headless(num_classes):
    return nn.Sequential(nn.Conv2d(3, 3, 3), nn.Flatten()), "rgb_256"


def one_output(num_classes):
    class Both(TinyNet):
        def forward(self, x):
            return {"logits": super().forward(x)}

    return Both(num_classes, 8), "rgb_256"


def viewing(num_classes):
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3, 8, 1), nn.Linear(64, num_classes)

        def forward(self, x):
            return self.fc(self.conv(x).view(len(x), -1))

    return Views(), "rgb_256"


def lazy(num_classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes)), "rgb_256"


def fixed_batch(num_classes):
    class Fixed(TinyNet):
        def forward(self, x):
            return super().forward(x) + self.token.mean().expand(len(x), 1)

    return Fixed(num_classes, 8), INPUT


NUMBER = 3
'''
NETWORKS = {"tiny": "tiny", "tv/": "from_torchvision"}


def install(
    folder: Path, monkeypatch: pytest.MonkeyPatch, networks: Mapping[str, str] = NETWORKS, *, package: str = "own-nets"
) -> Path:
    """Install a package that registers networks, name -> function of `SOURCE` or an object reference, for one test."""
    site, module = folder / f"{package}-site", package.replace("-", "_")
    metadata = site / f"{module}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / f"{module}.py").write_text(SOURCE)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = (f"{name} = {value if ':' in value else f'{module}:{value}'}" for name, value in networks.items())
    (metadata / "entry_points.txt").write_text("\n".join(("[shufflenet_mlflow.models]", *lines, "")))
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delitem(sys.modules, module, raising=False)
    return site
