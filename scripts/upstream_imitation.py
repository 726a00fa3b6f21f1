"""Files that look like YOLOv5's, for tests and fuzzing: its class names, attributes and layout, none of its code.

A pickle stores an object as the name of its class and a dict of attributes. :func:`stand_in` makes an object whose
class exists only as such a name, :func:`imitate` turns one of our models into a tree of them, :func:`write` pickles.
"""

from __future__ import annotations

import copy
import io
import pickle
import types
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

HOOKS = ("_backward_hooks", "_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")
OURS = {"models.head.Detect": "models.yolo.Detect"}
"""Classes that live elsewhere in YOLOv5."""


class _Pickler(pickle._Pickler):
    """Writes a class by its name without looking whether it exists."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        self.write(b"c" + f"{obj.__module__}\n{name or obj.__qualname__}\n".encode())
        self.memoize(obj)

    dispatch = {**pickle._Pickler.dispatch, types.FunctionType: save_global, types.BuiltinFunctionType: save_global}


PICKLE = types.SimpleNamespace(Pickler=_Pickler, dump=pickle.dump, __name__="pickle")
"""What ``torch.save`` takes as ``pickle_module``."""


def stand_in(name: str, state: Mapping[str, Any] | None = None) -> Any:
    """An object of the class ``name`` (``module.Class``) with these attributes."""
    module, _, kind = name.rpartition(".")
    obj = type(kind, (), {"__module__": module})()
    obj.__dict__.update(state or {})
    return obj


def imitate(
    model: nn.Module, classes: Mapping[str, str] | None = None, half: bool = True, hooks: bool = True, **attributes: Any
) -> Any:
    """``model`` as YOLOv5 would pickle it. ``classes``: other names of classes by our bare ones, e.g.
    ``{"DetectionModel": "models.yolo.Model"}``; ``attributes``: more or other attributes of the model itself
    (None takes one away)."""
    root = {
        "nc": model.nc,
        "names": list(model.names.values()),
        "yaml": copy.deepcopy(model.yaml),
        "stride": model.stride,
        "hyp": {},
    }
    root.update({"save": model.save, "inplace": True, **attributes})
    tree = _module(model, dict(classes or {}), half, hooks)
    tree.__dict__.pop("layers", None)
    tree.__dict__.update({key: value for key, value in root.items() if value is not None})
    for key in [key for key, value in root.items() if value is None]:
        tree.__dict__.pop(key, None)
    return tree


def _module(module: nn.Module, classes: dict[str, str], half: bool, hooks: bool) -> Any:
    own = type(module)
    name = classes.get(own.__name__, OURS.get(f"{own.__module__}.{own.__name__}", f"{own.__module__}.{own.__name__}"))
    state = {key: value for key, value in vars(module).items() if _attribute(key, value)}
    state["_parameters"] = OrderedDict((key, _cast(p, half)) for key, p in module._parameters.items())
    state["_buffers"] = OrderedDict((key, _cast(b, half)) for key, b in module._buffers.items())
    state["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    state.update({key: OrderedDict() for key in (HOOKS if hooks else ())})
    state["_modules"] = OrderedDict((key, _module(m, classes, half, hooks)) for key, m in module._modules.items() if m)
    if own.__name__ == "Detect":
        state["_non_persistent_buffers_set"], state["stride"] = set(), state["_buffers"].pop("stride")
        state["grid"] = [torch.zeros(1).expand(1, 1, 4, 4, 2)]
    return stand_in(name, state)


def _attribute(key: str, value: Any) -> bool:
    simple = isinstance(value, (bool, int, float, str, tuple, list)) or value is None
    return simple and (not key.startswith("_") or key == "_is_full_backward_hook") and key not in ("yaml", "layers")


def _cast(tensor: torch.Tensor | None, half: bool) -> torch.Tensor | None:
    if tensor is None or not tensor.is_floating_point():
        return tensor
    plain = tensor.detach().half() if half else tensor.detach().clone()
    return nn.Parameter(plain, requires_grad=False) if isinstance(tensor, nn.Parameter) else plain


def checkpoint(model: Any, **entries: Any) -> dict[str, Any]:
    """The entries of a stripped file of YOLOv5 around ``model``; ``entries`` replace them."""
    content = {"epoch": -1, "best_fitness": None, "model": model, "ema": None, "updates": None, "optimizer": None}
    return {
        **content,
        "opt": {"weights": "", "hyp": {"lr0": 0.01}},
        "git": {},
        "date": "2022-01-01T00:00:00",
        **entries,
    }


def write(path: str | Path | io.BytesIO, content: Any, zipped: bool = True) -> Any:
    """Pickle with ``torch.save``, classes by name; ``zipped`` False gives the form of torch before 1.6."""
    torch.save(content, path, pickle_module=PICKLE, pickle_protocol=2, _use_new_zipfile_serialization=zipped)
    return path
