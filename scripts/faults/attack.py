"""Runs one :class:`scripts.faults.hostile.Hostile` as a victim would, in a process of its own, and judges it."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from scripts.faults.hostile import HOSTILE, PWNED, Hostile
from scripts.faults.outcome import Outcome
from utils.files import ROOT

SECONDS, MEGABYTES = 120, 6000
"""More than these, and the attack has succeeded. An idle training takes some 800 MB."""


def rows(only: str = "") -> Iterator[Outcome]:
    """Run the attacks whose names match ``only``."""
    for case in HOSTILE:
        if re.search(only, case.name):
            yield run_attack(case)


def run_attack(case: Hostile) -> Outcome:
    """Build the attack in an empty folder (that is also the home folder), run its command, judge, clean up."""
    folder = Path(tempfile.mkdtemp(prefix="attack-"))
    try:
        return _run(case, folder)
    finally:
        subprocess.run(["rm", "-rf", str(folder)], check=False)  # shutil.rmtree fails on the deep folders


def _run(case: Hostile, folder: Path) -> Outcome:
    argv = case.build(folder)
    before = snapshot(folder)
    home = {"HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache"), "XDG_CONFIG_HOME": str(folder / "cache")}
    start = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, *argv],
            cwd=ROOT,
            env={**os.environ, **home},
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS)),
        )
        _, state, usage = os.wait4(process.pid, 0)
        output.seek(0)
        text = output.read().decode("utf-8", errors="replace")
    status, megabytes = os.waitstatus_to_exitcode(state), usage.ru_maxrss // 1024
    broken = [*judge(case, status, text), *written(folder, before)]
    if megabytes > MEGABYTES:
        broken.append(f"took {megabytes:,} MB")
    found = [line for line in text.splitlines() if re.search(case.says, line)]
    line = found[-1] if found else text.strip().splitlines()[-1] if text.strip() else ""
    line = line.replace(f"{folder}/", "")
    return Outcome(case.name, status, line, time.monotonic() - start, megabytes, tuple(broken))


def judge(case: Hostile, status: int, text: str) -> list[str]:
    """What is wrong with a run's exit status and output."""
    broken = []
    if status != case.status:
        broken.append(f"exit status {status}, expected {case.status}")
    if not re.search(case.says, text):
        broken.append(f"does not say '{case.says}'")
    if "Traceback (most recent call last)" in text:
        broken.append("a traceback")
    if any(ord(letter) < 32 and letter not in "\n\t\r" for letter in text):
        broken.append("control characters on the terminal")
    errors = [line for line in text.splitlines() if line.startswith("error:")]
    if case.status == 2 and len(errors) != 1:
        broken.append(f"{len(errors)} error lines")
    return broken


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file below ``folder``, links not followed; not of folders too deep for a name."""
    found = {}
    for root, folders, files in os.walk(folder):
        if root.count("/d/d/d"):
            folders.clear()
        for name in files:
            path = os.path.join(root, name)
            status = os.lstat(path)
            found[os.path.relpath(path, folder)] = (status.st_size, status.st_mtime_ns)
    return found


def written(folder: Path, before: dict[str, tuple[int, int]]) -> list[str]:
    """Files that are new or changed and lie neither in the run's folder nor in a cache; payloads that ran."""
    after = snapshot(folder)
    changed = [name for name, stamp in after.items() if before.get(name) != stamp]
    outside = [n for n in changed if not n.startswith(("runs/", "cache/")) and not n.endswith(".cache.npz")]
    lost = [name for name in before if name not in after]
    broken = [f"wrote {name}" for name in outside] + [f"removed {name}" for name in lost]
    return broken + ["the payload ran"] * (PWNED in after)
