"""The checkpoint file: its format, writing, verification, loading. Each is imported when it is first used."""

from typing import TYPE_CHECKING

from shufflenet_mlflow.lazily import exports

if TYPE_CHECKING:
    from shufflenet_mlflow.checkpoint.folder import delete_checkpoint, list_records, remove_leftovers
    from shufflenet_mlflow.checkpoint.load import AUXILIARY_PREFIX, LoadReport, head_of, load_checkpoint, weights_of
    from shufflenet_mlflow.checkpoint.names import (
        FINAL_TAG,
        checkpoint_name,
        list_checkpoints,
        newest_first,
        parse_name,
    )
    from shufflenet_mlflow.checkpoint.payload import RESUME_KEYS, check_payload, is_own
    from shufflenet_mlflow.checkpoint.record import (
        ARTIFACT_FOLDER,
        BEST_TAG,
        LATEST_TAG,
        CheckpointRecord,
        read_record,
        record_path,
        update_record,
        write_record,
    )
    from shufflenet_mlflow.checkpoint.retention import Retention, best_first
    from shufflenet_mlflow.checkpoint.snapshot import StateBuffer
    from shufflenet_mlflow.checkpoint.state import is_plain_tensor
    from shufflenet_mlflow.checkpoint.verify import read_checkpoint, verify_checkpoint
    from shufflenet_mlflow.checkpoint.write import (
        PreparedCheckpoint,
        WrittenCheckpoint,
        prepare_checkpoint,
        write_checkpoint,
        write_prepared,
    )

__all__ = [
    "ARTIFACT_FOLDER",
    "AUXILIARY_PREFIX",
    "BEST_TAG",
    "FINAL_TAG",
    "LATEST_TAG",
    "RESUME_KEYS",
    "CheckpointRecord",
    "LoadReport",
    "PreparedCheckpoint",
    "Retention",
    "StateBuffer",
    "WrittenCheckpoint",
    "best_first",
    "check_payload",
    "checkpoint_name",
    "delete_checkpoint",
    "head_of",
    "is_own",
    "is_plain_tensor",
    "list_checkpoints",
    "list_records",
    "load_checkpoint",
    "newest_first",
    "parse_name",
    "prepare_checkpoint",
    "read_checkpoint",
    "read_record",
    "record_path",
    "remove_leftovers",
    "update_record",
    "verify_checkpoint",
    "weights_of",
    "write_checkpoint",
    "write_prepared",
    "write_record",
]

_HOMES = {
    "ARTIFACT_FOLDER": "record",
    "AUXILIARY_PREFIX": "load",
    "BEST_TAG": "record",
    "CheckpointRecord": "record",
    "FINAL_TAG": "names",
    "LATEST_TAG": "record",
    "LoadReport": "load",
    "PreparedCheckpoint": "write",
    "RESUME_KEYS": "payload",
    "Retention": "retention",
    "StateBuffer": "snapshot",
    "WrittenCheckpoint": "write",
    "best_first": "retention",
    "check_payload": "payload",
    "checkpoint_name": "names",
    "delete_checkpoint": "folder",
    "head_of": "load",
    "is_own": "payload",
    "is_plain_tensor": "state",
    "list_checkpoints": "names",
    "list_records": "folder",
    "load_checkpoint": "load",
    "newest_first": "names",
    "parse_name": "names",
    "prepare_checkpoint": "write",
    "read_checkpoint": "verify",
    "read_record": "record",
    "record_path": "record",
    "remove_leftovers": "folder",
    "update_record": "record",
    "verify_checkpoint": "verify",
    "weights_of": "load",
    "write_checkpoint": "write",
    "write_prepared": "write",
    "write_record": "record",
}

__getattr__ = exports(__name__, _HOMES)
