"""val.py from the command line: files, numbers, and one clear line for each kind of wrong input."""

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import engine.evaluator
import val
from utils import helpers
from utils.errors import CheckpointError, ConfigError, DataError, ResourceError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with data.yaml (three images of 64 x 96, two classes) and model.pt (tiny, untrained, two classes)."""
    from models.yolo import DetectionModel
    from utils.checkpoint import save_checkpoint

    folder = tmp_path_factory.mktemp("val")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        (folder / "images" / split).mkdir(parents=True)
        (folder / "labels" / split).mkdir(parents=True)
        for i in range(3):
            cv2.imwrite(str(folder / f"images/{split}/{i}.png"), rng.integers(0, 255, (64, 96, 3), np.uint8))
            (folder / f"labels/{split}/{i}.txt").write_text(f"{i % 2} 0.5 0.5 0.3 0.4\n")
    yaml = "train: images/train\nval: images/val\nnames: [cat, dog]\n"
    (folder / "data.yaml").write_text(yaml)
    (folder / "three.yaml").write_text(yaml.replace("[cat, dog]", "[cat, dog, cow]"))
    model = DetectionModel("yolov5n.yaml", nc=2)
    meta = {"yaml": model.yaml, "names": {0: "cat", 1: "dog"}, "nc": 2}
    save_checkpoint(folder / "model.pt", model.state_dict(), meta)
    return folder


def flags(small, tmp_path, **changes):
    values = {"weights": small / "model.pt", "data": small / "data.yaml", "img": 64, "workers": 0, "device": "cpu"}
    values |= {"project": tmp_path} | changes
    return [f"--{key}={value}" for key, value in values.items()]


def test_a_whole_run(small, tmp_path, capsys):
    argv = [*flags(small, tmp_path, batch=2), "--save-txt", "--save-conf", "--save-json", "--max-det=20"]
    assert val.main(argv) == 0
    out = capsys.readouterr().out
    for text in ("mAP50-95", "all ", "cat ", "dog ", "COCO AP", "Speed: ", f"Results saved to {tmp_path / 'exp'}"):
        assert text in out
    written = {f.name for f in (tmp_path / "exp").iterdir()}
    curves = {f"{name}_curve.png" for name in ("PR", "F1", "P", "R")} | {"confusion_matrix.png"}
    pictures = {f"val_batch{i}_{kind}.jpg" for i in range(2) for kind in ("labels", "pred")}
    assert written == curves | pictures | {"labels", "model_predictions.json"}
    saved = json.loads((tmp_path / "exp" / "model_predictions.json").read_text())
    lines = [line for f in (tmp_path / "exp" / "labels").iterdir() for line in f.read_text().splitlines()]
    assert len(lines) == len(saved) > 0
    assert all(len(line.split()) == 6 for line in lines)


def test_run_from_python_gives_metrics_and_augment_works(small, tmp_path):
    settings = {"data": small / "data.yaml", "project": tmp_path, "imgsz": 64, "device": "cpu", "noplots": True}
    metrics = val.run(weights=small / "model.pt", augment=True, workers=0, **settings)
    assert metrics.images == 3 and metrics.labels == 3 and "AP" in metrics.coco
    with pytest.raises(ConfigError, match="did you mean 'imgsz'"):
        val.run(imgszz=64)


def test_speed_task_is_square_and_draws_nothing(small, tmp_path):
    metrics = val.run(**dict(flag[2:].split("=") for flag in flags(small, tmp_path)), task="speed")
    assert metrics.shape[2:] == (64, 64)
    assert not list((tmp_path / "exp").iterdir())


def test_study(small, tmp_path, monkeypatch):
    monkeypatch.setattr(val, "STUDY_SIZES", (64, 96))
    assert val.main([*flags(small, tmp_path), "--task=study"]) == 0
    rows = np.loadtxt(tmp_path / "exp" / "study_data_model.txt")
    assert rows.shape == (2, 11) and rows[:, 0].tolist() == [64, 96]
    assert (tmp_path / "exp" / "study.png").exists()


def test_a_study_of_two_files_of_one_name(small, tmp_path, monkeypatch):
    monkeypatch.setattr(val, "STUDY_SIZES", (64,))
    argv = flags(small, tmp_path)
    place = next(i for i, word in enumerate(argv) if word.startswith("--weights"))
    weights = argv[place].partition("=")[2] or argv[place + 1]
    again = tmp_path / "again" / Path(weights).name
    again.parent.mkdir()
    again.write_bytes(Path(weights).read_bytes())
    argv[place : place + 1 + ("=" not in argv[place])] = ["--weights", weights, str(again)]
    assert val.main([*argv, "--task=study", "--noplots"]) == 0
    names = sorted(path.name for path in (tmp_path / "exp").glob("study*.txt"))
    assert names == ["study_data_model-2.txt", "study_data_model.txt"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weights": "none.pt"}, CheckpointError, "--weights none.pt: no such file"),
        ({"data": "none.yaml"}, DataError, "--data none.yaml: no such file"),
        ({"task": "test"}, DataError, "has no 'test:' entry"),
        ({"conf-thres": 1.5}, ConfigError, "--conf-thres 1.5"),
        ({"iou-thres": 60}, ConfigError, "--iou-thres 60"),
        ({"batch": 0}, ConfigError, "--batch-size 0"),
        ({"img": 0}, ConfigError, "--imgsz 0"),
        ({"device": "7"}, ConfigError, "--device 7"),
        ({"cuda-graphs": "on"}, ConfigError, "--cuda-graphs on: they need a CUDA device, not cpu"),
        ({"task": "valid"}, ConfigError, "--task"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_no_folder(small, tmp_path, changes, error, message):
    with pytest.raises(error, match=message) as caught:
        val.main(flags(small, tmp_path, **changes))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_other_number_of_classes(small, tmp_path):
    argv = flags(small, tmp_path, data=small / "three.yaml")
    with pytest.raises(ConfigError, match=r"model.pt has 2 classes \(cat, dog\) but .*three.yaml has 3"):
        val.main(argv)
    assert val.main([*argv, "--single-cls", "--noplots"]) == 0


def test_empty_image_folder(small, tmp_path):
    (tmp_path / "nothing").mkdir()
    (tmp_path / "empty.yaml").write_text("train: nothing\nval: nothing\nnames: [cat, dog]\n")
    with pytest.raises(DataError, match="nothing"):
        val.main(flags(small, tmp_path / "runs", data=tmp_path / "empty.yaml"))


def test_save_conf_alone_and_absent_flags():
    with pytest.raises(ConfigError, match="add --save-txt"):
        val.main(["--save-conf"])
    with pytest.raises(ConfigError, match="--dnn: OpenCV"):
        val.main(["--dnn"])


def test_exit_status_of_the_script():
    done = subprocess.run(
        [sys.executable, "val.py", "--weights", "none.pt"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: --weights none.pt") and done.stderr.count("\n") == 1


def test_a_backbone_deeper_than_its_outputs(small, tmp_path):
    """yolov5-p34 has outputs at strides 8 and 16, but a layer at 32 in between: frames are multiples of that."""
    from models.api import load
    from models.yolo import DetectionModel
    from utils.checkpoint import save_checkpoint

    model = DetectionModel("yolov5-p34.yaml", nc=2)
    meta = {"yaml": model.yaml, "names": {0: "cat", 1: "dog"}, "nc": 2}
    save_checkpoint(tmp_path / "p34.pt", model.state_dict(), meta)
    argv = flags(small, tmp_path, weights=tmp_path / "p34.pt", img=80)
    assert val.main([*argv, "--noplots"]) == 0
    results = load(tmp_path / "p34.pt", "cpu")(np.zeros((64, 96, 3), np.uint8), size=80)
    assert results.s == (1, 3, 64, 96)


@pytest.mark.parametrize(
    ("flags", "batches", "graphs"),
    [
        ([], 39, False),
        ([], 40, True),
        (["--batch-size", "8"], 1, True),
        (["--cuda-graphs", "on"], 1, True),
        (["--cuda-graphs", "off"], 99, False),
        (["--batch-size", "8", "--augment"], 99, False),
    ],
)
def test_small_batches_and_many_alike_become_graphs(flags: list[str], batches: int, graphs: bool) -> None:
    args = val.build_parser().parse_args(["--weights", "best.pt", *flags])
    assert val.uses_graphs(args, torch.device("cuda", 0), batches) == graphs


def test_half_on_a_cpu_that_has_bfloat16(small, tmp_path, monkeypatch, caplog) -> None:
    seen, evaluate = [], engine.evaluator.evaluate

    def spy(*args, **settings):
        seen.append(settings["amp_dtype"])
        return evaluate(*args, **settings)

    monkeypatch.setattr(engine.evaluator, "evaluate", spy)
    monkeypatch.setattr("utils.device.cpu_has_bfloat16", lambda: True)
    files = dict(weights=small / "model.pt", data=small / "data.yaml", project=tmp_path)
    for half in (False, True):
        val.run(**files, imgsz=64, device="cpu", workers=0, noplots=True, half=half)
    assert seen == [None, torch.bfloat16] and "--half" not in caplog.text


@pytest.mark.parametrize("flags", [["--augment"], ["--task", "study"]])
def test_a_file_of_one_size_is_not_asked_for_others(flags: list[str], small, tmp_path, monkeypatch) -> None:
    model = torch.nn.Module()
    model.imgsz, model.names = (64, 64), {0: "cat", 1: "dog"}
    monkeypatch.setattr("deploy.runtime.open_model", lambda *args: model)
    argv = ["--weights", str(small / "model.pt"), "--data", str(small / "data.yaml"), "--device", "cpu"]
    with pytest.raises(ConfigError, match=f"{flags[0]}.*takes one image size"):
        val.main([*argv, *flags, "--project", str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists()


def test_helpers_change_nothing(small, tmp_path, monkeypatch, capsys):
    """Where there are cores to spare, other processes draw and compute COCO's numbers: the same words and files."""
    said, files = [], []
    for cores in (2, 16):
        monkeypatch.setattr(helpers, "available_cores", lambda cores=cores: cores)
        assert val.main([*flags(small, tmp_path, name=f"on{cores}"), "--save-json"]) == 0
        words = capsys.readouterr().out.replace(f"on{cores}", "")
        said.append([line for line in words.splitlines() if line.strip().startswith(("all ", "cat ", "dog ", "COCO "))])
        files.append({file.name: file.read_bytes() for file in (tmp_path / f"on{cores}").iterdir()})
    assert said[0] == said[1] and files[0] == files[1] and (len(said[0]), len(files[0])) == (4, 8)


def test_lost_helpers_cost_diagrams_and_nothing_else(small, tmp_path, monkeypatch, capsys):
    def begin(self, *call, begin=helpers.Helpers.begin):
        for process in multiprocessing.active_children():
            process.kill()
        return begin(self, *call)

    monkeypatch.setattr(helpers, "available_cores", lambda: 16)
    monkeypatch.setattr(helpers.Helpers, "begin", begin)
    with pytest.raises(ResourceError, match="diagrams are missing"):
        val.main([*flags(small, tmp_path), "--save-json"])
    out = capsys.readouterr().out
    assert "all " in out and "COCO AP" in out and (tmp_path / "exp" / "model_predictions.json").is_file()
    assert val.main([*flags(small, tmp_path), "--noplots"]) == 0


@pytest.mark.parametrize("cores", [2, 16])
def test_a_package_that_is_there_and_does_not_load(small, tmp_path, monkeypatch, caplog, capsys, cores):
    """Its compiled part may be for another machine."""
    (tmp_path / "faster_coco_eval").mkdir()
    (tmp_path / "faster_coco_eval" / "__init__.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.startswith("faster_coco_eval")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(helpers, "available_cores", lambda: cores)
    assert val.main(flags(small, tmp_path, project=tmp_path / "runs")) == 0
    assert "COCO AP needs a package" in caplog.text and "all " in capsys.readouterr().out
    assert (tmp_path / "runs" / "exp" / "PR_curve.png").is_file()


def test_cocos_own_annotations_count(small, tmp_path, capsys):
    """Those of val2017, and a damaged file is refused before there is a folder."""
    from models.yolo import DetectionModel
    from utils.checkpoint import save_checkpoint

    model, names = DetectionModel("yolov5n.yaml", nc=80), {number: str(number) for number in range(80)}
    save_checkpoint(tmp_path / "coco.pt", model.state_dict(), {"yaml": model.yaml, "names": names, "nc": 80})
    for part, ending in (("images", "png"), ("labels", "txt")):
        (tmp_path / "coco" / part / "val2017").mkdir(parents=True)
        for number in range(3):
            file = tmp_path / "coco" / part / "val2017" / f"{number:012}.{ending}"
            file.write_bytes((small / part / "val" / f"{number}.{ending}").read_bytes())
    (tmp_path / "coco.yaml").write_text(f"path: coco\ntrain: images/val2017\nval: images/val2017\nnames: {names}\n")
    annotations = tmp_path / "coco" / "annotations" / "instances_val2017.json"
    annotations.parent.mkdir()
    annotations.write_text("{}")
    argv = flags(small, tmp_path, data=tmp_path / "coco.yaml", weights=tmp_path / "coco.pt", project=tmp_path / "runs")
    with pytest.raises(DataError, match=r"instances_val2017\.json: not a COCO annotation file"):
        val.main([*argv, "--noplots"])
    assert not (tmp_path / "runs").exists()
    label = {"id": 1, "image_id": 1, "category_id": 90, "bbox": [0, 0, 1, 1], "area": 1, "segmentation": [[0, 0]]}
    images, categories = [{"id": number} for number in range(3)], [{"id": number} for number in (1, 2, 90)]
    annotations.write_text(json.dumps({"images": images, "annotations": [label], "categories": categories}))
    assert val.main([*argv, "--noplots"]) == 0
    out = capsys.readouterr().out
    assert f"against {annotations})" in out and "AP_large -1.000" in out  # the labels, large, are not looked at
