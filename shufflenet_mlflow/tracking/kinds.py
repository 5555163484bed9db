"""All kinds of messages that tracking itself can send, by the name they have in a journal."""

from typing import Any

from shufflenet_mlflow.tracking.commit import Checkpoint
from shufflenet_mlflow.tracking.logged import LoggedBatch, LoggedFile, LoggedInputs, RunUpdate
from shufflenet_mlflow.tracking.messages import (
    Create,
    DatasetInput,
    Finish,
    MetricPoints,
    Params,
    Reopen,
    Tags,
    TextArtifact,
)
from shufflenet_mlflow.tracking.note import Note
from shufflenet_mlflow.tracking.prune import Prune

TRACKING_KINDS: dict[str, type[Any]] = {
    message.kind: message
    for message in (
        MetricPoints,
        Params,
        Tags,
        TextArtifact,
        DatasetInput,
        Note,
        Checkpoint,
        Prune,
        Create,
        Reopen,
        Finish,
        LoggedBatch,
        LoggedInputs,
        LoggedFile,
        RunUpdate,
    )
}
