"""The loops of docs/frameworks.md: killed, resumed from their run ID elsewhere, and equal to undisturbed ones."""

import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import save_file

from shufflenet_mlflow import get_latest_model, read_checkpoint, save_checkpoint
from shufflenet_mlflow.errors import CheckpointError, ConfigError
from tests.support.doc_pages import ROOT, fences
from tests.support.effort import cases, only_in_full_run
from tests.support.metrics import steps
from tests.support.network import free_port

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

INTERRUPT = """
import os, torch
number = 0
step_of = torch.optim.AdamW.step
def step(optimizer, *arguments, **options):
    global number
    number += 1
    if number == {step}:
        os.kill(os.getpid(), {signal})
    return step_of(optimizer, *arguments, **options)
torch.optim.AdamW.step = step
"""


def loop(framework: str) -> str:
    page = ROOT / "docs" / "frameworks.md"
    [text] = [fence.text for fence in fences(page) if f"integrations.{framework}" in fence.text]
    return text


def train(folder: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    (folder / "loop.py").write_text(code)
    return subprocess.run(
        [sys.executable, "loop.py"],
        cwd=folder,
        env={**os.environ, "SHUFFLENET_CACHE_DIR": str(folder / "cache"), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def run_in(output: str) -> str:
    return re.findall(r"run ([0-9a-f]{32})", output)[0]


def weights_at_end(folder: Path, run_id: str) -> dict[str, torch.Tensor]:
    path, iters = get_latest_model(folder / "models" / run_id)
    assert path is not None
    assert iters == 32
    return dict(read_checkpoint(path)["state_dict"])


@pytest.fixture(scope="module", params=["lightning", "huggingface"])
def framework(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def undisturbed(framework: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("undisturbed")
    done = train(folder, loop(framework), MLFLOW_TRACKING_URI="sqlite:///mlflow.db")
    assert done.returncode == 0, done.stderr
    return weights_at_end(folder, run_in(done.stdout))


@pytest.mark.parametrize(("step", "background"), cases([(13, False), (17, True)], ci=1))
def test_a_killed_loop_goes_on_elsewhere(
    framework: str,
    step: int,
    background: bool,
    undisturbed: dict[str, torch.Tensor],
    client: MlflowClient,
    tmp_path: Path,
) -> None:
    """Within an epoch, and at the beginning of one."""
    code = loop(framework).replace("Checkpoint(", f"Checkpoint(background={background}, ")
    killed = train(tmp_path / "killed", INTERRUPT.format(step=step, signal="9") + code)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    [run] = [run for run in client.search_runs(["0"]) if run.info.status == "RUNNING"]
    resumed = train(tmp_path / "elsewhere", code, MLFLOW_RUN_ID=run.info.run_id)
    assert resumed.returncode == 0, resumed.stderr
    found = weights_at_end(tmp_path / "elsewhere", run.info.run_id)
    assert undisturbed.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in undisturbed.items())
    metric = {"lightning": "accuracy", "huggingface": "eval_loss"}[framework]
    logged = steps(client, run.info.run_id, metric)
    assert logged == sorted(set(logged))
    assert logged[-1] == 32
    assert list(tmp_path.glob("elsewhere/trainer_output/checkpoint-*")) == []


@only_in_full_run
def test_lightning_in_two_processes(client: MlflowClient, tmp_path: Path) -> None:
    """With one run in both, a killed loop goes on as if it had not been; with a run in each, that is said."""
    two = loop("lightning").replace("pl.Trainer(", "pl.Trainer(devices=2, strategy='ddp', ").replace("0.3", "0.0")
    one_run = two.replace("with mlflow.start_run() as run:", "import os\nif True:")
    one_run = one_run.replace("Checkpoint(", "Checkpoint(run_id=os.environ['RUN'], ").replace("{run.info.run_id}", "")
    runs = [client.create_run("0").info.run_id for _ in range(2)]
    undisturbed = train(tmp_path / "undisturbed", one_run, RUN=runs[0])
    assert undisturbed.returncode == 0, undisturbed.stderr
    killed = train(tmp_path / "killed", INTERRUPT.format(step=7, signal="9") + one_run, RUN=runs[1])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = train(tmp_path / "elsewhere", one_run, RUN=runs[1])
    assert resumed.returncode == 0, resumed.stderr
    folders = ("undisturbed", "elsewhere")
    found = [get_latest_model(tmp_path / name / "models" / run) for name, run in zip(folders, runs, strict=True)]
    assert [iters for _, iters in found] == [16, 16]
    weights = [read_checkpoint(path)["state_dict"] for path, _ in found if path is not None]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    refused = train(tmp_path / "apart", two)
    assert refused.returncode != 0
    assert "the processes of this training have different runs" in refused.stderr


def test_lightning_saves_the_batch_in_progress_on_sigterm(client: MlflowClient, tmp_path: Path) -> None:
    train(tmp_path / "a", INTERRUPT.format(step=12, signal="15") + loop("lightning"))
    [run] = client.search_runs(["0"])
    assert run.info.status == "FAILED"
    assert get_latest_model(tmp_path / "a" / "models" / run.info.run_id)[1] == 12


@only_in_full_run
def test_a_dead_server_is_no_hindrance(framework: str, tmp_path: Path) -> None:
    """The address refuses connections, and the run is named by its ID, so that MLflow itself need not be asked."""
    uri = f"http://127.0.0.1:{free_port()}"
    callback = {"lightning": "LightningCheckpoint(", "huggingface": "HuggingFaceCheckpoint("}[framework]
    code = (
        loop(framework)
        .replace("with mlflow.start_run() as run:", "if True:")
        .replace(callback, f"{callback}run_id='0' * 32, tracking_uri={uri!r}, ")
        .replace("run {run.info.run_id}", "run " + "0" * 32)
    )
    done = train(tmp_path / "a", code)
    assert done.returncode == 0, done.stderr
    weights_at_end(tmp_path / "a", "0" * 32)
    waiting = re.findall(r"(\d+) entries have not reached MLflow", done.stderr)
    assert waiting, done.stderr


@pytest.mark.filterwarnings("ignore")  # Lightning's, about this small example
def test_lightning_refuses_what_it_could_not_load(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import lightning.pytorch as pl

    from shufflenet_mlflow.integrations.lightning import LightningCheckpoint

    class Wrapping(pl.LightningModule):  # type: ignore[misc]
        def __init__(self, folder: Path = tmp_path) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.module = torch.nn.Linear(2, 2)

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            return torch.as_tensor(self.module(batch).sum())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Renamed(Wrapping):
        def __init__(self) -> None:
            super().__init__()
            self.net = self.module
            del self.module

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            return torch.as_tensor(self.net(batch).sum())

    loader = torch.utils.data.DataLoader(torch.ones(4, 2))

    def fit(module: pl.LightningModule, **options: object) -> None:
        checkpoint = LightningCheckpoint(tmp_path, **options)  # type: ignore[arg-type]
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[checkpoint], **quiet)
        trainer.fit(module, loader, loader)

    with pytest.raises(ConfigError, match=r"store 'module\.weight' as 'weight'.*rename that attribute"):
        fit(Wrapping())
    assert list(tmp_path.glob("*.tar")) == []
    with caplog.at_level(logging.WARNING):
        fit(Renamed(), monitor="f1")
    assert [path.name for path in tmp_path.glob("*.tar")] == ["checkpoint-000004.pth.tar"]
    assert "the hyper-parameter 'folder', a PosixPath, is left out of checkpoints" in caplog.text
    with pytest.raises(ConfigError, match=r"every_n_steps \(=0\)"):
        LightningCheckpoint(every_n_steps=0)
    with pytest.raises(ConfigError, match=r"mode \(='up'\)"):
        LightningCheckpoint(mode="up")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["../outside", "/outside", "..", ""])
def test_hugging_face_unpacks_into_its_folder_only(name: str, tmp_path: Path) -> None:
    from shufflenet_mlflow.integrations.huggingface import ENTRY, HuggingFaceCheckpoint

    state = {"state_dict": {"w": torch.ones(2)}}
    entry = {"weights": "model.safetensors", "names": ["w"], "files": {name: torch.zeros(3, dtype=torch.uint8)}}
    for content in (state, {**state, ENTRY: entry}):
        path = save_checkpoint(content, 1, directory=tmp_path / "models")
        with pytest.raises(CheckpointError, match="was not written by HuggingFaceCheckpoint"):
            HuggingFaceCheckpoint().latest(path)
    entry["files"] = {"optimizer.pt": torch.zeros(3, dtype=torch.uint8)}
    path = save_checkpoint({**state, ENTRY: entry}, 1, directory=tmp_path / "models")
    checkpoint = HuggingFaceCheckpoint()
    folder = checkpoint.latest(path)
    assert folder is not None
    assert sorted(os.listdir(folder)) == ["model.safetensors", "optimizer.pt"]
    checkpoint.close()
    assert not Path(folder).exists()


def test_hugging_face_packs_one_file_of_weights(tmp_path: Path) -> None:
    from shufflenet_mlflow.integrations.huggingface import pack

    for number in range(3):
        if number != 1:
            with pytest.raises(CheckpointError, match=f"holds {number} files of weights instead of one"):
                pack(tmp_path)
        save_file({"w": torch.ones(2)}, tmp_path / f"model-{number}.safetensors")
