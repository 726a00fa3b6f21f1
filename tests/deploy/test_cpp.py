"""The C++ programs of deploy/cpp: their common part gives detect.py's boxes; main.cpp of TensorRT compiles."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from deploy.metadata import Metadata
from deploy.tensorrt.engine_file import Maker, pack_engine
from engine.predictor import whole_pixels
from models.api import Detector, to_original
from models.loading import load_model
from models.results import draw_boxes
from tests.deploy.conftest import CELLS
from utils.augmentations import letterbox
from utils.images import read_image
from utils.labels import format_detections
from utils.nms import non_max_suppression

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COMMON = [
    ROOT / "deploy" / "cpp" / f"{name}.cpp"
    for name in ("detections engine_file letterbox metadata options program").split()
]
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'deploy' / 'cpp'}"]
NAMES = ("RBC", 'W"B\\C', "Plättchen 血\N{WINE GLASS}")
SIZE = 320
OPENCV = next(
    (folder for folder in map(Path, ("/usr/include/opencv4", "/usr/local/include/opencv4")) if folder.is_dir()), None
)
PICTURES = ["ppm"] + (["opencv"] if OPENCV else [])
"""What the program may be built to read: the second where OpenCV's headers are installed."""
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or "c++"


def compiled(sources: Sequence[Path], target: Path, *flags: str) -> Path:
    command = [COMPILER, *FLAGS, *map(str, sources), "-o", str(target), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return target


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``built(kind)``: the program with pictures_KIND.cpp, compiled once."""

    @lru_cache
    def build(kind: str) -> Path:
        folder, libraries = tmp_path_factory.mktemp(kind), []
        if kind == "opencv":
            libraries = ["-isystem", str(OPENCV), "-lopencv_imgcodecs", "-lopencv_imgproc", "-lopencv_core"]
        own = [ROOT / "deploy" / "cpp" / f"pictures_{kind}.cpp", HERE / "cpp" / "replay.cpp"]
        return compiled([*COMMON, *own], folder / "replay", *libraries)

    return build


@pytest.fixture(params=PICTURES)
def program(request: pytest.FixtureRequest, built: Callable[[str], Path]) -> Path:
    return built(request.param)


def pack(path: Path, records: bytes, **meta) -> Path:
    """An .engine whose engine are the records."""
    told = Metadata(NAMES, 32, (8.0, 16.0, 32.0), (SIZE, SIZE), **meta)
    path.write_bytes(pack_engine(records, told, Maker("tensorrt", "10.0", (86, 89), "libdcnv2.so")))
    return path


def record(image: np.ndarray, predictions: np.ndarray, auto: bool) -> bytes:
    boxed, _ = letterbox(image, SIZE, auto=auto)
    planes = boxed.transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    head = np.array([*boxed.shape[:2], len(predictions)], np.int32)
    return head.tobytes() + planes.tobytes() + predictions.astype(np.float32).tobytes()


def save(image: np.ndarray, path: Path) -> None:
    assert cv2.imwrite(str(path), image[:, :, ::-1])


def run(program: Path, *words: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run([program, *map(str, words)], capture_output=True, text=True, check=False)


def labels_of(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text() for path in sorted((folder / "labels").iterdir())}


class Case:
    """Pictures in a folder and an .engine that replays what a model gave for them."""

    def __init__(self, folder: Path, images: dict[str, np.ndarray], model: Callable, dynamic: bool, batch: int) -> None:
        self.images, self.decoded, self.dynamic = dict(sorted(images.items())), {}, dynamic
        self.source = folder / "pictures"
        self.source.mkdir(parents=True)
        records = b""
        for name, image in self.images.items():
            save(image, self.source / f"{name}.ppm")
            boxed, _ = letterbox(image, SIZE, auto=dynamic)
            self.decoded[name] = model(boxed)
            records += record(image, self.decoded[name].numpy(), dynamic)
        self.model = pack(folder / "replay.engine", records, dynamic=dynamic, batch=batch)

    def expected(self, **limits) -> dict[str, str]:
        """The label files that detect.py would write."""
        texts = {}
        for name, image in self.images.items():
            boxed, box = letterbox(image, SIZE, auto=self.dynamic)
            (found,) = non_max_suppression(self.decoded[name][None], **{"max_det": 1000, **limits})
            rows = whole_pixels(to_original(found, boxed.shape[:2], box)).flip(0).numpy()
            if len(rows):
                texts[name] = format_detections(rows, image.shape[:2], with_confidence=True)
        return texts


@pytest.fixture(scope="module", params=[True, False], ids=["any-size", "one-size"])
def cells(request: pytest.FixtureRequest, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Pictures of blood cells of three shapes, through the trained model."""
    images = {path.stem: read_image(path) for path in sorted(CELLS.glob("*.jpg"))[:6]}
    first, second = list(images.values())[:2]
    images["tall"] = np.ascontiguousarray(first[:, :150])
    images["large"] = cv2.resize(second, (1111, 777))
    model = load_model(weights, fuse=True)

    @torch.no_grad()
    def decoded(boxed: np.ndarray) -> torch.Tensor:
        return model(torch.from_numpy(boxed.transpose(2, 0, 1)[None].astype(np.float32) / 255))[0][0]

    return Case(tmp_path_factory.mktemp("cells"), images, decoded, request.param, batch=4)


@pytest.mark.parametrize("batch", [1, 3])
def test_boxes_are_those_of_detect(program: Path, cells: Case, batch: int, tmp_path: Path) -> None:
    done = run(program, "-d", cells.model, cells.source, "--img", SIZE, "--save-txt", "--save-conf",
               "--batch-size", batch, "--project", tmp_path, "--name", "run")  # fmt: skip
    assert done.returncode == 0, done.stderr
    found, expected = labels_of(tmp_path / "run"), cells.expected()
    assert sum(text.count("\n") for text in expected.values()) > 50
    assert found == expected
    assert len(list((tmp_path / "run").glob("*.*"))) == len(cells.images)


def test_the_case_is_what_detect_does(weights: Path, cells: Case) -> None:
    """What the tests here expect is what Detector gives, so that they compare with the real thing."""
    detector = Detector(load_model(weights, fuse=True), torch.device("cpu"), max_det=1000)
    detector.imgsz = None if cells.dynamic else (SIZE, SIZE)
    name, image = next(iter(cells.images.items()))
    ((rows,), _, _) = detector.detect([image], (SIZE, SIZE))
    text = format_detections(whole_pixels(rows).flip(0).numpy(), image.shape[:2], with_confidence=True)
    found = np.array([line.split() for line in text.splitlines()], float)
    expected = np.array([line.split() for line in cells.expected()[name].splitlines()], float)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize(
    ("flags", "limits"),
    [
        (["--conf-thres", "0.01", "--iou-thres", "0.3"], {"conf_thres": 0.01, "iou_thres": 0.3}),
        (["--max-det", "7"], {"max_det": 7}),
        (["--classes", "0", "2"], {"classes": [0, 2]}),
        (["--agnostic-nms", "--conf-thres", "0.1"], {"agnostic": True, "conf_thres": 0.1}),
        (["--conf-thres", "0.999"], {"conf_thres": 0.999}),
    ],
)
def test_suppression_of_a_crowd(program: Path, flags: list[str], limits: dict, tmp_path: Path) -> None:
    """Thousands of boxes on top of each other, with equal scores and values that are no numbers."""
    generator = np.random.default_rng(5)
    rows = np.empty((4000, 8), np.float32)
    rows[:, :2] = generator.integers(0, 320, (4000, 2))
    rows[:, 2:4] = generator.integers(4, 160, (4000, 2))
    rows[:, 4:] = generator.integers(0, 50, (4000, 4)) / 50
    rows[::97, 5], rows[5::97, 2], rows[9::97, 4], rows[11::97, 0] = np.nan, np.inf, np.nan, -4e4
    image = generator.integers(0, 255, (200, 320, 3), np.uint8)
    case = Case(tmp_path, {"noise": image}, lambda _: torch.from_numpy(rows), dynamic=True, batch=1)
    done = run(program, "-d", case.model, case.source, "--img", SIZE, "--save-txt", "--save-conf", "--nosave",
               "--project", tmp_path, "--name", "run", *flags)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert labels_of(tmp_path / "run") == case.expected(**limits)
    assert not list((tmp_path / "run").glob("*.*"))


def test_pictures_look_like_those_of_detect(program: Path, cells: Case, tmp_path: Path) -> None:
    """Boxes to the pixel; the texts on them where this build has OpenCV, whose font differs a little by version."""
    with_texts = program.parent.name.startswith("opencv")
    flags = [] if with_texts else ["--hide-labels"]
    assert run(program, "-d", cells.model, cells.source, "--img", SIZE, "--project", tmp_path, *flags).returncode == 0
    names = dict(enumerate(NAMES))
    for name, image in cells.images.items():
        boxed, box = letterbox(image, SIZE, auto=cells.dynamic)
        (rows,) = non_max_suppression(cells.decoded[name][None], max_det=1000)
        expected = draw_boxes(image, whole_pixels(to_original(rows, boxed.shape[:2], box)), names, labels=with_texts)
        (file,) = (tmp_path / "exp").glob(f"{name}.*")
        found = cv2.imread(str(file))[:, :, ::-1]
        far = (np.abs(found.astype(int) - expected).max(2) > 60).mean()
        assert far < (0.12 if with_texts else 0.003), name
        assert (np.abs(found.astype(int) - image).max(2) > 60).mean() > 0.01  # something is drawn


def test_names_of_any_letters_and_results_that_keep_apart(program: Path, cells: Case, tmp_path: Path) -> None:
    for _ in range(2):
        done = run(
            program, "-d", cells.model, cells.source, "--img", SIZE, "--project", tmp_path, "--nosave", "--save-txt"
        )
        assert done.returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exp", "exp2"]
    assert "RBCs" in done.stdout and NAMES[2] in done.stdout and 'W"B\\C' in done.stdout


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "expected -d MODEL FOLDER"),
        (["-d", "{model}"], "-d {model}: expected a value behind it"),
        (["-d", "nowhere.engine", "{source}"], "nowhere.engine: no such file"),
        (["-d", "{model}", "nowhere"], "nowhere: no such folder or picture"),
        (["-d", "{model}", "{empty}"], "{empty}: holds no pictures"),
        (["-d", "{model}", "{source}", "--conf-thres", "1.5"], "--conf-thres 1.5: must lie between 0 and 1"),
        (["-d", "{model}", "{source}", "--conf-thres", "x"], "--conf-thres x: must lie between 0 and 1"),
        (["-d", "{model}", "{source}", "--max-det", "0"], "--max-det 0: expected a whole number, 1 or more"),
        (["-d", "{model}", "{source}", "--classes", "3"], "--classes 3: this model has classes 0 to 2"),
        (["-d", "{model}", "{source}", "--save-conf"], "--save-conf: a column of the label files"),
        (["-d", "{model}", "{source}", "--weights", "x"], "--weights: unknown flag"),
        (["-d", "{model}", "{source}", "--project", "{model}"], "{model}/exp: cannot make this folder"),
        (["-d", "{cut}", "{source}"], "{cut}: no header of class names and sizes"),
        (["-d", "{headless}", "{source}"], "{headless}: no header of class names and sizes"),
        (["-d", "{bare}", "{source}"], "{bare}: cut short: no engine behind its header"),
        (["-d", "{garbled}", "{source}"], "{garbled}: what it says of itself cannot be read"),
        (["-d", "{astray}", "{source}"], "{astray}: what it says of itself cannot be read"),
        (["-d", "{newer}", "{source}"], "{newer}: written by a newer version"),
        (["-d", "{nameless}", "{source}"], "{nameless}: holds no class names, stride and size"),
    ],
)
def test_wrong_input_is_one_line(program: Path, cells: Case, words: list[str], line: str, tmp_path: Path) -> None:
    whole = cells.model.read_bytes()
    length = 4 + int.from_bytes(whole[:4], "little")
    files = {"cut": whole[: length - 9], "headless": b"vtrt and so on", "bare": whole[:length],
             "garbled": whole.replace(b"strides", b"strid\\x", 1),
             "newer": whole.replace(b'"format": "1"', b'"format": "9"'),
             "astray": whole.replace(b"libdcnv2", b"/ibdcnv2", 1),
             "nameless": whole.replace(b'"imgsz"', b'"imgsy"')}  # fmt: skip
    places = {"model": str(cells.model), "source": str(cells.source), "empty": str(tmp_path / "empty")}
    (tmp_path / "empty").mkdir()
    for name, content in files.items():
        (tmp_path / f"{name}.engine").write_bytes(content)
        places[name] = str(tmp_path / f"{name}.engine")
    done = run(
        program,
        *(word.format(**places) for word in words),
        *(["--project", tmp_path / "runs"] * ("--project" not in words)),
    )
    assert done.returncode == 2
    errors = done.stderr.splitlines()
    assert len(errors) == 1 and errors[0].startswith(f"error: {line.format(**places)}"), done.stderr
    assert not (tmp_path / "runs").exists()


def test_damaged_pictures_are_told_and_left_out(program: Path, cells: Case, tmp_path: Path) -> None:
    pictures = Path(shutil.copytree(cells.source, tmp_path / "pictures"))
    whole = (pictures / "large.ppm").read_bytes()
    (pictures / "a.ppm").write_bytes(b"no picture")
    (pictures / "b.ppm").write_bytes(whole[:1000])
    (pictures / "c.ppm").write_bytes(b"P6\n99999999 9999999\n255\n")
    (pictures / "d.ppm").write_bytes(b"")
    (pictures / "notes.txt").write_text("no picture, and not tried")
    done = run(
        program,
        "-d",
        cells.model,
        pictures,
        "--img",
        SIZE,
        "--save-txt",
        "--save-conf",
        "--nosave",
        "--project",
        tmp_path,
    )
    assert done.returncode == 1
    told = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert [Path(line.split(": ")[1]).name for line in told][:1] == ["a.ppm"]
    names = {Path(line.split(": ")[1]).stem for line in told}
    assert {"a", "c", "d"} <= names <= {"a", "b", "c", "d"}  # OpenCV 4 may fill up a picture that is cut short
    assert labels_of(tmp_path / "exp").items() >= cells.expected().items() if "b" in names else True


def test_header_of_a_file_of_python_reads_as_it_was_written(cells: Case) -> None:
    text = cells.model.read_bytes()[4:]
    entries, _ = json.JSONDecoder().raw_decode(text[: int.from_bytes(cells.model.read_bytes()[:4], "little")].decode())
    assert json.loads(entries["names"]) == list(NAMES) and "\\u" in entries["names"]  # escapes that C++ must undo


def test_tensorrts_program_compiles() -> None:
    """Against declarations of our own, which hold what it uses: the headers are the vendor's, and so is the rest."""
    command = [COMPILER, *FLAGS, "-fsyntax-only", f"-I{HERE / 'cpp' / 'declarations'}"]
    done = subprocess.run(
        [*command, str(ROOT / "deploy" / "tensorrt" / "main.cpp")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
