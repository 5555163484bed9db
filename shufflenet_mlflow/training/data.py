"""The data of a training, in the order in which it is seen."""

from dataclasses import dataclass

from shufflenet_mlflow.data.division import Division
from shufflenet_mlflow.data.listing import ImageListing
from shufflenet_mlflow.data.preprocess import Preprocess
from shufflenet_mlflow.data.sampler import MicroBatches, SampleOrder


@dataclass(frozen=True)
class TrainData:
    """Training and validation images, the order of samples, and how batches are divided."""

    train: ImageListing
    val: ImageListing
    order: SampleOrder
    micro_batches: MicroBatches
    preprocess: Preprocess
    division: Division | None = None
    """The rule that divided one set into the two; None if they were given apart."""
