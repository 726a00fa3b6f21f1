"""A model description, read and checked: from YAML text (or the dict in a checkpoint) to a frozen ModelSpec.

Grammar: the keys below; ``backbone`` and ``head`` are lists of rows [from, number, module, arguments].
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from models.activations import activation_from_text
from utils.console import LOGGER
from utils.errors import ConfigError, did_you_mean
from utils.files import ROOT, YamlFile, find_file, load_yaml

REQUIRED = ("nc", "depth_multiple", "width_multiple", "anchors", "backbone", "head")
OPTIONAL = ("activation", "ch", "channel_multiple", "csp_activation", "dcn", "dcn_options", "inplace")
MAX_REPEATS = 1000
DCN_OPTIONS = {"offset_groups": (int,), "separable": (bool,), "bound": (int, float)}
"""What ``dcn_options`` may say of the layers that are made deformable: arguments of models.common.DCN, which checks
their values."""
_KINDS = {(int,): "whole number", (bool,): "true or false", (int, float): "number (YAML reads 1e3 as text: 1.0e+3)"}


@dataclass(frozen=True)
class Row:
    """One line of backbone or head, not yet resolved."""

    where: str
    source: int | list[int]
    number: int
    block: str
    args: list


@dataclass(frozen=True)
class ModelSpec:
    """A checked description. ``anchors``: per level a flat list w, h, ... in pixels, or the number per level;
    ``csp_activation``: that of the blocks which ``activation`` does not reach (BottleneckCSP, MixConv2d)."""

    name: str
    yaml: dict
    nc: int
    ch: int
    anchors: int | list[list[float]]
    depth: float
    width: float
    divisor: int
    activation: nn.Module
    csp_activation: nn.Module
    rows: list[Row]
    dcn: list[str | int]
    dcn_where: str
    dcn_options: dict[str, Any]

    @property
    def anchors_per_cell(self) -> int:
        return self.anchors if isinstance(self.anchors, int) else len(self.anchors[0]) // 2


def read_spec(
    source: str | Path | dict, ch: int | None = None, nc: int | None = None, anchors: float | list | None = None
) -> ModelSpec:
    """Read a YAML file (by path, or by name below models/) or a dict; ``ch``, ``nc``, ``anchors`` replace its entries.

    ``anchors`` is a number per level (rounded) or a list as in the YAML. The result's ``yaml`` is a plain dict with the
    replacements, which rebuilds the same model. Raises ConfigError naming file, line and fault.
    """
    data = source if isinstance(source, dict) else _load(source)
    text = _Where(data)
    values = {key: copy.deepcopy(value) for key, value in data.items()}
    for key, value in (("ch", ch), ("nc", nc), ("anchors", anchors)):
        if value is None:
            continue
        value = round(value) if key == "anchors" and isinstance(value, (int, float)) else value
        if key in values and values[key] != value:
            LOGGER.info(f"Overriding model.yaml {key}={values[key]} with {key}={value}")
        values[key] = value
    _check_keys(values, text, strict=isinstance(data, YamlFile))
    return ModelSpec(
        name=text.name,
        yaml=values,
        nc=_integer(values["nc"], "nc", text),
        ch=_integer(values.setdefault("ch", 3), "ch", text),
        anchors=_anchors(values["anchors"], text),
        depth=_positive(values["depth_multiple"], "depth_multiple", text),
        width=_positive(values["width_multiple"], "width_multiple", text),
        divisor=_integer(values.get("channel_multiple", 8), "channel_multiple", text),
        activation=_activation(values, "activation", text),
        csp_activation=_activation(values, "csp_activation", text),
        rows=[row for part in ("backbone", "head") for row in _rows(part, values[part], text)],
        dcn=_dcn(values.get("dcn"), text),
        dcn_where=f"{text('dcn')}: dcn",
        dcn_options=_dcn_options(values.get("dcn_options"), text),
    )


class _Where:
    """Names places in the description: file:line for a file, key and row number for a dict."""

    def __init__(self, data: dict) -> None:
        self.file = data if isinstance(data, YamlFile) else None
        self.name = self.file.path.name if self.file is not None else "model"

    def __call__(self, key: str, row: int | None = None) -> str:
        if self.file is not None:
            return self.file.where(key) if row is None else self.file.where(key, row)
        return f"model description, {key}" + ("" if row is None else f" row {row + 1}")


def _load(source: str | Path) -> YamlFile:
    path = find_file(source, folders=("models",))
    if path is None:
        known = [file.name for file in (ROOT / "models").rglob("*.yaml")]
        near = did_you_mean(Path(source).name, known)
        raise ConfigError(f"--cfg {source}: no such model YAML{near}; give a path or a file name below models/")
    return load_yaml(path)


def _check_keys(values: dict, where: _Where, strict: bool) -> None:
    known = (*REQUIRED, *OPTIONAL)
    unknown = [key for key in values if key not in known]
    missing = [key for key in REQUIRED if key not in values]
    if strict and unknown:
        raise ConfigError(f"{where(unknown[0])}: unknown key '{unknown[0]}'{did_you_mean(unknown[0], known)}")
    if missing:
        place = where.file.path if where.file is not None else "model description"
        raise ConfigError(f"{place}: missing {', '.join(missing)}; a model needs {', '.join(REQUIRED)}")


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _integer(value: Any, key: str, where: _Where) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{where(key)}: {key} must be a whole number from 1 up, got {value!r}")
    return value


def _positive(value: Any, key: str, where: _Where) -> float:
    if not _number(value) or value <= 0:
        raise ConfigError(f"{where(key)}: {key} must be a number above 0, got {value!r}")
    return float(value)


def _anchors(value: Any, where: _Where) -> int | list[list[float]]:
    if not isinstance(value, list):
        return _integer(value, "anchors", where)
    for index, level in enumerate(value):
        place = where("anchors", index)
        if not isinstance(level, list) or not level or len(level) % 2:
            raise ConfigError(f"{place}: anchors must be lists w,h, w,h, ... in pixels, got {level!r}")
        if not all(_number(side) and side >= 0 for side in level):
            raise ConfigError(f"{place}: anchor sides must be numbers in pixels, got {level!r}")
        if len(level) != len(value[0]):
            raise ConfigError(f"{place}: {len(level) // 2} anchors here, {len(value[0]) // 2} in the first level")
    if not value:
        raise ConfigError(f"{where('anchors')}: anchors is an empty list")
    return value


def _dcn(value: Any, where: _Where) -> list[str | int]:
    """Layers to make deformable (models.deform): an item, or a list of them."""
    items = [] if value is None else value if isinstance(value, list) else [value]
    for item in items:
        if not isinstance(item, (str, int)) or isinstance(item, bool):
            raise ConfigError(f"{where('dcn')}: dcn must list layers like 5 or c3:8, got {item!r}")
    return items


def _dcn_options(value: Any, where: _Where) -> dict[str, Any]:
    """A mapping of DCN_OPTIONS, or nothing."""
    if value is None:
        return {}
    place = where("dcn_options")
    if not isinstance(value, dict):
        raise ConfigError(f"{place}: dcn_options must be a mapping like {{offset_groups: 4}}, got {value!r}")
    for key, given in value.items():
        if key not in DCN_OPTIONS:
            raise ConfigError(f"{place}: unknown dcn_options key {key!r}{did_you_mean(str(key), DCN_OPTIONS)}")
        if type(given) not in DCN_OPTIONS[key]:
            raise ConfigError(f"{place}: dcn_options {key}: {given!r} is no {_KINDS[DCN_OPTIONS[key]]}")
    return dict(value)


def _activation(values: dict, key: str, where: _Where) -> nn.Module:
    if values.get(key) is None:
        return nn.SiLU()
    try:
        return activation_from_text(str(values[key]))
    except ValueError as error:
        raise ConfigError(f"{where(key)}: {error}") from None


def _rows(part: str, value: Any, where: _Where) -> list[Row]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{where(part)}: {part} must be a list of rows [from, number, module, [arguments]]")
    return [_row(row, where(part, index)) for index, row in enumerate(value)]


def _row(row: Any, where: str) -> Row:
    if not isinstance(row, list) or len(row) != 4:
        raise ConfigError(f"{where}: expected a row [from, number, module, [arguments]], got {row!r}")
    source, number, block, args = row
    sources = source if isinstance(source, list) else [source]
    if not sources or not all(isinstance(s, int) and not isinstance(s, bool) for s in sources):
        raise ConfigError(f"{where}: 'from' must be a layer number or a list of them, got {source!r}")
    if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= MAX_REPEATS:
        raise ConfigError(f"{where}: 'number' must be a whole number 1..{MAX_REPEATS}, got {number!r}")
    if not isinstance(block, str):
        raise ConfigError(f"{where}: the module must be a name like Conv, got {block!r}")
    if not isinstance(args, list):
        raise ConfigError(f"{where}: the arguments of {block} must be a list, got {args!r}")
    return Row(where, source, number, block, args)
