"""An exported file beside its checkpoint: which images changed sides, and whether that is more than chance."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shufflenet_mlflow.checkpoints.names import local_name, parse_name
from shufflenet_mlflow.compare.comparison import all_evaluations, test_of
from shufflenet_mlflow.compare.paired import PairedTest
from shufflenet_mlflow.errors import UnresolvedError

if TYPE_CHECKING:
    from shufflenet_mlflow.tracking.client import MlflowClient, Run


@dataclass(frozen=True)
class ExportComparison:
    """Evaluations of a checkpoint and of an exported file on the same images."""

    file: str
    checkpoint: str
    run_id: str
    sha256: str
    checkpoint_sha256: str | None
    tests: tuple[PairedTest, ...]
    """One for each set of images; the checkpoint is the first."""

    def to_dict(self) -> dict[str, Any]:
        """Return its entry in the document of `compare --json`."""
        return {
            "file": self.file,
            "checkpoint": self.checkpoint,
            "run_id": self.run_id,
            "sha256": self.sha256,
            "checkpoint_sha256": self.checkpoint_sha256,
            "paired_tests": [test.to_dict() for test in self.tests],
        }


def compare_export(client: "MlflowClient", run: "Run", export: Mapping[str, Any]) -> ExportComparison:
    """Compare an exported file with its checkpoint, by their evaluations in the checkpoint's run.

    Args:
        export: the file, as `ExportedFile.to_dict` describes it.

    Raises:
        UnresolvedError: the run has no evaluations of both on the same images.
        TrackingError: MLflow did not answer.
    """
    file, sha256, run_id = export["file"], export["sha256"], run.info.run_id
    checkpoint = str(export["checkpoint"])
    found = list(all_evaluations(client, run))
    of_checkpoint = {
        one.digest: one for one in found if one.export_sha256 is None and local_name(one.checkpoint) == checkpoint
    }
    of_file = {one.digest: one for one in found if one.export_sha256 == sha256}
    if not of_file:
        raise UnresolvedError(
            f"run {run_id} has no evaluation of {file!r} with these bytes; `shufflenet eval {file} --val-dir DIR` "
            "makes one",
            code="export-not-evaluated",
        )
    both = [digest for digest in of_file if digest in of_checkpoint]
    if not both:
        images = ", ".join(sorted({one.data for one in of_file.values()}))
        name = parse_name(checkpoint)
        iters = name.iters if name is not None else "latest"
        raise UnresolvedError(
            f"run {run_id} has no evaluation of {checkpoint} on the images of {images}, which {file!r} was evaluated "
            f"on; `shufflenet eval {run_id}@{iters} --val-dir DIR` makes one",
            code="checkpoint-not-evaluated",
        )
    tests = (test_of(client, of_checkpoint[digest], of_file[digest]) for digest in both)
    return ExportComparison(
        file, checkpoint, run_id, sha256, export["checkpoint_sha256"], tuple(test for test in tests if test is not None)
    )
