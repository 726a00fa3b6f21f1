"""Settings as frozen dataclasses, checked once: hyper-parameters, the dataset description, the training flags.

Nothing here imports torch, so a wrong value is answered before anything heavy is loaded. Nothing loaded is changed
in place: derived settings are new objects (:meth:`Hyp.scaled`).
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.errors import ConfigError, DataError, did_you_mean
from utils.files import ROOT, YamlFile, find_file, load_yaml
from utils.safe_names import class_name_fault


def check_thresholds(conf_thres: float, iou_thres: float, max_det: int = 1) -> None:
    """Raise ConfigError, naming the flag, unless both thresholds lie in 0..1 and ``max_det`` is at least 1."""
    for flag, value in (("--conf-thres", conf_thres), ("--iou-thres", iou_thres)):
        if not 0 <= value <= 1:
            raise ConfigError(f"{flag} {value}: must lie between 0 and 1")
    if max_det < 1:
        raise ConfigError(f"--max-det {max_det}: must be at least 1")


# key: (lowest, highest) value that makes sense; outside it a training cannot work
_HYP_RANGES = {
    "lr0": (0, 10),
    "lrf": (0, 10),
    "momentum": (0, 1),
    "weight_decay": (0, 1),
    "warmup_epochs": (0, 1000),
    "warmup_momentum": (0, 1),
    "warmup_bias_lr": (0, 10),
    "anchor_t": (1, 100),
    "label_smoothing": (0, 1),
    "hsv_h": (0, 1),
    "hsv_s": (0, 1),
    "hsv_v": (0, 1),
    "degrees": (0, 180),
    "translate": (0, 1),
    "scale": (0, 1),
    "shear": (0, 89),
    "perspective": (0, 0.01),
    "flipud": (0, 1),
    "fliplr": (0, 1),
    "mosaic": (0, 1),
    "mixup": (0, 1),
    "copy_paste": (0, 1),
    "warmup_iterations": (1, 1e6),
    "nominal_batch": (1, 1e5),
    "ema_decay": (0, 1),
    "ema_tau": (1, 1e6),
    "bn_momentum": (0.001, 1),
}
_UPSTREAM_CONSTANTS = ("warmup_iterations", "nominal_batch", "ema_decay", "ema_tau", "bn_momentum")
_OPTIONAL_HYP = {"anchors", "label_smoothing", *_UPSTREAM_CONSTANTS}


@dataclass(frozen=True)
class Hyp:
    """Hyper-parameters of a training, with the keys and defaults of hyp.scratch-low.yaml.

    Rates are per step of the nominal batch 64; angles in degrees; augmentation entries are probabilities (flips,
    mosaic, mixup, copy_paste) or gains. ``anchors``: how many anchors per output AutoAnchor is to find, or None.

    The last five are upstream's constants, which small sets do better without (hyp.small-set.yaml): the fewest
    iterations of a warm-up; images that a step should see, for which gradients of smaller batches add up; how slowly
    the average of the weights moves in the end, and over how many updates it becomes so; BatchNorm's momentum.
    """

    lr0: float = 0.01
    lrf: float = 0.01
    momentum: float = 0.937
    weight_decay: float = 0.0005
    warmup_epochs: float = 3.0
    warmup_momentum: float = 0.8
    warmup_bias_lr: float = 0.1
    box: float = 0.05
    cls: float = 0.5
    cls_pw: float = 1.0
    obj: float = 1.0
    obj_pw: float = 1.0
    iou_t: float = 0.20
    anchor_t: float = 4.0
    anchors: float | None = None
    fl_gamma: float = 0.0
    label_smoothing: float = 0.0
    hsv_h: float = 0.015
    hsv_s: float = 0.7
    hsv_v: float = 0.4
    degrees: float = 0.0
    translate: float = 0.1
    scale: float = 0.5
    shear: float = 0.0
    perspective: float = 0.0
    flipud: float = 0.0
    fliplr: float = 0.5
    mosaic: float = 1.0
    mixup: float = 0.0
    copy_paste: float = 0.0
    warmup_iterations: float = 100
    nominal_batch: float = 64
    ema_decay: float = 0.9999
    ema_tau: float = 2000
    bn_momentum: float = 0.03

    @classmethod
    def load(cls, path: str | Path) -> tuple[Hyp, list[str]]:
        """Read a hyp.yaml (a path, or a name below data/). Returns it and one note for each key left to its default.

        Raises ConfigError naming file, line and key for an unknown key or a value that cannot be.
        """
        found = find_file(path, ("data/hyps", "data"))
        if found is None:
            known = sorted(p.name for p in (ROOT / "data/hyps").glob("*.yaml"))
            raise ConfigError(
                f"--hyp {path}: no such file{did_you_mean(str(path), known)} (there are: {', '.join(known)})"
            )
        data = load_yaml(found)
        return cls.from_dict(data), cls.missing_keys(data)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Hyp:
        """Check a mapping of hyper-parameters. Raises ConfigError naming the key (and file and line if known)."""
        where = data.where if isinstance(data, YamlFile) else (lambda key: "hyp")
        names = [f.name for f in dataclasses.fields(cls)]
        values: dict[str, float | None] = {}
        for key, value in data.items():
            if key not in names:
                raise ConfigError(f"{where(key)}: unknown hyper-parameter '{key}'{did_you_mean(key, names)}")
            if key == "anchors" and value in (None, 0):
                continue
            if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text: accept what people write
                try:
                    value = float(value)
                except ValueError:
                    raise ConfigError(f"{where(key)}: {key}: expected a number, found {value[:40]!r}") from None
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ConfigError(f"{where(key)}: {key}: expected a number, found {value!r}")
            low, high = _HYP_RANGES.get(key, (0, math.inf))
            if not low <= value <= high:
                raise ConfigError(f"{where(key)}: {key}: {value} is outside {low}..{high}")
            values[key] = float(value)
        return cls(**values)

    @classmethod
    def missing_keys(cls, data: dict[str, Any]) -> list[str]:
        """Names of hyper-parameters that ``data`` leaves to their defaults (optional ones left out)."""
        return [f.name for f in dataclasses.fields(cls) if f.name not in data and f.name not in _OPTIONAL_HYP]

    def scaled(self, levels: int, nc: int, imgsz: int) -> Hyp:
        """The loss gains for a model with ``levels`` outputs and ``nc`` classes trained at ``imgsz`` pixels."""
        return dataclasses.replace(
            self,
            box=self.box * 3 / levels,
            cls=self.cls * nc / 80 * 3 / levels,
            obj=self.obj * (imgsz / 640) ** 2 * 3 / levels,
        )

    def to_dict(self) -> dict[str, float]:
        """Plain mapping for hyp.yaml and checkpoints; ``anchors`` is left out when unset."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}


@dataclass(frozen=True)
class DataConfig:
    """What a dataset YAML says, resolved. ``train``/``val``/``test``: folders and .txt lists that exist."""

    source: Path
    root: Path
    train: tuple[Path, ...]
    val: tuple[Path, ...]
    test: tuple[Path, ...]
    names: dict[int, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    missing_test: str = ""
    """What the YAML names as its test split and is not there: no fault before it is asked for."""

    @property
    def nc(self) -> int:
        """Number of classes."""
        return len(self.names)

    def split(self, task: str) -> tuple[Path, ...]:
        """The sources of split 'train', 'val' or 'test'. Raises DataError when the YAML does not have it."""
        sources = {"train": self.train, "val": self.val, "test": self.test}[task]
        if not sources and self.missing_test:
            raise DataError(self.missing_test)
        if not sources:
            raise DataError(f"{self.source}: has no '{task}:' entry")
        return sources

    @classmethod
    def load(cls, path: str | Path, single_cls: bool = False) -> DataConfig:
        """Read and check a dataset YAML (a path, or a name below data/).

        ``path:`` is resolved against the YAML's own folder first, then the repository and the working folder.
        ``download:`` is never carried out, only mentioned when images are missing. ``single_cls`` joins all classes
        into one (called "item" unless there is just one). Raises DataError with file and line.
        """
        found = find_file(path, ("data",))
        if found is None:
            if Path(path).is_dir():
                raise DataError(f"--data {path}: is a folder; give the dataset YAML in it")
            known = sorted(p.name for p in (ROOT / "data").glob("*.yaml"))
            raise DataError(
                f"--data {path}: no such file{did_you_mean(Path(path).name, known)} (there are: {', '.join(known)})"
            )
        data = load_yaml(found)
        for key in ("train", "val", "names"):
            if data.get(key) in (None, "", [], {}):
                raise DataError(f"{found}: '{key}:' is missing{_dataset_key_hint(key, data)}")
        names, notes = read_names(data)
        if single_cls:
            names = {0: names[0] if len(names) == 1 else "item"}
        root = _dataset_root(data)
        train, val = (_resolve_split(data, key, root) for key in ("train", "val"))
        test, missing = (), ""
        try:
            test = _resolve_split(data, "test", root)
        except DataError as error:
            missing = str(error)
        return cls(found, root, train, val, test, names, tuple(notes), missing)


_DATA_KEYS = ("path", "train", "val", "test", "nc", "names", "download", "yaml_file", "roboflow", "kpt_shape")


def _dataset_key_hint(key: str, data: dict) -> str:
    near = did_you_mean(key, [k for k in data if k not in _DATA_KEYS])
    return (
        near.replace("did you mean", "is it the").replace("?", " line?")
        if near
        else {
            "train": " (a folder of images, a .txt list, or a list of them)",
            "val": " (a folder of images, a .txt list, or a list of them; it may be the same as train)",
            "names": " (the class names, e.g. names: [cat, dog])",
        }[key]
    )


def read_names(data: YamlFile) -> tuple[dict[int, str], list[str]]:
    raw, notes = data["names"], []
    if isinstance(raw, str) and "," in raw:
        raise DataError(f"{data.where('names')}: names: {raw!r} is one name; several are a list: [{raw}]")
    if isinstance(raw, str):
        raw = [raw]
    if isinstance(raw, (list, tuple)):
        raw = dict(enumerate(raw))
    if not isinstance(raw, dict):
        raise DataError(f"{data.where('names')}: names: expected a list or 'number: name' lines")
    for key in raw:
        if isinstance(key, bool) or not isinstance(key, int):
            raise DataError(f"{data.where('names', key)}: names: keys must be whole numbers, found {key!r}")
    if sorted(raw) != list(range(len(raw))):
        found = ", ".join(map(str, sorted(raw)[:20])) + (", ..." if len(raw) > 20 else "")
        raise DataError(
            f"{data.where('names')}: names: numbers must run from 0 to {len(raw) - 1} without gaps, found {found}"
        )
    for key, name in raw.items():
        if isinstance(name, bool) or not isinstance(name, (str, int, float)):
            hint = "; YAML reads yes, no, on, off as true or false: put it in quotes" if isinstance(name, bool) else ""
            raise DataError(f"{data.where('names', key)}: names: class {key} must be a text, found {name!r}{hint}")
    names = {key: " ".join(str(raw[key]).split()) for key in sorted(raw)}
    for key, name in names.items():
        if fault := class_name_fault(name):
            raise DataError(f"{data.where('names', key)}: names: class {key} {fault}")
    repeated = sorted(name for name, count in Counter(names.values()).items() if count > 1)
    if repeated:
        notes.append(f"{data.where('names')}: the same class name is used twice: {', '.join(repeated)}")
    if "nc" in data and data["nc"] != len(names):
        raise DataError(
            f"{data.where('nc')}: nc: {data['nc']} does not agree with the {len(names)} names; nc may be left out"
        )
    return names, notes


def _dataset_root(data: YamlFile) -> Path:
    folder = data.path.resolve().parent
    given = data.get("path")
    if given in (None, ""):
        return folder
    if "\0" in str(given):
        raise DataError(f"{data.where('path')}: path: {given!r}: a name cannot hold a zero byte")
    path = Path(os.path.expanduser(str(given)))  # an unknown ~user stays as it is, and is not found
    tried = (
        [path]
        if path.is_absolute()
        else [folder / path, ROOT / path, ROOT.parent / "datasets" / path.name, Path.cwd() / path]
    )
    for candidate in tried:
        if candidate.is_dir():
            return candidate.resolve()
    listed = ", ".join(dict.fromkeys(str(t.resolve()) for t in tried))
    raise DataError(f"{data.where('path')}: path: {given}: no such folder (looked at {listed}){_download_hint(data)}")


def _download_hint(data: YamlFile) -> str:
    if not data.get("download"):
        return ""
    text = str(data["download"]).strip().splitlines()[0]
    return f"; nothing is downloaded here: fetch the data yourself (the YAML's download: says {text[:120]})"


def _resolve_split(data: YamlFile, key: str, root: Path) -> tuple[Path, ...]:
    value = data.get(key)
    if value in (None, "", []):
        return ()
    entries = value if isinstance(value, (list, tuple)) else [value]
    found = []
    for index, entry in enumerate(entries):
        if not isinstance(entry, str):
            raise DataError(f"{data.where(key, index)}: {key}: expected a path, found {entry!r}")
        tried = [root / entry]
        if entry.startswith("../"):  # exports of labelling services point one folder too high
            tried.append(root / entry[3:])
        tried += [data.path.resolve().parent / entry, ROOT / entry]
        for candidate in tried:
            if candidate.exists():
                found.append(_without_dots(candidate))
                break
        else:
            raise DataError(
                f"{data.where(key, index)}: {key}: {tried[0]}: no such folder or file{_download_hint(data)}"
            )
    return tuple(found)


def _without_dots(path: Path) -> Path:
    """The absolute path without ``..``. A link keeps its name: labels are found by the word ``images`` in it."""
    plain = Path(os.path.abspath(path))
    return plain if plain.exists() and plain.samefile(path) else path.resolve()


DCN_BACKENDS = ("auto", "cuda", "triton", "torchvision")
"""What --dcn-backend may be: models.ops.deform_conv.BACKENDS, for where torch is not imported."""


MAX_LAYERS = 10_000


@dataclass(frozen=True)
class TrainConfig:
    """The flags of train.py, checked. Field names are the flags' names with underscores; see ``train.py --help``."""

    weights: str = ""
    cfg: str = ""
    data: str = ""
    hyp: str = ""
    epochs: int = 100
    batch_size: int = 16
    imgsz: int = 640
    rect: bool = False
    resume: str = ""
    nosave: bool = False
    noval: bool = False
    noautoanchor: bool = False
    noplots: bool = False
    cache: str = ""
    image_weights: bool = False
    device: str = ""
    multi_scale: bool = False
    single_cls: bool = False
    optimizer: str = "SGD"
    sync_bn: bool = False
    ddp_timeout: float = 45.0
    workers: int = 8
    project: str = "runs/train"
    name: str = "exp"
    exist_ok: bool = False
    quad: bool = False
    cos_lr: bool = False
    label_smoothing: float = 0.0
    patience: int = 100
    freeze: tuple[int, ...] = (0,)
    save_period: int = -1
    keep: int = 0
    on_nan: str = "stop"
    seed: int = 0
    amp: str = "auto"
    deterministic: bool = False
    strict_data: bool = False
    dcn: str = ""
    dcn_offset_lr: float = 0.1
    dcn_backend: str = "auto"
    close_mosaic: int = 0
    clip_grad: float = 10.0
    cuda_graphs: str = "auto"
    compile: bool = False
    augment_device: str = "cpu"

    def __post_init__(self) -> None:
        checks = [
            (self.epochs >= 1, f"--epochs {self.epochs}: at least 1"),
            (
                self.batch_size >= 1 or self.batch_size == -1,
                f"--batch-size {self.batch_size}: at least 1, or -1 for automatic",
            ),
            (self.imgsz >= 32, f"--imgsz {self.imgsz}: at least 32 pixels"),
            (0 <= self.seed < 2**63, f"--seed {self.seed}: a whole number from 0 up, below 2**63"),
            (self.keep >= 0, f"--keep {self.keep}: 0 (all) or more checkpoints of --save-period"),
            (
                not (self.keep and self.save_period < 1),
                f"--keep {self.keep}: of the checkpoints that --save-period N writes; give it as well",
            ),
            (self.on_nan in ("stop", "rollback"), f"--on-nan {self.on_nan}: choose one of stop, rollback"),
            (
                not (self.on_nan == "rollback" and self.nosave),
                "--on-nan rollback needs the checkpoints that --nosave leaves out: leave out one of them",
            ),
            (
                self.augment_device in ("cpu", "gpu"),
                f"--augment-device {self.augment_device}: choose cpu or gpu",
            ),
            (self.cuda_graphs in ("auto", "on", "off"), f"--cuda-graphs {self.cuda_graphs}: choose auto, on or off"),
            (
                not (self.compile and (self.multi_scale or self.rect)),
                f"--compile is for batches of one shape: leave it out, or --{'rect' if self.rect else 'multi-scale'}",
            ),
            (self.workers >= 0, f"--workers {self.workers}: 0 or more"),
            (
                self.ddp_timeout == 0 or 2 <= self.ddp_timeout < math.inf,
                f"--ddp-timeout {self.ddp_timeout:g}: 2 seconds or more, or 0 to wait for ever",
            ),
            (self.patience >= 0, f"--patience {self.patience}: 0 (never stop early) or more"),
            (0 <= self.label_smoothing < 1, f"--label-smoothing {self.label_smoothing}: between 0 and 1"),
            (self.dcn_offset_lr >= 0, f"--dcn-offset-lr {self.dcn_offset_lr}: 0 or more"),
            (
                self.dcn_backend in DCN_BACKENDS,
                f"--dcn-backend {self.dcn_backend}: choose one of {', '.join(DCN_BACKENDS)}",
            ),
            (self.close_mosaic >= 0, f"--close-mosaic {self.close_mosaic}: 0 or more epochs"),
            (self.clip_grad >= 0, f"--clip-grad {self.clip_grad}: 0 (off) or more"),
            (
                all(0 <= f <= MAX_LAYERS for f in self.freeze),
                f"--freeze {self.freeze}: layer numbers are 0 or more, at most {MAX_LAYERS}",
            ),
            (
                bool(self.name) and self.name not in (".", "..") and "/" not in self.name,
                f"--name {self.name!r}: a plain folder name",
            ),
            (
                not (self.rect and self.image_weights),
                "--rect and --image-weights exclude each other: rectangular batches have a fixed order",
            ),
        ]
        for fine, message in checks:
            if not fine:
                raise ConfigError(message)

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping for opt.yaml and checkpoints, in the order of the fields."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @property
    def freeze_layers(self) -> tuple[int, ...]:
        """Layer numbers to freeze: one number N means 0..N-1, several mean exactly those."""
        return tuple(range(self.freeze[0])) if len(self.freeze) == 1 else tuple(self.freeze)
