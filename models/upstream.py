"""Checkpoints of YOLOv5 as data: from a file's inert records to weights, YAML, names, strides, anchors, hyp, epoch.

Read are the .pt files of all releases (stripped or with training state), whole pickled models, the article's DCN
models, and plain state dicts. No class of theirs is imported; the network is rebuilt from the ``yaml`` in the file, and
:func:`differences` tells where the modules in the file are others than those built.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from models.activations import ACTIVATIONS
from utils.checkpoint import Checkpoint, as_checkpoint, is_own
from utils.errors import CheckpointError
from utils.pickle_records import Named, Record, show
from utils.torch_file import read_torch_file

MAX_ENTRIES = 50_000
MAX_NAME = 200
"""Characters of a module's or parameter's full name."""
WRAPPERS = ("DataParallel", "DistributedDataParallel")
OTHER_TASKS = {"SegmentationModel": "segmentation", "Segment": "segmentation", "ClassificationModel": "classification"}
FIXED_ACTIVATION = ("BottleneckCSP", "MixConv2d")
"""Blocks with an activation of their own beside the model's."""


@dataclass(frozen=True)
class Upstream(Checkpoint):
    """A checkpoint of YOLOv5. ``modules``: the record of every module by its path, like ``model.0.conv``;
    ``left_out``: what of the file is not taken over."""

    modules: dict[str, Record] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def read_weights(path: str | Path) -> Checkpoint:
    """A checkpoint of this program, or one of YOLOv5 (an :class:`Upstream`), tensors on the CPU; no code is run.

    A state dict without a description gives a Checkpoint whose ``meta`` has no yaml. Raises CheckpointError, in one
    line, for what cannot be read or holds no detector.
    """
    return from_content(Path(path), read_torch_file(path))


def from_content(path: Path, content: Any) -> Checkpoint:
    """The same from what :func:`utils.torch_file.read_torch_file` returned for ``path``."""
    if is_own(content):
        return as_checkpoint(path, content)
    if isinstance(content, Record):
        content = {"model": content}
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a checkpoint (it holds a {type(content).__name__})")
    for key in ("ema", "model"):  # the averaged weights are the better ones
        module = _module(content.get(key))
        if module is not None:
            return _converted(path, content, module, key)
    return Checkpoint(path, _plain_state_dict(path, content))


def _module(value: Any) -> Record | None:
    """The model in an entry: the object itself, the first of a pair, or what a wrapper for several GPUs holds."""
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    while isinstance(value, Record) and value.kind in WRAPPERS:
        value = _children(value).get("module")
    return value if isinstance(value, Record) else None


def _plain_state_dict(path: Path, content: dict) -> dict[str, Tensor]:
    """{"state_dict" or "model" or "ema": {name: tensor}}, or the dict of tensors itself; "module." is taken off."""
    places = [content.get(key) for key in ("ema", "state_dict", "model_state_dict", "model")] + [content]
    for place in places:
        if isinstance(place, dict) and place and all(isinstance(value, Tensor) for value in place.values()):
            return {str(key).removeprefix("module."): value for key, value in place.items()}
    keys = ", ".join(show(str(key)) for key in list(content)[:4])
    raise CheckpointError(f"{path}: no weights found in it (it holds a dict of {keys or 'nothing'})")


def _converted(path: Path, content: dict, module: Record, source: str) -> Upstream:
    _check_kind(path, module)
    modules = dict(islice(_walk(path, module), MAX_ENTRIES))
    state = _state_dict(path, modules)
    description = _description(path, module, modules)
    options = content.get("opt") if isinstance(content.get("opt"), dict) else {}
    nc = description.get("nc")
    epoch = content.get("epoch")
    meta = {
        "yaml": description,
        "nc": nc,
        "names": _names(module.state.get("names"), nc),
        "stride": _strides(module, modules),
        "hyp": next((_plain(h) for h in (options.get("hyp"), module.state.get("hyp")) if isinstance(h, dict)), {}),
        "epoch": epoch if isinstance(epoch, int) and epoch >= 0 else None,
        "date": str(content["date"])[:40] if isinstance(content.get("date"), str) else None,
        "source": f"YOLOv5, {show(module.name)}",
    }
    meta["anchors"] = _anchors(state, meta["stride"])
    taken = {source, "epoch", "date"}
    left_out = [show(str(key)) for key, value in content.items() if key not in taken and value is not None]
    return Upstream(path, state, {k: v for k, v in meta.items() if v is not None}, None, modules, left_out)


def _check_kind(path: Path, module: Record) -> None:
    """Raise CheckpointError for the models of other programs and tasks."""
    last = list(_children(_children(module).get("model")).values())[-1:]
    for record in (module, *last):
        if isinstance(record, Record) and record.name.startswith("ultralytics."):
            raise CheckpointError(
                f"{path}: a {show(record.name)}, a model of YOLOv8 or later; only YOLOv5's are read here"
            )
        if isinstance(record, Record) and record.kind in OTHER_TASKS:
            raise CheckpointError(
                f"{path}: a {OTHER_TASKS[record.kind]} model ({show(record.name)}); this is a detector"
            )


def _children(module: Any) -> dict[str, Any]:
    """name -> Record (or None) of the modules inside a module."""
    found = module.state.get("_modules") if isinstance(module, Record) else None
    return found if isinstance(found, dict) else {}


def _walk(path: Path, module: Record, prefix: str = "") -> Iterator[tuple[str, Record]]:
    """(path, record) of a module and all inside it, in the order of a state dict. Depth is bounded by the reader."""
    yield prefix, module
    for name, child in _children(module).items():
        if not isinstance(name, str) or len(name) + len(prefix) > MAX_NAME:
            raise CheckpointError(f"{path}: a module in it has a name that cannot be")
        if isinstance(child, Record):
            yield from _walk(path, child, f"{prefix}.{name}" if prefix else name)


def _state_dict(path: Path, modules: Mapping[str, Record]) -> dict[str, Tensor]:
    """Parameters, then buffers of every module, under the names torch gives them. Left out: what torch leaves out, and
    ``anchor_grid``, which releases before 6.1 stored."""
    state: dict[str, Tensor] = {}
    for prefix, module in modules.items():
        passing = module.state.get("_non_persistent_buffers_set")
        passing = passing if isinstance(passing, (set, list, tuple)) else ()
        for group in ("_parameters", "_buffers"):
            entries = module.state.get(group)
            for name, value in entries.items() if isinstance(entries, dict) else ():
                if not isinstance(value, Tensor) or name in passing or name == "anchor_grid":
                    continue
                if not isinstance(name, str) or len(name) > MAX_NAME or len(state) >= MAX_ENTRIES:
                    raise CheckpointError(f"{path}: more tensors, or longer names, than a model has")
                state[f"{prefix}.{name}" if prefix else name] = value
    if not state:
        raise CheckpointError(f"{path}: no weights found in it (a {show(modules[''].name)} without tensors)")
    return state


# -- what describes the model -----------------------------------------------------------------------------------------


def _description(path: Path, module: Record, modules: Mapping[str, Record]) -> dict:
    """The YAML in the file, with the class count and the activations that the modules really have."""
    found = module.state.get("yaml")
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{path}: a {show(module.name)} without a model description (yaml); add --cfg with its YAML"
        )
    description = _plain(found)
    if isinstance(module.state.get("nc"), int):
        description["nc"] = module.state["nc"]
    for key, fixed in (("activation", False), ("csp_activation", True)):
        text = _activation(modules, fixed)
        if text is not None:
            description[key] = text
    return description


def _activation(modules: Mapping[str, Record], fixed: bool) -> str | None:
    """The commonest ``act`` of the model's blocks as the text a YAML uses; None where it is SiLU, the default.

    ``fixed``: of the blocks that have their own, which the YAML's ``activation`` does not reach.
    """
    texts: Counter[str] = Counter()
    for place, record in modules.items():
        parent, _, name = place.rpartition(".")
        inside = modules[parent].kind in FIXED_ACTIVATION
        if name == "act" and inside == fixed and record.kind in ACTIVATIONS and record.kind != "Identity":
            slope = record.state.get("negative_slope")
            texts[f"nn.{record.kind}({slope})" if isinstance(slope, float) else f"nn.{record.kind}"] += 1
    text = texts.most_common(1)[0][0] if texts else "nn.SiLU"
    return None if text == "nn.SiLU" else text


def _plain(value: Any) -> Any:
    """Plain data of a value: classes by their names, tensors and objects dropped."""
    if isinstance(value, dict):
        kept = {
            k: v for k, v in value.items() if isinstance(k, (str, int, float)) and not isinstance(v, (Record, Tensor))
        }
        return {key: _plain(item) for key, item in kept.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value if not isinstance(item, (Record, Tensor))]
    if isinstance(value, Named):
        short = value.name.rpartition(".")[2]
        return f"nn.{short}" if value.name.startswith("torch.nn.") else short
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(type(value).__name__)


def _names(names: Any, nc: Any) -> dict[int, str] | None:
    """{class: name}; older files have a list. None when they do not fit, so that numbers stand in."""
    pairs = dict(enumerate(names)) if isinstance(names, (list, tuple)) else names
    if not isinstance(pairs, dict) or len(pairs) != nc or not all(type(k) is int and 0 <= k < nc for k in pairs):
        return None
    return {key: name if isinstance(name, str) else f"class{key}" for key, name in sorted(pairs.items())}


def _strides(module: Record, modules: Mapping[str, Record]) -> list[float] | None:
    """Pixels per cell of each level: of the model, or of its Detect."""
    detect = next((record for record in reversed(modules.values()) if record.kind == "Detect"), module)
    for record in (module, detect):
        stride = record.state.get("stride")
        if isinstance(stride, Tensor) and stride.dim() == 1 and 0 < len(stride) <= 16:
            return stride.float().tolist()
    return None


def _anchors(state: Mapping[str, Tensor], strides: list[float] | None) -> list[list[float]] | None:
    """Per level a flat list w, h, ... in pixels."""
    grid = next((value for key, value in state.items() if key.endswith(".anchors")), None)
    if grid is None or not strides or grid.dim() != 3 or len(grid) != len(strides):
        return None
    return [(level.float() * stride).flatten().tolist() for level, stride in zip(grid, strides)]


# -- whether the rebuilt model is the one in the file -----------------------------------------------------------------

_GEOMETRY = {
    "Conv2d": ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
    "ConvTranspose2d": ("kernel_size", "stride", "padding", "output_padding", "dilation", "groups"),
    "BatchNorm2d": ("eps",),
    "MaxPool2d": ("kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    "AvgPool2d": ("kernel_size", "stride", "padding", "ceil_mode"),
    "Upsample": ("size", "scale_factor", "mode"),
    "LeakyReLU": ("negative_slope",),
    "Concat": ("d",),
    "Bottleneck": ("add",),
    "CrossConv": ("add",),
    "Detect": ("nc", "na", "nl"),
}
_WITHOUT_EFFECT = ("Identity", "Dropout", "Dropout2d", "Sequential", "ModuleList")


def differences(model: nn.Module, modules: Mapping[str, Record]) -> list[str]:
    """Where ``model``, in eval mode, does not compute what the modules of the file do: other classes, other sizes,
    modules too many or too few. Empty for a faithful copy (the weights aside)."""
    own = dict(model.named_modules(remove_duplicate=False))
    found = []
    for place, record in modules.items():
        if place and place in own:
            found += _unlike(place, own[place], record)
        elif place and record.kind not in _WITHOUT_EFFECT:
            found.append(f"{show(place)} is a {show(record.name)} there and absent here")
    for place, module in own.items():
        leaf = not any(module.children()) and type(module).__name__ not in _WITHOUT_EFFECT
        if leaf and place not in modules:
            found.append(f"{place} is a {type(module).__name__} here and absent there")
    return found


def _unlike(place: str, module: nn.Module, record: Record) -> list[str]:
    kind = type(module).__name__
    own_class = not record.name.startswith("torch.") or record.kind in ACTIVATIONS or kind in ACTIVATIONS
    if own_class and record.kind not in [each.__name__ for each in type(module).__mro__]:  # DWConv was a Conv once
        return [f"{place} is a {show(record.name)} there, a {kind} here"]
    found = []
    for name in _GEOMETRY.get(kind, ()):
        there, here = record.state.get(name), getattr(module, name)
        if name in record.state and _pair(there) != _pair(here):
            found.append(f"{place} ({show(record.name)}) has {name} {show(str(_plain(there)))} there, {here} here")
    return found


def _pair(value: Any) -> Any:
    """Sizes are written as one number or as two; numbers are compared as float32."""
    if isinstance(value, (tuple, list)):
        return tuple(value) if len(value) == 2 else value
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return (float(f"{value:.6g}"),) * 2 if number else value
