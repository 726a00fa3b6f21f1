"""train.py from the command line: what a run writes, that it repeats, that it resumes, and each wrong input's line."""

from __future__ import annotations

import csv
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import train
from utils.checkpoint import read_checkpoint
from utils.files import ROOT, load_yaml

DCN = ["--cfg", "yolov5n-dcn.yaml"]
RUN_FILES = """opt.yaml hyp.yaml results.csv results.png labels.jpg train_batch0.jpg val_batch0_labels.jpg
val_batch0_pred.jpg confusion_matrix.png PR_curve.png F1_curve.png P_curve.png R_curve.png weights/last.pt
weights/best.pt""".split()


def weights_of(run: Path, name: str = "last.pt") -> dict[str, torch.Tensor]:
    return read_checkpoint(run / "weights" / name).model


def rows_of(run: Path) -> list[list[str]]:
    return [[field.strip() for field in row] for row in csv.reader((run / "results.csv").read_text().splitlines())]


def test_a_run_writes_what_users_know(tmp_path: Path, tiny: Path, train_cli) -> None:
    base = f"--weights= --img 64 --batch 4 --epochs 2 --workers 0 --device cpu --project {tmp_path}/runs".split()
    status, out, err = train_cli(*DCN, base=base)
    assert status == 0, err
    run = tmp_path / "runs" / "exp"
    missing = [name for name in RUN_FILES if not (run / name).is_file()]
    assert not missing
    assert list(run.glob("events.out.tfevents.*"))
    header, *rows = rows_of(run)
    assert header[:5] == ["epoch", "train/box_loss", "train/obj_loss", "train/cls_loss", "metrics/precision"]
    assert header[-3:] == ["x/lr0", "x/lr1", "x/lr2"]
    assert [row[0] for row in rows] == ["0", "1"]
    assert all(np.isfinite([float(v) for v in row]).all() for row in rows)
    assert load_yaml(run / "opt.yaml")["epochs"] == 2 and load_yaml(run / "hyp.yaml")["lr0"] == 0.01
    assert "DCN offset(lr x 0.1)" in out and "Results saved to" in out
    content = torch.load(run / "weights" / "last.pt", weights_only=True)
    assert {"optimizer", "scaler", "rng", "model", "epoch"} <= content["train"].keys()
    assert content["meta"]["names"][0] == "nine" and len(content["meta"]["anchors"]) == 3
    best = torch.load(run / "weights" / "best.pt", weights_only=True)
    assert best["train"] is None
    assert {v.dtype for v in best["model"].values() if v.is_floating_point()} == {torch.float16}


def test_a_second_run_gets_its_own_folder_and_the_same_numbers(tmp_path: Path, train_cli) -> None:
    train_cli()
    train_cli("--workers", "2")
    first, second = tmp_path / "runs" / "exp", tmp_path / "runs" / "exp2"
    assert rows_of(first) == rows_of(second)
    assert all(torch.equal(a, b) for a, b in zip(weights_of(first).values(), weights_of(second).values()))


def test_a_training_that_fails_leaves_no_processes(train_cli, monkeypatch) -> None:
    """Those of its loader stay after a first SIGTERM, and the end of Python waited half a minute for them."""
    import engine.trainer

    before, during = set(multiprocessing.active_children()), set()

    def faulty(*_: object) -> None:
        during.update(multiprocessing.active_children())
        raise ZeroDivisionError

    monkeypatch.setattr(engine.trainer, "train_one_epoch", faulty)
    with pytest.raises(ZeroDivisionError):
        train_cli("--workers", "2")
    assert during - before and not set(multiprocessing.active_children()) - before


@pytest.mark.parametrize("extra", [[], [*DCN, "--optimizer", "AdamW", "--image-weights", "--multi-scale"]])
def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path: Path, train_cli, monkeypatch, extra: list[str]) -> None:
    flags = [*extra, "--epochs", "3"]
    assert train_cli(*flags, "--name", "whole")[0] == 0
    import engine.trainer

    real = engine.trainer.train_one_epoch

    def interrupted(learner, loader, epoch, *rest):
        if epoch == 2:
            raise KeyboardInterrupt
        return real(learner, loader, epoch, *rest)

    monkeypatch.setattr(engine.trainer, "train_one_epoch", interrupted)
    status, _, err = train_cli(*flags, "--name", "cut")
    assert status == 130 and "--resume" in err
    monkeypatch.setattr(engine.trainer, "train_one_epoch", real)
    cut, whole = tmp_path / "runs" / "cut", tmp_path / "runs" / "whole"
    (cut / "results.csv").open("a").write("                   2,   half a row that a kill left")
    status, out, err = train_cli(base=["--resume", str(cut)], data="")
    assert status == 0, err
    assert "at epoch 2 of 3" in out
    assert rows_of(cut) == rows_of(whole)
    for name in ("last.pt", "best.pt"):
        pairs = zip(weights_of(cut, name).items(), weights_of(whole, name).values())
        assert [key for (key, a), b in pairs if not torch.equal(a, b)] == []


def test_a_finished_run_can_be_made_longer(tmp_path: Path, train_cli) -> None:
    train_cli()
    run = tmp_path / "runs" / "exp"
    status, _, err = train_cli(base=["--resume", str(run)], data="")
    assert status == 2 and "is finished" in err and "--epochs" in err
    status, _, err = train_cli(base=["--resume", str(run), "--epochs", "2"], data="")
    assert status == 0, err
    assert [row[0] for row in rows_of(run)[1:]] == ["0", "1"]
    status, _, err = train_cli(base=["--resume", str(run), "--batch", "8", "--epochs", "3"], data="")
    assert status == 2 and "--batch-size 8: cannot change on --resume" in err


def test_training_starts_from_weights_with_other_classes(tmp_path: Path, tiny: Path, train_cli) -> None:
    train_cli()
    best = tmp_path / "runs" / "exp" / "weights" / "best.pt"
    status, out, err = train_cli("--weights", str(best), "--cfg", "", "--single-cls")
    assert status == 0, err
    assert "Transferred 343/349 items" in out
    assert read_checkpoint(tmp_path / "runs" / "exp2" / "weights" / "best.pt").meta["names"] == {0: "item"}


def test_flags_that_change_the_loop(tmp_path: Path, train_cli) -> None:
    flags = ["--rect", "--freeze", "3", "--cos-lr", "--label-smoothing", "0.1", "--nosave", "--noval", "--cache", "ram"]
    status, out, err = train_cli(*flags, "--epochs", "2", "--amp", "bf16", "--img", "100", "--close-mosaic", "1")
    assert status == 0, err
    assert "must be a multiple of 32" in out and "using 128" in out
    assert "freezing" in out
    assert (tmp_path / "runs" / "exp" / "weights" / "best.pt").is_file()


def test_a_batch_larger_than_the_data_is_cut_to_it(tmp_path: Path, train_cli) -> None:
    status, out, err = train_cli("--batch", "1000")
    assert status == 0, err
    assert "--batch-size 1000: there are 8 training images, using 8" in out
    assert "weight(decay=0.0005)" in out


def test_anchors_to_be_found_need_autoanchor(tmp_path: Path, train_cli) -> None:
    (tmp_path / "hyp.yaml").write_text("anchors: 3\n")
    status, _, err = train_cli("--hyp", str(tmp_path / "hyp.yaml"), "--noautoanchor")
    assert status == 2 and "--noautoanchor" in err and err.count("\n") == 1


def test_quad_multiplies_the_batch(tmp_path: Path, train_cli) -> None:
    status, _, err = train_cli("--quad")
    assert status == 0, err


def test_best_is_kept_with_nosave(tmp_path: Path, train_cli, monkeypatch) -> None:
    import engine.trainer

    scores = iter([0.5, 0.2])
    real = engine.trainer.validate

    class Scored:
        def __init__(self, metrics):
            self._metrics, self.fitness = metrics, next(scores)

        def __getattr__(self, name):
            return getattr(self._metrics, name)

    monkeypatch.setattr(engine.trainer, "validate", lambda run: Scored(real(run)))
    assert train_cli("--nosave", "--epochs", "2")[0] == 0
    weights = tmp_path / "runs" / "exp" / "weights"
    assert read_checkpoint(weights / "best.pt").meta["epoch"] == 0
    assert read_checkpoint(weights / "last.pt").meta["epoch"] == 1


def test_early_stopping(tmp_path: Path, train_cli) -> None:
    status, out, _ = train_cli("--epochs", "6", "--patience", "1", "--save-period", "1")
    assert status == 0 and "Stopping training early" in out
    run = tmp_path / "runs" / "exp"
    assert len(rows_of(run)) < 7
    assert (run / "weights" / "epoch0.pt").is_file()
    rows = rows_of(run)
    status, _, err = train_cli(base=["--resume", str(run)], data="")
    assert status == 2 and "is finished; give a larger --patience" in err
    assert rows_of(run) == rows
    status, _, err = train_cli(base=["--resume", str(run), "--patience", "0"], data="")
    assert status == 0 and len(rows_of(run)) == 7, err


def test_run_from_python(tmp_path: Path, tiny: Path) -> None:
    done = train.run(
        data=str(tiny), cfg="yolov5n.yaml", weights="", imgsz=64, batch_size=4, epochs=1, workers=0, noplots=True,
        device="cpu", project=str(tmp_path / "runs"),
    )  # fmt: skip
    assert done == 0 and (tmp_path / "runs" / "exp" / "weights" / "best.pt").is_file()


# ---- wrong input: one line, exit status 2, no run folder -------------------------------------------------------------


WRONG_FLAGS = {
    "no data file": (["--data", "nope.yaml"], "--data nope.yaml: no such file"),
    "data folder": (["--data", "data"], "--data data: is a folder; give the dataset YAML in it"),
    "near miss": (["--data", "bcdd.yaml"], "did you mean 'bccd.yaml'?"),
    "no cfg": (["--cfg", "yolov5q.yaml"], "yolov5q.yaml"),
    "no weights": (["--weights", "nope.pt"], "nope.pt: no such file"),
    "neither": (["--cfg", ""], "nothing to train: give --cfg"),
    "no hyp": (["--hyp", "nope.yaml"], "--hyp nope.yaml: no such file"),
    "unknown flag": (["--epocs", "3"], "--epocs: no such flag, did you mean '--epochs'?"),
    "absent flag": (["--evolve"], "--evolve: hyper-parameter evolution is not offered"),
    "epochs": (["--epochs", "0"], "--epochs 0: at least 1"),
    "batch": (["--batch", "0"], "--batch-size 0"),
    "huge": (["--img", "100000"], "100000: at most 16384 pixels"),
    "device": (["--device", "7"], "--device 7: there are"),
    "device word": (["--device", "gpu"], "--device gpu: expected cpu"),
    "freeze": (["--freeze", "99"], "the model has layers 0..24"),
    "freeze all": (["--freeze", "25"], "--freeze 25: freezes all 25 layers, nothing is left to train"),
    "seed": (["--seed", "-1"], "--seed -1: a whole number from 0 up"),
    "quad of two": (["--quad", "--batch", "2"], "--quad makes one image of four"),
    "amp": (["--amp", "fp16"], "--amp fp16: CPUs"),
    "contradiction": (["--rect", "--image-weights"], "exclude each other"),
    "resume nothing": (["--resume", "nope/last.pt"], "--resume nope/last.pt: no such checkpoint"),
}


@pytest.mark.parametrize("case", WRONG_FLAGS)
def test_wrong_flags(case: str, tmp_path: Path, train_cli) -> None:
    flags, expected = WRONG_FLAGS[case]
    status, _, err = train_cli(*flags)
    assert status == 2
    assert expected in err and err.startswith("error: ") and err.count("\n") == 1, err
    assert not (tmp_path / "runs").exists()


def test_options_of_dcn_layers_that_are_not_there(tmp_path: Path, train_cli) -> None:
    """The rows have DCN layers, but dcn_options are for those of dcn: and --dcn."""
    cfg = tmp_path / "mine.yaml"
    cfg.write_text((ROOT / "models" / "yolov5n-dcn.yaml").read_text() + "\ndcn_options: {bound: 4}\n")
    status, _, err = train_cli("--cfg", str(cfg))
    assert status == 2 and err.count("\n") == 1
    assert err.startswith(f"error: --cfg {cfg}: dcn_options: no layer is made deformable")
    assert not (tmp_path / "runs").exists()


def edit(tiny: Path, old: str, new: str) -> None:
    tiny.write_text(tiny.read_text().replace(old, new))


def write_label(tiny: Path, text: str) -> None:
    (sorted((tiny.parent / "labels" / "train").glob("*.txt"))[0]).write_text(text)


def empty_folder(tiny: Path) -> None:
    (tiny.parent / "none").mkdir()
    edit(tiny, "images/train", "none")


def only_background(tiny: Path) -> None:
    for label in (tiny.parent / "labels" / "train").glob("*.txt"):
        label.write_text("")


WRONG_DATA = {
    "names missing": (lambda t: edit(t, "names:", "nmaes:"), "'names:' is missing"),
    "nc disagrees": (lambda t: t.write_text(t.read_text() + "nc: 5\n"), "nc: 5 does not agree with the 6 names"),
    "no image folder": (lambda t: edit(t, "images/train", "imgs/train"), "no such folder or file"),
    "root missing": (lambda t: edit(t, "path: .", "path: nowhere"), "path: nowhere: no such folder"),
    "not yaml": (lambda t: t.write_text("train: [a\nval: b: c"), "data.yaml:"),
    "python tag": (lambda t: t.write_text("a: !!python/object/apply:os.system ['true']\n"), "data.yaml:1"),
    "empty train set": (empty_folder, "no images found"),
    "only background": (only_background, "label"),
}


@pytest.mark.parametrize("case", WRONG_DATA)
def test_wrong_data(case: str, tmp_path: Path, tiny: Path, train_cli) -> None:
    damage, expected = WRONG_DATA[case]
    damage(tiny)
    status, _, err = train_cli()
    assert status == 2
    assert expected.lower() in err.lower() and err.startswith("error: ") and err.count("\n") == 1, err
    assert not (tmp_path / "runs").exists()


BAD_ROWS = {
    "class out of range": ("9 .5 .5 .2 .2\n", "class 9"),
    "NaN": ("0 nan .5 .2 .2\n", "nan"),
    "four columns": ("0 .5 .5 .2\n", "columns"),
    "out of bounds": ("0 1.5 .5 .2 .2\n", "1.5"),
    "words": ("cat .5 .5 .2 .2\n", "cat"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_label_rows_are_named_and_left_out(case: str, tiny: Path, train_cli) -> None:
    row, expected = BAD_ROWS[case]
    write_label(tiny, "0 .5 .5 .2 .2\n" + row)
    before = {p: p.read_bytes() for p in tiny.parent.rglob("*.txt")}
    status, out, err = train_cli()
    assert status == 0, err
    assert ".txt:2" in out and expected in out.lower()
    assert {p: p.read_bytes() for p in tiny.parent.rglob("*.txt")} == before
    status, _, err = train_cli("--strict-data")
    assert status == 2 and ".txt:2" in err


def first_image(tiny: Path) -> Path:
    return sorted((tiny.parent / "images" / "train").iterdir())[0]


BAD_IMAGES = {
    "truncated": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
    "empty": lambda p: p.write_bytes(b""),
    "not an image": lambda p: p.write_bytes(b"hello" * 100),
    "16-bit": lambda p: cv2.imwrite(str(p.with_suffix(".png")), np.full((64, 64, 3), 40000, np.uint16)) and p.unlink(),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_odd_images_do_not_end_a_training(case: str, tiny: Path, train_cli) -> None:
    image = first_image(tiny)
    BAD_IMAGES[case](image)
    status, out, err = train_cli()
    assert status == 0, err
    if case != "16-bit":
        assert image.name in out


def test_an_upstream_checkpoint_is_a_start(train_cli) -> None:
    """The tiny file has three classes, the data set two: all but the head comes over."""
    status, out, err = train_cli("--cfg", "", "--weights", str(ROOT / "tests/reference/upstream_format_stripped.pt"))
    assert status == 0, err
    assert "Transferred 343/349 items from" in out and "Not transferred, other shape: model.24.m.0.weight" in out


def test_a_lost_loss_stops_the_run_and_names_it(tmp_path: Path, train_cli, monkeypatch) -> None:
    import engine.epoch

    real = engine.epoch.Learner.backward

    def poisoned(self, images, targets, **options):
        return real(self, images * float("nan"), targets, **options)

    monkeypatch.setattr(engine.epoch.Learner, "backward", poisoned)
    status, _, err = train_cli(*DCN)
    assert status == 2 and "the loss is not finite at epoch 0, batch 1" in err and err.count("\n") == 1


def test_out_of_memory_says_which_batch_to_try(train_cli, monkeypatch) -> None:
    import engine.epoch

    def hungry(self, images, targets, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine.epoch.Learner, "backward", hungry)
    status, _, err = train_cli()
    assert status == 2 and "memory ran out at batch 4, 64 px; use --batch-size 2" in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_one_line(tmp_path: Path, train_cli, monkeypatch) -> None:
    import utils.files

    real = os.fsync

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "runs"))

    monkeypatch.setattr(utils.files.os, "fsync", full)
    status, _, err = train_cli()
    monkeypatch.setattr(utils.files.os, "fsync", real)
    assert status == 2 and "the disk is full" in err and err.count("\n") == 1


def test_a_project_that_cannot_be_made(tmp_path: Path, train_cli) -> None:
    (tmp_path / "file").write_text("")
    status, _, err = train_cli("--project", str(tmp_path / "file" / "runs"))
    assert status == 2 and "cannot make this folder" in err and err.count("\n") == 1


def test_check_data_prints_a_report_and_trains_nothing(tmp_path: Path, train_cli) -> None:
    status, out, _ = train_cli("--check-data")
    assert status == 0
    assert "queen" in out and "train" in out and "val" in out
    assert not (tmp_path / "runs").exists()


def test_the_command_itself(tmp_path: Path) -> None:
    """As a user types it, from another folder: a wrong file gives one line, status 2 and no traceback."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--data", "nope.yaml", "--cfg", "yolov5n.yaml"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: --data nope.yaml: no such file") and done.stderr.count("\n") == 1
