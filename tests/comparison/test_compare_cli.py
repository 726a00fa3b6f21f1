"""compare.py from the command line: one real comparison, added to, and each wrong input's line."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import compare
from comparison.checks import unlike_starts
from models.loading import LoadReport
from utils.errors import run_cli
from utils.files import ROOT

MODELS = ["--cfg", "yolov5n.yaml", "yolov5n-dcn.yaml"]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """data.yaml of a private copy of data/tiny, whose test split is its val split."""
    shutil.copytree(ROOT / "data" / "tiny", tmp_path / "tiny", ignore=shutil.ignore_patterns("*.npz"))
    text = "path: .\ntrain: images/train\nval: images/val\ntest: images/val\n"
    (tmp_path / "tiny" / "data.yaml").write_text(f"{text}names: [nine, ten, jack, queen, king, ace]\n")
    return tmp_path / "tiny" / "data.yaml"


@pytest.fixture
def compare_cli(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """Run compare.py's main as the command line would: (exit status, stdout, stderr)."""

    def call(*flags: str) -> tuple[int, str, str]:
        capsys.readouterr()
        shared = ["--workers", "0", "--device", "cpu", "--bootstrap", "100", "--jobs", "2"]
        status = run_cli(compare.main, [*shared, *flags])
        return status, *capsys.readouterr()

    return call


def budget(tiny: Path, *flags: str) -> list[str]:
    runs = ["--project", str(tiny.parents[1] / "runs")]
    return ["--data", str(tiny), *MODELS, "--epochs", "1", "--img", "64", "--batch", "4", *runs, *flags]


@pytest.mark.slow
def test_a_comparison_and_one_more_seed(tmp_path: Path, tiny: Path, compare_cli, monkeypatch) -> None:
    monkeypatch.setattr("comparison.costs.SECONDS_A_MODEL", 0.1)
    status, out, err = compare_cli(*budget(tiny, "--seeds", "1", "--", "--close-mosaic", "1"))
    assert status == 0, err
    folder = tmp_path / "runs" / "exp"
    assert "neither yolov5n-dcn nor yolov5n has learnt anything yet" in out and str(folder / "report.html") in out
    html = (folder / "report.html").read_text()
    assert html.count("<svg") == 2 and html.count("data:image/jpeg;base64,") >= 4 * 3
    assert (folder / "trainings" / "yolov5n-seed0" / "opt.yaml").read_text().count("close_mosaic: 1") == 1
    first = {path: path.stat().st_mtime_ns for path in folder.glob("*/*seed0*/weights/best.pt")}
    first |= {path: path.stat().st_mtime_ns for path in folder.glob("predictions/*.npz")}
    assert len(first) == 2 + 4

    status, out, err = compare_cli("--resume", str(folder), "--seeds", "2")
    assert status == 0, err
    assert "2 trainings of 4 finished already" in out
    assert {path: path.stat().st_mtime_ns for path in first} == first
    rows = list(csv.DictReader(io.StringIO((folder / "report.csv").read_text())))
    whole = [row for row in rows if row["part"] == "all" and row["split"] == "test"]
    assert [(row["model"], row["seed"]) for row in whole[:3]] == [("yolov5n", seed) for seed in ("mean", "0", "1")]
    assert float(whole[0]["train_seconds"]) > 0 and float(whole[0]["inference_ms"]) > 0
    assert int(whole[3]["params"]) > int(whole[0]["params"]) and whole[0]["boxes"] == "15"
    assert "| seeds |" in (folder / "report.md").read_text()

    status, _, err = compare_cli(*budget(tiny, "--exist-ok", "--epochs", "2"))
    assert status == 2 and f"--epochs 2: {folder} was begun with 1" in err


def test_a_model_that_is_alone_is_told_of(tiny: Path, compare_cli, monkeypatch) -> None:
    monkeypatch.setattr("compare.conduct", lambda *_: 0)
    for models, said in (
        (["yolov5n.yaml"], "--cfg: yolov5n is alone; --resume --cfg OTHER.yaml adds"),
        (MODELS[1:], ""),
    ):
        runs = ["--project", str(tiny.parents[1] / "runs")]
        status, out, err = compare_cli("--data", str(tiny), "--cfg", *models, "--img", "64", *runs)
        assert status == 0 and ("is alone" in out + err) == bool(said) and said in out + err


def test_models_that_start_unlike_are_told() -> None:
    """A checkpoint of one of the models gives the others less than that one."""
    own = LoadReport("dcn.pt", 348, 349, ["model.24.anchors"], [])
    other = LoadReport("dcn.pt", 330, 349, ["model.24.anchors", *(f"model.1.bn.{i}" for i in range(18))], [])
    assert unlike_starts({"dcn": own, "same": own}) == () == unlike_starts({})
    (line,) = unlike_starts({"plain": other, "dcn": own})
    assert "do not start alike (tensors that begin anew: plain 18 of 349, dcn 0 of 349)" in line


WRONG = [
    (["--data", "tiny.yaml"], "nothing to compare: give --data mine.yaml --cfg"),
    (["--data", "tiny.yaml", "--cfg", "yolov5n-dnc.yaml"], "--cfg yolov5n-dnc.yaml: no such file, did you mean"),
    (["--data", "tiny.yaml", "--cfg", "README.md"], "--cfg README.md: not a model YAML"),
    (["--data", "tiny.yaml", *MODELS, "yolov5n.yaml"], "--cfg: two models are called yolov5n"),
    (["--data", "none.yaml", *MODELS], "--data none.yaml: no such file"),
    (["--data", "tiny.yaml", *MODELS, "--seeds", "0"], "--seeds 0: at least 1"),
    (["--data", "tiny.yaml", *MODELS, "--seeds", "501"], "--seeds 501: 1,002 trainings, at most 1,000"),
    (["--data", "tiny.yaml", *MODELS, "--epochs", "0"], "--epochs 0: at least 1"),
    (["--data", "tiny.yaml", *MODELS, "--batch-size", "-1"], "--batch-size -1: at least 1"),
    (["--data", "tiny.yaml", *MODELS, "--jobs", "0"], "--jobs 0: at least 1"),
    (["--data", "tiny.yaml", *MODELS, "--bootstrap", "5"], "--bootstrap 5: at least 100"),
    (["--data", "tiny.yaml", *MODELS, "--points-per-doubling", "nan"], "--points-per-doubling nan: from 0 to 100"),
    (["--data", "tiny.yaml", *MODELS, "--weights", "none.pt"], "--weights none.pt: no such file"),
    (["--data", "tiny.yaml", *MODELS, "--device", "cpu,99"], "--device 99: there are"),
    (["--data", "tiny.yaml", *MODELS, "--", "--seed", "3"], "--seed after --: use --seeds, before the --"),
    (["--data", "tiny.yaml", *MODELS, "--", "--resume"], "--resume after --: compare.py takes care of it"),
    (["--data", "tiny.yaml", *MODELS, "--", "--cos-rl"], "--cos-rl: no such flag, did you mean '--cos-lr'?"),
    (["--data", "tiny.yaml", *MODELS, "--", "--patience", "-3"], "--patience -3: 0 (never stop early) or more"),
    (["--data", "tiny.yaml", *MODELS, "--", "--hyp", "x.yaml"], "--hyp x.yaml: no such file"),
    (["--data", "tiny.yaml", *MODELS, "--", "--dcn", "99"], "--dcn"),
    (["--data", "tiny.yaml", *MODELS, "--", "--dcn-backend", "cuda"], "--dcn-backend cuda: "),
    (["--data", "tiny.yaml", *MODELS, "--device", "cpu", "--", "--amp", "fp16"], "--amp fp16: CPUs train in bf16"),
    (["--resume", "."], "--resume .: not the folder of a comparison"),
    (["--resume", "--name", "x"], "--name: --resume goes on in the folder that it names"),
]


@pytest.mark.parametrize(("flags", "line"), WRONG, ids=[" ".join(flags[-2:]) for flags, _ in WRONG])
def test_wrong_input_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str], line: str
) -> None:
    project = ["--project", str(tmp_path / "runs")] if flags[0] != "--resume" or flags[1] == "." else []
    project = [] if "--resume" in flags[:1] else project
    cut = flags.index("--") if "--" in flags else len(flags)
    assert run_cli(compare.main, [*flags[:cut], *project, *flags[cut:]]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and line in err and err.count("\n") == 1, err
    assert not (tmp_path / "runs").exists()


def test_what_only_building_and_reading_show_is_found_before_any_training(
    tmp_path: Path, tiny: Path, compare_cli
) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text((ROOT / "models" / "yolov5n.yaml").read_text().replace("C3", "C33", 1))
    status, _, err = compare_cli(*budget(tiny, "--cfg", "yolov5n.yaml", str(bad)))
    assert status == 2 and "bad.yaml" in err and "C33" in err and err.count("\n") == 1
    shutil.rmtree(tiny.parent / "labels" / "train")
    shutil.rmtree(tiny.parent / "images" / "val")
    status, _, err = compare_cli(*budget(tiny))
    assert status == 2 and "no such folder or file" in err and err.count("\n") == 1
    assert not (tmp_path / "runs").exists()
