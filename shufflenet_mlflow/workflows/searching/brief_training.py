"""The brief training of a network from the beginning, by whose accuracy inherited scores are measured.

It has the options of the supernet's training, its training images and its batches, and the held-out images for
validation. A CPU computes with one thread, and all networks see the same batches, so that the result follows from the
network alone, whichever process trains.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from shufflenet_mlflow.config import FIELDS, RunConfig, format_numbers
from shufflenet_mlflow.data.holding_out import HeldOut
from shufflenet_mlflow.data.preprocess import Preprocess
from shufflenet_mlflow.data.sampler import BalancedOrder, MicroBatches, SampleOrder
from shufflenet_mlflow.errors import NonFiniteLossError
from shufflenet_mlflow.models.search_space import NETWORK, Genes, network_of
from shufflenet_mlflow.models.spec import ModelSpec
from shufflenet_mlflow.runtime.context import JobContext
from shufflenet_mlflow.runtime.devices import choose_device, move_model
from shufflenet_mlflow.runtime.progress import FollowerReporter
from shufflenet_mlflow.runtime.signals import StopFlag, StopRequested
from shufflenet_mlflow.training.data import TrainData
from shufflenet_mlflow.training.keeping import NoMetrics, NoStore
from shufflenet_mlflow.training.loop import TrainingLoop
from shufflenet_mlflow.training.state import TrainingState

_PLAIN = {
    **dict.fromkeys(("init_from", "teacher", "qat", "micro_batch_size")),
    "pretrained": False,
    "compile": False,
    "sync_bn": False,
    "freeze": "none",
    "patience": 0,
    "warmup_epochs": 0.0,
}
"""Options of the supernet's training that make no sense for a brief one, or that its processes had."""


@dataclass(frozen=True)
class BriefTraining:
    """Trains networks; it can be sent to another process."""

    held: HeldOut
    preprocess: Preprocess
    config: Mapping[str, Any]
    """The configuration of the supernet's training."""
    epochs: int
    bn_images: int
    """Training images for the final statistics of batch normalisation."""
    seed: int
    device: str
    images: int
    """Images, of those that are held out, that can be read."""
    threads: int
    decoders: int
    """Processes that decode images; 0 in a process that must not have any."""

    def correct(self, genes: Genes) -> int:
        """Return how many of the held-out images a trained network classifies correctly; 0 if training diverges.

        Raises:
            ShuffleNetError: as `TrainingLoop.run` does.
            StopRequested: a signal has arrived.
        """
        order = self._order()
        spec, device = ModelSpec.of(NETWORK, *network_of(genes)), choose_device(self.device)
        config = self._config(spec, order)
        torch.manual_seed(config.seed)
        model = move_model(spec.build(config.num_classes), device)
        loop = TrainingLoop(
            config=config,
            data=TrainData(
                self.held.train,
                self.held.scoring,
                order,
                MicroBatches.of(config.batch_size, config.batch_size, 0, 1),
                self.preprocess,
            ),
            state=TrainingState.of(config, model, device, order.iters_per_epoch),
            constants={},
            store=NoStore(),
            sink=NoMetrics(),
            context=JobContext.alone(_Quiet(0), StopFlag()),
        )
        try:
            result = loop.run()
        except NonFiniteLossError:
            return 0
        if result.stopped_by is not None:
            raise StopRequested(result.stopped_by)
        return round(result.validation["val/top1"] * self.images)

    def _order(self) -> SampleOrder:
        count = len(self.held.train)
        size = min(self.config["batch_size"], count)
        if self.config.get("balance") == "sampler":
            return BalancedOrder(count, size, self.seed, labels=self.held.train.samples.labels)
        return SampleOrder(count, size, self.seed)

    def _config(self, spec: ModelSpec, order: SampleOrder) -> RunConfig:
        total_iters = self.epochs * order.iters_per_epoch
        own = {
            "model": NETWORK,
            "choices": spec.choices and format_numbers(spec.choices),
            "scales": spec.scales and format_numbers(spec.scales),
            "batch_size": order.batch_size,
            "total_iters": total_iters,
            **dict.fromkeys(("val_interval", "save_interval", "display_interval"), total_iters),
            "bn_images": self.bn_images,
            "seed": self.seed,
            "device": self.device,
            "threads": self.threads,
            "workers": self.decoders,
        }
        known = {name: value for name, value in self.config.items() if name in FIELDS}
        return RunConfig(**{**known, **_PLAIN, **own})


class _Quiet(FollowerReporter):
    """Reports nothing: the search reports."""

    def warn(self, text: str) -> None:
        """Show nothing: what there is to say was said when the images were decoded."""
