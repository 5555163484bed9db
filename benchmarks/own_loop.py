"""Measure how long `save_checkpoint` keeps a script of one's own when its tracking server is killed.

A torchvision ResNet-18 with AdamW and a cosine schedule (134 MB a checkpoint) saves ten times in each of ten runs; the
server is killed (SIGKILL) at a random moment of each. Afterwards a new server is started on the same store, and
`shufflenet sync` delivers the rest. Prints JSON with each run's moment, its longest call, and the longest call that
writes the same file and has no run; exits with status 1 if a call raised, or if anything is missing or there twice:

    PYTHONPATH=. python benchmarks/own_loop.py [--runs N] [--seed N]
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from machine import describe, report
from mlflow import MlflowClient

from tests.support.mlflow_server import Server

SAVES = 10

SCRIPT = """
import json, sys, time
import torch, torchvision
from shufflenet_mlflow import save_checkpoint

saves, run_id, uri = int(sys.argv[1]), *(sys.argv[2:] or (None, None))
torch.manual_seed(0)
model = torchvision.models.resnet18(num_classes=10)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=saves)
images, labels = torch.randn(4, 3, 32, 32), torch.randint(0, 10, (4,))
for iters in range(1, saves + 1):
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    began = time.perf_counter()
    save_checkpoint(state, iters, metrics={"loss": loss.detach()}, run_id=run_id, tracking_uri=uri)
    print(json.dumps(time.perf_counter() - began), flush=True)
"""


class Script:
    """The loop, in a process and a folder of its own.

    Args:
        words: the run and its server; none for a loop without a run.
    """

    def __init__(self, folder: Path, *words: str) -> None:
        self.calls: list[float] = []
        self.second_call = threading.Event()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "SHUFFLENET_CACHE_DIR": str(folder / "cache")}
        self._process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(SAVES), *words],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=open(folder / "errors.log", "w"),  # noqa: SIM115 - the process has it
            text=True,
        )
        self._errors = folder / "errors.log"
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            self.calls.append(json.loads(line))
            if len(self.calls) == 2:
                self.second_call.set()

    def longest(self) -> float:
        """Wait for the end; return the seconds of the longest call."""
        status = self._process.wait()
        self._reader.join()
        if status or len(self.calls) != SAVES:
            sys.exit(f"the loop ended with status {status}: {self._errors.read_text()}")
        return max(self.calls)


def faults(server: Server, run_id: str) -> list[str]:
    """Return what is missing in the run, or there twice."""
    client = MlflowClient(server.uri)
    steps = [point.step for point in client.get_metric_history(run_id, "loss")]
    artifacts = sorted(Path(found.path).name for found in client.list_artifacts(run_id, "checkpoints"))
    names = [f"checkpoint-{iters:06}.pth.tar" for iters in range(1, SAVES + 1)]
    found = [] if sorted(steps) == list(range(1, SAVES + 1)) else [f"points at {sorted(steps)}"]
    return found if artifacts == sorted([*names, *(f"{name}.json" for name in names)]) else [*found, str(artifacts)]


def outage(folder: Path, generator: random.Random) -> dict[str, Any]:
    """Run the loop once, and kill its server meanwhile."""
    server = Server(folder)
    try:
        client = MlflowClient(server.uri)
        run_id = client.create_run(client.create_experiment("own loop")).info.run_id
        script = Script(folder, run_id, server.uri)
        script.second_call.wait(60)
        after = generator.uniform(0, 4)
        threading.Event().wait(after)
        done = len(script.calls)
        server.kill()
        longest = script.longest()
        calls = [round(seconds, 2) for seconds in script.calls]
        server.start()
        sync = [sys.executable, "-m", "shufflenet_mlflow", "sync", f"models/{run_id}", "--tracking-uri", server.uri]
        subprocess.run(sync, cwd=folder, check=True, capture_output=True)
        return {
            "killed_after_calls": done,
            "longest_call_s": round(longest, 2),
            "calls_s": calls,
            "faults": faults(server, run_id),
        }
    finally:
        server.kill()


def main() -> None:
    """Run the loop without a run, then once for each outage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    generator = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as folder:
        alone = Script(Path(folder)).longest()
    outages = []
    for _ in range(given.runs):
        with tempfile.TemporaryDirectory() as folder:
            outages.append(outage(Path(folder), generator))
    longest = max(found["longest_call_s"] for found in outages)
    report({**describe(), "longest_call_without_run_s": round(alone, 2), "longest_call_s": longest, "runs": outages})
    sys.exit(any(found["faults"] for found in outages))


if __name__ == "__main__":
    main()
