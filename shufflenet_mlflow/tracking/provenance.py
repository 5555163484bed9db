"""Tags that say where a run comes from: command, code, versions and hardware."""

import os
import platform
import re
import shlex
import sys
from itertools import takewhile
from pathlib import Path

import psutil

from shufflenet_mlflow.runtime.text import counted
from shufflenet_mlflow.runtime.versions import installed_versions
from shufflenet_mlflow.tracking.names import BRANCH_TAG, COMMAND_TAG, COMMIT_TAG, DIRTY_TAG, HARDWARE_TAG, VERSION_TAG
from shufflenet_mlflow.tracking.redaction import redact_word
from shufflenet_mlflow.version import __version__


def command_line() -> str:
    """Return this process's command, ready to be typed again, without credentials."""
    program = Path(sys.argv[0]).name
    words = ["shufflenet" if program == "__main__.py" else program, *sys.argv[1:]]
    return shlex.join(map(redact_word, words))


def command_name() -> str:
    """Return the command without its options, as the UI shows it in the column Source: `shufflenet train`."""
    program, *rest = shlex.split(command_line())
    return " ".join([program, *takewhile(re.compile("[a-z]+").fullmatch, rest[:1])])


def git_tags() -> dict[str, str]:
    """Return commit, branch and dirtiness of the project's code, or else of the working directory.

    Empty outside a checkout, or without git.
    """
    try:
        import git
    except ImportError:  # also raised if there is no git executable
        return {}
    for folder in (Path(__file__).parent, Path.cwd()):
        try:
            with git.Repo(folder, search_parent_directories=True) as repository:
                tags = {
                    COMMIT_TAG: repository.head.commit.hexsha,
                    DIRTY_TAG: str(repository.is_dirty(untracked_files=False)).lower(),
                }
                if not repository.head.is_detached:
                    tags[BRANCH_TAG] = repository.active_branch.name
                return tags
        except (git.GitError, ValueError, OSError):  # no repository, or one without a commit
            continue
    return {}


def hardware_tags() -> dict[str, str]:
    """Return processor, memory and GPUs of this machine."""
    import torch

    memory = psutil.virtual_memory().total / (1 << 30)
    tags = {
        f"{HARDWARE_TAG}cpu": f"{_processor()}, {counted(os.cpu_count() or 1, 'core')}",
        f"{HARDWARE_TAG}memory": f"{memory:.1f} GiB",
    }
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        tags[f"{HARDWARE_TAG}gpu"] = ", ".join(names)
    return tags


def _processor() -> str:
    """Return the processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except (OSError, UnicodeDecodeError):
        pass
    return platform.processor() or platform.machine()


def version_tags() -> dict[str, str]:
    """Return versions of Python, this package, and those that its results depend on."""
    versions = installed_versions(("torch", "torchvision", "mlflow", "numpy", "opencv-python-headless", "pillow"))
    versions = {"python": platform.python_version(), "shufflenet_mlflow": __version__, **versions}
    return {f"{VERSION_TAG}{package}": version for package, version in versions.items()}


def provenance_tags() -> dict[str, str]:
    """Return command, commit, versions, hardware and user."""
    from mlflow.tracking.context import default_context

    command = command_line()
    return {
        **default_context.DefaultRunContext().tags(),  # type: ignore[no-untyped-call]
        **git_tags(),
        **version_tags(),
        **hardware_tags(),
        "mlflow.source.name": command_name(),
        COMMAND_TAG: command,
    }
