"""--dcn on the command line: a pretrained model gains DCN layers, the run goes on, nothing else needs a flag."""

from __future__ import annotations

from pathlib import Path

import pytest

import detect
import val
from utils.checkpoint import read_checkpoint
from utils.errors import run_cli
from utils.files import load_yaml


@pytest.fixture
def start(tmp_path: Path, train_cli) -> Path:
    """A plain model, trained a little."""
    assert train_cli("--name", "start")[0] == 0
    return tmp_path / "runs" / "start" / "weights" / "best.pt"


def test_train_resume_val_and_detect(tmp_path: Path, tiny: Path, start: Path, train_cli, capsys) -> None:
    status, out, err = train_cli("--cfg", "", "--weights", str(start), "--dcn", "1,c3:8", "--name", "dcn")
    assert status == 0, err
    assert "--dcn 1,c3:8: 2 convolutions made deformable, same output: 1, 8.m.0.cv2" in out
    assert "DCN: 2 layers" in out and "4 DCN offset(lr x 0.1)" in out
    run = tmp_path / "runs" / "dcn"
    last = run / "weights" / "last.pt"
    saved = read_checkpoint(last)
    assert saved.meta["yaml"]["dcn"] == ["1", "8.m.0.cv2"] and load_yaml(run / "opt.yaml")["dcn"] == "1,c3:8"
    moved = [saved.train["model"][f"model.{name}.conv.conv_offset_mask.weight"] for name in ("1", "8.m.0.cv2")]
    assert all(weight.abs().max() > 0 for weight in moved)  # one epoch: the offsets learn
    status, out, err = train_cli(base=["--resume", str(last), "--epochs", "2"], data="")
    assert status == 0 and "made deformable" not in out, err
    status, _, err = train_cli(base=["--resume", str(last), "--epochs", "3", "--dcn", "3"], data="")
    assert status == 2 and "--dcn 3: cannot change on --resume" in err
    flags = ["--weights", str(run / "weights" / "best.pt"), "--img", "64", "--device", "cpu"]
    flags += ["--project", str(tmp_path / "out")]
    assert run_cli(val.main, [*flags, "--data", str(tiny), "--batch", "4", "--workers", "0"]) == 0
    assert run_cli(detect.main, [*flags, "--source", str(tiny.parent / "images" / "val")]) == 0
    assert "DCN: 2 layers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dcn", "24"], "--dcn 24: it is a Detect"),
        (["--dcn", ","], "--dcn ',': names no layer"),
        (["--dcn", "1,3", "--freeze", "2"], "layer 1 is frozen by --freeze"),
    ],
)
def test_refused_before_a_folder_is_made(tmp_path: Path, train_cli, flags: list[str], message: str) -> None:
    status, _, err = train_cli(*flags)
    assert status == 2 and err.count("\n") == 1 and message in err
    assert not (tmp_path / "runs").exists()
