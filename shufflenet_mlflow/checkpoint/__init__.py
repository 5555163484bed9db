"""The checkpoint file: its format, writing, verification, loading."""

from shufflenet_mlflow.checkpoint.load import LoadReport, load_checkpoint
from shufflenet_mlflow.checkpoint.names import (
    FINAL_TAG,
    checkpoint_name,
    list_checkpoints,
    newest_first,
    parse_name,
)
from shufflenet_mlflow.checkpoint.record import (
    ARTIFACT_FOLDER,
    BEST_TAG,
    LATEST_TAG,
    CheckpointRecord,
    read_record,
    record_path,
)
from shufflenet_mlflow.checkpoint.verify import read_checkpoint, verify_checkpoint
from shufflenet_mlflow.checkpoint.write import WrittenCheckpoint, write_checkpoint

__all__ = [
    "ARTIFACT_FOLDER",
    "BEST_TAG",
    "FINAL_TAG",
    "LATEST_TAG",
    "CheckpointRecord",
    "LoadReport",
    "WrittenCheckpoint",
    "checkpoint_name",
    "list_checkpoints",
    "load_checkpoint",
    "newest_first",
    "parse_name",
    "read_checkpoint",
    "read_record",
    "record_path",
    "verify_checkpoint",
    "write_checkpoint",
]
