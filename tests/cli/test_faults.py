"""What a training survives, in this process: signals, NaN, memory, pictures that go; see docs/reliability.md."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import engine.run
import engine.trainer
from engine.epoch import Learner
from engine.resume import find_last_checkpoint, run_to_take_up
from engine.state import keep_newest
from scripts.faults.runs import same, weights
from utils.checkpoint import read_checkpoint
from utils.errors import CheckpointError, explain_lost_worker, run_cli
from utils.files import dump_yaml, load_yaml
from utils.signals import sigterm_as_interrupt, termination_noted


def at_call(number: int, action: Callable[[], None], function: Callable) -> Callable:
    """``function`` that does ``action`` before its ``number``-th call."""
    calls = []

    def wrapper(*args, **options):
        calls.append(1)
        if len(calls) == number:
            action()
        return function(*args, **options)

    return wrapper


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def whole(tmp_path: Path, train_cli) -> Path:
    """An uninterrupted run of three epochs, two steps each."""
    assert train_cli("--epochs", "3", "--name", "whole", "--multi-scale")[0] == 0
    return tmp_path / "runs" / "whole"


@pytest.mark.parametrize("where", ["step 1", "step 3", "validation", "between", "nosave"])
def test_sigterm_saves_and_the_resumed_run_ends_the_same(
    tmp_path: Path, whole: Path, train_cli, monkeypatch, where: str
) -> None:
    flags = ["--epochs", "3", "--name", "cut", "--multi-scale"]
    with monkeypatch.context() as patch:
        if where.startswith("step") or where == "nosave":
            number = int(where[-1]) if where != "nosave" else 3
            patch.setattr(Learner, "step", at_call(number, terminate, Learner.step))
            flags += ["--nosave"] * (where == "nosave")
        elif where == "validation":
            patch.setattr(engine.trainer, "evaluate", at_call(2, terminate, engine.trainer.evaluate))
        else:
            patch.setattr(engine.run, "save_last", at_call(2, terminate, engine.run.save_last))
        status, _, err = train_cli(*flags)
    run = tmp_path / "runs" / "cut"
    assert status == 143 and err.count("\n") == 1 and f"--resume {run}" in err
    assert not list(run.rglob("*.tmp"))
    status, out, err = train_cli(base=["--resume", str(run)], data="")
    assert status == 0, err
    assert ("after 1 batch\n" in out) == (where in ("step 1", "step 3", "nosave"))
    assert same(run, whole)


def test_a_second_sigterm_ends_at_once() -> None:
    with sigterm_as_interrupt() as came, pytest.raises(KeyboardInterrupt):
        with termination_noted() as noted:
            terminate()
            assert noted.is_set() and not came.is_set()
            terminate()
    assert came.number == signal.SIGTERM


def test_sighup_is_129_and_nohup_stays() -> None:
    def main(argv: list[str]) -> int:
        os.kill(os.getpid(), signal.SIGHUP)
        return 0

    assert run_cli(main, []) == 129
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run_cli(main, []) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_without_a_checkpoint_starts_again(tmp_path: Path, whole: Path, train_cli, monkeypatch) -> None:
    """As after kill -9 in the first epoch: there is opt.yaml and hyp.yaml, a half file, and no last.pt."""
    with monkeypatch.context() as patch:
        patch.setattr(engine.trainer, "fit", lambda *_: None)
        assert train_cli("--epochs", "3", "--name", "cut", "--multi-scale")[0] == 0
    run = tmp_path / "runs" / "cut"
    half = run / "weights" / ".last.pt.abc.tmp"
    half.write_bytes(b"half")
    (run / "results.csv").write_text("epoch, half a li")
    status, _, err = train_cli(base=["--resume", str(run)], data="")
    assert status == 0, err
    assert not half.exists() and same(run, whole) and [p.name for p in sorted(run.parent.iterdir())] == ["cut", "whole"]


def test_a_run_stopped_in_its_final_validation_is_finished_by_resume(
    tmp_path: Path, whole: Path, train_cli, monkeypatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine.trainer, "_finish", at_call(1, terminate, engine.trainer._finish))
        assert train_cli("--epochs", "3", "--name", "cut", "--multi-scale")[0] == 143
    run = tmp_path / "runs" / "cut"
    status, out, err = train_cli(base=["--resume", str(run)], data="")
    assert status == 0 and f"Validating {run / 'weights' / 'best.pt'}" in out and same(run, whole), err
    status, _, err = train_cli(base=["--resume", str(run)], data="")
    assert status == 2 and "its training of 3 epochs is finished" in err


def test_validation_that_fails_keeps_the_training_before_it(
    tmp_path: Path, whole: Path, train_cli, monkeypatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine.trainer, "evaluate", at_call(1, _raiser(MemoryError()), engine.trainer.evaluate))
        status, _, err = train_cli("--epochs", "3", "--name", "cut", "--multi-scale")
    assert status == 2 and "memory ran out" in err
    status, out, _ = train_cli(base=["--resume", str(tmp_path / "runs" / "cut")], data="")
    assert status == 0 and "at epoch 0 of 3, after 2 batches" in out and same(tmp_path / "runs" / "cut", whole)


def test_which_run_is_the_newest(tmp_path: Path) -> None:
    runs = tmp_path / "runs" / "train"
    for number, name in enumerate(("old", "new", "empty")):
        (runs / name / "weights").mkdir(parents=True)
        (runs / name / "opt.yaml").write_text("epochs: 1\n")
        (runs / name / "hyp.yaml").write_text("lr0: 0.01\n")
        os.utime(runs / name / "opt.yaml", (number + 1000, number + 1000))
    (runs / "old" / "weights" / "last.pt").write_bytes(b"")
    os.utime(runs / "old" / "weights" / "last.pt", (1001.5, 1001.5))
    assert find_last_checkpoint("auto", tmp_path) == runs / "empty" / "weights" / "last.pt"
    os.utime(runs / "old" / "weights" / "last.pt", (2000, 2000))
    assert find_last_checkpoint("auto", tmp_path) == runs / "old" / "weights" / "last.pt"
    (runs / "empty" / "hyp.yaml").unlink()
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        find_last_checkpoint(str(runs / "empty"))


def nan_in(layer: int, when: Callable[[], bool]) -> Callable:
    """Learner.backward that breaks a weight of a layer before the step while ``when()``."""
    original = Learner.backward

    def backward(self: Learner, images, targets, **options):
        if when():
            with torch.no_grad():
                self.model.model[layer].conv.weight[0, 0, 0, 0] = float("nan")
        return original(self, images, targets, **options)

    return backward


def test_nan_stops_and_names_step_and_layer(train_cli, monkeypatch, tmp_path: Path) -> None:
    calls = []
    monkeypatch.setattr(Learner, "backward", nan_in(3, lambda: calls.append(1) or len(calls) == 2))
    status, _, err = train_cli()
    assert status == 2 and err.count("\n") == 1
    assert "the loss is not finite at epoch 0, batch 2 of 2" in err
    assert "first: model.3.conv.weight itself is not finite" in err and "--on-nan rollback" in err


def test_an_overflowing_activation_is_named() -> None:
    from models.yolo import DetectionModel
    from utils.nan_search import first_not_finite

    model, images = DetectionModel("yolov5n.yaml", nc=2), torch.rand(2, 3, 64, 64)
    assert first_not_finite(model, images) is None
    with torch.no_grad():
        model.model[5].bn.weight.fill_(3e38)
        model.model[5].bn.bias.fill_(3e38)
    assert first_not_finite(model, images) == "the output of model.5.bn (BatchNorm2d)"
    images[0, 0, 0, 0] = float("inf")
    assert first_not_finite(model, images) == "the images themselves are not finite"


def test_nan_rolls_back_with_a_tenth_of_the_rate(train_cli, monkeypatch, tmp_path: Path) -> None:
    calls = []
    monkeypatch.setattr(Learner, "backward", nan_in(3, lambda: calls.append(1) or len(calls) in (2, 6)))
    status, out, err = train_cli("--epochs", "3", "--on-nan", "rollback")
    assert status == 0, err
    assert "Rollback 1 of 3: back to the start of epoch 0, learning rates x 0.1" in out
    assert "Rollback 2 of 3: back to the start of epoch 1, learning rates x 0.01" in out
    run = tmp_path / "runs" / "exp"
    saved = read_checkpoint(run / "weights" / "last.pt")
    assert saved.train["rollbacks"] == 2 and all(torch.isfinite(value).all() for value in weights(run).values())
    rows = (run / "results.csv").read_text().splitlines()
    assert [int(row.split(",")[0]) for row in rows[1:]] == [0, 1, 2]
    assert (
        float(rows[1].split(",")[12]) == pytest.approx(10 * float(rows[2].split(",")[12]), rel=1) and len(calls) == 10
    )
    status, out, err = train_cli(base=["--resume", str(run), "--epochs", "4"], data="")  # the lower rate stays
    assert status == 0 and read_checkpoint(run / "weights" / "last.pt").train["rollbacks"] == 2


def test_three_rollbacks_are_enough(train_cli, monkeypatch) -> None:
    monkeypatch.setattr(Learner, "backward", nan_in(0, lambda: True))
    status, out, err = train_cli("--on-nan", "rollback")
    assert status == 2 and out.count("Rollback") == 3 and "3 rollbacks with ever lower learning rates did not" in err
    assert train_cli("--on-nan", "rollback", "--nosave")[0] == 2


def test_keep_leaves_the_newest(tmp_path: Path, train_cli) -> None:
    assert train_cli("--epochs", "4", "--save-period", "1", "--keep", "2")[0] == 0
    folder = tmp_path / "runs" / "exp" / "weights"
    assert sorted(path.name for path in folder.iterdir()) == ["best.pt", "epoch2.pt", "epoch3.pt", "last.pt"]
    for name in ("epoch10.pt", "epochs.pt", "epoch9x.pt"):
        (folder / name).touch()
    keep_newest(folder, 1)
    assert sorted(p.name for p in folder.glob("epoch*")) == ["epoch10.pt", "epoch9x.pt", "epochs.pt"]
    keep_newest(folder, 0)
    assert train_cli("--keep", "-1")[0] == 2


@pytest.mark.parametrize("workers", ["0", "2"])
def test_images_that_vanish_are_left_out_and_counted(
    tmp_path: Path, tiny: Path, train_cli, monkeypatch, workers: str
) -> None:
    images = [sorted((tiny.parent / "images" / split).iterdir())[0] for split in ("train", "val")]
    second = sorted((tiny.parent / "images" / "train").iterdir())[1]

    def spoil() -> None:
        for image in images:
            image.unlink()
        second.write_bytes(second.read_bytes()[:500])

    # after the scan, and before the loader's processes begin to read
    monkeypatch.setattr(engine.trainer, "build_loaders", at_call(1, spoil, engine.trainer.build_loaders))
    status, out, err = train_cli("--epochs", "2", "--workers", workers)
    assert status == 0, err
    assert all(out.count(f"{image}: no such file; training goes on without it") == 1 for image in images)
    assert out.count(f"{second}: the image file is cut short") == 1 and "2 images so far" in out
    status, _, err = train_cli("--strict-data", "--workers", workers)
    assert status == 2 and err.count("\n") == 1


def test_memory_says_what_to_change(train_cli, monkeypatch) -> None:
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("x: can't allocate memory"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(Learner, "backward", at_call(1, _raiser(error), Learner.backward))
            status, _, err = train_cli()
        assert status == 2 and err.count("\n") == 1
        assert "memory ran out at batch 4, 64 px; use --batch-size 2" in err


def test_a_full_disk_keeps_the_earlier_checkpoint(tmp_path: Path, train_cli) -> None:
    """Files may not grow beyond 3 MB: best.pt would be larger. The system says "file too large" instead of "full"."""
    assert train_cli()[0] == 0
    run = tmp_path / "runs" / "exp"
    before = {path: path.read_bytes() for path in (run / "weights").iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, hard))
        status, _, err = train_cli(base=["--resume", str(run), "--epochs", "2"], data="")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 2 and err.count("\n") == 1 and f"{run}/weights/" in err and "larger than allowed" in err
    assert {path: path.read_bytes() for path in (run / "weights").iterdir()} == before
    assert train_cli(base=["--resume", str(run), "--epochs", "2"], data="")[0] == 0


def test_a_lost_loader_process_is_one_line_wherever_torch_raises_it(train_cli, monkeypatch) -> None:
    error = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    monkeypatch.setattr(Learner, "backward", at_call(1, _raiser(error), Learner.backward))
    status, _, err = train_cli()
    assert status == 2 and err.count("\n") == 1 and "a data loading process died" in err and "--resume" in err


def test_an_error_inside_a_loader_process_stays_a_traceback() -> None:
    error = IndexError("Caught IndexError in DataLoader worker process 0.\nOriginal Traceback ...")
    assert explain_lost_worker(error) is None


def _raiser(error: Exception) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


def test_on_a_gpu_the_largest_batch_that_fits_is_measured(monkeypatch) -> None:
    """The CUDA allocator, imitated: 1 GiB an image, 10 GiB free."""
    import engine.diagnosis as diagnosis

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(1))

        def forward(self, images):
            peak.append(len(images) << 30)
            return [images + self.bias]

    from utils.dist import World

    class Fake:
        model, world, amp_dtype = Model(), World(), None
        device = torch.device("cuda")
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1)

    peak = [0]
    for name, result in {
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device: None,
        "memory_reserved": lambda device: 0,
        "max_memory_reserved": lambda device: peak[-1],
        "synchronize": lambda device: None,
        "mem_get_info": lambda device: (10 << 30, 80 << 30),
    }.items():
        monkeypatch.setattr(torch.cuda, name, result)
    monkeypatch.setattr(diagnosis.torch, "rand", lambda *shape, device: torch.zeros(shape))
    error = diagnosis.out_of_memory(Fake(), torch.zeros(16, 3, 64, 64))
    assert "GPU memory ran out at batch 16, 64 px; use --batch-size 9, the largest that fits by measurement" in str(
        error
    )
    assert "not even one image" in str(diagnosis.out_of_memory(Fake(), torch.zeros(1, 3, 64, 64)))


def test_which_run_a_torchrun_restart_takes_up(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert run_to_take_up(str(tmp_path)) == ""
    from engine.resume import torchrun_job

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job7")
    for name, job in (("other", {"run_id": "job7", "agent": "elsewhere 1 2"}), ("ours", torchrun_job())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "opt.yaml").write_text(dump_yaml({"epochs": 1, "torchrun": job}))
    assert run_to_take_up(str(tmp_path)) == str(tmp_path / "ours")
    (tmp_path / "ours" / "opt.yaml").unlink()
    assert run_to_take_up(str(tmp_path)) == ""  # a first start: a job of an earlier day may have had this id
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert run_to_take_up(str(tmp_path)) == str(tmp_path / "other")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")  # this machine may stand in for one that was lost
    assert run_to_take_up(str(tmp_path)) == str(tmp_path / "other")
    (tmp_path / "done").mkdir()
    job = {"run_id": "job7", "agent": "elsewhere 3 4"}
    (tmp_path / "done" / "opt.yaml").write_text(dump_yaml({"epochs": 1, "finished": True, "torchrun": job}))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "opt.yaml").write_text("epochs: [1\n")
    assert run_to_take_up(str(tmp_path)) == str(tmp_path / "other")
    assert load_yaml(tmp_path / "other" / "opt.yaml")["torchrun"]["run_id"] == "job7"
