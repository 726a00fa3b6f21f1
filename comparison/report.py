"""What a report says, in tables of text; report_text.py and report_html.py write them down."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from comparison.costs import Cost
from comparison.findings import Row, SplitFindings
from comparison.intervals import Difference, Interval
from comparison.plan import Plan
from comparison.verdict import Verdict


@dataclass(frozen=True)
class Example:
    """One image as several models see it: ``title`` and (caption, JPEG) of each picture, the labels first."""

    title: str
    pictures: tuple[tuple[str, bytes], ...]


@dataclass(frozen=True)
class Comparison:
    """All that a report shows. ``splits``: val, then test where the data has one; the last decides. ``seeds``: by
    model, those that finished; ``curves``: of each of them mAP50-95 in points after each epoch. ``setting``: lines on
    where and when. ``offsets``: (caption, JPEG) of where DCN layers sample."""

    plan: Plan
    splits: tuple[SplitFindings, ...]
    costs: dict[str, Cost]
    verdicts: tuple[Verdict, ...]
    curves: dict[str, list[list[float]]]
    seeds: dict[str, list[int]]
    setting: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    jobs: int = 1
    examples: tuple[Example, ...] = ()
    offsets: tuple[tuple[str, bytes], ...] = ()

    @property
    def models(self) -> list[str]:
        """Those with a finished training; the first is what the others are compared with."""
        return list(self.costs)


@dataclass(frozen=True)
class Table:
    """``rows`` of text under ``header``; ``notes`` go below."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def tables(result: Comparison) -> list[Table]:
    """Of each split the models, then their scores by class, size and shape; then costs and single trainings."""
    found = []
    for split in result.splits:
        found.append(_overall(result, split))
        for kind, title in (("class", "class"), ("size", "size of box"), ("aspect ratio", "aspect ratio of box")):
            rows = split.of_kind(kind)
            if rows:
                notes = [note for note in split.notes if note.lower().startswith(kind)]
                found.append(_by_part(result, f"{split.split}: mAP50-95 by {title}", rows, notes))
    return [*found, _costs(result), _single_runs(result)]


def _overall(result: Comparison, split: SplitFindings) -> Table:
    rows = []
    for model, score in split.overall.scores.items():
        gain = score.gain
        parts = "" if gain is None else f"{_half(gain.seeds_half)} seeds, {_half(gain.images_half)} images"
        rows.append((model, str(len(score.by_seed)), interval(score.map50), interval(score.map), signed(gain), parts))
    header = ("model", "seeds", "mAP50", "mAP50-95", f"against {result.models[0]}", "of which")
    labels = split.overall.labels
    return Table(f"{split.split}: {split.images} images, {labels:,} boxes", header, tuple(rows))


def _by_part(result: Comparison, title: str, parts: Sequence[Row], notes: Sequence[str]) -> Table:
    header, rows = ["", "boxes"], []
    for model in result.models:
        header += [model] if model == result.models[0] else [model, "difference"]
    for part in parts:
        cells = [part.name, f"{part.labels:,}"]
        for model in result.models:
            score = part.scores[model]
            cells += [interval(score.map)] if model == result.models[0] else [interval(score.map), signed(score.gain)]
        rows.append(tuple(cells))
    return Table(title, tuple(header), tuple(rows), tuple(notes))


def _costs(result: Comparison) -> Table:
    base, rows = result.costs[result.models[0]], []
    for model, cost in result.costs.items():
        rows.append(
            (
                model,
                f"{cost.params:,}",
                f"{cost.gflops:.3g}",
                f"{duration(cost.train_time)} ({cost.train_time / base.train_time:.2f}x)",
                f"{cost.inference_ms:.1f} ms ({cost.inference_ms / base.inference_ms:.2f}x)",
                "-" if cost.memory_gb is None else f"{cost.memory_gb:.2f} GB",
            )
        )
    notes = [
        "Training: wall time of train.py, start and validation after each epoch included, mean over seeds. "
        "Inference: forward pass of one image, batch 1, float32, without NMS, the shortest of many, in "
        "turns, on a CPU by one thread."
    ]
    if result.jobs > 1:
        notes.append(
            f"In the last start {result.jobs} trainings shared the machine: their times compare with each other, "
            f"not with those of a training alone."
        )
    if all(cost.memory_gb is None for cost in result.costs.values()):
        notes.append("Memory is recorded on GPUs only.")
    header = ("model", "parameters", f"GFLOPs at {result.plan.imgsz}", "training", "inference", "GPU memory")
    return Table("Cost", header, tuple(rows), tuple(notes))


def _single_runs(result: Comparison) -> Table:
    rows = []
    for model in result.models:
        for number, (seed, seconds) in enumerate(zip(result.seeds[model], result.costs[model].train_seconds)):
            scores = [split.overall.scores[model].by_seed[number] for split in result.splits]
            rows.append((model, str(seed), duration(seconds), *(f"{value:.1f}" for pair in scores for value in pair)))
    measures = [f"{split.split} {name}" for split in result.splits for name in ("mAP50", "mAP50-95")]
    return Table("Each training", ("model", "seed", "time", *measures), tuple(rows))


LEGEND = (
    "Scores are points, 100 x AP as val.py defines it; +- is a 95 % interval over seeds (Student's t). The "
    "difference's +- adds, as squares, the interval over seeds (Welch) and that over the images of the split (paired "
    "bootstrap)."
)


def interval(value: Interval) -> str:
    """``42.1 +- 0.8``; ``42.1`` for a single training, ``-`` where there are no labels."""
    if math.isnan(value.mean):
        return "-"
    return f"{value.mean:.1f}" if value.half is None else f"{value.mean:.1f} +- {value.half:.1f}"


def signed(value: Difference | None) -> str:
    """``+1.2 +- 0.5``; ``+1.2 +- ?`` where trainings are too few."""
    return "" if value is None else f"{value.mean:+.1f} +- {_half(value.half)}"


def _half(value: float | None) -> str:
    return "?" if value is None else f"{value:.1f}"


def duration(seconds: float) -> str:
    """``12.3 s``, ``4 min 05 s`` or ``3 h 20 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
