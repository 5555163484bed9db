"""Delivery of a journal without a thread."""

from collections.abc import Mapping
from typing import Any

from mlflow import MlflowClient

from shufflenet_mlflow.tracking.delivery import Deliverer
from shufflenet_mlflow.tracking.journal import Journal


def deliver_now(client: MlflowClient, journal: Journal, kinds: Mapping[str, type[Any]]) -> None:
    """Send everything; raises TrackingError at the first entry that does not arrive."""
    deliverer = Deliverer(client, journal, kinds)
    while deliverer.send_some():
        pass
