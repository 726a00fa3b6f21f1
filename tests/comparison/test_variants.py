"""benchmarks.variants: each starts as the plain model; what is trained in which order and until when."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from benchmarks.variants import tables
from benchmarks.variants.__main__ import build_parser, study_from
from benchmarks.variants.costs import read_rows
from benchmarks.variants.models import PLAIN, VARIANTS, check_names, write_cfgs
from benchmarks.variants.study import Study, Task, tasks_of, train_until
from comparison.trainings import Settings
from models.common import DCN
from models.loading import build_or_load
from models.yolo import DetectionModel
from tests.models.reference import fill, image
from utils.checkpoint import save_checkpoint
from utils.errors import ConfigError
from utils.files import ROOT
from utils.loggers import COLUMNS, results_header, results_row

NEW = {"grouped-6-8"}  # begins anew in what it replaces


@torch.no_grad()
def test_every_variant_is_built_and_starts_as_the_plain_model(tmp_path: Path) -> None:
    cfgs, x = write_cfgs("yolov5n.yaml", tmp_path, list(VARIANTS)), image((1, 3, 64, 64))
    plain = fill(DetectionModel(cfgs[PLAIN], nc=2))
    save_checkpoint(tmp_path / "plain.pt", plain.state_dict(), {"yaml": plain.yaml, "nc": 2})
    expected = plain(x)[0]
    for name, cfg in cfgs.items():
        model, _ = build_or_load(cfg, tmp_path / "plain.pt", nc=2)
        model.detect.anchors.copy_(plain.detect.anchors)
        assert any(isinstance(m, DCN) for m in model.modules()) == (name != PLAIN)
        same = (model.eval()(x)[0] - expected).abs().max() < 1e-4 * expected.abs().max()
        assert same == (name not in NEW), name


def study(tmp_path: Path, **changes) -> Study:
    sets = {name: str(ROOT / "data" / "bccd.yaml") for name in ("first", "second")}
    options = dict(scratch_epochs=2, tuned_epochs=1, imgsz=64, batch=4, seeds=2)
    return Study("yolov5n.yaml", tmp_path / "exp", sets, (PLAIN, "c3-6-8-fast", "c3-8"), **{**options, **changes})


def test_what_is_trained_in_which_order(tmp_path: Path) -> None:
    recipes = (("soon", "hyp.small-set.yaml"),)
    tasks = tasks_of(study(tmp_path, recipes=recipes, recipe_data="bccd.yaml", scratch=("c3-8",)), workers=4)
    names = [str(task) for task in tasks]
    assert names[:3] == ["scratch-first plain seed 0", "scratch-second plain seed 0", "recipe-soon plain seed 0"]
    assert names[3:6] == [
        "tuned-first plain seed 0",
        "tuned-second plain seed 0",
        "tuned-first-dcn-offset-lr-1 c3-6-8-fast seed 0",
    ]
    assert names.index("scratch-first c3-8 seed 0") < names.index("tuned-first plain seed 1")
    assert len(names) == len(set(names)) == 2 + 1 + 2 + 2 * 3 * 2
    tuned = next(task for task in tasks if task.kind == "tuned")
    assert not tuned.ready and tuned.plan.weights.endswith("scratch-first/trainings/plain-seed0/weights/best.pt")
    assert tasks[0].workers == 4 and tuned.workers == 1


def left_behind(tasks: list[Task]) -> None:
    """results.csv of what is finished, as train.py would have written it."""
    gains = {PLAIN: 0.0, "c3-8": 0.01, "c3-6-8-fast": -0.02}
    for task in tasks:
        if task.finished:
            points = 0.3 + gains[task.run.model] + 0.1 * (task.set == "second") + 0.001 * task.run.seed
            row = results_row(0, {column: points for column in COLUMNS})
            (task.folder.run_dir(task.run) / "results.csv").write_text(results_header() + row)


def test_all_are_trained_and_reported(tmp_path: Path, fake_train: Path) -> None:
    tasks = tasks_of(study(tmp_path), workers=1)
    assert train_until(tasks, Settings(jobs=4), time.monotonic() + 60) == {}
    assert all(task.finished for task in tasks)
    left_behind(tasks)
    costs = [
        dict(zip(("variant", "imgsz", *tables.RATES), row)) for row in ((PLAIN, 64, 2, 2, 4), ("c3-8", 64, 3, 2, 4))
    ]
    text = tables.tuned_table(tasks, "tuned", tables.cost_ratios(costs, 64))
    (row,) = [line for line in text.splitlines() if "| c3-8 |" in line]
    assert row.endswith("| 31.1 | 41.0 | 4 | +1.00 | 0.00 | 4/4 | 1.50 | 1.00 | 1.00 |")
    ledger, tests = tmp_path / "ledger.csv", {str(tasks[-1]): (0.5, 0.25)}
    assert tables.write_ledger(ledger, tasks, "a GPU", costs, tests) == len(tasks)
    assert tables.write_ledger(ledger, tasks, "a GPU", costs, {}) == len(tasks)  # the same ones
    assert "--dcn-offset-lr 1" in ledger.read_text()
    assert [row["test_mAP50-95"] for row in read_rows(ledger)].count("0.25") == 1


def test_the_end_of_the_time_leaves_nothing_half_done(
    tmp_path: Path, fake_train: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slow trainings save and are not finished; a failed one keeps those back that start from it."""
    monkeypatch.setitem(VARIANTS, "slow", VARIANTS["c3-8"])
    monkeypatch.setitem(VARIANTS, "broken", VARIANTS["c3-8"])
    short = study(tmp_path, seeds=1)
    tasks = tasks_of(Study(**{**vars(short), "variants": (PLAIN, "broken", "slow")}), workers=1)
    failed = train_until(tasks, Settings(jobs=8), time.monotonic() + 4)
    assert set(failed) == {"tuned-first broken seed 0", "tuned-second broken seed 0"}
    assert [str(t) for t in tasks if not t.finished and str(t) not in failed] == [
        "tuned-first slow seed 0", "tuned-second slow seed 0"
    ]  # fmt: skip
    log = tasks[-1].folder.log(tasks[-1].run).read_text()
    assert log.splitlines() == ["begins anew", "terminated: saved"]


def test_what_waits_for_a_failed_training_is_not_begun(tmp_path: Path, fake_train: Path) -> None:
    (fake_train / "train.py").write_text("raise SystemExit('error: no')")
    tasks = tasks_of(study(tmp_path), workers=1)
    assert set(train_until(tasks, Settings(jobs=2), time.monotonic() + 30)) == {
        "scratch-first plain seed 0", "scratch-second plain seed 0"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "bccd.yaml", "data/bccd.yaml"], "two sets have the same name"),
        (["--data", "bccd.yaml", "--variants", "c3-9"], "no such variant, did you mean 'c3-8'"),
        (["--data", "bccd.yaml", "--recipes", "soon"], "write NAME=HYP.YAML"),
        (["--data", "bccd.yaml", "--jobs", "0"], "--jobs 0: at least 1"),
    ],
)
def test_wrong_flags_are_one_line(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        study_from(build_parser().parse_args(flags))
    with pytest.raises(ConfigError, match="--base none.yaml: no such file"):
        write_cfgs("none.yaml", Path("unused"), [PLAIN])
    assert check_names(["c3-8", "c3-8"], "") == ["c3-8"]
