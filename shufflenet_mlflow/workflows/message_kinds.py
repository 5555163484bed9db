"""Every kind of message that a journal can hold."""

from typing import Any

from shufflenet_mlflow.export.logged import LogModels
from shufflenet_mlflow.tracking.kinds import TRACKING_KINDS

MESSAGE_KINDS: dict[str, type[Any]] = {**TRACKING_KINDS, LogModels.kind: LogModels}
