"""From a YAML file or a checkpoint to a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from models.deform import factor_between
from models.ensemble import Ensemble
from models.parser import described_values
from models.spec import read_spec
from models.surgery import fuse as fuse_norms
from models.upstream import Upstream, differences, read_weights
from models.yolo import DetectionModel
from utils.checkpoint import Checkpoint
from utils.console import LOGGER
from utils.errors import CheckpointError, ConfigError
from utils.files import EXPORTED_MODELS
from utils.safe_names import MAX_NAME, printable
from utils.wts import read_wts

BESIDE_THE_WEIGHTS = ("anchor_grid", "strides")
"""Tensors of Detect in a .wts that C++ readers need and no state dict holds."""


@dataclass(frozen=True)
class LoadReport:
    """What came over from a checkpoint: entries of the model's state dict."""

    source: str = ""
    transferred: int = 0
    total: int = 0
    missing: list[str] = field(default_factory=list)
    """In the model, not in the file (or left out: anchors that were given anew)."""
    mismatched: list[str] = field(default_factory=list)
    """In both with different shapes, as ``name file-shape -> model-shape``."""

    def text(self) -> str:
        """One or two lines for the log."""
        if not self.source:
            return "No weights given: training starts from random weights"
        line = f"Transferred {self.transferred}/{self.total} items from {self.source}"
        if self.mismatched:
            line += f"\nNot transferred, other shape: {_first(self.mismatched)}"
        if self.missing:
            line += f"\nNot in the file: {_first(self.missing)}"
        return line


def _first(names: list[str], shown: int = 3) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def build_or_load(
    cfg: str | Path | dict | None,
    weights: str | Path | None,
    nc: int | None,
    anchors: float | list | None = None,
    names: Mapping[int, str] | Sequence[str] | None = None,
) -> tuple[DetectionModel, LoadReport]:
    """A model for training, float32 on the CPU.

    The layers are those of ``cfg``, or of the checkpoint when cfg is empty; entries of the checkpoint whose name and
    shape fit are taken over. Another ``nc`` so keeps all but the head. The checkpoint's anchors are taken over too,
    unless ``cfg`` or ``anchors`` gives others; to resume a run pass neither. ``names`` are the class names, as a dict
    or in order.

    Raises ConfigError for a faulty YAML, for neither cfg nor weights and for a wrong number of names; CheckpointError
    for a weights file that is missing, damaged, without a description or that fits nothing.
    """
    checkpoint = _read(weights) if weights else None
    if checkpoint is None and not cfg:
        raise ConfigError("neither --weights nor --cfg given: name a checkpoint to start from or a model YAML to build")
    if cfg:
        model = DetectionModel(cfg, nc=nc, anchors=anchors)
    else:
        model = build_described(checkpoint, nc, anchors)
        for line in _differences(model, checkpoint)[:3] if nc in (None, checkpoint.meta.get("nc")) else ():
            LOGGER.warning(f"{weights}: {line}")
    report = LoadReport()
    if checkpoint is not None:
        keep_anchors = not cfg and anchors is None
        report = _transfer(model, checkpoint, keep_anchors)
        if checkpoint.meta.get("names") and checkpoint.meta.get("nc") == model.nc:
            model.names = _named(checkpoint.meta["names"], model.nc, str(weights))
    if names is not None:
        model.names = _named(names, model.nc, "names")
    return model, report


def load_model(
    weights: str | Path | Sequence[str | Path],
    device: torch.device | str = "cpu",
    fuse: bool = True,
    cfg: str | Path | None = None,
) -> DetectionModel | Ensemble:
    """A model for inference: eval mode, float32, on ``device``, norms folded unless ``fuse`` is False. Several files
    make an Ensemble. ``cfg``: the model YAML, for a file that holds tensors only (a .wts of another program).

    Raises ConfigError for a faulty ``cfg``, CheckpointError for a file that is missing, damaged or incomplete. Nothing
    is downloaded.
    """
    paths = [weights] if isinstance(weights, (str, Path)) else list(weights)
    if not paths:
        raise CheckpointError("no weights given: name at least one checkpoint")
    # channels last: the order that both cuDNN and oneDNN convolve fastest (a quarter less time on a CPU at batch 1)
    models = [_load_one(path, fuse, cfg).to(device, memory_format=torch.channels_last) for path in paths]
    if len(models) == 1:
        return models[0]
    LOGGER.info(f"Ensemble created with {[str(path) for path in paths]}")
    return Ensemble(models).eval()


def _load_one(path: str | Path, fuse: bool, cfg: str | Path | None) -> DetectionModel:
    checkpoint = _read(path)
    model = fill_described(described_by(cfg, checkpoint) if cfg else checkpoint).eval()
    return fuse_norms(model) if fuse else model


def described_by(cfg: str | Path, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with a model YAML as its description; the class count is that of the weights, where the head shows
    it. Raises ConfigError for a faulty YAML."""
    spec = read_spec(cfg)
    biases = [tensor for name, tensor in checkpoint.model.items() if name.endswith(".m.0.bias") and tensor.dim() == 1]
    outputs = len(biases[-1]) / spec.anchors_per_cell if biases else 0
    nc = int(outputs) - 5 if outputs > 5 and outputs.is_integer() else spec.nc
    return replace(checkpoint, meta={**checkpoint.meta, "yaml": {**spec.yaml, "nc": nc}, "nc": nc})


def fill_described(checkpoint: Checkpoint) -> DetectionModel:
    """The model that a checkpoint describes with all of its weights, float32 on the CPU.

    Raises CheckpointError when it has no description or a faulty one, when weights are lacking, and when the modules in
    a file of YOLOv5 do not compute what those of this program do.
    """
    model = build_described(checkpoint, empty=True)
    unlike = _differences(model, checkpoint)
    if unlike:
        raise CheckpointError(f"{checkpoint.path}: its modules are not those of this program: {_first(unlike)}")
    report = _transfer(model, checkpoint, keep_anchors=True)
    if report.transferred < report.total:
        lacking = [*report.missing, *report.mismatched]
        raise CheckpointError(f"{checkpoint.path}: its weights do not fill its own model: {_first(lacking)}")
    if checkpoint.meta.get("names"):
        model.names = _named(checkpoint.meta["names"], model.nc, str(checkpoint.path))
    return model.float()


def build_described(
    checkpoint: Checkpoint, nc: int | None = None, anchors: float | list | None = None, empty: bool = False
) -> DetectionModel:
    """A new model from a checkpoint's own description; ``nc`` and ``anchors`` replace its entries. ``empty``: its
    values are to be set, all of them.

    Raises CheckpointError, naming the file, for a description that is missing, faulty or of a far larger model than the
    file has weights for.
    """
    description, own_nc = _description(checkpoint), checkpoint.meta.get("nc")
    try:
        check = partial(_check_size, checkpoint)
        if nc in (None, own_nc) and anchors is None:
            return DetectionModel(description, nc=own_nc, check=check, empty=empty)
        check(described_values(read_spec(description, nc=own_nc)))
        return DetectionModel(description, nc=own_nc if nc is None else nc, anchors=anchors, empty=empty)
    except ConfigError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from None


def _check_size(checkpoint: Checkpoint, described: int) -> None:
    """The description is text of the file: a few words of it could ask for all memory. Counted without allocating."""
    held = sum(value.numel() for value in checkpoint.model.values())
    if described > 2 * held + 1_000_000:
        raise CheckpointError(
            f"{checkpoint.path}: the model it describes, or the --cfg that is to, has {described:,} values but it "
            f"holds {held:,}: they do not belong together"
        )


def _differences(model: DetectionModel, checkpoint: Checkpoint) -> list[str]:
    """Where a checkpoint of YOLOv5 has other modules than the model built from its description, or a .wts tensors that
    the model has no place for."""
    own = model.state_dict()
    unknown = [f"{name} has no place here" for name in checkpoint.model if name not in own]
    if is_wts(checkpoint.path):
        return [line for line in unknown if not line.split()[0].endswith(BESIDE_THE_WEIGHTS)]
    return differences(model, checkpoint.modules) + unknown if isinstance(checkpoint, Upstream) else []


def _read(path: str | Path) -> Checkpoint:
    if Path(path).suffix in (".yaml", ".yml"):
        raise CheckpointError(f"{path}: a model YAML holds no weights; use --cfg {path}")
    if str(path).endswith(EXPORTED_MODELS):
        where = "val.py, detect.py and deploy.runtime.open_model run it"
        raise CheckpointError(f"{path}: an exported model: {where}; a checkpoint (.pt) is needed here")
    return read_any_weights(path)


def read_any_weights(path: str | Path) -> Checkpoint:
    """:func:`models.upstream.read_weights`, or a .wts as a Checkpoint whose tensors are flat, without shapes."""
    if not is_wts(path):
        return read_weights(path)
    tensors, meta = read_wts(path)
    return Checkpoint(Path(path), tensors, meta)


def is_wts(path: str | Path) -> bool:
    """Whether the file's name is that of tensors as text (utils/wts.py)."""
    return Path(path).suffix == ".wts"


def _description(checkpoint: Checkpoint) -> dict:
    description = checkpoint.meta.get("yaml")
    if not isinstance(description, dict):
        raise CheckpointError(
            f"{checkpoint.path}: holds weights without a model description; add --cfg with its YAML (train.py, "
            f"val.py, detect.py; or python -m models.convert {checkpoint.path} --cfg model.yaml -o ours.pt)"
        )
    return description


@torch.no_grad()
def _transfer(model: nn.Module, checkpoint: Checkpoint, keep_anchors: bool) -> LoadReport:
    """Copy what fits by name and shape, whatever the file's float dtype. Between a convolution and a DCN in its place
    the weight changes by :func:`models.deform.factor_between`, so that the layer gives what it gave."""
    own: dict[str, Tensor] = model.state_dict()
    transferred, missing, mismatched = 0, [], []
    for name, target in own.items():
        value = checkpoint.model.get(name)
        if value is not None and is_wts(checkpoint.path) and value.numel() == target.numel():
            value = value.view_as(target)  # a .wts has no shapes
        if value is None or ("anchor" in name and not keep_anchors):
            missing.append(name)
        elif value.shape != target.shape:
            mismatched.append(f"{name} {tuple(value.shape)} -> {tuple(target.shape)}")
        else:
            factor = factor_between(name, checkpoint.model, own)
            target.copy_(value if factor == 1 else value * factor)
            transferred += 1
    if transferred == 0:
        raise CheckpointError(
            f"{checkpoint.path}: nothing in it fits the model; is it a checkpoint of another network?"
        )
    return LoadReport(str(checkpoint.path), transferred, len(own), missing, mismatched)


def _named(names: Mapping[int, str] | Sequence[str], nc: int, source: str) -> dict[int, str]:
    pairs = names.items() if isinstance(names, Mapping) else enumerate(names if isinstance(names, Sequence) else ())
    # weights come from anywhere: what cannot be a class name is shown, not refused, so that the weights can be used
    named = {number: printable(str(name)[:MAX_NAME]) for number, name in pairs}
    if not all(type(number) is int for number in named):
        raise ConfigError(f"{source}: class names must be numbered 0..{nc - 1}")
    if sorted(named) != list(range(nc)):
        raise ConfigError(f"{source}: {len(named)} class names for {nc} classes; they must be numbered 0..{nc - 1}")
    return dict(sorted(named.items()))
