"""--compile: the same step, keys without a wrapper's name, hooks that see measured batches, one line where nothing can
compile."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import engine.compiling
from engine.compiling import CompiledStep, check_compiler
from engine.epoch import Learner
from engine.parts import Frame, build_learner
from models.yolo import DetectionModel
from utils.config import Hyp, TrainConfig
from utils.dist import World
from utils.ema import unwrap
from utils.errors import ConfigError, ResourceError
from utils.loss import LossParts

CPU = torch.device("cpu")
TINY = {
    "nc": 2,
    "depth_multiple": 1.0,
    "width_multiple": 0.125,
    "anchors": [[10, 13, 30, 30]],
    "backbone": [[-1, 1, "Conv", [64, 6, 4, 2]], [-1, 1, "Conv", [64, 3, 2]], [-1, 1, "Conv", [64, 3, 2]]],
    "head": [[[2], 1, "Detect", ["nc", "anchors"]]],
}

TINY_DCN = {
    **TINY,
    "width_multiple": 1.0,
    "backbone": [[-1, 1, "Conv", [32, 6, 2, 2]], [-1, 1, "DCN", [96, 3, 2]], [-1, 1, "DCN", [128, 3, 2]]],
}
"""Compiled in a fraction of yolov5n-dcn's time; its layers are wide enough for all kernels."""


def learner(compiled: bool) -> Learner:
    torch.manual_seed(0)
    model = DetectionModel(TINY, nc=2)
    cfg = TrainConfig(cfg="tiny", batch_size=4, imgsz=64, compile=compiled)
    made = build_learner(model, cfg, Hyp(), Frame(64, 32, 4, 4), 10, CPU, World())
    made.model.train()
    return made


def batch(count: int, seed: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    targets = torch.rand(9, 6, generator=random) * 0.4 + 0.3
    targets[:, 0], targets[:, 1] = torch.arange(9) % count, torch.arange(9) % 2
    return torch.randint(256, (count, 3, 64, 64), generator=random, dtype=torch.uint8), targets


@pytest.mark.slow
def test_compiled_steps_are_the_same_steps(caplog: pytest.LogCaptureFixture) -> None:
    """The compiler itself: first batch, another, a smaller one, one that hooks look at, each with a step."""
    plain, compiled = learner(False), learner(True)
    keys = list(plain.model.state_dict())
    assert list(unwrap(compiled.model).state_dict()) == keys == list(compiled.ema.model.state_dict())
    seen: list[int] = []
    unwrap(compiled.model).model[0].register_forward_hook(lambda *_: seen.append(1))
    with caplog.at_level("INFO"):
        for number, (count, usual) in enumerate([(4, False), (4, False), (3, False), (4, True)]):
            seen.clear()
            expected = plain.backward(*batch(count, number)).items
            torch.testing.assert_close(compiled.backward(*batch(count, number), usual).items, expected)
            plain.step(), compiled.step()
            assert seen or not usual
    for one, other in ((plain.model, compiled.model), (plain.ema.model, compiled.ema.model)):
        for key, value in one.state_dict().items():
            torch.testing.assert_close(unwrap(other).state_dict()[key], value, rtol=1e-3, atol=1e-5)
    assert sum("compiling took" in record.message for record in caplog.records) == 1


class Doubles(nn.Module):
    def forward(self, images: Tensor) -> list[Tensor]:
        return [images * 2]


def test_one_shape_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []

    def stand_in(function, **options):
        def compiled(*args):
            calls.append(tuple((args[1] if len(args) > 1 else args[0]).shape))
            return function(*args)

        return compiled

    monkeypatch.setattr(torch, "compile", stand_in)
    step = CompiledStep(Doubles(), lambda raw, targets: LossParts(raw[0].sum(), *[raw[0].sum()] * 3))
    for count in (4, 4, 3):
        images = torch.ones(count, 3, 2, 2)
        parts = step.loss(step.model(images), torch.zeros(5, 6))
        assert parts.total == 2 * images.numel()
    assert calls == [(4, 3, 2, 2), (128, 6)] * 2


def test_what_torch_cannot_compile_is_one_line() -> None:
    step = CompiledStep(Doubles(), lambda raw, targets: None)
    with pytest.raises(ResourceError, match=r"cannot compile this model \(no such operation\); leave --compile out"):
        with step.step():
            raise torch._dynamo.exc.Unsupported("no such operation")


def test_a_compiler_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/bin/false")
    with pytest.raises(ResourceError, match=r"finds no /bin/false that answers \(CXX\)"):
        check_compiler(CPU)


def test_a_machine_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(ResourceError, match=r"finds no g\+\+: install it, or leave --compile out"):
        check_compiler(CPU)
    monkeypatch.setattr(engine.compiling, "is_installed", lambda name: True)
    with pytest.raises(ResourceError, match="finds no gcc or clang or cc"):
        check_compiler(torch.device("cuda", 0))
    monkeypatch.setattr(engine.compiling, "is_installed", lambda name: False)
    with pytest.raises(ResourceError, match="needs Triton"):
        check_compiler(torch.device("cuda", 0))


@pytest.mark.parametrize("other", ["rect", "multi_scale"])
def test_batches_of_many_shapes_are_refused(other: str) -> None:
    with pytest.raises(ConfigError, match=f"--compile is for .* leave it out, or --{other.replace('_', '-')}"):
        TrainConfig(compile=True, **{other: True})


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_compiled_steps_are_recorded_as_graphs(amp: str) -> None:
    device, losses = torch.device("cuda", 0), []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = DetectionModel(TINY_DCN, nc=2).to(device, memory_format=torch.channels_last)
        cfg = TrainConfig(cfg="tiny", batch_size=4, imgsz=64, compile=compiled, amp=amp)
        made = build_learner(model, cfg, Hyp(), Frame(64, 32, 4, 4), 10, device, World())
        made.model.train()
        losses.append([])
        for number in range(5):
            images, targets = batch(4, number)
            losses[-1] += made.backward(images.to(device), targets.to(device), number == 3).items.tolist()
        assert len(made.graphs._recorded) == 1
    assert losses[1] == pytest.approx(losses[0], rel=1e-3 if amp == "off" else 3e-2)
