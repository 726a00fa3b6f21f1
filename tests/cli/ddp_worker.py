"""Run by torchrun in two processes: one known step, written to argv[1]; then train.py with the other flags."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import train
from engine.parts import Frame, build_learner
from models.yolo import DetectionModel
from utils.config import Hyp, TrainConfig
from utils.dist import World, init_distributed
from utils.errors import run_cli


def one_step(world: World, copies: int) -> dict[str, float]:
    """Loss and gradient norm of one step on two fixed images, ``copies`` times each, in this process."""
    torch.manual_seed(0)
    model = DetectionModel("yolov5n-dcn.yaml", nc=3)
    rng = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, 64, 64, generator=rng).repeat(copies, 1, 1, 1)
    targets = torch.tensor([[0, 1, 0.4, 0.5, 0.3, 0.4], [1, 2, 0.6, 0.3, 0.2, 0.2]])
    targets = torch.cat([targets + torch.tensor([2.0 * i, 0, 0, 0, 0, 0]) for i in range(copies)])
    frame = Frame(imgsz=64, stride=32, batch=4, rank_batch=4 // world.size)
    learner = build_learner(model, TrainConfig(), Hyp(), frame, 10, torch.device("cpu"), world)
    learner.model.train()
    parts = learner.backward(images, targets)
    norm = learner.step()
    weights = sum(p.detach().double().abs().sum().item() for p in model.parameters())
    return {"loss": parts.total.item() * world.size, "norm": norm.item(), "weights": weights}


def main() -> int:
    torch.set_num_threads(1)
    world = init_distributed(cuda=False)
    result = one_step(world, copies=1)
    Path(f"{sys.argv[1]}{world.rank}.json").write_text(json.dumps(result))
    return run_cli(train.main, sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
