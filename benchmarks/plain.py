"""The baseline of the benchmarks: torchvision and a plain loop, as users write them."""

import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler
from torchvision import transforms
from torchvision.datasets import ImageFolder

JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4}


def train_loader(root: Path, input_size: int, batch_size: int, workers: int) -> DataLoader:
    """Return training batches: Pillow decodes, crops, changes colours and flips, and the worker converts to float."""
    steps = [
        transforms.RandomResizedCrop(input_size),
        transforms.ColorJitter(**JITTER),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
    ]
    dataset = ImageFolder(str(root), transforms.Compose(steps))
    endless = RandomSampler(dataset, replacement=True, num_samples=10**6)  # no epoch ends during the measurement
    sampler = endless if workers else RandomSampler(dataset)
    return DataLoader(dataset, batch_size, sampler=sampler, drop_last=True, num_workers=workers)


def eval_loader(root: Path, input_size: int, batch_size: int, workers: int) -> DataLoader:
    """Return evaluation batches after the usual resize and centre crop."""
    steps = [
        transforms.Resize(input_size * 256 // 224),
        transforms.CenterCrop(input_size),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    return DataLoader(ImageFolder(str(root), transforms.Compose(steps)), batch_size, num_workers=workers)


class Training:
    """A loop that reads the loss and the accuracy after each step."""

    def __init__(self, model: nn.Module, device: torch.device, lr: float = 0.01) -> None:
        self.model, self.device = model.to(device).train(), device
        self.optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=4e-5)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
        self.loss = self.correct = 0.0

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Run one iteration."""
        images, labels = images.to(self.device), labels.to(self.device)
        outputs = self.model(images)
        logits = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
        loss = self.criterion(logits, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.loss += loss.item()
        self.correct += (logits.argmax(1) == labels).sum().item()


def evaluate(model: nn.Module, loader: DataLoader, device: torch.device) -> dict[str, float]:
    """Return accuracies, loss and seconds."""
    model = model.to(device).eval()
    top1 = top5 = n = 0
    loss_sum = 0.0
    began = time.perf_counter()
    with torch.no_grad():
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            logits = model(images)
            loss_sum += nn.functional.cross_entropy(logits, labels).item() * len(labels)
            hits = logits.topk(5, 1).indices.eq(labels[:, None])
            top1 += hits[:, 0].sum().item()
            top5 += hits.sum().item()
            n += len(labels)
    return {"top1": top1 / n, "top5": top5 / n, "loss": loss_sum / n, "seconds": time.perf_counter() - began}
