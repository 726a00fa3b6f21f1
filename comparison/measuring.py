"""From finished trainings to the result: every best.pt on every split, its cost, the verdicts, and the three files."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import torch
from torch import nn

from comparison.checks import Checked
from comparison.costs import Cost, peak_memory_gb, time_inference
from comparison.examples import examples
from comparison.findings import POINTS, SplitFindings, analyse
from comparison.matching import Predictions
from comparison.offset_examples import offset_examples
from comparison.plan import Folder, Plan, Run
from comparison.predictions import predictions_of
from comparison.report import Comparison
from comparison.report_html import page
from comparison.report_text import markdown, table_csv
from comparison.trainings import check_finished, read_seconds
from comparison.verdict import Verdict, judge
from models.loading import load_model
from models.surgery import set_dcn_backend
from utils.console import LOGGER, plural
from utils.device import describe_device
from utils.errors import ConfigError
from utils.files import atomic_write
from utils.loggers import read_results

LEAST_LEARNT = 1.0
"""Points of mAP50-95 below which models are not compared: chance finds as much."""


def finished_runs(plan: Plan, folder: Folder) -> dict[str, list[Run]]:
    """Of each model its finished trainings, in the order of seeds; models without any are left out. Raises ConfigError
    when the first model has none, as there is nothing to compare with."""
    runs = {model: [r for r in plan.runs if r.model == model and folder.is_finished(r)] for model in plan.models}
    first = plan.models[0]
    if not runs[first]:
        raise ConfigError(f"no training of {first} finished, so there is nothing to compare with: see {folder.path}")
    runs = {model: found for model, found in runs.items() if found}
    check_finished(folder, [run for found in runs.values() for run in found])
    return runs


def measure(
    plan: Plan,
    folder: Folder,
    checked: Checked,
    device: torch.device,
    workers: int,
    *,
    command: Sequence[str],
    resamples: int,
    points_per_doubling: float,
    jobs: int,
    failed: Sequence[str],
) -> Comparison:
    """All numbers of the finished trainings. ``command``: what to repeat it by; ``failed``: lines to show."""
    runs = finished_runs(plan, folder)
    splits, found, bins_of = [], {}, None
    for split in ("val", "test") if checked.data.test else ("val",):
        found = _predictions(plan, folder, checked, runs, split, device, workers)
        LOGGER.info(f"{split}: comparing, {resamples:,} resamples of the images")
        splits.append(analyse(split, found, checked.data.names, resamples, bins_of))
        bins_of = splits[0].sizes
    models = {model: _first_model(folder, checked, own[0], device) for model, own in runs.items()}
    costs = _costs(plan, folder, checked, runs, time_inference(models, plan.imgsz, device))
    firsts = {model: own[0] for model, own in found.items()}
    return Comparison(
        plan=plan,
        splits=tuple(splits),
        costs=costs,
        verdicts=tuple(verdicts(splits[-1], costs, points_per_doubling, alike=not checked.notes)),
        curves={model: [_curve(folder.run_dir(run)) for run in own] for model, own in runs.items()},
        seeds={model: [run.seed for run in own] for model, own in runs.items()},
        setting=_setting(plan, checked, device, command),
        warnings=(*checked.notes, *failed),
        jobs=jobs,
        examples=examples(firsts, checked.data.names),
        offsets=offset_examples(models, firsts, plan.imgsz, device),
    )


def _predictions(
    plan: Plan,
    folder: Folder,
    checked: Checked,
    runs: dict[str, list[Run]],
    split: str,
    device: torch.device,
    workers: int,
) -> dict[str, list[Predictions]]:
    found: dict[str, list[Predictions]] = {}
    for model, own in runs.items():
        config = checked.configs[model]
        flags = ["--imgsz", str(plan.imgsz), "--batch-size", str(min(plan.batch_size, 32)), "--workers", str(workers)]
        flags += ["--dcn-backend", config.dcn_backend, *(["--single-cls"] if config.single_cls else [])]
        how = (checked.data, split, flags, device)
        found[model] = [predictions_of(folder.predictions(run, split), folder.best(run), *how) for run in own]
    return found


def _first_model(folder: Folder, checked: Checked, run: Run, device: torch.device) -> nn.Module:
    model = load_model(folder.best(run), device)
    set_dcn_backend(model, checked.configs[run.model].dcn_backend)
    return model


def _costs(
    plan: Plan, folder: Folder, checked: Checked, runs: dict[str, list[Run]], milliseconds: dict[str, float]
) -> dict[str, Cost]:
    return {
        model: Cost(
            params=checked.summaries[model].params,
            gflops=checked.summaries[model].gflops,
            train_seconds=tuple(read_seconds(folder.seconds(run)) for run in own),
            inference_ms=milliseconds[model],
            memory_gb=peak_memory_gb([folder.log(run) for run in own]),
        )
        for model, own in runs.items()
    }


def verdicts(
    split: SplitFindings, costs: dict[str, Cost], points_per_doubling: float, alike: bool = True
) -> list[Verdict]:
    """A sentence for every model but the first, from the deciding split. ``alike``: the models start from the same
    parts of --weights, if any; otherwise the sentence says that they do not."""
    (first, base), *others = costs.items()
    found = []
    for model, cost in others:
        gain = split.overall.scores[model].gain
        if gain is None:
            found.append(Verdict("unknown", f"{model}: the {split.split} split has no labels to compare by"))
            continue
        if max(split.overall.scores[name].map.mean for name in (model, first)) < LEAST_LEARNT:
            found.append(Verdict("unknown", f"neither {model} nor {first} has learnt anything yet: train for longer"))
            continue
        ratios = cost.train_time / base.train_time, cost.inference_ms / base.inference_ms
        verdict = judge(model, first, gain, *ratios, points_per_doubling)
        found.append(verdict if alike else replace(verdict, text=f"{verdict.text} (but they did not start alike)"))
    return found


def _curve(run_dir: Path) -> list[float]:
    """mAP50-95 in points after each epoch."""
    return [POINTS * value for value in read_results(run_dir / "results.csv").get("metrics/mAP_0.5:0.95", [])]


def _setting(plan: Plan, checked: Checked, device: torch.device, command: Sequence[str]) -> tuple[str, ...]:
    when = datetime.now().strftime("%Y-%m-%d %H:%M")
    budget = f"{plural(plan.epochs, 'epoch')}, batch {plan.batch_size}, {plan.imgsz} px, seeds 0 to {plan.seeds - 1}"
    start = f"from {plan.weights}" if plan.weights else "from scratch"
    extra = f", with {shlex.join(plan.extra)}" if plan.extra else ""
    return (
        shlex.join(["python", "compare.py", *command]),
        f"{when}, {describe_device(device)}, torch {torch.__version__}",
        f"{checked.data.source}: {budget}, {start}{extra}",
    )


def write(result: Comparison, folder: Folder) -> list[Path]:
    """The three reports. Returns their paths."""
    files = {"report.md": markdown(result), "report.html": page(result), "report.csv": table_csv(result)}
    for name, text in files.items():
        atomic_write(folder.path / name, text)
    return [folder.path / name for name in files]
