"""Steps as CUDA graphs: the padding of targets changes no loss; on a GPU replayed steps equal launched ones."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.graphs import pad_targets
from engine.parts import Frame, build_learner, uses_graphs
from models.common import DCN
from models.yolo import DetectionModel
from tests.learning.test_compiling import TINY_DCN
from utils.config import Hyp, TrainConfig
from utils.dcn_watch import DcnWatch
from utils.dist import World
from utils.errors import ConfigError
from utils.loss import DetectionLoss


def made_up_targets(count: int, images: int, seed: int = 0) -> Tensor:
    """(count, 6): image, class, cx, cy, w, h."""
    random = torch.Generator().manual_seed(seed)
    targets = torch.rand(count, 6, generator=random) * 0.4 + 0.3
    targets[:, 0] = torch.randint(0, images, (count,), generator=random)
    targets[:, 1] = torch.randint(0, 2, (count,), generator=random)
    return targets


@pytest.mark.parametrize(
    ("count", "rows"), [(0, 128), (1, 128), (128, 128), (129, 256), (256, 256), (257, 512), (5000, 8192)]
)
def test_targets_are_filled_up(count: int, rows: int) -> None:
    targets = made_up_targets(count, 2)
    padded = pad_targets(targets)
    assert padded.shape == (rows, 6)
    assert torch.equal(padded[:count], targets) and not padded[count:].any()


@pytest.mark.parametrize("count", [0, 1, 40])
@pytest.mark.parametrize("sort_obj_iou", [False, True])
def test_padding_changes_no_loss(count: int, sort_obj_iou: bool) -> None:
    """Also where padding meets a target in cell 0 of image 0, which is where rows of zeros lie."""
    anchors = torch.tensor([[[1.0, 1.5], [2.0, 1.0]], [[1.5, 1.5], [3.0, 2.0]]])
    loss = DetectionLoss(anchors, [8, 16], 2, Hyp(), sort_obj_iou=sort_obj_iou)
    targets = made_up_targets(count, 2)
    if count:
        targets[0] = torch.tensor([0, 0, 0.01, 0.01, 0.1, 0.15])
    results = []
    for rows in (targets, pad_targets(targets)):
        torch.manual_seed(1)
        raw = [torch.randn(2, 2, side, side, 7, requires_grad=True) for side in (16, 8)]
        parts = loss(raw, rows)
        parts.total.backward()
        results.append((parts.total.detach(), parts.items, *(level.grad for level in raw)))
    for plain, padded in zip(*results):
        torch.testing.assert_close(padded, plain, rtol=1e-5, atol=1e-7)


def test_where_graphs_are_used() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    cfg = {choice: TrainConfig(cuda_graphs=choice) for choice in ("auto", "on", "off")}
    assert uses_graphs(cfg["auto"], cuda, World()) and uses_graphs(cfg["on"], cuda, World())
    assert not uses_graphs(cfg["off"], cuda, World())
    assert not uses_graphs(cfg["auto"], cpu, World())
    assert uses_graphs(cfg["auto"], cuda, World(size=2))
    assert not uses_graphs(replace(cfg["auto"], sync_bn=True), cuda, World(size=2))
    with pytest.raises(ConfigError, match="--cuda-graphs on: they need a CUDA device, not cpu"):
        uses_graphs(cfg["on"], cpu, World())
    assert uses_graphs(cfg["on"], cuda, World(size=2))
    with pytest.raises(ConfigError, match="--cuda-graphs on: --sync-bn sends messages in the middle of a step"):
        uses_graphs(replace(cfg["on"], sync_bn=True), cuda, World(size=2))
    with pytest.raises(ConfigError, match="--cuda-graphs maybe: choose auto, on or off"):
        TrainConfig(cuda_graphs="maybe")


def train_a_little(
    name: str, graphs: str, steps: int = 18, amp: str = "off", side: int = 128, most: int = 4
) -> tuple[list[float], dict[str, Tensor], int]:
    """(losses, weights and statistics afterwards, graphs recorded) of ``steps`` batches of two shapes, the last of
    every three half of ``most`` images; a gradient norm in between."""
    device = torch.device("cuda", 0)
    torch.manual_seed(0)
    model = DetectionModel(name, nc=2).to(device, memory_format=torch.channels_last)
    cfg = TrainConfig(cfg=name, batch_size=32, imgsz=side, cuda_graphs=graphs, amp=amp)
    learner = build_learner(model, cfg, Hyp(), Frame(side, 32, 32, 32), 100, device, World())
    model.train()
    losses = []
    for step in range(steps):
        learner.schedule.apply(learner.optimizer, learner.schedule.at(0, 2 * step + 60))
        random = torch.Generator(device).manual_seed(step)
        batch = most // 2 if step % 3 == 2 else most
        images = torch.randint(256, (batch, 3, side, side), device=device, generator=random, dtype=torch.uint8)
        parts = learner.backward(images, made_up_targets(20 + 40 * (step % 4), batch, step).to(device), step == 7)
        losses += parts.items.tolist()
        if step in (5, 17):  # seldom: DCN's atomics differ in the last bits, and every step of training amplifies that
            learner.step()
    state = {key: value.float().cpu() for key, value in model.state_dict().items()}
    return losses, state, len(learner.graphs._recorded) if learner.graphs else 0


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["off", "fp16"])
@pytest.mark.parametrize("name", ["yolov5n.yaml", "yolov5n-dcn.yaml"])
def test_replayed_steps_equal_launched_ones(name: str, amp: str) -> None:
    """Losses, weights, BN statistics and the number of batches seen: nothing is run for a recording alone."""
    losses, state, none = train_a_little(name, "off", amp=amp)
    again, replayed, graphs = train_a_little(name, "on", amp=amp)
    assert none == 0 and graphs >= 3  # 4 and 2 images; up to 128 and up to 256 targets
    assert again == pytest.approx(losses, rel=1e-3 if amp == "off" else 2e-2)
    for key, value in state.items():
        torch.testing.assert_close(
            replayed[key], value, rtol=1e-2, atol=1e-3, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.gpu
def test_a_model_that_cannot_be_recorded_goes_on(caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    """A layer that waits for the device: one warning, and steps as before."""
    monkeypatch.setattr(DCN, "forward", lambda self, x, forward=DCN.forward: forward(self, x * float(x.mean() < 9)))
    with caplog.at_level("WARNING"):
        losses, _, graphs = train_a_little("yolov5n-dcn.yaml", "on", steps=5)
    assert graphs == 0 and len(losses) == 15
    assert sum("cannot be recorded" in record.message for record in caplog.records) == 1
    assert torch.rand(8, device="cuda").unique().numel() > 1
    gc.collect()  # the learner and its pool


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_replays_leave_alone_what_hooks_keep(compiled: bool) -> None:
    """The watch's sums of a launched step, read after replays; an earlier learner goes in the middle of it."""
    device, summaries = torch.device("cuda", 0), []
    for graphs in ("off", "on", "on"):
        torch.manual_seed(0)
        model = DetectionModel(TINY_DCN, nc=2).to(device, memory_format=torch.channels_last)
        cfg = TrainConfig(cfg="n", batch_size=4, imgsz=128, cuda_graphs=graphs, compile=compiled and graphs == "on")
        learner = build_learner(model, cfg, Hyp(), Frame(128, 32, 4, 4), 100, device, World())
        model.train()
        for layer in model.modules():
            if isinstance(layer, DCN):
                torch.nn.init.normal_(layer.conv_offset_mask.bias, std=2)
        watch = DcnWatch(model, every=4)
        for step in range(14):
            random = torch.Generator(device).manual_seed(step)
            images = torch.randint(256, (4, 3, 128, 128), device=device, generator=random, dtype=torch.uint8)
            with watch.step() as measured:
                learner.backward(images, made_up_targets(20, 4, step).to(device), measured)
        lengths = {name: values.sum().item() for name, values in watch.lengths().items()}
        summaries.append(
            [*lengths.values(), *(number for layer in watch.summary().values() for number in layer.values())]
        )
    assert len(summaries[0]) == 2 * 8
    for other in summaries[1:]:
        assert other == pytest.approx(summaries[0], rel=1e-4)


@pytest.mark.gpu
def test_graphs_share_their_memory_with_launched_steps() -> None:
    """Three graphs and the launched steps around them take little more than launched steps alone; of a size beside
    which what a library takes for each stream does not count."""
    peaks = []
    for graphs in ("off", "on"):
        gc.collect()  # models of other tests, whose memory would be used again
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        train_a_little("yolov5s.yaml", graphs, side=384, most=16)
        peaks.append(torch.cuda.max_memory_reserved() - before)
    assert peaks[1] < 1.25 * peaks[0]
