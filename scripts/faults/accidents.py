"""Accidents of a training and what comes of them: each row starts real processes, strikes, and looks.

A row is a function of an empty folder; ``@accident`` puts it into ACCIDENTS with the test that pins it.
"""

from __future__ import annotations

import http.server
import os
import re
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.launch import launcher
from scripts.faults.runs import EPOCHS, Done, command, leftovers, resume, run, same, training
from utils.checkpoint import read_checkpoint


@dataclass(frozen=True)
class Result:
    """``status`` of the process that was struck, ``line`` the one that it said, ``after`` what came of the run, and
    ``fine`` whether all is as docs/reliability.md promises."""

    status: int
    line: str
    after: str
    fine: bool
    name: str = ""
    test: str = ""

    @property
    def broken(self) -> tuple[str, ...]:
        return () if self.fine else ("not as promised",)

    def row(self) -> str:
        """The row of a Markdown table."""
        line = self.line if len(self.line) <= 300 else f"{self.line[:297]}..."
        held = "; ".join(self.broken) or "held"
        cells = (self.name, held, str(self.status), f"`{line}`" if line else "", self.after, f"`{self.test}`")
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


HEADER = "| fault | promises | exit | what is said | afterwards | test |\n|---|---|---|---|---|---|"


@dataclass(frozen=True)
class Accident:
    """A row of the table. ``test``: where the suite looks at the same."""

    name: str
    run: Callable[[Path], Result]
    test: str


ACCIDENTS: list[Accident] = []


def accident(name: str, test: str) -> Callable[[Callable[[Path], Result]], Callable[[Path], Result]]:
    """Register a row."""

    def register(function: Callable[[Path], Result]) -> Callable[[Path], Result]:
        ACCIDENTS.append(Accident(name, function, test))
        return function

    return register


def rows(only: str = "") -> Iterator[Result]:
    """Run the accidents whose names match ``only``, each in a folder of its own."""
    for row in ACCIDENTS:
        if re.search(only, row.name):
            folder = Path(tempfile.mkdtemp(prefix="fault-"))
            try:
                result = row.run(folder)
                yield replace(result, line=result.line.replace(f"{folder}/", ""), name=row.name, test=row.test)
            finally:
                shutil.rmtree(folder, ignore_errors=True)


def start(folder: Path, *more: str, fault: str = "", **strike: object) -> Done:
    """The training that is struck: runs/exp."""
    return run(command("train.py", training(folder, *more), fault), folder, **strike)


def resumed(folder: Path, struck: Done, line: str, status: int, *more: str) -> Result:
    """Resume runs/exp and compare its end with that of runs/whole, which nothing happened to."""
    whole = run(command("train.py", training(folder, *more, name="whole")), folder)
    left = leftovers(folder / "runs" / "exp")
    again = resume(folder)
    equal = again.status == whole.status == 0 and same(folder / "runs" / "exp", folder / "runs" / "whole")
    fine = struck.status == status and struck.clean and again.clean and equal and not leftovers(folder / "runs" / "exp")
    after = f"resumed: {again.line('Resuming').partition(' at ')[2] or 'from its start'}; "
    after += "the same numbers as an uninterrupted run" if equal else f"OTHER NUMBERS ({again.line()})"
    return Result(struck.status, line, after + (f"; {len(left)} half file removed" if left else ""), fine)


def killed(folder: Path, fault: str) -> Result:
    return resumed(folder, start(folder, fault=fault), "", -signal.SIGKILL)


@accident("kill -9 in the first epoch", "test_a_run_without_a_checkpoint_starts_again")
def kill_first(folder: Path) -> Result:
    struck = start(folder, strike=lambda p: p.kill(), after="Starting training")
    return resumed(folder, struck, "", -signal.SIGKILL)


@accident("kill -9 in the middle of writing last.pt", "tests/foundation/test_files.py")
def kill_last(folder: Path) -> Result:
    return killed(folder, "kill-in-save:4")


@accident("kill -9 in the middle of writing best.pt", "tests/foundation/test_files.py")
def kill_best(folder: Path) -> Result:
    return killed(folder, "kill-in-save:3")


@accident("kill -9 when last.pt is written but has not its name yet", "tests/foundation/test_files.py")
def kill_rename(folder: Path) -> Result:
    return killed(folder, "kill-before-rename:4")


@accident("kill -9 between best.pt and last.pt", "tests/cli/test_train.py")
def kill_between(folder: Path) -> Result:
    return killed(folder, "kill-before-last:2")


@accident("kill -9 in the middle of writing the labels cache", "tests/data/test_label_cache.py")
def kill_cache(folder: Path) -> Result:
    struck = start(folder, fault="kill-in-cache")
    half = leftovers(folder / "bccd")
    again = start(folder)
    fine = struck.status == -signal.SIGKILL and again.status == 0 and len(half) == 1
    return Result(struck.status, "", "the next start scans again and trains; the half file is never read", fine)


@accident("last.pt cut in half by another program", "tests/learning/test_checkpoint.py")
def cut(folder: Path) -> Result:
    start(folder)
    last = folder / "runs" / "exp" / "weights" / "last.pt"
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    again = resume(folder, "--epochs", "9")
    return Result(again.status, again.line("error:"), "refused, not taken for whole", again.status == 2 and again.clean)


@accident("SIGTERM in an epoch (a scheduler's preemption)", "test_sigterm_saves_and_the_resumed_run_ends_the_same")
def preempted(folder: Path) -> Result:
    struck = start(folder, strike=lambda p: p.terminate(), after="GPU_mem")
    return resumed(folder, struck, struck.line("terminated"), 143)


@accident("SIGTERM to the whole group, loader processes too", "test_sigterm_saves_and_the_resumed_run_ends_the_same")
def preempted_group(folder: Path) -> Result:
    strike = {"strike": lambda p: os.killpg(p.pid, signal.SIGTERM), "after": "mAP50"}
    struck = start(folder, "--workers", "2", **strike)
    return resumed(folder, struck, struck.line("terminated"), 143, "--workers", "2")


@accident("SIGHUP (the terminal is closed)", "test_sighup_is_129_and_nohup_stays")
def hung_up(folder: Path) -> Result:
    struck = start(folder, strike=lambda p: p.send_signal(signal.SIGHUP), after="mAP50")
    return resumed(folder, struck, struck.line("terminated"), 129)


@accident("Ctrl-C in an epoch", "tests/cli/test_train.py")
def interrupted(folder: Path) -> Result:
    struck = start(folder, strike=lambda p: p.send_signal(signal.SIGINT), after="mAP50")
    return resumed(folder, struck, struck.line("interrupted"), 130)


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[bool]:
    """A file system of that size at folder/runs; False where this user may not mount one."""
    (folder / "runs").mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder / "runs")]
    mounted = subprocess.run(options, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder / "runs")], check=False)


@accident("disk full when last.pt is written", "test_a_full_disk_keeps_the_earlier_checkpoint")
def disk_full(folder: Path) -> Result:
    with small_disk(folder, 45) as mounted:  # two last.pt and one best.pt do not fit
        start(folder, "--epochs", "1")
        last = folder / "runs" / "exp" / "weights" / "last.pt"
        if mounted:
            (folder / "runs" / "filler").write_bytes(bytes(shutil.disk_usage(folder / "runs").free - 3_000_000))
        limit = None if mounted else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000_000, 10_000_000))
        again = run(command("train.py", ["--resume", str(last), "--epochs", "3"]), folder, before_exec=limit)
        kept = read_checkpoint(last).train["epoch"] == 0
        (folder / "runs" / "filler").unlink(missing_ok=True)
        after = run(command("train.py", ["--resume", str(last), "--epochs", "3"]), folder)
        fine = again.status == 2 and again.clean and kept and after.status == 0
    text = "the earlier checkpoint is whole, no half file; resumed once there was space"
    return Result(again.status, again.line("error:"), text if kept else "LOST", fine)


@accident("a folder on a read-only file system", "tests/foundation/test_files.py")
def read_only(folder: Path) -> Result:
    with small_disk(folder, 8) as mounted:
        target = folder / "runs"
        if mounted:
            subprocess.run(["mount", "-o", "remount,ro", str(target)], check=True)
        else:
            target = Path("/sys")
        struck = run(command("train.py", [*training(folder), "--project", str(target)]), folder)
    return Result(
        struck.status, struck.line("error:"), "said before the first step", struck.status == 2 and struck.clean
    )


@accident("memory used up (CPU: the address space is limited)", "test_memory_says_what_to_change")
def no_memory(folder: Path) -> Result:
    struck = run(command("train.py", training(folder, size=640), "no-memory"), folder)
    fine = struck.status == 2 and struck.clean and "--batch-size" in struck.text
    return Result(struck.status, struck.line("error:"), "the batch to try is named", fine)


@accident("memory used up (CUDA's error, raised on the CPU)", "test_on_a_gpu_the_largest_batch_that_fits_is_measured")
def gpu_memory(folder: Path) -> Result:
    struck = start(folder, fault="gpu-memory")
    fine = struck.status == 2 and struck.clean and "use --batch-size" in struck.text
    return Result(struck.status, struck.line("error:"), "on a GPU the largest batch that fits is measured", fine)


@accident("kill -9 of a loader process", "test_a_lost_loader_process_is_one_line_wherever_torch_raises_it")
def worker(folder: Path) -> Result:
    struck = start(folder, "--workers", "2", fault="kill-a-worker:7")
    return resumed(folder, struck, struck.line("error:"), 2, "--workers", "2")


@accident(
    "an image vanishes and another is cut short in mid-training", "test_images_that_vanish_are_left_out_and_counted"
)
def vanished(folder: Path) -> Result:
    flags = training(folder)
    struck = run(command("train.py", flags, f"vanish:{folder / 'bccd' / 'images' / 'train'}"), folder)
    fine = struck.status == 0 and struck.text.count("training goes on without it") == 2
    return Result(
        struck.status, struck.line("training goes on without it"), "trained to the end; both named and counted", fine
    )


@accident("NaN, --on-nan stop (default)", "test_nan_stops_and_names_step_and_layer")
def nan_stop(folder: Path) -> Result:
    struck = start(folder, fault="nan:6")
    return resumed(folder, struck, struck.line("error:"), 2)


@accident("NaN once, --on-nan rollback", "test_nan_rolls_back_with_a_tenth_of_the_rate")
def nan_rollback(folder: Path) -> Result:
    struck = start(folder, "--on-nan", "rollback", fault="nan:6")
    line = struck.line("Rollback")
    after = "trained to the end with a tenth of the rate"
    return Result(
        struck.status, line[line.find("Rollback") :], after, struck.status == 0 and struck.text.count("Rollback") == 1
    )


@accident("NaN at every step, --on-nan rollback", "test_three_rollbacks_are_enough")
def nan_always(folder: Path) -> Result:
    struck = start(folder, "--on-nan", "rollback", fault="nan:0")
    fine = struck.status == 2 and struck.clean and struck.text.count("Rollback") == 3
    return Result(struck.status, struck.line("error:"), "stopped after three rollbacks", fine)


@accident("a process of two under torchrun is lost (--max-restarts 3)", "test_which_run_a_torchrun_restart_takes_up")
def elastic(folder: Path) -> Result:
    restarted = [*launcher(2), "--max-restarts", "3", "-m", "scripts.faults.inject", "1@kill:6", "train.py"]
    struck = run([*restarted, *training(folder)], folder)
    runs = sorted(path.name for path in (folder / "runs").iterdir())
    rows = (folder / "runs" / "exp" / "results.csv").read_text().splitlines()[1:]
    epochs = [int(row.split(",")[0]) for row in rows]
    resumed_at = struck.line("Resuming").partition(" at ")[2]
    fine = (
        struck.status == 0
        and runs == ["exp"]
        and epochs == list(range(EPOCHS))
        and resumed_at == f"epoch 1 of {EPOCHS}"
    )
    return Result(
        struck.status,
        struck.line("Resuming").partition("/runs/")[2],
        f"torchrun started both again, resumed by itself: {resumed_at}",
        fine,
    )


@accident("kill -9 when an export is complete but has not its name yet", "tests/deploy/test_export.py")
def export_killed(folder: Path) -> Result:
    start(folder, "--epochs", "1")
    weights = folder / "runs" / "exp" / "weights"
    flags = ["--weights", str(weights / "best.pt"), "--include", "onnx", "--img", "96", "--device", "cpu"]
    first = run(command("export.py", flags), folder)
    older = (weights / "best.onnx").read_bytes()
    struck = run(command("export.py", [*flags, "--opset", "20"], "kill-before-rename:1,.onnx"), folder)
    kept = (weights / "best.onnx").read_bytes() == older
    again = run(command("export.py", [*flags, "--opset", "20"]), folder)
    fine = (first.status, struck.status, again.status) == (0, -signal.SIGKILL, 0) and kept and again.clean
    fine = fine and (weights / "best.onnx").read_bytes() != older
    after = "the older file is whole and in its place; the next export replaces it" if fine else again.line()
    return Result(struck.status, "", after, fine)


@accident("a stream stops (detect.py)", "tests/inference/test_sources.py")
def stream(folder: Path) -> Result:
    start(folder, "--epochs", "1")
    picture = next((folder / "bccd" / "images" / "val").glob("*.jpg")).read_bytes()

    class Camera(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802
            self.send_response(200 if not seen else 404)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
            self.end_headers()
            for _ in range(0 if seen else 40):
                self.wfile.write(b"--frame\r\nContent-Type: image/jpeg\r\n\r\n" + picture + b"\r\n")
            seen.append(1)

        def log_message(self, *_: object) -> None:
            pass

    seen: list[int] = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Camera)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    flags = ["--weights", str(folder / "runs" / "exp" / "weights" / "best.pt"), "--img", "96", "--device", "cpu"]
    flags += ["--source", f"http://127.0.0.1:{server.server_port}/video.mjpg", "--project", str(folder / "out")]
    struck = run(command("detect.py", flags, "impatient:3"), folder)
    server.shutdown()
    fine = struck.clean and struck.status == 1 and "trying to reconnect" in struck.text
    return Result(
        struck.status,
        struck.line("given up"),
        "tried again for its time (here 3 s), then ended; what was seen is saved",
        fine,
    )
