"""What came out, as tables and as the ledger: scores of the last epoch, paired with the plain model trained alike."""

from __future__ import annotations

import shlex
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path

from benchmarks.report import table
from benchmarks.variants.costs import read_rows, write_rows
from benchmarks.variants.models import PLAIN, VARIANTS
from benchmarks.variants.study import Task
from comparison.intervals import mean_interval
from comparison.trainings import budget_flags, read_seconds
from utils.loggers import read_results

LEDGER = (
    "date", "device", "study", "set", "variant", "seed", "epochs", "imgsz", "batch", "start", "mAP50", "mAP50-95",
    "test_mAP50", "test_mAP50-95", "train_s", "s_per_epoch", "step_ms", "infer1_ms", "command",
)  # fmt: skip
"""Scores are of 0..1, those of the last epoch on val; on test, which chooses nothing, those of --test."""
ON_TEST = ("test_mAP50", "test_mAP50-95")
RATES = ("step_ms", "infer1_ms", "infer16_ms")

Costs = Mapping[str, Mapping[str, float]]
Tests = Mapping[str, tuple[float, float]]
"""Of study.scores_on_test."""


def curve(task: Task, column: str = "metrics/mAP_0.5:0.95") -> list[float]:
    """A column of results.csv; without --noval a row for each epoch that was validated, with it the last one counts."""
    return read_results(task.folder.run_dir(task.run) / "results.csv").get(column, [])


def score(task: Task) -> float:
    """mAP50-95 of the last epoch, in points."""
    return 100 * curve(task)[-1]


def cost_ratios(rows: Iterable[Mapping[str, object]], imgsz: int) -> Costs:
    """Variant -> each of RATES over the plain model's, at one image size."""
    found = {str(row["variant"]): row for row in rows if int(row["imgsz"]) == imgsz}
    if PLAIN not in found:
        return {}
    return {name: {k: float(row[k]) / float(found[PLAIN][k]) for k in RATES} for name, row in found.items()}


def tuned_table(tasks: Sequence[Task], kind: str, costs: Costs) -> str:
    """A row for each variant: mAP50-95 by set, mean over the finished seeds; the difference to the plain model, paired
    by set and seed, sets weighing alike; and what it costs."""
    done = {(t.run.model, t.set, t.run.seed): score(t) for t in tasks if t.kind == kind and t.finished and curve(t)}
    sets = list(dict.fromkeys(t.set for t in tasks if t.kind == kind))
    rows = []
    for name in dict.fromkeys(t.run.model for t in tasks if t.kind == kind):
        rows.append([name, VARIANTS[name].note, *_scores(name, sets, done), *_ratios(costs.get(name))])
    header = [
        "variant",
        "what",
        *sets,
        "pairs",
        "difference",
        "+-",
        "pairs ahead",
        *(f"{rate} ratio" for rate in RATES),
    ]
    return table(header, rows)


def _scores(name: str, sets: Sequence[str], done: Mapping[tuple[str, str, int], float]) -> list[object]:
    mine: dict[str, list[float]] = defaultdict(list)
    pairs: dict[str, list[float]] = defaultdict(list)
    for (model, where, seed), value in done.items():
        if model == name:
            mine[where].append(value)
            if (PLAIN, where, seed) in done:
                pairs[where].append(value - done[PLAIN, where, seed])
    cells: list[object] = [f"{statistics.fmean(mine[where]):.1f}" if mine[where] else "-" for where in sets]
    every = [value for values in pairs.values() for value in values]
    if name == PLAIN or not every:
        return [*cells, len(every), "-", "-", "-"]
    half = mean_interval(every).half
    mean = statistics.fmean(statistics.fmean(values) for values in pairs.values())
    ahead = f"{sum(value > 0 for value in every)}/{len(every)}"
    return [*cells, len(every), f"{mean:+.2f}", "-" if half is None else f"{half:.2f}", ahead]


def _ratios(costs: Mapping[str, float] | None) -> list[str]:
    return [f"{costs[rate]:.2f}" if costs else "-" for rate in RATES]


def recipe_table(tasks: Sequence[Task], every: int = 5) -> str:
    """mAP50-95 in points along the epochs, for each recipe; ``mean``: over all epochs, what learning sooner raises;
    ``drops``: how far it fell from one epoch to the next, summed: how erratic it is. Below, epoch by epoch."""
    rows, curves = [], []
    for task in tasks:
        points = [100 * value for value in curve(task)] if task.kind == "recipe" else []
        if points:
            shown = [f"{value:.1f}" for value in points[every - 1 :: every]]
            drops = sum(max(a - b, 0) for a, b in zip(points, points[1:]))
            rows.append([task.folder.path.name, task.run.name, *shown, statistics.fmean(points), drops])
            curves.append(f"{task.folder.path.name} {task.run}: {' '.join(f'{value:.1f}' for value in points)}")
    longest = max((len(row) for row in rows), default=4) - 4
    rows = [[*row[:-2], *["-"] * (longest + 4 - len(row)), *row[-2:]] for row in rows]
    text = table(["recipe", "run", *(f"epoch {every * (i + 1)}" for i in range(longest)), "mean", "drops"], rows)
    return "\n\n".join([text, *curves])


def write_ledger(
    path: Path, tasks: Sequence[Task], device: str, costs: Sequence[Mapping[str, object]], tests: Tests
) -> int:
    """Add a row for each finished training to the CSV at ``path``; one of the same study, command, date and device is
    replaced. Returns how many there are."""
    by_variant = {str(row["variant"]): dict(row) for row in costs}
    rows = {_key(row): row for row in read_rows(path)}
    for task in tasks:
        if task.finished and curve(task):
            row = ledger_row(task, device, by_variant.get(task.run.model, {}), tests.get(str(task)))
            before = rows.get(_key(row), {})
            rows[_key(row)] = row | {name: before.get(name, "") for name in ON_TEST if row[name] == ""}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(path, LEDGER, list(rows.values()))
    return len(rows)


def _key(row: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in ("date", "device", "study", "command"))


def ledger_row(
    task: Task, device: str, cost: Mapping[str, object], test: tuple[float, float] | None
) -> dict[str, object]:
    """The training in LEDGER's columns."""
    plan, run = task.plan, task.run
    seconds = read_seconds(task.folder.seconds(run))
    flags = [*budget_flags(run, plan), *plan.extra]
    values = {
        "date": date.today().isoformat(), "device": device, "study": task.folder.path.name, "set": task.set,
        "variant": run.model, "seed": run.seed, "epochs": plan.epochs, "imgsz": plan.imgsz, "batch": plan.batch_size,
        "start": Path(plan.weights).parents[2].name if plan.weights else "scratch",
        "mAP50": curve(task, "metrics/mAP_0.5")[-1], "mAP50-95": curve(task)[-1],
        "train_s": seconds, "s_per_epoch": seconds / plan.epochs, "command": shlex.join(["train.py", *flags]),
    }  # fmt: skip
    values |= {name: cost[name] for name in ("step_ms", "infer1_ms") if name in cost}
    if test:
        values |= dict(zip(ON_TEST, test))
    return {name: values.get(name, "") for name in LEDGER}
