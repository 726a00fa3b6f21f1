"""What a run writes into its checkpoints, and how it takes it up again."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from engine.epoch import Learner, PartialEpoch
from utils.background import now
from utils.checkpoint import half_precision, read_checkpoint, rng_state, save_checkpoint, set_rng_state
from utils.config import Hyp, TrainConfig
from utils.early_stopping import EarlyStopping
from utils.ema import unwrap
from utils.errors import CheckpointError
from utils.optim import restore_optimizer

ROLLBACK_LR = 0.1
"""Learning rate after a rollback, as a share of that before."""
MOST_ROLLBACKS = 3


@dataclass
class Progress:
    """Where a run stands between epochs."""

    stopper: EarlyStopping
    start_epoch: int = 0
    best_fitness: float = 0.0
    class_maps: list[float] = field(default_factory=list)  # mAP per class, for --image-weights
    partial: PartialEpoch | None = None  # what a terminated run did of epoch start_epoch
    rollbacks: int = 0  # after a loss that was not finite; each made the learning rate ROLLBACK_LR times what it was


def describe_run(model, cfg: TrainConfig, hyp: Hyp) -> dict[str, Any]:
    """The checkpoint's ``meta``: all that rebuilds the model and says how it was trained, as plain data."""
    return {
        "yaml": model.yaml,
        "nc": model.nc,
        "names": dict(model.names),
        "stride": model.stride.tolist(),
        "anchors": (model.detect.anchors * model.detect.stride.view(-1, 1, 1)).flatten(1).tolist(),
        "imgsz": cfg.imgsz,
        "hyp": hyp.to_dict(),
        "opt": cfg.to_dict(),
        "versions": {
            "torch": torch.__version__,
            "torchvision": version("torchvision"),  # importing it takes as long as torch itself
            "python": platform.python_version(),
        },
    }


def _stamped(meta: dict[str, Any], epoch: int, metrics: dict[str, float]) -> dict[str, Any]:
    """``meta`` with what belongs to one checkpoint: its epoch, that epoch's metrics, and now."""
    return {**meta, "epoch": epoch, "metrics": metrics, "date": datetime.now().isoformat(timespec="seconds")}


def save_last(
    path: Path,
    learner: Learner,
    meta: dict,
    progress: Progress,
    epoch: int,
    metrics: dict[str, float],
    partial: PartialEpoch | None = None,
    later: Callable[..., None] = now,
) -> None:
    """Write everything that ``--resume`` needs to go on exactly, after ``epoch`` was completed (-1: none yet) and
    ``partial`` of the next one. ``later``: what has it written, utils.background."""
    train = {
        "model": unwrap(learner.model).state_dict(),
        "optimizer": learner.optimizer.state_dict(),
        "scaler": learner.scaler.state_dict(),
        "ema_updates": learner.ema.updates,
        "best_fitness": progress.best_fitness,
        "stopper": progress.stopper.state_dict(),
        "class_maps": list(progress.class_maps),
        "rollbacks": progress.rollbacks,
        "partial": {"batches": partial.batches, "losses": partial.losses} if partial else None,
        "rng": rng_state(),
    }
    state = learner.ema.model.state_dict()
    later(save_checkpoint, path, state, _stamped(meta, epoch, metrics), {**train, "epoch": epoch})


def save_best(
    path: Path,
    state: dict,
    meta: dict,
    epoch: int,
    metrics: dict[str, float],
    later: Callable[..., None] = now,
) -> None:
    """Write the averaged weights alone, in half precision: small, and all that val, detect and export need."""
    later(_save_half, path, state, _stamped(meta, epoch, metrics))


def _save_half(path: Path, state: dict, meta: dict) -> None:
    save_checkpoint(path, {key: half_precision(value) for key, value in state.items()}, meta)


def keep_newest(folder: Path, count: int) -> None:
    """Remove all but the ``count`` newest epochN.pt in ``folder``; 0 keeps all."""
    numbered = {int(path.stem[5:]): path for path in folder.glob("epoch*.pt") if path.stem[5:].isdigit()}
    for number in sorted(numbered)[: -count or None] if count else ():
        numbered[number].unlink(missing_ok=True)


def restore(path: str | Path, learner: Learner, progress: Progress) -> None:
    """Put a run back to where ``path`` (its last.pt) was written: weights, EMA, optimizer, scaler, RNG, counters.

    Raises CheckpointError when the file holds no training state or does not fit this model.
    """
    checkpoint = read_checkpoint(path)
    state = checkpoint.train
    if not state:
        raise CheckpointError(f"{path}: holds weights only, nothing to resume; start anew with --weights {path}")
    try:
        unwrap(learner.model).load_state_dict(state["model"])
        learner.ema.load(checkpoint.model, _count(state["ema_updates"]))
        restore_optimizer(learner.optimizer, state["optimizer"], str(path))
        if state["scaler"]:  # empty when the run so far did not scale its loss: float32, bf16
            learner.scaler.load_state_dict(state["scaler"])
        progress.start_epoch = _count(state["epoch"] + 1)
        progress.best_fitness = state["best_fitness"]
        progress.class_maps = list(state["class_maps"])
        progress.partial = PartialEpoch(**state["partial"]) if state.get("partial") else None
        set_rollbacks(learner, progress, state.get("rollbacks", 0))
        progress.stopper.load_state_dict(state["stopper"])
        set_rng_state(state["rng"])
    except (AttributeError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: its training state does not fit this model ({reason})") from error


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def roll_back(path: Path, learner: Learner, progress: Progress) -> None:
    """Back to what ``path`` holds, with the learning rate ROLLBACK_LR times that of the attempt that failed."""
    count = progress.rollbacks + 1
    restore(path, learner, progress)
    set_rollbacks(learner, progress, count)


def set_rollbacks(learner: Learner, progress: Progress, count: int) -> None:
    """Note ``count`` rollbacks and set the learning rate that follows from them."""
    progress.rollbacks = count
    learner.schedule.scale = ROLLBACK_LR**count
