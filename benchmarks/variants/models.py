"""The variants: a plain model's YAML with another ``dcn:`` line, with other blocks, or trained with other flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.errors import ConfigError, did_you_mean
from utils.files import atomic_write, dump_yaml, find_file, load_yaml

PLAIN = "plain"


@dataclass(frozen=True)
class Variant:
    """``dcn``, ``options``: the YAML's ``dcn:`` and ``dcn_options:``. ``blocks``: rows of the backbone that get another
    block. ``flags``: of train.py."""

    note: str
    dcn: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    blocks: Mapping[int, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()


LAST_TWO = ("c3:6", "c3:8")
VARIANTS: dict[str, Variant] = {
    PLAIN: Variant("the control: no DCN"),
    "c3-6-8": Variant("3x3 of the bottlenecks of layers 6 and 8", LAST_TWO),
    "c3-8": Variant("3x3 of the bottlenecks of layer 8", ("c3:8",)),
    "down-5-7": Variant("downsampling layers 5 and 7", ("5", "7")),
    "c3-6-8-fast": Variant("c3-6-8, offsets learn at the full rate", LAST_TWO, flags=("--dcn-offset-lr", "1")),
    "c3-third": Variant("every third bottleneck of layers 6 and 8", ("c3:6/3", "c3:8/3")),
    "c3-6-8-groups": Variant("c3-6-8, 4 offset groups", LAST_TWO, {"offset_groups": 4}),
    "c3-6-8-separable": Variant("c3-6-8, offsets from depthwise 3x3 and 1x1", LAST_TWO, {"separable": True}),
    "c3-6-8-bound": Variant("c3-6-8, offsets within 4 pixels of the map", LAST_TWO, {"bound": 4}),
    "grouped-6-8": Variant("grouped sampling and 1x1 in layers 6 and 8", blocks={6: "C3GDCN", 8: "C3GDCN"}),
    "down-7": Variant("downsampling layer 7", ("7",)),
    "down-1-3-5": Variant("the article's places, with BatchNorm and SiLU", ("1", "3", "5")),
    "c3-4-6-8": Variant("3x3 of the bottlenecks of layers 4, 6 and 8", ("c3:4", *LAST_TWO)),
    "c3-8-groups": Variant("c3-8, 4 offset groups", ("c3:8",), {"offset_groups": 4}),
    "c3-third-groups": Variant("c3-third, 4 offset groups", ("c3:6/3", "c3:8/3"), {"offset_groups": 4}),
    "c3-third-groups-fast": Variant(
        "c3-third-groups, offsets learn at the full rate",
        ("c3:6/3", "c3:8/3"),
        {"offset_groups": 4},
        flags=("--dcn-offset-lr", "1"),
    ),
    "c3-head": Variant("3x3 of the bottlenecks before Detect", ("c3:17", "c3:20", "c3:23")),
}
"""In order of interest: what time does not suffice for is left out from the end."""


def check_names(names: Sequence[str], flag: str) -> list[str]:
    """The names, each once. Raises ConfigError for one that is none."""
    for name in names:
        if name not in VARIANTS:
            raise ConfigError(
                f"{flag} {name}: no such variant{did_you_mean(name, VARIANTS)} (there are: {', '.join(VARIANTS)})"
            )
    return list(dict.fromkeys(names))


def write_cfgs(base: str, folder: Path, names: Sequence[str]) -> dict[str, str]:
    """FOLDER/NAME.yaml for each variant of the model YAML ``base``; returns the absolute paths. Raises ConfigError."""
    found = find_file(base, ("models",))
    if found is None:
        raise ConfigError(f"--base {base}: no such file here or below models/")
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name in names:
        path = folder.resolve() / f"{name}.yaml"
        atomic_write(path, f"# {VARIANTS[name].note}\n{dump_yaml(_described(load_yaml(found), VARIANTS[name]))}")
        paths[name] = str(path)
    return paths


def _described(values: dict, variant: Variant) -> dict:
    values = {**values, "backbone": [list(row) for row in values["backbone"]]}
    for index, block in variant.blocks.items():
        values["backbone"][index][2] = block
    if variant.dcn:
        values["dcn"] = list(variant.dcn)
    if variant.options:
        values["dcn_options"] = dict(variant.options)
    return values
