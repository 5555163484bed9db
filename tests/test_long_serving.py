"""The way from training to serving, as printed in the docs: train, compare, promote, serve, post an image with curl."""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.support.effort import repetitions
from tests.support.network import free_port, wait_until_up
from tests.support.processes import finish, start
from tests.support.serving_requests import FORMS, malformed
from tests.test_export import png, written

__all__ = ["written"]  # a fixture

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


@contextmanager
def serving(command: str, folder: Path) -> Iterator[str]:
    """Run a command of `mlflow models serve`, on a free port in place of 5001, and yield its address."""
    address = f"http://127.0.0.1:{free_port()}"
    server = subprocess.Popen(
        [sys.executable, "-m", *command.replace("5001", address.rpartition(":")[2]).split()],
        cwd=folder,
        env={**os.environ, "PATH": PATH},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_until_up(f"{address}/ping", server)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


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

    serve = printed("serving.md", "mlflow models serve -m models:/")
    with serving(serve, folder) as address:
        port = address.rpartition(":")[2]
        shell(printed("serving.md", "echo "), folder)
        answer = json.loads(shell(printed("serving.md", "curl ").replace("5001", port), folder))
        status = shell(
            f"curl -s -o /dev/null -w '%{{http_code}}' -H 'Content-Type: application/json' "
            f"""-d '{{"dataframe_split": {{"columns": ["image"], "data": [["aGVsbG8="]]}}}}' """
            f"{address}/invocations",
            folder,
        )
    [predicted] = json.loads(shell("shufflenet predict models:/pets@champion cat.jpg --json", folder))
    assert answer == {"predictions": [{"label": predicted["label"], "probability": predicted["probability"]}]}
    assert status == "400"


def post(address: str, body: bytes) -> tuple[int, str]:
    request = urllib.request.Request(f"{address}/invocations", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def memory_of(address: str) -> float:
    """Return the megabytes that the server on this port occupies."""
    port = int(address.rpartition(":")[2])
    [owner] = {c.pid for c in psutil.net_connections("tcp") if c.laddr.port == port and c.status == "LISTEN" and c.pid}
    return psutil.Process(owner).memory_info().rss / 1e6


def test_a_thousand_malformed_requests(written: Path, tmp_path: Path) -> None:
    """Each is refused with one short line, the server stays as it was, and keeps nothing of them."""
    number = repetitions(full=1000, ci=250)
    text = base64.b64encode(png()).decode()
    with serving(f"mlflow models serve -m {written} --env-manager local --port 5001", tmp_path) as address:
        good = [
            post(address, json.dumps(make([text, f"data:image/png;base64,{text}"])).encode()) for make in FORMS.values()
        ]
        assert {status for status, _ in good} == {200}
        assert len({body for _, body in good}) == 1
        occupied = []
        for index, body in enumerate(malformed(png(), 2 * number, seed=1)):
            status, answer = post(address, body)
            assert status == 400, (body[:200], answer)
            message = json.loads(answer)["message"]
            assert set(json.loads(answer)) <= {"error_code", "message", "sqlstate", "error_class"}
            assert "\n" not in message
            assert len(message) < 250
            assert str(written) not in answer
            assert sys.prefix not in answer
            if index in (number - 1, 2 * number - 1):
                occupied.append(memory_of(address))
        assert post(address, json.dumps(FORMS["inputs"]([text])).encode())[0] == 200
    assert occupied[1] - occupied[0] < 15, occupied  # the requests of the second half alone are 30 MB and more
