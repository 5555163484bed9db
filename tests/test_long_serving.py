"""The way from training to serving, as printed in the docs: train, compare, promote, serve, post an image with curl."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.network import free_port, wait_until_up
from tests.support.processes import finish, start

PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
DOCS = Path(__file__).parent.parent / "docs"

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed"),
]


def printed(page: str, beginning: str) -> str:
    """Return the first command on a page of the docs that begins so, without its comment."""
    line = next(line for line in (DOCS / page).read_text().splitlines() if line.startswith(beginning))
    return re.sub(r"\s{2,}# .*", "", line)


def shell(command: str, folder: Path) -> str:
    env = {**os.environ, "PATH": PATH, "SHUFFLENET_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_way_in_the_docs(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stranger"
    folder.mkdir()
    small = ("--input-size", 32, "--batch-size", 8, "--total-iters", 12, "--workers", 0)
    data = ("--train-dir", images / "train", "--val-dir", images / "val")
    runs = [finish(start(folder, "train", *data, *small, "--lr", rate, "--json"))["run_id"] for rate in (0.02, 0.005)]
    shutil.copy(images / "val" / "red" / "000.png", folder / "cat.jpg")  # what it is called tells nobody what it is
    for run_id in runs:
        shell(printed("comparing.md", "shufflenet eval RUN_ID ").replace("RUN_ID", run_id), folder)
    compare = printed("comparing.md", "shufflenet compare RUN_ID").replace("RUN_ID OTHER_RUN_ID", " ".join(runs))
    assert "p = " in shell(compare, folder)
    assert (folder / "comparison" / "compare.html").exists()
    shell(printed("serving.md", "shufflenet checkpoints promote").replace("RUN_ID", runs[0]), folder)

    port = free_port()
    serve = printed("serving.md", "mlflow models serve -m models:/").replace("5001", str(port))
    served = subprocess.Popen(
        [sys.executable, "-m", *serve.split()],
        cwd=folder,
        env={**os.environ, "PATH": PATH},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_until_up(f"http://127.0.0.1:{port}/ping", served)
        shell(printed("serving.md", "echo "), folder)
        answer = json.loads(shell(printed("serving.md", "curl ").replace("5001", str(port)), folder))
        status = shell(
            f"curl -s -o /dev/null -w '%{{http_code}}' -H 'Content-Type: application/json' "
            f"""-d '{{"dataframe_split": {{"columns": ["image"], "data": [["aGVsbG8="]]}}}}' """
            f"http://127.0.0.1:{port}/invocations",
            folder,
        )
    finally:
        os.killpg(served.pid, signal.SIGKILL)
        served.wait()
    [predicted] = json.loads(shell("shufflenet predict models:/pets@champion cat.jpg --json", folder))
    assert answer == {"predictions": [{"label": predicted["label"], "probability": predicted["probability"]}]}
    assert status == "400"
