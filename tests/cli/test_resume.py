"""What a resumed run must not depend on, what it must keep, and what an interruption says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.parts import Frame, build_learner
from engine.resume import find_last_checkpoint, resumed_settings
from engine.state import Progress, describe_run, restore, save_last
from models.yolo import DetectionModel
from utils.checkpoint import read_checkpoint, save_checkpoint
from utils.config import Hyp, TrainConfig
from utils.dist import World
from utils.early_stopping import EarlyStopping
from utils.errors import CheckpointError
from utils.files import ROOT, dump_yaml, load_yaml


@pytest.fixture(scope="module")
def last(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last.pt of a run on the CPU, in float32, after its first epoch."""
    path = tmp_path_factory.mktemp("run") / "last.pt"
    learner, progress = fresh_learner()
    meta = describe_run(learner.model, TrainConfig(), Hyp())
    save_last(path, learner, meta, progress, epoch=0, metrics={})
    return path


def fresh_learner():
    frame = Frame(imgsz=64, stride=32, batch=4, rank_batch=4)
    model = DetectionModel("yolov5n.yaml", nc=2)
    learner = build_learner(model, TrainConfig(), Hyp(), frame, 3, torch.device("cpu"), World())
    return learner, Progress(EarlyStopping(100))


def test_a_run_that_starts_to_scale_its_loss_resumes(last: Path) -> None:
    """From the CPU, or from bf16, to a GPU that trains in fp16: there is no scale to take over."""
    learner, progress = fresh_learner()
    learner.scaler = torch.amp.GradScaler("cpu", enabled=True)
    scale = learner.scaler.get_scale()
    restore(last, learner, progress)
    assert progress.start_epoch == 1 and learner.scaler.get_scale() == scale


@pytest.mark.parametrize("missing", ["model", "rng", "stopper", "epoch"])
def test_an_incomplete_training_state_is_one_line(last: Path, tmp_path: Path, missing: str) -> None:
    whole = read_checkpoint(last)
    state = {key: value for key, value in whole.train.items() if key != missing}
    save_checkpoint(tmp_path / "last.pt", whole.model, whole.meta, state)
    with pytest.raises(CheckpointError, match=f"does not fit this model.*{missing}"):
        restore(tmp_path / "last.pt", *fresh_learner())


def test_the_start_weights_may_be_gone(tmp_path: Path, train_cli) -> None:
    train_cli("--name", "first")
    start = tmp_path / "start.pt"
    (tmp_path / "runs" / "first" / "weights" / "best.pt").rename(start)
    assert train_cli("--weights", str(start), "--cfg", "", "--name", "second")[0] == 0
    start.unlink()
    status, _, err = train_cli(base=["--resume", str(tmp_path / "runs" / "second"), "--epochs", "2"], data="")
    assert status == 0, err


def test_a_batch_found_by_measuring_is_written_down(tmp_path: Path, train_cli) -> None:
    """Measured again, on a GPU with other free memory, it would be another one and so another training."""
    assert train_cli("--batch", "-1")[0] == 0
    run = tmp_path / "runs" / "exp"
    assert load_yaml(run / "opt.yaml")["batch_size"] == 16
    assert read_checkpoint(run / "weights" / "last.pt").meta["opt"]["batch_size"] == 16


def test_an_interrupted_run_without_checkpoints_says_so(tmp_path: Path, train_cli, monkeypatch) -> None:
    import engine.trainer

    real = engine.trainer.train_one_epoch

    def interrupted(learner, loader, epoch, *rest):
        if epoch == 1:
            raise KeyboardInterrupt
        return real(learner, loader, epoch, *rest)

    monkeypatch.setattr(engine.trainer, "train_one_epoch", interrupted)
    status, _, err = train_cli("--nosave", "--epochs", "2")
    assert status == 130 and "--nosave" in err and "no epoch was completed" not in err


@pytest.mark.parametrize(
    ("key", "value"), [("epoch", -50), ("epoch", "7"), ("ema_updates", -1), ("rng", {"torch": 5}), ("optimizer", 5)]
)
def test_a_damaged_training_state_is_one_line(last: Path, tmp_path: Path, key: str, value: object) -> None:
    whole = read_checkpoint(last)
    save_checkpoint(tmp_path / "last.pt", whole.model, whole.meta, {**whole.train, key: value})
    with pytest.raises(CheckpointError, match="does not fit this model"):
        restore(tmp_path / "last.pt", *fresh_learner())


def test_momentum_of_another_shape_is_one_line(last: Path, tmp_path: Path) -> None:
    whole = read_checkpoint(last)
    learner, progress = fresh_learner()
    for parameter in learner.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    learner.optimizer.step()
    state = learner.optimizer.state_dict()
    state["state"][0]["momentum_buffer"] = torch.zeros(7)
    save_checkpoint(tmp_path / "last.pt", whole.model, whole.meta, {**whole.train, "optimizer": state})
    with pytest.raises(CheckpointError, match=r"its momentum_buffer is of \(7,\), not"):
        restore(tmp_path / "last.pt", learner, progress)


def test_the_flags_of_the_first_start_serve_again(tmp_path: Path, tiny: Path, train_cli, monkeypatch) -> None:
    """torchrun repeats them at every start, a scheduler with --resume behind; the run's own copy of --hyp is stored."""
    hyp = tmp_path / "mine.yaml"
    hyp.write_text((ROOT / "data/hyps/hyp.scratch-low.yaml").read_text())
    assert train_cli("--hyp", str(hyp), "--name", "first")[0] == 0
    run = tmp_path / "runs" / "first"
    for epochs in ("2", "3"):
        status, _, err = train_cli(base=["--resume", str(run), "--hyp", str(hyp), "--epochs", epochs], data="")
        assert status == 0, err
    hyp.write_text(hyp.read_text().replace("lr0: 0.01", "lr0: 0.02"))
    status, _, err = train_cli(base=["--resume", str(run), "--hyp", str(hyp), "--epochs", "4"], data="")
    assert status == 2 and "--hyp" in err and "cannot change on --resume" in err
    settings = {"resume": str(run), "project": "elsewhere", "name": "first", "exist_ok": True}
    assert resumed_settings(settings, {"project", "name", "exist_ok"})["resume"].endswith("last.pt")


def test_two_trainings_do_not_share_a_folder(tmp_path: Path, train_cli) -> None:
    """Another process holds it, as a first training would; when that ends, nothing is in the way."""
    assert train_cli()[0] == 0
    run = tmp_path / "runs" / "exp"
    before = {path: path.read_bytes() for path in run.glob("**/*") if path.is_file()}
    code = "import sys; from pathlib import Path; from utils.run_lock import sole_user\n"
    code += "with sole_user(Path(sys.argv[1])): print(1); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen([sys.executable, "-uc", code, str(run)], **pipes) as other:
        assert other.stdout.readline() == "1\n"
        status, _, err = train_cli(base=["--resume", str(run), "--epochs", "2"], data="")
        assert status == 2 and err.count("\n") == 1 and f"{run}: another process still writes there" in err
        assert train_cli("--exist-ok")[0] == 2
        assert {path: path.read_bytes() for path in before} == before
        other.kill()
    assert train_cli(base=["--resume", str(run), "--epochs", "2"], data="")[0] == 0


@pytest.mark.parametrize("name", ["best.pt", "epoch12.pt"])
def test_weights_only_files_point_to_last(tmp_path: Path, name: str) -> None:
    for file in (name, "last.pt"):
        (tmp_path / file).touch()
    with pytest.raises(CheckpointError, match=f"{name}: holds weights only; go on from .*last.pt, or start anew with"):
        find_last_checkpoint(str(tmp_path / name))
    assert find_last_checkpoint(str(tmp_path / "last.pt")) == tmp_path / "last.pt"


def test_what_is_no_checkpoint_is_not_resumed(tiny: Path, train_cli) -> None:
    status, _, err = train_cli(base=["--resume", str(tiny)], data="")
    assert status == 2 and f"--resume {tiny}: is no checkpoint" in err


def test_a_data_set_that_has_moved(tmp_path: Path, tiny: Path, train_cli) -> None:
    here, there = tmp_path / "here.yaml", tmp_path / "there.yaml"
    here.write_text(dump_yaml({**load_yaml(tiny), "path": str(tiny.parent)}))
    assert train_cli(data=here)[0] == 0
    run = tmp_path / "runs" / "exp"
    status, _, err = train_cli(base=["--resume", str(run), "--epochs", "2"], data=tiny)
    assert status == 2 and "--data" in err and "cannot change on --resume" in err
    here.rename(there)
    status, _, err = train_cli(base=["--resume", str(run), "--epochs", "2"], data="")
    assert status == 2 and f"its data set {here} is not there any more; say where it is now with --data" in err
    status, _, err = train_cli(base=["--resume", str(run), "--epochs", "2"], data=there)
    assert status == 0, err
    assert load_yaml(run / "opt.yaml")["data"] == str(there)
