"""--dcn-backend of train.py, val.py and detect.py: what is printed, what is refused, and where the choice arrives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import detect
import train
import val
from models.common import DCN
from models.ops.deform_conv import BACKENDS
from models.yolo import DetectionModel
from tests.inference.conftest import write_png
from utils.checkpoint import read_checkpoint, save_checkpoint
from utils.config import DCN_BACKENDS, TrainConfig
from utils.errors import ConfigError, run_cli
from utils.files import load_yaml

WITH_DCN = ["--cfg", "yolov5n-dcn.yaml"]
TINY_NAMES = ["nine", "ten", "jack", "queen", "king", "ace"]


def weights(path: Path, cfg: str) -> str:
    """A checkpoint of this model with the tiny set's classes and random weights."""
    model = DetectionModel(cfg, nc=len(TINY_NAMES))
    save_checkpoint(
        path, model.state_dict(), {"yaml": model.yaml, "nc": model.nc, "names": dict(enumerate(TINY_NAMES))}
    )
    return str(path)


@pytest.fixture(autouse=True)
def kernels_are_not_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under TRITON_INTERPRET=1 the kernels run on the CPU, for their own tests."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The backends of the DCN layers of each model that the trainer evaluates."""
    import engine.trainer

    seen: list[set[str]] = []
    real = engine.trainer.evaluate

    def evaluate(model: nn.Module, *args, **options):
        seen.append({module.backend for module in model.modules() if isinstance(module, DCN)})
        return real(model, *args, **options)

    monkeypatch.setattr(engine.trainer, "evaluate", evaluate)
    return seen


def test_the_flag_offers_what_the_op_has() -> None:
    assert DCN_BACKENDS == BACKENDS
    for script in (train, val, detect):
        assert script.build_parser().parse_args([]).dcn_backend == "auto"
        with pytest.raises(ConfigError, match="--dcn-backend.*mmcv.*triton"):
            script.build_parser().parse_args(["--dcn-backend", "mmcv"])
    with pytest.raises(ConfigError, match="--dcn-backend mmcv: choose one of auto, cuda, triton, torchvision"):
        TrainConfig(dcn_backend="mmcv")


def test_training_says_which_and_validates_with_it(tmp_path: Path, train_cli, evaluated: list[set[str]]) -> None:
    status, out, err = train_cli(*WITH_DCN)
    assert status == 0, err
    assert out.count("DCN: 3 layers, backend torchvision (no CUDA device)\n") == 1
    assert evaluated == [{"auto"}, {"auto"}]
    run = tmp_path / "runs" / "exp"
    assert load_yaml(run / "opt.yaml")["dcn_backend"] == "auto"
    assert read_checkpoint(run / "weights" / "best.pt").meta["opt"]["dcn_backend"] == "auto"


def test_a_resumed_run_keeps_the_choice_unless_told(tmp_path: Path, train_cli, evaluated: list[set[str]]) -> None:
    status, out, err = train_cli(*WITH_DCN, "--dcn-backend", "torchvision")
    assert status == 0, err
    assert "DCN: 3 layers, backend torchvision\n" in out
    run = tmp_path / "runs" / "exp"
    assert train_cli(base=["--resume", str(run), "--epochs", "2"], data="")[0] == 0
    assert evaluated == [{"torchvision"}] * 4
    assert train_cli(base=["--resume", str(run), "--epochs", "3", "--dcn-backend", "auto"], data="")[0] == 0
    assert evaluated[4:] == [{"auto"}] * 2 and load_yaml(run / "opt.yaml")["dcn_backend"] == "auto"


def test_plain_models_say_nothing_and_refuse_nothing(train_cli) -> None:
    status, out, err = train_cli("--dcn-backend", "triton")
    assert status == 0, err
    assert "DCN:" not in out


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_no_cuda_device_is_one_line_before_any_folder(backend: str, tmp_path: Path, tiny: Path, train_cli) -> None:
    status, _, err = train_cli(*WITH_DCN, "--dcn-backend", backend)
    assert refused(status, err, backend) and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("script", [val, detect])
def test_val_and_detect(script, tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture) -> None:
    common = ["--img", "64", "--device", "cpu", "--project", str(tmp_path / "runs")]
    if script is val:
        common += ["--data", str(tiny), "--workers", "0", "--noplots"]
    else:
        common += ["--source", str(write_png(tmp_path / "a.png")), "--nosave", "--save-txt"]
    plain, dcn = weights(tmp_path / "plain.pt", "yolov5n.yaml"), weights(tmp_path / "dcn.pt", "yolov5n-dcn.yaml")

    status = run_cli(script.main, [*common, "--weights", dcn, "--dcn-backend", "triton"])
    assert refused(status, capsys.readouterr().err) and not (tmp_path / "runs").exists()
    assert run_cli(script.main, [*common, "--weights", plain, "--dcn-backend", "triton"]) == 0
    assert "DCN:" not in capsys.readouterr().out
    assert run_cli(script.main, [*common, "--weights", dcn]) == 0
    assert "DCN: 3 layers, backend torchvision (no CUDA device)\n" in capsys.readouterr().out
    assert run_cli(script.main, [*common, "--weights", dcn, plain, "--dcn-backend", "torchvision"]) == 0
    assert "DCN: 3 layers, backend torchvision\n" in capsys.readouterr().out


def refused(status: int, err: str, backend: str = "triton") -> bool:
    return status == 2 and err.startswith(f"error: --dcn-backend {backend}: ") and err.count("\n") == 1


def test_the_averaged_copy_has_the_choice() -> None:
    from engine.parts import Frame, build_learner
    from models.surgery import set_dcn_backend
    from utils.config import Hyp
    from utils.dist import World

    model = DetectionModel("yolov5n-dcn.yaml", nc=2)
    set_dcn_backend(model, "torchvision")
    frame = Frame(imgsz=64, stride=32, batch=4, rank_batch=4)
    learner = build_learner(model, TrainConfig(), Hyp(), frame, 3, torch.device("cpu"), World())
    assert {m.backend for m in learner.ema.model.modules() if isinstance(m, DCN)} == {"torchvision"}
