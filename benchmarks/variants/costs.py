"""What a variant costs beside the plain model: a training step and a forward pass, alone on the device."""

from __future__ import annotations

import csv
import gc
import io
import time
from collections.abc import Sequence
from itertools import repeat
from pathlib import Path

import torch

from benchmarks.forward import forward_ms
from benchmarks.made_up import made_up_training
from benchmarks.train_throughput import rate
from benchmarks.variants.models import PLAIN, write_cfgs
from models.surgery import fuse
from utils.config import TrainConfig
from utils.console import LOGGER
from utils.files import atomic_write

COLUMNS = ("variant", "imgsz", "params", "step_ms", "infer1_ms", "infer16_ms")


def measure_costs(
    base: str,
    names: Sequence[str],
    data: str,
    sizes: Sequence[int],
    batch: int,
    device: torch.device,
    project: Path,
    until: float,
) -> list[dict[str, float | str]]:
    """A row for each variant and image size; written to PROJECT/costs.csv too. A step is bf16 with CUDA graphs on a
    GPU, as train.py does it; a forward pass is float16 there, norms folded, replayed. The plain model is measured first
    and once more at the end ("plain again"), which tells what the device's mood is worth. After ``until``
    (time.monotonic()) no further variant is begun."""
    cfgs = write_cfgs(base, project / "cfg", [PLAIN, *names])
    rows = []
    for imgsz in sizes:
        for name in (*dict.fromkeys([PLAIN, *names]), "plain again"):
            if time.monotonic() > until and not name.startswith(PLAIN):
                continue
            cfg = cfgs[PLAIN if name == "plain again" else name]
            rows.append({"variant": name, "imgsz": imgsz, **_costs(cfg, data, imgsz, batch, device)})
            LOGGER.info(" ".join(f"{key}={_short(value)}" for key, value in rows[-1].items()))
            write_rows(project / "costs.csv", COLUMNS, rows)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return rows


def _costs(cfg: str, data: str, imgsz: int, batch: int, device: torch.device) -> dict[str, float]:
    cuda = device.type == "cuda"
    settings = TrainConfig(cfg=cfg, data=data, batch_size=batch, imgsz=imgsz, workers=0)
    learner, made_up = made_up_training(settings, device)
    speed = rate(learner, repeat(made_up, 60 if cuda else 3), warmup=20 if cuda else 1)
    plain = fuse(learner.ema.model.eval())
    plain = plain.half() if cuda else plain
    one, many = (forward_ms(plain, count, made_up.images.shape[2:], device) for count in (1, 16))
    params = sum(p.numel() for p in plain.parameters())
    return {"params": params, "step_ms": batch / speed * 1e3, "infer1_ms": one, "infer16_ms": many}


def write_rows(path: Path, columns: Sequence[str], rows: Sequence[dict]) -> None:
    """A CSV, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _short(value) for key, value in row.items()} for row in rows)
    atomic_write(path, text.getvalue())


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _short(value: object) -> object:
    return f"{value:.5g}" if isinstance(value, float) else value
