"""Run by torchrun in two processes: known steps and validations, written to argv[1]; then train.py with the flags."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import train
from engine.epoch import Learner
from engine.evaluator import evaluate
from engine.parts import Frame, build_learner
from models.loading import load_model
from models.yolo import DetectionModel
from utils.config import Hyp, TrainConfig
from utils.dataloaders import create_dataloader
from utils.dataset import DetectionDataset
from utils.dist import World, init_distributed, main_first
from utils.errors import run_cli
from utils.files import ROOT
from utils.loss import DetectionLoss
from utils.shared_gradients import SharedGradients

NAMES = {0: "RBC", 1: "WBC", 2: "Platelets"}


def new_learner(world: World, shared: bool = False) -> Learner:
    """A learner for two images a rank; the weights differ from rank to rank until it is built. ``shared``: without
    DDP, as steps that are CUDA graphs are trained."""
    torch.manual_seed(world.rank)
    model = DetectionModel("yolov5n-dcn.yaml", nc=3)
    frame = Frame(imgsz=64, stride=32, batch=4, rank_batch=4 // world.size)
    learner = build_learner(model, TrainConfig(), Hyp(), frame, 10, torch.device("cpu"), world)
    if shared and world.size > 1:
        learner = replace(learner, model=model, shared=SharedGradients(model))
    learner.model.train()
    return learner


def made_up(seed: int, copies: int) -> tuple[Tensor, Tensor]:
    """Two fixed images with a box each, ``copies`` times."""
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed)).repeat(copies, 1, 1, 1)
    targets = torch.tensor([[0, 1, 0.4, 0.5, 0.3, 0.4], [1, 2, 0.6, 0.3, 0.2, 0.2]])
    return images, torch.cat([targets + torch.tensor([2.0 * i, 0, 0, 0, 0, 0]) for i in range(copies)])


def one_step(world: World, copies: int, shared: bool = False) -> dict[str, float]:
    """Loss, gradient norm and the weights after one step."""
    learner = new_learner(world, shared)
    parts = learner.backward(*made_up(1, copies))
    norm = learner.step()
    weights = sum(p.detach().double().abs().sum().item() for p in learner.model.parameters())
    return {"loss": parts.total.item() * world.size, "norm": norm.item(), "weights": weights}


def accumulated(world: World, copies: int) -> dict[str, float]:
    """Two steps of two batches each. ``messages``: how often each of the four let DDP send its first bucket."""
    learner, sent = new_learner(world), []
    if world.size > 1:

        def hook(state: None, bucket):
            sent.append(bucket.index())
            return allreduce_hook(state, bucket)

        learner.model.register_comm_hook(None, hook)
    messages, norms = [], []
    for seed in range(4):
        sent.clear()
        learner.backward(*made_up(seed, copies), last=seed % 2 == 1)
        messages.append(sent.count(0))
        if seed % 2:
            norms.append(learner.step().item())
    return {"norms": norms, "messages": messages}


def validated(world: World, images: Path, batch: int) -> list[float]:
    """What a validation of these images by the ranks of ``world`` finds; empty in all ranks but the first."""
    with main_first(world):
        dataset = DetectionDataset([images], 160, rect=True, batch_size=batch, pad=0.5, nc=3, names=NAMES, show=False)
    model = load_model(ROOT / "data" / "demo" / "yolov5n-dcn-start.pt", fuse=False)
    criterion = DetectionLoss(model.detect.anchors, model.stride, 3, Hyp().scaled(model.detect.nl, 3, 160))
    loader = create_dataloader(dataset, batch, workers=1, world=world)
    cpu = torch.device("cpu")
    metrics = evaluate(model, loader, device=cpu, names=NAMES, criterion=criterion, show_progress=False, world=world)
    if metrics is None:
        return []
    return [*metrics.row(), metrics.images, metrics.labels, *metrics.confusion.ravel(), *metrics.ap.ravel()]


def main() -> int:
    torch.set_num_threads(1)
    prefix, pictures, *flags = sys.argv[1:]
    world = init_distributed(cuda=False)
    result = {
        "step": one_step(world, copies=1),
        "shared step": one_step(world, copies=1, shared=True),
        "accumulated": accumulated(world, copies=1),
        "validated": {name: validated(world, Path(pictures) / name / "images", 2) for name in ("five", "one")},
    }
    Path(f"{prefix}{world.rank}.json").write_text(json.dumps(result))
    return run_cli(train.main, flags)


if __name__ == "__main__":
    sys.exit(main())
