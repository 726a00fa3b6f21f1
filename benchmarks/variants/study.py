"""What is trained, in which order, and the training itself: several train.py side by side until the time is up.

PROJECT/cfg/VARIANT.yaml
PROJECT/scratch-SET/       from scratch; its plain model is what the others start from
PROJECT/tuned-SET/         the variants with that model's weights, and the plain model trained on like them
PROJECT/tuned-SET-FLAGS/   those that need flags of their own
PROJECT/recipe-NAME/       from scratch with other hyper-parameters, validated after each epoch

Each is a folder as compare.py leaves it (comparison/plan.py).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from types import SimpleNamespace

from benchmarks.seeds import scores
from benchmarks.variants.models import PLAIN, VARIANTS, write_cfgs
from comparison.plan import Folder, Plan, Run, begin
from comparison.trainings import POLL, Job, Settings, end_all, ended, start
from utils.config import DataConfig
from utils.console import LOGGER

SHARED = ("--cache", "ram", "--patience", "0", "--noautoanchor")
"""Anchors stay the YAML's: those that AutoAnchor finds differ from seed to seed, and from those of the start."""
ONCE = ("--noval",)  # the last epoch decides: the largest of many validations is biased, and they take time
LEAST_SHARE = 0.7
"""Of the median training's time: with less left, none is begun any more."""


@dataclass(frozen=True)
class Study:
    """``sets``: name -> dataset YAML. ``scratch``: variants that are trained from scratch as well. ``recipes``: name ->
    hyper-parameter file, tried on ``recipe_data`` with ``recipe_variants``."""

    base: str
    project: Path
    sets: dict[str, str]
    variants: tuple[str, ...]
    seeds: int
    scratch_epochs: int
    tuned_epochs: int
    imgsz: int
    batch: int
    scratch: tuple[str, ...] = ()
    recipes: tuple[tuple[str, str], ...] = ()
    recipe_data: str = ""
    recipe_variants: tuple[str, ...] = (PLAIN,)
    recipe_epochs: int = 30
    recipe_seeds: int = 1


@dataclass(frozen=True)
class Task:
    """One training. ``after``: the folder and run whose best.pt it starts from."""

    kind: str
    set: str
    folder: Folder
    plan: Plan
    run: Run
    workers: int = 1
    after: tuple[Folder, Run] | None = None

    @property
    def finished(self) -> bool:
        return self.folder.is_finished(self.run)

    @property
    def ready(self) -> bool:
        return self.after is None or self.after[0].is_finished(self.after[1])

    def __str__(self) -> str:
        return f"{self.folder.path.name} {self.run}"


def tasks_of(study: Study, workers: int) -> list[Task]:
    """Everything, most urgent first: what others start from, recipes, then seed by seed, variant by variant, set by
    set, so that an early end leaves whole comparisons."""
    names = dict.fromkeys((PLAIN, *study.variants, *study.scratch, *study.recipe_variants))
    cfgs = write_cfgs(study.base, study.project / "cfg", tuple(names))
    starts, rest = [], []
    for name, data in study.sets.items():
        scratch = list(_scratch(study, name, data, cfgs, workers))
        starts.append(scratch[0])
        rest += [*scratch[1:], *_tuned(study, name, data, cfgs, scratch[0])]
    order = {name: number for number, name in enumerate(study.variants)}
    rest.sort(key=lambda task: (task.run.seed, task.kind != "tuned", order.get(task.run.model, 0)))
    return [*starts, *_recipes(study, cfgs), *rest]


def _plan(study: Study, data: str, cfg: Sequence[str], seeds: int, epochs: int, weights: str, extra: Sequence[str]):
    source = str(DataConfig.load(data).source.resolve())
    return Plan(source, tuple(cfg), seeds, epochs, study.batch, study.imgsz, weights, (*SHARED, *extra))


def _scratch(study: Study, name: str, data: str, cfgs: dict[str, str], workers: int) -> Iterator[Task]:
    models = dict.fromkeys((PLAIN, *study.scratch))
    plan = _plan(study, data, [cfgs[model] for model in models], 1, study.scratch_epochs, "", ONCE)
    folder = Folder(study.project / f"scratch-{name}")
    for run in plan.runs:
        yield Task("scratch", name, folder, plan, run, workers if run.model == PLAIN else 1)


def _tuned(study: Study, name: str, data: str, cfgs: dict[str, str], first: Task) -> Iterator[Task]:
    weights = str(first.folder.best(first.run))
    by_flags = sorted(study.variants, key=lambda variant: VARIANTS[variant].flags)
    for flags, variants in groupby(by_flags, key=lambda variant: VARIANTS[variant].flags):
        group = set(variants)
        paths = [cfgs[variant] for variant in study.variants if variant in group]
        plan = _plan(study, data, paths, study.seeds, study.tuned_epochs, weights, (*ONCE, *flags))
        suffix = "".join(f"-{flag.lstrip('-')}" for flag in flags)
        folder = Folder(study.project / f"tuned-{name}{suffix}")
        for run in plan.runs:
            yield Task("tuned", name, folder, plan, run, after=(first.folder, first.run))


def _recipes(study: Study, cfgs: dict[str, str]) -> Iterator[Task]:
    for recipe, hyp in study.recipes:
        paths = [cfgs[variant] for variant in study.recipe_variants]
        plan = _plan(study, study.recipe_data, paths, study.recipe_seeds, study.recipe_epochs, "", ("--hyp", hyp))
        folder = Folder(study.project / f"recipe-{recipe}")
        for run in plan.runs:
            yield Task("recipe", study.recipe_data, folder, plan, run, workers=2)


def scores_on_test(tasks: Sequence[Task], jobs: int, device: str) -> dict[str, tuple[float, float]]:
    """(mAP50, mAP50-95), 0..1, of the best.pt of finished trainings on the test split, by task, from val.py; those that
    val.py could not score are told of and left out."""

    def score(task: Task) -> tuple[float, float] | None:
        place = SimpleNamespace(
            data=task.plan.data, imgsz=task.plan.imgsz, project=str(task.folder.path), device=device
        )
        try:
            return scores(place, task.folder.best(task.run), "test")
        except SystemExit as error:
            LOGGER.warning(f"{task}: {error}")
            return None

    with ThreadPoolExecutor(jobs) as pool:
        found = dict(zip(map(str, tasks), pool.map(score, tasks)))
    return {task: values for task, values in found.items() if values is not None}


def train_until(tasks: Sequence[Task], settings: Settings, deadline: float) -> dict[str, str]:
    """Train what is not finished until ``deadline`` (time.monotonic()), ``settings.jobs`` at a time; then end those at
    work, which save their steps. Returns why trainings failed, by task; what waits for one of them is not begun."""
    with ExitStack() as stack:
        for folder, plan in {task.folder.path: (task.folder, task.plan) for task in tasks}.values():
            folder.path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(folder)
            begin(folder, plan)
        by_path = {task.folder.path: task.folder for task in tasks}
        tasks = [replace(task, folder=by_path[task.folder.path]) for task in tasks]  # those that hold the lock
        return _train(tasks, settings, deadline)


def _train(tasks: Sequence[Task], settings: Settings, deadline: float) -> dict[str, str]:
    pending = [task for task in tasks if not task.finished]
    at_work: dict[Job, Task] = {}
    begun: dict[Job, float] = {}
    lasted: list[float] = []
    failed: dict[str, str] = {}
    try:
        while (pending or at_work) and time.monotonic() < deadline:
            left = deadline - time.monotonic()
            if not lasted or left > LEAST_SHARE * statistics.median(lasted):
                free = settings.jobs - len(at_work)
                for task in _next(pending, free) if free else ():
                    pending.remove(task)
                    here = replace(settings, workers=task.workers)
                    job = start(task.run, task.plan, task.folder, here, list(at_work))
                    at_work[job], begun[job] = task, time.monotonic()
            elif not at_work:
                break
            if not at_work:  # what is left waits for a training that failed
                break
            time.sleep(POLL)
            for job in [job for job in at_work if job.poll() is not None]:
                task, reasons = at_work.pop(job), {}
                ended(job, task.folder, reasons)
                lasted.append(time.monotonic() - begun[job])
                failed |= {str(task): reason for reason in reasons.values()}
    finally:
        if at_work:
            LOGGER.info(f"Time is up: {len(at_work)} trainings save their steps and end")
            end_all(list(at_work))
    return failed


def _next(pending: Sequence[Task], count: int) -> list[Task]:
    return list(islice((task for task in pending if task.ready), count))
