"""YOLOv5's checkpoints: found, rebuilt, refused by name. The files are imitations (scripts/upstream_imitation.py) but
for tests/reference/upstream_format_stripped.pt, which upstream's own code wrote."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models import load
from models.convert import convert, main
from models.loading import build_or_load, load_model
from models.upstream import Upstream, read_weights
from models.yolo import DetectionModel
from scripts.upstream_imitation import checkpoint, imitate, stand_in, write
from tests.models.reference import FOLDER, fill, image, stored
from utils.checkpoint import read_checkpoint
from utils.errors import CheckpointError, ConfigError

ROOT = Path(__file__).resolve().parents[2]
STRIPPED = FOLDER / "upstream_format_stripped.pt"
NAMES = {0: "red", 1: "white", 2: "platelet"}


def model_of(cfg: str | dict, nc: int = 3, **changes) -> DetectionModel:
    model = fill(DetectionModel(cfg, nc=nc, **changes))
    model.names = {number: f"name {number}" for number in range(nc)}
    return model


@pytest.fixture(scope="module")
def nano() -> DetectionModel:
    return model_of("yolov5n.yaml")


@torch.no_grad()
def outputs(model: torch.nn.Module, side: int = 64) -> torch.Tensor:
    return model(image((1, 3, side, side)))[0]


def same(model: DetectionModel, other: DetectionModel, side: int = 64) -> bool:
    """Whether ``model`` has the weights of ``other`` in half precision, and its outputs up to the order of sums."""
    halved = copy.deepcopy(other).half().float().eval()
    weights = all(torch.equal(value, halved.state_dict()[key]) for key, value in model.state_dict().items())
    return weights and torch.allclose(outputs(model, side), outputs(halved, side), rtol=1e-4, atol=0.05)


# -- the file that upstream wrote -------------------------------------------------------------------------------------


def test_upstreams_own_file_gives_its_weights() -> None:
    expected = stored("upstream_format_ckpt.json")
    found = read_weights(STRIPPED)
    assert isinstance(found, Upstream)
    keys = [
        [key, list(value.shape), "float32" if value.is_floating_point() else "int64"]
        for key, value in found.model.items()
    ]
    assert keys == expected["ema_keys"]
    for key, total in expected["sums"].items():
        assert found.model[key].double().sum().item() == pytest.approx(total, abs=1e-3, rel=1e-3), key
    assert found.meta["nc"] == 3 and found.meta["names"] == {0: "red", 1: "green", 2: "blue"}
    assert found.meta["stride"] == [8, 16, 32] and found.meta["anchors"][0][:2] == [10, 13]
    assert found.meta["hyp"]["lr0"] == 0.01 and "epoch" not in found.meta
    assert found.meta["yaml"]["width_multiple"] == 0.02


@torch.no_grad()
def test_upstreams_own_file_gives_its_outputs() -> None:
    expected = stored("upstream_format_ckpt.json")
    decoded = load_model(STRIPPED, fuse=False)(image((1, 3, 64, 96), "input"))[0]
    assert list(decoded.shape) == expected["decoded_shape"]
    assert decoded[0, 0].tolist() == pytest.approx(expected["decoded_first"], abs=1e-3)
    assert decoded[0, -1].tolist() == pytest.approx(expected["decoded_last"], abs=1e-3)
    assert decoded.mean().item() == pytest.approx(expected["decoded_mean"], abs=1e-3)


def test_the_python_way_in_opens_it() -> None:
    assert load(STRIPPED, "cpu").names == {0: "red", 1: "green", 2: "blue"}


# -- forms and ages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("half", [True, False])
def test_both_forms_of_torch_files(zipped: bool, half: bool, nano: DetectionModel, tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", checkpoint(imitate(nano, half=half)), zipped)
    model = load_model(path, fuse=False)
    assert same(model, nano) if half else torch.equal(outputs(model), outputs(load_model(path, fuse=False)))
    assert model.names == nano.names and model.detect.stride.tolist() == [8, 16, 32]


def test_the_average_comes_first_and_the_rest_is_left_out(nano: DetectionModel, tmp_path: Path) -> None:
    raw = copy.deepcopy(nano)
    raw.model[0].conv.weight.data.zero_()
    content = checkpoint(imitate(raw), ema=imitate(nano), epoch=7, optimizer={"state": {}}, updates=12)
    found = read_weights(write(tmp_path / "a.pt", content))
    assert found.model["model.0.conv.weight"].any() and found.meta["epoch"] == 7
    assert found.left_out == ["model", "updates", "optimizer", "opt", "git"]
    pair = read_weights(write(tmp_path / "b.pt", checkpoint(imitate(raw), ema=(imitate(nano), 5))))
    assert pair.model["model.0.conv.weight"].any()


def test_old_releases_lack_attributes_and_are_called_model(nano: DetectionModel, tmp_path: Path) -> None:
    old = imitate(
        nano, {"DetectionModel": "models.yolo.Model"}, stride=None, hyp=None, inplace=None, names=None, save=None
    )
    detect = old.__dict__["_modules"]["model"].__dict__["_modules"]["24"].__dict__
    detect["_buffers"]["anchor_grid"] = torch.zeros(3, 1, 3, 1, 1, 2)
    content = {"epoch": 3, "best_fitness": 0.5, "training_results": "text", "model": old, "optimizer": None}
    found = read_weights(write(tmp_path / "a.pt", content))
    assert found.meta["source"] == "YOLOv5, models.yolo.Model" and "model.24.anchor_grid" not in found.model
    model = load_model(tmp_path / "a.pt", fuse=False)
    assert same(model, nano) and model.names == {0: "0", 1: "1", 2: "2"}
    assert read_weights(write(tmp_path / "b.pt", old)).model.keys() == found.model.keys()  # torch.save(model)
    wrapped = stand_in("torch.nn.parallel.data_parallel.DataParallel", {"_modules": {"module": imitate(nano)}})
    assert same(load_model(write(tmp_path / "c.pt", checkpoint(wrapped)), fuse=False), nano)


V5 = [[-1, 1, "Focus", [64, 3]], [-1, 1, "Conv", [128, 3, 2]], [-1, 3, "C3", [128]], [-1, 1, "Conv", [256, 3, 2]]]
V5 += [[-1, 9, "C3", [256]], [-1, 1, "Conv", [512, 3, 2]], [-1, 1, "SPP", [512, [5, 9, 13]]]]
ERAS = {
    "v5: Focus, SPP": ({}, {}),
    "v4: LeakyReLU": ({"activation": "nn.LeakyReLU(0.1)"}, {}),
    "v3: Hardswish": ({"activation": "nn.Hardswish"}, {"Hardswish": "utils.activations.Hardswish"}),
}


def era(**changes) -> dict:
    """The shape of a release before 6.0."""
    swap = changes.pop("csp", False)
    rows = [[f, n, "BottleneckCSP" if swap and block == "C3" else block, args] for f, n, block, args in V5]
    head = [[[-1], 1, "Detect", ["nc", "anchors"]]]
    common = {"nc": 3, "depth_multiple": 0.33, "width_multiple": 0.25, "anchors": [[10, 13, 16, 30, 33, 23]]}
    return {**common, "backbone": rows, "head": head, **changes}


@pytest.mark.parametrize("name", ERAS)
def test_activations_are_taken_from_the_modules(name: str, tmp_path: Path) -> None:
    """Old releases had them in the code, not in the YAML."""
    changes, classes = ERAS[name]
    model = model_of(era(**changes))
    model.yaml.pop("activation", None)
    path = write(tmp_path / "a.pt", checkpoint(imitate(model, classes)))
    found = load_model(path, fuse=False)
    assert same(found, model)
    assert found.yaml.get("activation") == changes.get("activation")
    convert(path, tmp_path / "ours.pt")
    assert torch.equal(outputs(load_model(tmp_path / "ours.pt", fuse=False)), outputs(found))


def test_csp_blocks_have_an_activation_of_their_own(tmp_path: Path) -> None:
    """Release 3: Hardswish everywhere but in BottleneckCSP, where LeakyReLU stayed."""
    model = model_of(era(csp=True, activation="nn.Hardswish", csp_activation="nn.LeakyReLU(0.1)"))
    for key in ("activation", "csp_activation"):
        model.yaml.pop(key)
    found = load_model(write(tmp_path / "a.pt", checkpoint(imitate(model))), fuse=False)
    assert same(found, model)
    assert isinstance(found.model[2].act, torch.nn.LeakyReLU) and isinstance(
        found.model[0].conv.act, torch.nn.Hardswish
    )


@pytest.mark.parametrize(
    "cfg",
    [
        "hub/yolov5n6.yaml",
        "yolov5n-dcn.yaml",
        "hub/yolov5s-ghost.yaml",
        "hub/yolov3-tiny.yaml",
        "hub/yolov5s-transformer.yaml",
    ],
)
def test_other_architectures(cfg: str, tmp_path: Path) -> None:
    model = model_of(cfg)
    found = load_model(write(tmp_path / "a.pt", checkpoint(imitate(model))), fuse=False)
    assert same(found, model, side=128)


def test_depthwise_convolutions_were_plain_ones_once(tmp_path: Path) -> None:
    rows = [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "GhostBottleneck", [16, 3, 2]]]
    model = model_of(era(backbone=rows, depth_multiple=1.0, width_multiple=1.0))
    path = write(tmp_path / "a.pt", checkpoint(imitate(model, {"DWConv": "models.common.Conv"})))
    assert same(load_model(path, fuse=False), model)


def test_the_articles_layers_keep_their_names(tmp_path: Path) -> None:
    """The article's DCN has weight, bias and conv_offset_mask, no norm and no activation."""
    model = model_of("yolov5n-dcn.yaml")
    found = read_weights(write(tmp_path / "a.pt", checkpoint(imitate(model))))
    assert found.model["model.1.conv_offset_mask.weight"].shape[0] == 27
    assert {key.split(".", 2)[2] for key in found.model if key.startswith("model.1.")} == {
        "weight",
        "bias",
        "conv_offset_mask.weight",
        "conv_offset_mask.bias",
    }


def test_paths_of_windows_and_classes_in_the_yaml(nano: DetectionModel, tmp_path: Path) -> None:
    description = copy.deepcopy(nano.yaml)
    description["backbone"][0][2] = type("Conv", (), {"__module__": "models.common"})
    description["head"][1][2] = type("Upsample", (), {"__module__": "torch.nn.modules.upsampling"})
    windows = type("WindowsPath", (), {"__module__": "pathlib", "__reduce__": lambda self: (type(self), ("C:\\", "x"))})
    content = checkpoint(imitate(nano, yaml=description), opt={"save_dir": windows()})
    assert same(load_model(write(tmp_path / "a.pt", content), fuse=False), nano)


# -- what is not as it should be --------------------------------------------------------------------------------------


def refusal(path: Path, read=load_model) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(path)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ")


def test_modules_that_are_unknown_or_different_are_named(nano: DetectionModel, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    description = copy.deepcopy(nano.yaml)
    description["backbone"][2][2] = "C3_Attention"
    write(path, checkpoint(imitate(nano, {"C3": "models.common.C3_Attention"}, yaml=description)))
    assert "backbone row 3: unknown block 'C3_Attention'" in refusal(path)
    write(path, checkpoint(imitate(nano, {"SPPF": "models.common.SPPFCSPC"})))
    assert "model.9 is a models.common.SPPFCSPC there, a SPPF here" in refusal(path)
    changed = imitate(nano)
    layer = changed.__dict__["_modules"]["model"].__dict__["_modules"]["1"].__dict__["_modules"]
    layer["conv"].__dict__["stride"] = (1, 1)
    assert "model.1.conv (torch.nn.modules.conv.Conv2d) has stride [1, 1] there, (2, 2) here" in refusal(
        write(path, checkpoint(changed))
    )
    layer["conv"].__dict__["stride"] = (2, 2)
    layer["se"] = stand_in("models.common.SE", {"_parameters": {"w": torch.ones(1)}, "_modules": {}})
    assert "model.1.se is a models.common.SE there and absent here" in refusal(write(path, checkpoint(changed)))


def test_other_tasks_and_later_versions(nano: DetectionModel, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for ours, theirs, words in [
        ("DetectionModel", "models.yolo.SegmentationModel", "a segmentation model (models.yolo.SegmentationModel)"),
        ("Detect", "models.yolo.Segment", "a segmentation model (models.yolo.Segment)"),
        ("DetectionModel", "models.yolo.ClassificationModel", "a classification model"),
        ("DetectionModel", "ultralytics.nn.tasks.DetectionModel", "a model of YOLOv8 or later"),
    ]:
        assert words in refusal(write(path, checkpoint(imitate(nano, {ours: theirs}))))


def test_files_without_a_model_or_a_description(nano: DetectionModel, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    assert "without a model description (yaml)" in refusal(write(path, checkpoint(imitate(nano, yaml=None))))
    assert "no weights found in it (it holds a dict of epoch, date)" in refusal(write(path, {"epoch": 1, "date": "x"}))
    assert "no weights found in it" in refusal(write(path, stand_in("models.yolo.Model", {"yaml": {}})))
    assert "it holds a list" in refusal(write(path, [1]))
    for content in (nano.state_dict(), {"state_dict": nano.state_dict()}, {"model": nano.state_dict(), "epoch": 3}):
        assert "add --cfg with its YAML" in refusal(write(path, content))
        model, report = build_or_load("yolov5n.yaml", path, nc=3)
        assert report.transferred == 348 and report.missing == ["model.24.anchors"]
    parallel = {f"module.{key}": value for key, value in nano.state_dict().items()}
    assert build_or_load("yolov5n.yaml", write(path, parallel), nc=3)[1].transferred == 348


def test_a_description_cannot_ask_for_all_memory(nano: DetectionModel, tmp_path: Path) -> None:
    for key, value, words in [
        ("width_multiple", 100.0, "parameters|they do not belong together"),
        ("width_multiple", 4.0, "the model it describes, .* has .* values but it holds 1,"),
        ("depth_multiple", 1e6, "repeats|blocks"),
        ("depth_multiple", 1e308, "repeats|blocks"),
        ("nc", 10**9, "describes a model|parameters"),
    ]:
        changed = {**nano.yaml, key: value}
        path = write(tmp_path / "a.pt", checkpoint(imitate(nano, yaml=changed, nc=changed["nc"], names=None)))
        with pytest.raises(CheckpointError, match=words):
            load_model(path)


GROWING = [
    [-1, 1, "nn.Upsample", ["None", 4000, "nearest"]],
    [-1, 1, "nn.ZeroPad2d", [4000]],
    [-1, 1, "Conv", [8, 1, 1, 4000]],
    [-1, 1, "nn.ConvTranspose2d", [8, 1, 4000]],
]


@pytest.mark.parametrize("row", GROWING, ids=lambda row: row[2])
def test_a_description_cannot_ask_for_huge_maps(row: list, tmp_path: Path) -> None:
    small = model_of(era(backbone=[[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [8, 1]]]))
    grown = {**small.yaml, "backbone": [small.yaml["backbone"][0], row]}
    path = write(tmp_path / "a.pt", checkpoint(imitate(small, yaml=grown)))
    assert "layer 1 makes a map of" in refusal(path)
    wide = {**small.yaml, "ch": 50_000, "backbone": [[-1, 1, "Conv", [8, 1, 2]], small.yaml["backbone"][1]]}
    assert "50000 input channels" in refusal(write(path, checkpoint(imitate(small, yaml=wide))))


class Payload:
    """Pickles as a call."""

    def __init__(self, call: tuple) -> None:
        self.call = call

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("place", ["hyp", "names", "yaml", "layer", "parameter", "opt"])
def test_code_hidden_in_a_model_never_runs(place: str, nano: DetectionModel, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    payload = Payload((subprocess.check_call, (["touch", str(mark)],)))
    model = imitate(nano, **({place: {"x": [payload]}} if place in ("hyp", "names", "yaml") else {}))
    layer = model.__dict__["_modules"]["model"].__dict__["_modules"]["0"].__dict__["_modules"]["conv"].__dict__
    if place == "layer":
        layer["forward"] = payload
    elif place == "parameter":
        layer["_parameters"]["weight"] = payload
    path = write(tmp_path / "a.pt", checkpoint(model, **({"opt": payload} if place == "opt" else {})))
    for read in (load_model, read_weights, read_checkpoint, lambda p: convert(p, tmp_path / "out.pt")):
        assert "calls subprocess.check_call, which is not allowed; nothing in the file was run" in refusal(path, read)
    assert not mark.exists() and [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_no_class_of_the_file_is_imported(nano: DetectionModel, tmp_path: Path) -> None:
    """A module of the file's name lies on the path; importing it would leave a mark."""
    (tmp_path / "their_code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Model: pass\n")
    path = write(tmp_path / "a.pt", checkpoint(imitate(nano, {"DetectionModel": "their_code.Model"})))
    code = f"from models.loading import load_model; print(load_model({str(path)!r}).nc)"
    env = {"PYTHONPATH": f"{ROOT}:{tmp_path}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "3", done.stderr
    assert not (tmp_path / "ran").exists()


# -- train and convert ------------------------------------------------------------------------------------------------


def test_training_takes_what_fits(nano: DetectionModel, tmp_path: Path, caplog) -> None:
    path = write(tmp_path / "a.pt", checkpoint(imitate(nano)))
    model, report = build_or_load(None, path, nc=5)
    assert (report.transferred, report.total) == (343, 349) and model.nc == 5
    model, report = build_or_load("yolov5n-dcn.yaml", path, nc=3)
    assert report.missing[0] == "model.1.weight" and report.transferred > 300


def test_convert_says_what_it_found(tmp_path: Path, capsys) -> None:
    out = tmp_path / "ours.pt"
    main([str(STRIPPED), "-o", str(out)])
    text = capsys.readouterr().out
    assert "YOLOv5, models.yolo.DetectionModel, 25,232 parameters in float16, 3 classes (red, green, blue)" in text
    assert "strides 8/16/32, epoch not recorded (a finished run's file); left out: opt, git" in text
    assert f"Saved to {out}" in text
    ours = read_checkpoint(out)
    assert ours.train is None and "opt" not in ours.meta
    assert torch.equal(outputs(load_model(out)), outputs(load_model(STRIPPED)))
    assert torch.load(out, weights_only=True)["meta"]["names"] == {0: "red", 1: "green", 2: "blue"}


def test_convert_of_bare_tensors(nano: DetectionModel, tmp_path: Path) -> None:
    bare = write(tmp_path / "bare.pt", {"state_dict": nano.state_dict()})
    text = convert(bare, tmp_path / "ours.pt", "yolov5n.yaml")
    assert "a state dict, 1,767,976 parameters in float32, 3 classes (0, 1, 2)" in text
    assert torch.equal(outputs(load_model(tmp_path / "ours.pt")), outputs(load_model(tmp_path / "ours.pt")))


def test_what_convert_refuses(nano: DetectionModel, tmp_path: Path) -> None:
    bare = write(tmp_path / "bare.pt", nano.state_dict())
    with pytest.raises(CheckpointError, match="is the file to convert"):
        convert(bare, bare, "yolov5n.yaml")
    with pytest.raises(CheckpointError, match="do not fill its own model"):
        convert(bare, tmp_path / "o.pt", "yolov5n-dcn.yaml")
    with pytest.raises(ConfigError, match="no such model YAML"):
        convert(bare, tmp_path / "o.pt", "nothing.yaml")
    ours = tmp_path / "ours.pt"
    convert(STRIPPED, ours)
    with pytest.raises(CheckpointError, match="a checkpoint of this program already"):
        convert(ours, tmp_path / "o.pt")
    with pytest.raises(ConfigError, match="--output"):
        main([str(bare)])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bare.pt", "ours.pt"]


ODD_META = [("nc", 10**9, "describes a model|parameters"), ("names", 7, "0 class names for 3 classes")]
ODD_META += [("names", {"a": "b"}, "must be numbered 0..2"), ("yaml", [1], "without a model description")]


@pytest.mark.parametrize(("key", "value", "words"), ODD_META)
def test_what_a_file_of_ours_says_is_checked_too(key: str, value: object, words: str, nano, tmp_path: Path) -> None:
    meta = {"yaml": nano.yaml, "nc": 3, "names": nano.names, key: value}
    path = write(tmp_path / "a.pt", {"format": 1, "model": nano.state_dict(), "meta": meta, "train": None})
    with pytest.raises((CheckpointError, ConfigError), match=words):
        load_model(path)


def test_objects_in_a_file_of_ours_are_named(nano: DetectionModel, tmp_path: Path) -> None:
    for value, words in [
        (stand_in("a.B"), "an object, a.B"),
        (torch.ones(1), "an object, Tensor"),
        ({1}, "object, set"),
    ]:
        content = {"format": 1, "model": nano.state_dict(), "meta": {"x": [value]}, "train": None}
        assert words in refusal(write(tmp_path / "a.pt", content))
