"""Which run ``--resume`` means and with which flags it goes on. Imports no torch: it is asked before parsing ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from utils.errors import CheckpointError, ConfigError
from utils.files import load_yaml

# What may differ from the interrupted run without changing what it computes (but for the rounding of another kernel).
MAY_CHANGE = frozenset(
    {"epochs", "device", "workers", "cache", "patience", "nosave", "noval", "noplots", "save_period", "resume", "debug"}
    | {"dcn_backend"}
)


def find_last_checkpoint(request: str, below: Path = Path(".")) -> Path:
    """The last.pt that ``--resume [PATH]`` means: a file, a run's folder, or ('auto') the newest below ``below``/runs.

    Raises CheckpointError when there is none.
    """
    if request == "auto":
        found = sorted((below / "runs").glob("**/last.pt"), key=lambda p: p.stat().st_mtime)
        if not found:
            raise CheckpointError(
                "--resume: no last.pt below runs/; give its path: --resume runs/train/exp/weights/last.pt"
            )
        return found[-1]
    path = Path(request)
    if path.is_dir():
        path = path / "weights" / "last.pt"
    if not path.is_file():
        raise CheckpointError(f"--resume {request}: no such checkpoint (expected a run's weights/last.pt)")
    return path


def resumed_settings(settings: dict[str, Any], given: set[str]) -> dict[str, Any]:
    """The interrupted run's flags, from its opt.yaml, with those of ``given`` that may change put on top.

    ``settings``: flags as parsed now; ``given``: names really on the command line. Raises ConfigError when a flag
    that would change the computation is given with another value, CheckpointError when the run's files are missing.
    """
    last = find_last_checkpoint(settings["resume"])
    run_dir = last.resolve().parent.parent
    for needed in ("opt.yaml", "hyp.yaml"):
        if not (run_dir / needed).is_file():
            raise CheckpointError(f"--resume {last}: {run_dir / needed} is missing; start anew with --weights {last}")
    options = load_yaml(run_dir / "opt.yaml")
    stored = {k: v for k, v in options.items() if k in settings}
    for name, value in stored.items():
        if not _same_kind(value, settings[name]):
            raise ConfigError(f"{options.where(name)}: {name}: {value!r} is no value of this flag; correct the file")
    for name in sorted(given - MAY_CHANGE):
        if name in stored and stored[name] != settings[name]:
            raise ConfigError(
                f"--{name.replace('_', '-')} {settings[name]}: cannot change on --resume (the run has {stored[name]}); "
                f"leave it out, or start anew with --weights {last}"
            )
    changed = {name: settings[name] for name in given & MAY_CHANGE}
    return {**settings, **stored, **changed, "hyp": str(run_dir / "hyp.yaml"), "resume": str(last)}


def _same_kind(value: Any, flag: Any) -> bool:
    """Whether a value from a file is of the type that the parser gives a flag."""
    if isinstance(flag, list):
        return isinstance(value, list) and all(type(item) is int for item in value)
    return isinstance(value, (int, float)) and value is not True if type(flag) is float else type(value) is type(flag)
