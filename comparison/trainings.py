"""All trainings of a plan as child processes of train.py, several at a time; what stops one does not stop the rest."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from comparison.plan import Folder, Plan, Run
from utils.console import LOGGER, plural
from utils.cores import available_cores
from utils.errors import ConfigError
from utils.files import ROOT, atomic_write
from utils.safe_names import printable

POLL = 0.1
"""Seconds between two looks at the processes."""

SAVE_EVERY = 5.0
"""Seconds between two notes of the time that trainings have taken: what a killed comparison forgets at most."""

TELL_EVERY = 60.0
"""Seconds between two lines on how far the trainings are."""

GRACE = 60.0
"""Seconds that trainings get to save their state when the comparison is ended."""


@dataclass(frozen=True)
class Settings:
    """How to train, as opposed to what: none of it changes a result. ``devices``: for --device, dealt out in turn."""

    jobs: int = 1
    devices: tuple[str, ...] = ("",)
    workers: int = 8


class Job:
    """One train.py at work. ``slot``: a number that no other running one of these has."""

    def __init__(self, run: Run, folder: Folder, command: Sequence[str], threads: int | None, slot: int) -> None:
        self.run, self.slot = run, slot
        self._file, self._log = folder.seconds(run), folder.log(run)
        self._before, self._start = read_seconds(self._file), time.monotonic()
        self._saved = self._start
        env = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if threads:
            env.setdefault("OMP_NUM_THREADS", str(threads))
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=env,
                start_new_session=True,  # Ctrl-C is for us: we send what lets a training save its steps
                pass_fds=(folder.lock,) if folder.lock >= 0 else (),
            )

    def poll(self) -> int | None:
        """Exit status, None while it runs. Notes the time it has taken."""
        status, now = self.process.poll(), time.monotonic()
        if status is not None or now - self._saved > SAVE_EVERY:
            self._saved = now
            atomic_write(self._file, f"{self._before + now - self._start:.2f}\n")
        return status

    def last_line(self) -> str:
        """The last line that it printed."""
        return last_line(self._log) or "it printed nothing"


def train_all(plan: Plan, folder: Folder, settings: Settings) -> dict[Run, str]:
    """Train what is not finished, go on with what was interrupted. Returns the runs that failed, each with why.

    Ctrl-C and SIGTERM end the trainings, which save their steps, and raise KeyboardInterrupt with how to go on.
    """
    pending = deque(run for run in plan.runs if not folder.is_finished(run))
    done = len(plan.runs) - len(pending)
    if done:
        LOGGER.info(f"{plural(done, 'training')} of {len(plan.runs)} finished already")
    jobs: list[Job] = []
    failed: dict[Run, str] = {}
    told = time.monotonic()
    try:
        while pending or jobs:
            while pending and len(jobs) < settings.jobs:
                jobs.append(start(pending.popleft(), plan, folder, settings, jobs))
            time.sleep(POLL)
            for job in [job for job in jobs if job.poll() is not None]:
                jobs.remove(job)
                ended(job, folder, failed)
            if time.monotonic() - told > TELL_EVERY:
                told = time.monotonic()
                _tell(plan, folder, jobs, len(pending))
    except BaseException as error:
        end_all(jobs)
        if not isinstance(error, KeyboardInterrupt):
            raise
        raise KeyboardInterrupt(f"trainings are saved; go on with: python compare.py --resume {folder.path}") from None
    return failed


def start(run: Run, plan: Plan, folder: Folder, settings: Settings, jobs: Sequence[Job]) -> Job:
    """Begin a training of ``plan``, or go on with it, beside those of ``jobs``."""
    slot = min(set(range(settings.jobs)) - {job.slot for job in jobs})
    device = settings.devices[slot % len(settings.devices)]
    cores = available_cores()
    threads = max(1, cores // settings.jobs) if settings.jobs > 1 else None
    command = [sys.executable, str(ROOT / "train.py"), *flags_for(run, plan, folder, settings, device)]
    resumed = "going on" if "--resume" in command else "training"
    LOGGER.info(f"{run}: {resumed} (log: {folder.log(run)})")
    return Job(run, folder, command, threads, slot)


def flags_for(run: Run, plan: Plan, folder: Folder, settings: Settings, device: str) -> list[str]:
    """train.py's flags: a new training, or --resume for one that was begun."""
    how = ["--workers", str(settings.workers), f"--device={device}"]
    if (folder.run_dir(run) / "opt.yaml").is_file():
        return ["--resume", str(folder.run_dir(run)), *how]
    place = ["--project", str(folder.run_dir(run).parent), "--name", run.name, "--exist-ok", "--noplots"]
    return [*budget_flags(run, plan), *place, *how, *plan.extra]


def budget_flags(run: Run, plan: Plan) -> list[str]:
    """Those of train.py's flags, plan.extra aside, that a result depends on."""
    flags = ["--data", plan.data, "--cfg", run.cfg, f"--weights={plan.weights}", "--seed", str(run.seed)]
    return [*flags, "--epochs", str(plan.epochs), "--batch-size", str(plan.batch_size), "--imgsz", str(plan.imgsz)]


def ended(job: Job, folder: Folder, failed: dict[Run, str]) -> None:
    """Tell how a training ended; one that is not finished goes into ``failed``."""
    status = job.process.returncode
    if status == 0 and folder.is_finished(job.run):
        LOGGER.info(f"{job.run}: finished after {read_seconds(folder.seconds(job.run)):.0f} s")
        return
    how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
    failed[job.run] = f"{job.run} failed ({how}): {job.last_line()} (whole log: {folder.log(job.run)})"
    LOGGER.warning(failed[job.run])


def _tell(plan: Plan, folder: Folder, jobs: Sequence[Job], waiting: int) -> None:
    now = ", ".join(f"{job.run}: {epochs_done(folder.run_dir(job.run))}/{plan.epochs} epochs" for job in jobs)
    LOGGER.info(now + (f"; {plural(waiting, 'training')} waiting" if waiting else ""))


def end_all(jobs: Sequence[Job]) -> None:
    """Ask trainings to save and end; end those that do not within GRACE seconds. A second Ctrl-C ends them at once."""
    for job in jobs:
        if job.poll() is None:
            job.process.terminate()
    deadline = time.monotonic() + GRACE
    try:
        for job in jobs:
            job.process.wait(max(deadline - time.monotonic(), 0.1))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        pass
    for job in jobs:
        if job.poll() is None:
            job.process.kill()
            job.process.wait()
            job.poll()


def epochs_done(run_dir: Path) -> int:
    """Rows of a run's results.csv."""
    from utils.loggers import read_results

    return len(read_results(run_dir / "results.csv").get("epoch", []))


def last_line(log: Path, tail: int = 8192) -> str:
    """The last line of a log that holds anything, fit for a terminal; '' for none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - tail))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return printable(lines[-1][-500:]) if lines else ""


def read_seconds(file: Path) -> float:
    """What :meth:`Folder.seconds` holds; 0 when nothing was noted yet."""
    try:
        return max(float(file.read_text(encoding="utf-8")), 0.0)
    except (OSError, ValueError):
        return 0.0


def check_finished(folder: Folder, runs: Sequence[Run]) -> None:
    """Raise ConfigError when a finished training has lost its best.pt or the note of its time."""
    for run in runs:
        lost = folder.best(run) if not folder.best(run).is_file() else folder.seconds(run)
        if lost != folder.seconds(run) or not read_seconds(lost):
            raise ConfigError(f"{lost}: missing or damaged; remove {folder.run_dir(run)} to train {run} again")
