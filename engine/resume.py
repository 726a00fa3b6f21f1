"""Which run ``--resume`` means and with which flags it goes on. Imports no torch: it is asked before parsing ends."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import Any

from utils.config import Hyp
from utils.errors import CheckpointError, ConfigError, UserError
from utils.files import find_file, load_yaml, refuse_links

# What may differ from the interrupted run without changing what it computes (but for the rounding of another kernel).
MAY_CHANGE = frozenset(
    {"epochs", "device", "workers", "cache", "patience", "nosave", "noval", "noplots", "save_period", "resume", "debug"}
    | {"dcn_backend", "keep", "on_nan", "augment_device", "cuda_graphs", "compile"}
    | {"ddp_timeout"}
)

WHERE = frozenset({"project", "name", "exist_ok"})
"""Where a run's folder is made, of which nothing is left to say when it is there."""


def find_last_checkpoint(request: str, below: Path = Path(".")) -> Path:
    """The last.pt that ``--resume [PATH]`` means: a file, a run's folder, or ('auto') the newest below ``below``/runs.

    A run that was killed before its first checkpoint counts: the path is then of a file that is not there yet, in a
    run that can be started again. Raises CheckpointError when there is none.
    """
    if request == "auto":
        runs = {path.parent for path in (below / "runs").glob("**/opt.yaml")}
        runs |= {path.parent.parent for path in (below / "runs").glob("**/weights/last.pt")}
        found = sorted(last for last in map(_last_of, runs) if last.is_file() or _can_start_again(last))
        if not found:
            raise CheckpointError(
                "--resume: no last.pt below runs/; give its path: --resume runs/train/exp/weights/last.pt"
            )
        return max(found, key=_age)
    path = Path(request)
    if path.is_file() and path.suffix != ".pt":
        raise CheckpointError(f"--resume {request}: is no checkpoint (expected a run's folder or its weights/last.pt)")
    if path.is_dir():
        path = path / "weights" / "last.pt"
    if re.fullmatch(r"best|epoch\d+", path.stem) and (path.parent / "last.pt").is_file():
        raise CheckpointError(
            f"--resume {request}: holds weights only; go on from {path.parent / 'last.pt'}, or start anew with "
            f"--weights {request}"
        )
    if not path.is_file() and not _can_start_again(path):
        raise CheckpointError(f"--resume {request}: no such checkpoint (expected a run's weights/last.pt)")
    return path


def _last_of(run: Path) -> Path:
    return run / "weights" / "last.pt"


def _age(last: Path) -> float:
    return (last if last.is_file() else last.parent.parent / "opt.yaml").stat().st_mtime


def _can_start_again(last: Path) -> bool:
    """Whether a last.pt is missing because no epoch was completed: the run wrote down all that repeats it."""
    run = last.parent.parent
    return last.name == "last.pt" and all((run / name).is_file() for name in ("opt.yaml", "hyp.yaml"))


def resumed_settings(settings: dict[str, Any], given: set[str]) -> dict[str, Any]:
    """The interrupted run's flags, from its opt.yaml, with those of ``given`` that may change put on top.

    ``settings``: flags as parsed now; ``given``: names really on the command line. Raises ConfigError when a flag
    that would change the computation is given with another value, CheckpointError when the run's files are missing,
    ResourceError for links that lead out of its folder. A run that was killed before its first checkpoint starts again,
    in its own folder.
    """
    last = find_last_checkpoint(settings["resume"])
    run_dir = last.resolve().parent.parent
    for needed in ("opt.yaml", "hyp.yaml"):
        if not (run_dir / needed).is_file():
            raise CheckpointError(f"--resume {last}: {run_dir / needed} is missing; start anew with --weights {last}")
    refuse_links(run_dir)
    options = load_yaml(run_dir / "opt.yaml")
    stored = {k: v for k, v in options.items() if k in settings}
    for name, value in stored.items():
        if not _same_kind(value, settings[name]):
            raise ConfigError(f"{options.where(name)}: {name}: {value!r} is no value of this flag; correct the file")
    if "data" in stored and find_file(stored["data"], ("data",)) is None:  # the data set has moved
        if "data" not in given:
            raise ConfigError(
                f"--resume {last}: its data set {stored['data']} is not there any more; say where it is now with --data"
            )
        stored["data"] = settings["data"]
    taken_up = "resume" not in given  # by torchrun, with the flags of the first start
    for name in sorted(given - MAY_CHANGE - (WHERE if taken_up else set())):
        if name in stored and stored[name] != settings[name] and not (name == "hyp" and _same_hyp(settings, run_dir)):
            raise ConfigError(
                f"--{name.replace('_', '-')} {settings[name]}: cannot change on --resume (the run has "
                f"{stored[name] or 'none'}); leave it out, or start anew with --weights {last}"
            )
    changed = {name: settings[name] for name in given & MAY_CHANGE}
    settings = {**settings, **stored, **changed, "hyp": str(run_dir / "hyp.yaml"), "resume": str(last)}
    if not last.is_file():
        settings |= {"resume": "", "project": str(run_dir.parent), "name": run_dir.name, "exist_ok": True}
    return settings


def _same_hyp(settings: dict[str, Any], run_dir: Path) -> bool:
    """Whether --hyp is what the run wrote down as its own."""
    return Hyp.load(settings["hyp"])[0] == Hyp.load(str(run_dir / "hyp.yaml"))[0]


def torchrun_job() -> dict[str, str]:
    """Who started this process, for opt.yaml: torchrun's run id and the agent on this machine; empty without it."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id is None:
        return {}
    import psutil

    agent = psutil.Process(os.getppid())
    return {"run_id": run_id, "agent": f"{socket.gethostname()} {agent.pid} {agent.create_time():.0f}"}


def run_to_take_up(project: str) -> str:
    """The run of this torchrun job that an elastic restart should go on with: its folder below ``project``, or ''.

    A run is this job's when the same agent process started it, or a job of the same --rdzv-id did and either this is a
    restart or there are several machines, of which this one may have come in for one that was lost, and the run is not
    finished. All processes of a start so find the same.
    """
    job = torchrun_job()
    if not job:
        return ""
    named = job["run_id"] not in ("", "none")
    restarted = named and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    several = named and os.environ.get("GROUP_WORLD_SIZE", "1") != "1"
    found = []
    for options in Path(project).glob("*/opt.yaml"):
        try:
            run = load_yaml(options)
        except UserError:  # another run's; this job wrote its own whole
            continue
        theirs = run.get("torchrun")
        if isinstance(theirs, dict) and (
            theirs.get("agent") == job["agent"]
            or (theirs.get("run_id") == job["run_id"] and (restarted or (several and run.get("finished") is not True)))
        ):
            found.append(options)
    return str(max(found, key=lambda path: path.stat().st_mtime).parent) if found else ""


def _same_kind(value: Any, flag: Any) -> bool:
    """Whether a value from a file is of the type that the parser gives a flag."""
    if isinstance(flag, list):
        return isinstance(value, list) and all(type(item) is int for item in value)
    return isinstance(value, (int, float)) and value is not True if type(flag) is float else type(value) is type(flag)
