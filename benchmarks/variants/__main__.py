"""Many short trainings of DCN variants side by side on one GPU, against the plain model trained alike.

    python -m benchmarks.variants --data aquarium/data.yaml cards/data.yaml nuclei/data.yaml --minutes 9 --cost 640

First the plain model is trained from scratch on each set. From its weights start all variants, whose first step gives
the plain model's output (not grouped-6-8's), and the plain model itself once more: the control. What a variant gains is
the difference to that, set by set and seed by seed, in mAP50-95 of the last epoch on val. --cost times a training step
and a forward pass of each variant beforehand, alone on the device. What is not finished after --minutes is saved; the
same command again goes on. Results: PROJECT/report.md, ledger.csv, costs.csv.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import cpu_name, heading
from benchmarks.variants import tables
from benchmarks.variants.costs import measure_costs, read_rows
from benchmarks.variants.models import PLAIN, VARIANTS, check_names
from benchmarks.variants.study import Study, Task, scores_on_test, tasks_of, train_until
from comparison.trainings import Settings
from utils.cli import Parser
from utils.config import Hyp
from utils.console import LOGGER, plural, setup_console
from utils.device import describe_device, select_device
from utils.errors import ConfigError, run_cli
from utils.files import atomic_write


def build_parser() -> Parser:
    parser = Parser(
        prog="python -m benchmarks.variants",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what to train")
    what.add_argument("--data", nargs="+", required=True, help="dataset YAMLs; a set is called as its folder or file")
    what.add_argument("--base", default="yolov5s.yaml", help="the plain model (default: %(default)s)")
    what.add_argument("--variants", nargs="+", default=list(VARIANTS), metavar="NAME", help="default: all")
    what.add_argument("--seeds", type=int, default=2, help="of each variant and set (default: %(default)s)")
    what.add_argument("--epochs", type=int, default=30, help="from the plain weights (default: %(default)s)")
    what.add_argument("--scratch-epochs", type=int, default=80, help="of the plain model before (default: 80)")
    what.add_argument("--scratch", nargs="+", default=[], metavar="NAME", help="also from scratch, one seed")
    what.add_argument("--imgsz", type=int, default=416)
    what.add_argument("--batch-size", type=int, default=16)
    soon = parser.add_argument_group("recipes: from scratch, validated every epoch")
    soon.add_argument("--recipes", nargs="+", default=[], metavar="NAME=HYP.YAML", help="hyper-parameters to compare")
    soon.add_argument("--recipe-data", default="", metavar="YAML", help="dataset (default: the first of --data)")
    soon.add_argument("--recipe-seeds", type=int, default=1)
    soon.add_argument("--recipe-variants", nargs="+", default=[PLAIN], metavar="NAME")
    soon.add_argument("--recipe-epochs", type=int, default=30)
    how = parser.add_argument_group("how")
    how.add_argument("--minutes", type=float, default=9.0, help="until all ends, from the start (default: 9)")
    how.add_argument("--jobs", type=int, default=8, help="trainings at a time (default: %(default)s)")
    how.add_argument("--start-workers", type=int, default=4, help="loader processes of the first; others have one")
    how.add_argument("--cost", nargs="*", type=int, default=[], metavar="IMGSZ", help="time steps and passes at it")
    how.add_argument("--cost-minutes", type=float, default=2.0, help="after which no further variant is timed")
    how.add_argument("--test", nargs="+", default=[], metavar="NAME", help="score these on the test split in the end")
    how.add_argument("--no-train", action="store_true", help="only --cost, --test and the report on what is there")
    how.add_argument("--project", default="runs/variants")
    how.add_argument("--ledger", default="", metavar="CSV", help="default: PROJECT/ledger.csv")
    how.add_argument("--device", default="", help="cpu, 0; default: the first GPU, else the CPU")
    return parser


def study_from(args: argparse.Namespace) -> Study:
    """What the flags ask for. Raises ConfigError."""
    sets = {_set_name(path): path for path in args.data}
    if len(sets) < len(args.data):
        raise ConfigError(f"--data: two sets have the same name ({', '.join(map(_set_name, args.data))})")
    for flag in ("seeds", "jobs", "batch_size", "scratch_epochs", "epochs", "recipe_epochs", "recipe_seeds"):
        if getattr(args, flag) < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: at least 1")
    recipes = [tuple(item.partition("=")[::2]) for item in args.recipes]
    if wrong := [item for item, (_, hyp) in zip(args.recipes, recipes) if not hyp]:
        raise ConfigError(f"--recipes {wrong[0]}: write NAME=HYP.YAML")
    for _, hyp in recipes:
        Hyp.load(hyp)  # what is wrong with it is said now, not by a training within the study
    return Study(
        base=args.base,
        project=Path(args.project),
        sets=sets,
        variants=tuple(check_names([PLAIN, *args.variants], "--variants")),
        seeds=args.seeds,
        scratch_epochs=args.scratch_epochs,
        tuned_epochs=args.epochs,
        imgsz=args.imgsz,
        batch=args.batch_size,
        scratch=tuple(check_names(args.scratch, "--scratch")),
        recipes=tuple(recipes),
        recipe_data=args.recipe_data or args.data[0],
        recipe_seeds=args.recipe_seeds,
        recipe_variants=tuple(check_names(args.recipe_variants, "--recipe-variants")),
        recipe_epochs=args.recipe_epochs,
    )


def _set_name(path: str) -> str:
    file = Path(path)
    return file.resolve().parent.name if file.stem == "data" else file.stem


def main(argv: Sequence[str]) -> int:
    start = time.monotonic()
    args = build_parser().parse_args(argv)
    setup_console()
    study, device = study_from(args), select_device(args.device)
    finalists = check_names(args.test, "--test")
    tasks = tasks_of(study, args.start_workers)
    where = f"{describe_device(device)}; {cpu_name()}; {plural(args.jobs, 'training')} at a time"
    if args.cost:
        until = start + 60 * args.cost_minutes
        measure_costs(study.base, study.variants, args.data[0], args.cost, study.batch, device, study.project, until)
    failed: dict[str, str] = {}
    try:
        if not args.no_train:
            settings = Settings(jobs=args.jobs, devices=(args.device,))
            failed = train_until(tasks, settings, start + 60 * args.minutes)
    finally:
        report(study, tasks, where, failed)
        ledger = Path(args.ledger or study.project / "ledger.csv")
        keep(study, tasks, ledger, describe_device(device), {})  # at once: the test split takes a while
        tested = [t for t in tasks if t.kind == "tuned" and t.run.model in finalists and t.finished]
        if tested:
            keep(study, tasks, ledger, describe_device(device), scores_on_test(tested, args.jobs, args.device))
    return 1 if failed else 0


def report(study: Study, tasks: Sequence[Task], where: str, failed: dict[str, str]) -> None:
    """Print and write PROJECT/report.md."""
    costs = read_rows(study.project / "costs.csv")
    sizes = sorted({int(row["imgsz"]) for row in costs}) or [study.imgsz]
    ratios = tables.cost_ratios(costs, sizes[-1])
    parts = [heading(where), f"{study.base}, {study.imgsz} px, batch {study.batch}; costs at {sizes[-1]} px"]
    parts += [f"From plain weights, {study.tuned_epochs} epochs", tables.tuned_table(tasks, "tuned", ratios)]
    if study.scratch:
        parts += [f"From scratch, {study.scratch_epochs} epochs", tables.tuned_table(tasks, "scratch", ratios)]
    if study.recipes:
        parts += [f"Recipes on {study.recipe_data}, from scratch", tables.recipe_table(tasks)]
    unfinished = [str(task) for task in tasks if not task.finished and str(task) not in failed]
    parts += [f"Failed: {reason}" for reason in failed.values()]
    if unfinished:
        parts.append(f"Not finished ({len(unfinished)}): {', '.join(unfinished)}")
    text = "\n\n".join(parts) + "\n"
    print(text)
    atomic_write(study.project / "report.md", text)


def keep(study: Study, tasks: Sequence[Task], ledger: Path, device: str, tests: tables.Tests) -> None:
    """Add what is finished to the ledger and say what the test split said."""
    costs = read_rows(study.project / "costs.csv")
    largest = max((int(row["imgsz"]) for row in costs), default=0)
    count = tables.write_ledger(ledger, tasks, device, [row for row in costs if int(row["imgsz"]) == largest], tests)
    for task, (map50, map_) in tests.items():
        LOGGER.info(f"test: {task}: mAP50 {100 * map50:.1f}, mAP50-95 {100 * map_:.1f}")
    LOGGER.info(f"{ledger}: {plural(count, 'row')}")


if __name__ == "__main__":
    sys.exit(run_cli(main))
