"""What a comparison is: which models, how many seeds, which budget; and where its folder keeps what.

FOLDER/compare.yaml                       the plan, so that the same command, or --resume, can go on with it
FOLDER/trainings/MODEL-seedN/ and .log    train.py's run folder, and what it printed
FOLDER/predictions/MODEL-seedN-SPLIT.npz  what best.pt finds
FOLDER/report.md report.html report.csv
"""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import ConfigError, ResourceError
from utils.files import atomic_write, dump_yaml, load_yaml, new_run_dir, refuse_links, remove_leftovers

MAX_RUNS = 1000
MAX_MODEL_NAME = 100
BUDGET = ("data", "weights", "epochs", "batch_size", "imgsz", "extra")
"""What must be the same for all trainings of a folder, those of a later start included."""

MAY_GROW = ("cfg", "seeds")
"""What a later start may add to; everything that is there stays in the comparison."""


@dataclass(frozen=True)
class Plan:
    """Files by absolute path, so that --resume works from any folder. ``extra``: further flags of train.py."""

    data: str
    cfg: tuple[str, ...]
    seeds: int
    epochs: int
    batch_size: int = 16
    imgsz: int = 640
    weights: str = ""
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for flag in ("seeds", "epochs", "batch_size"):
            if getattr(self, flag) < 1:
                raise ConfigError(f"--{flag.replace('_', '-')} {getattr(self, flag)}: at least 1")
        if not self.cfg:
            raise ConfigError("--cfg: name the models to compare, e.g. --cfg yolov5s.yaml yolov5s-dcn.yaml")
        if self.seeds * len(self.cfg) > MAX_RUNS:
            raise ConfigError(f"--seeds {self.seeds}: {self.seeds * len(self.cfg):,} trainings, at most {MAX_RUNS:,}")
        for number, name in enumerate(self.models):
            if not name.isprintable() or len(name) > MAX_MODEL_NAME:
                raise ConfigError(f"--cfg {name[:50]!r}: rename the file: plain letters, at most {MAX_MODEL_NAME}")
            if name in self.models[:number]:
                raise ConfigError(f"--cfg: two models are called {name}; give each YAML a name of its own")

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models, the files' stems; the first is what the others are compared with."""
        return tuple(Path(cfg).stem for cfg in self.cfg)

    @property
    def runs(self) -> list[Run]:
        """All trainings, seed by seed, so that an early end leaves whole comparisons."""
        return [Run(name, cfg, seed) for seed in range(self.seeds) for name, cfg in zip(self.models, self.cfg)]

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping for compare.yaml."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


@dataclass(frozen=True)
class Run:
    """One training of a plan."""

    model: str
    cfg: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder and files."""
        return f"{self.model}-seed{self.seed}"

    def __str__(self) -> str:
        return f"{self.model} seed {self.seed}"


class Folder:
    """The folder of a comparison; a context manager that nobody else can enter meanwhile, and whose trainings keep it
    closed if this process is killed and they are not."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.lock = -1
        self._stack = ExitStack()

    def __enter__(self) -> Folder:
        try:
            import fcntl
        except ImportError:  # Windows: nothing is locked
            return self
        file = self._stack.enter_context((self.path / "compare.lock").open("w"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._stack.close()
            raise ResourceError(
                f"{self.path}: a comparison, or a training that one left behind, still works here: "
                f"wait for it or end it (see `ps -ef`), or use another --name"
            ) from None
        self.lock = file.fileno()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()
        self.lock = -1

    def run_dir(self, run: Run) -> Path:
        """train.py's run folder."""
        return self.path / "trainings" / run.name

    def log(self, run: Run) -> Path:
        """What train.py printed, all starts one after the other."""
        return self.path / "trainings" / f"{run.name}.log"

    def seconds(self, run: Run) -> Path:
        """A number: how long train.py has run, all starts together."""
        return self.path / "trainings" / f"{run.name}.seconds"

    def best(self, run: Run) -> Path:
        """The checkpoint that is measured."""
        return self.run_dir(run) / "weights" / "best.pt"

    def predictions(self, run: Run, split: str) -> Path:
        """What :attr:`best` finds."""
        return self.path / "predictions" / f"{run.name}-{split}.npz"

    def is_finished(self, run: Run) -> bool:
        """Whether the training came to its end."""
        options = self.run_dir(run) / "opt.yaml"
        return options.is_file() and load_yaml(options).get("finished") is True


def read_plan(folder: Path) -> Plan:
    """The plan of a comparison's folder. Raises ConfigError when there is none or it was damaged."""
    file = folder / "compare.yaml"
    if not file.is_file():
        raise ConfigError(f"--resume {folder}: not the folder of a comparison (it has no compare.yaml)")
    data = load_yaml(file)
    fields = {field.name: field.default for field in dataclasses.fields(Plan)}
    kinds = {"seeds": int, "epochs": int, "batch_size": int, "imgsz": int, "cfg": list, "extra": list}
    for key in fields:
        value, kind = data.get(key), kinds.get(key, str)
        if type(value) is not kind or (kind is list and not all(isinstance(item, str) for item in value)):
            raise ConfigError(f"{data.where(key)}: {key}: {value!r} is not what compare.py wrote; correct the file")
    return Plan(**{key: tuple(data[key]) if isinstance(data[key], list) else data[key] for key in fields})


def newest_comparison(project: Path) -> Path:
    """The folder below ``project`` that was begun last. Raises ConfigError when there is none."""
    found = sorted(project.glob("*/compare.yaml"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ConfigError(f"--resume: no comparison below {project}; give its folder")
    return found[-1].parent


def merged(stored: Plan, wanted: Plan, folder: Path) -> Plan:
    """``stored`` with the models and seeds that ``wanted`` adds. Raises ConfigError when the budget differs."""
    for key in BUDGET:
        if getattr(stored, key) != getattr(wanted, key):
            flag = "flags after --:" if key == "extra" else f"--{key.replace('_', '-')}"
            raise ConfigError(
                f"{flag} {_shown(getattr(wanted, key))}: {folder} was begun with "
                f"{_shown(getattr(stored, key))}, and all its trainings need the same; use another --name"
            )
    cfg = (*stored.cfg, *(path for path in wanted.cfg if path not in stored.cfg))
    return dataclasses.replace(stored, cfg=cfg, seeds=max(stored.seeds, wanted.seeds))


def _shown(value: object) -> str:
    return " ".join(value) or "nothing" if isinstance(value, tuple) else str(value) or "nothing"


def open_folder(project: str, name: str, exist_ok: bool) -> Folder:
    """PROJECT/NAME, or NAME2, NAME3, ... when taken and not ``exist_ok``. Raises ResourceError."""
    return Folder(new_run_dir(project, name, exist_ok))


def begin(folder: Folder, plan: Plan) -> None:
    """Write the plan down and make the folders. Raises ResourceError for links that lead out of the folder."""
    refuse_links(folder.path)
    for part in ("trainings", "predictions"):
        (folder.path / part).mkdir(exist_ok=True)
        remove_leftovers(folder.path / part)
    remove_leftovers(folder.path)
    atomic_write(folder.path / "compare.yaml", dump_yaml(plan.to_dict()))
