"""Faults that lie outside the data: memory that runs out, packages that are missing, names and files of odd kinds."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import detect
import val
from utils.checkpoint import save_checkpoint
from utils.errors import ResourceError, explain_memory_error, is_installed, run_cli
from utils.plots import write_image
from utils.signals import interrupts_deferred, sigterm_as_interrupt


@pytest.fixture
def trained(tmp_path: Path, train_cli) -> Path:
    """best.pt of the smallest training."""
    status, _, err = train_cli()
    assert status == 0, err
    return tmp_path / "runs" / "exp" / "weights" / "best.pt"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 37 GiB for an array"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    ],
)
def test_exhausted_memory_is_one_line(error: Exception, capsys) -> None:
    def main(argv: list[str]) -> int:
        raise error

    assert run_cli(main, []) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "memory ran out" in lines[0] and "--batch-size" in lines[0]


def test_other_errors_keep_their_traceback() -> None:
    def main(argv: list[str]) -> int:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError):
        run_cli(main, [])
    assert explain_memory_error(ValueError("x")) is None


def test_val_prints_map_without_faster_coco_eval(
    trained: Path, tiny: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    flags = ["--weights", str(trained), "--data", str(tiny), "--img", "64", "--workers", "0", "--device", "cpu"]
    assert run_cli(val.main, [*flags, "--project", str(tmp_path / "val"), "--save-json"]) == 0
    out = capsys.readouterr().out
    assert "mAP50-95" in out and "pip install faster-coco-eval" in out and "pip install matplotlib" in out
    assert (tmp_path / "val" / "exp" / "best_predictions.json").is_file()


def test_training_without_matplotlib_and_tensorboard(tmp_path: Path, tiny: Path, train_cli, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    base = "--cfg yolov5n.yaml --img 64 --batch 4 --epochs 1 --workers 0 --device cpu".split()
    status, out, err = train_cli(base=[*base, "--project", str(tmp_path / "runs")])
    assert status == 0, err
    assert "pip install matplotlib" in out and "pip install tensorboard" in out
    assert (tmp_path / "runs/exp/weights/best.pt").is_file() and not (tmp_path / "runs/exp/results.png").exists()


def test_is_installed(monkeypatch) -> None:
    assert is_installed("json") and not is_installed("no_such_package_here")
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert not is_installed("pandas")


def test_linked_image_folder_keeps_its_labels(tiny: Path, tmp_path: Path, train_cli) -> None:
    (tmp_path / "store").mkdir()
    (tiny.parent / "images" / "train").rename(tmp_path / "store" / "pictures")
    (tiny.parent / "images" / "train").symlink_to(tmp_path / "store" / "pictures")
    status, out, err = train_cli()
    assert status == 0, err
    assert "8 images, 0 backgrounds" in out


@pytest.mark.parametrize(
    ("names", "hint"), [("[a, null, b]", "None"), ("{0: yes, 1: b}", "quotes"), ("[[a], b]", "['a']")]
)
def test_class_names_must_be_texts(tiny: Path, train_cli, names: str, hint: str) -> None:
    tiny.write_text(f"train: images/train\nval: images/val\nnames: {names}\n")
    status, _, err = train_cli()
    assert status == 2 and f"{tiny}:3: names: class" in err and hint in err and err.count("\n") == 1


def test_a_folder_is_no_weights_file(tmp_path: Path, train_cli) -> None:
    status, _, err = train_cli("--weights", str(tmp_path))
    assert status == 2 and "is a folder" in err
    part = tmp_path / "best_openvino_model" / "best.xml"
    part.parent.mkdir()
    part.write_text("<net/>")
    status, _, err = train_cli("--weights", str(part))
    assert status == 2 and err == (
        f"error: --weights {part}: is a part of an exported model; give its folder, {part.parent}\n"
    )


def test_unknown_model_yaml_names_the_flag_and_the_nearest(train_cli) -> None:
    status, _, err = train_cli("--cfg", "yolo5s.yaml")
    assert status == 2 and "--cfg yolo5s.yaml: no such model YAML, did you mean 'yolov5s.yaml'?" in err


def test_detect_reads_pictures_whose_names_are_not_utf8(trained: Path, tiny: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    picture = next((tiny.parent / "images" / "val").iterdir()).read_bytes()
    name = os.fsdecode(b"\xff\xfe.jpg")
    (folder / name).write_bytes(picture)
    (folder / os.fsdecode(b"\xff.mp4")).write_bytes(b"no video")
    (folder / "lost.jpg").symlink_to(tmp_path / "nowhere.jpg")
    os.mkfifo(folder / "pipe.png")
    flags = ["--weights", str(trained), "--source", str(folder), "--img", "64", "--device", "cpu", "--conf", "0.0001"]
    every = ["--save-txt", "--save-csv", "--save-crop", "--project", str(tmp_path / "out")]
    assert run_cli(detect.main, [*flags, *every]) == 1
    out = capsys.readouterr().out
    assert "lost.jpg: no such file" in out and "pipe.png: cannot be read (not a file)" in out
    assert "name is not UTF-8" in out and "3 sources could not be read" in out
    assert (tmp_path / "out" / "exp" / name).is_file()


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ResourceError, match="No such file or directory"):
        write_image(tmp_path / "nowhere" / "a.jpg", image)
    with pytest.raises(ResourceError, match="8x8 picture cannot be written as '.xyz'"):
        write_image(tmp_path / "a.xyz", image)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("line", ["epochs: many", "freeze: x", "batch_size: true", "project: 5"])
def test_resume_with_a_damaged_opt_yaml_names_the_line(trained: Path, train_cli, line: str) -> None:
    options = trained.parents[1] / "opt.yaml"
    options.write_text(f"# edited by hand\n{line}\n")
    status, _, err = train_cli(base=["--resume", str(trained.parents[1])], data="")
    assert status == 2 and f"{options}:2: {line.split(':')[0]}: " in err and err.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_wait_until_processes_are_started(number: int) -> None:
    steps, before = [], signal.getsignal(number)
    with sigterm_as_interrupt() as came:
        with pytest.raises(KeyboardInterrupt):
            with interrupts_deferred():
                os.kill(os.getpid(), number)
                time.sleep(0.01)
                steps.append("started")
    assert steps == ["started"] and came.number == (0 if number == signal.SIGINT else number)
    assert signal.getsignal(number) is before


def test_a_signal_is_not_lost_where_a_process_cannot_be_started() -> None:
    with pytest.raises(KeyboardInterrupt):
        with interrupts_deferred():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            raise OSError("no more processes")


def test_processes_being_started_end_with_sigterm_and_do_not_hear_ctrl_c() -> None:
    with interrupts_deferred():
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
            os._exit(0)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGTERM


def test_ctrl_c_while_saving_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"w": torch.zeros(3)}, {})
    before = path.read_bytes()

    class Interrupted(io.BytesIO):
        def write(self, data: bytes) -> int:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def interrupted(_):
        yield Interrupted()

    monkeypatch.setattr("utils.checkpoint.atomic_open", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {"w": torch.ones(300_000)}, {})
    assert path.read_bytes() == before


def test_sigterm_ends_like_ctrl_c(capsys) -> None:
    def main(argv: list[str]) -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("go on with --resume") from None
        return 0

    before = signal.getsignal(signal.SIGTERM)
    assert run_cli(main, []) == 143
    assert capsys.readouterr().err == "terminated: go on with --resume\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_resume_clears_what_a_kill_left(trained: Path, train_cli) -> None:
    left = trained.with_name(".last.pt.abc123.tmp")
    left.write_bytes(b"half a checkpoint")
    status, _, err = train_cli(base=["--resume", str(trained.parents[1]), "--epochs", "2"], data="")
    assert status == 0, err
    assert not left.exists()
