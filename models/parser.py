"""From checked rows to layers. Each block of the table carries its own channel rule; nothing in a row is evaluated."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from models.activations import activation_from_text
from models.common import C3, C3DCN, DCN, SPP, SPPF, Bottleneck, Concat, Conv, DCNConv, DWConv, Focus, batch_norm
from models.extra import (
    C3GDCN,
    C3SPP,
    BottleneckCSP,
    C3x,
    Contract,
    CrossConv,
    DWConvTranspose2d,
    Expand,
    GDCNConv,
    MixConv2d,
)
from models.ghost import C3Ghost, GhostBottleneck, GhostConv
from models.head import Detect
from models.spec import MAX_REPEATS, ModelSpec, Row
from models.transformer import C3TR, TransformerBlock
from utils.errors import ConfigError, did_you_mean

Rule = Callable[[ModelSpec, list[int], list], tuple[list, int]]
"""(spec, channels of the inputs, arguments of the row) -> (arguments of the constructor, channels out)."""


@dataclass(frozen=True)
class Block:
    """A name's meaning. ``takes_repeats``: the number goes into the constructor (third) instead of making copies."""

    build: Callable[..., nn.Module]
    rule: Rule
    takes_repeats: bool = False


@dataclass(frozen=True)
class Layer:
    """What the model knows of one built layer. ``inputs`` are absolute layer numbers, -1 is the image."""

    index: int
    source: int | list[int]
    inputs: tuple[int, ...]
    repeats: int
    type: str
    args: list
    where: str

    @property
    def kept(self) -> tuple[int, ...]:
        """Inputs that are named by number or further back than the previous layer: the model must keep them."""
        sources = self.source if isinstance(self.source, list) else [self.source]
        return tuple(i for source, i in zip(sources, self.inputs) if source != -1)


MAX_BLOCKS = 3000
"""Of a whole model, repeats included: descriptions come with checkpoints, so from strangers; yolov5x6 has 150."""


def scaled(spec: ModelSpec, c_in: list[int], args: list) -> tuple[list, int]:
    """First argument = channels out, times the width, up to a multiple of 8; unless it is a head's own number."""
    if not args or not isinstance(args[0], int) or isinstance(args[0], bool) or args[0] < 1:
        raise ValueError(
            f"the first argument is the channels out, a whole number from 1 up, got {args[:1] or 'nothing'}"
        )
    c2 = args[0]
    if c2 != spec.anchors_per_cell * (spec.nc + 5):
        c2 = math.ceil(c2 * spec.width / spec.divisor) * spec.divisor
    return [c_in[0], c2, *args[1:]], c2


def same(spec: ModelSpec, c_in: list[int], args: list) -> tuple[list, int]:
    """Arguments as written, channels unchanged."""
    return args, c_in[0]


def norm(spec: ModelSpec, c_in: list[int], args: list) -> tuple[list, int]:
    """The only argument is the channels in."""
    return [c_in[0]], c_in[0]


def joined(spec: ModelSpec, c_in: list[int], args: list) -> tuple[list, int]:
    """Channels add up."""
    return args, sum(c_in)


def contracted(spec: ModelSpec, c_in: list[int], args: list) -> tuple[list, int]:
    """Channels times gain squared."""
    return args, c_in[0] * _gain(args) ** 2


def expanded(spec: ModelSpec, c_in: list[int], args: list) -> tuple[list, int]:
    """Channels over gain squared."""
    if c_in[0] % _gain(args) ** 2:
        raise ValueError(f"{c_in[0]} channels do not divide by {_gain(args)} squared")
    return args, c_in[0] // _gain(args) ** 2


def _gain(args: list) -> int:
    gain = args[0] if args else 2
    if not isinstance(gain, int) or gain < 1:
        raise ValueError(f"the gain must be a whole number from 1 up, got {gain!r}")
    return gain


def detection(spec: ModelSpec, c_in: list[int], args: list) -> tuple[list, int]:
    """nc, anchors, then the channels of every level."""
    nc, anchors = spec.nc, spec.anchors
    if args != [nc, anchors]:
        raise ValueError(f"takes [nc, anchors], got {args!r}")
    if isinstance(anchors, int):  # placeholders, until AutoAnchor finds some
        anchors = [list(range(2 * anchors)) for _ in c_in]
    if len(anchors) != len(c_in):
        raise ValueError(f"anchors for {len(anchors)} levels but {len(c_in)} inputs in 'from'")
    return [nc, anchors, c_in], 0


LAYERS: dict[str, Block] = {
    "Conv": Block(Conv, scaled),
    "DWConv": Block(DWConv, scaled),
    "DWConvTranspose2d": Block(DWConvTranspose2d, scaled),
    "DCN": Block(DCN, scaled),
    "DCNConv": Block(DCNConv, scaled),
    "GDCNConv": Block(GDCNConv, scaled),
    "Focus": Block(Focus, scaled),
    "CrossConv": Block(CrossConv, scaled),
    "MixConv2d": Block(MixConv2d, scaled),
    "GhostConv": Block(GhostConv, scaled),
    "GhostBottleneck": Block(GhostBottleneck, scaled),
    "Bottleneck": Block(Bottleneck, scaled),
    "SPP": Block(SPP, scaled),
    "SPPF": Block(SPPF, scaled),
    "TransformerBlock": Block(TransformerBlock, scaled),
    "C3SPP": Block(C3SPP, scaled),
    "BottleneckCSP": Block(BottleneckCSP, scaled, takes_repeats=True),
    "C3": Block(C3, scaled, takes_repeats=True),
    "C3x": Block(C3x, scaled, takes_repeats=True),
    "C3TR": Block(C3TR, scaled, takes_repeats=True),
    "C3Ghost": Block(C3Ghost, scaled, takes_repeats=True),
    "C3DCN": Block(C3DCN, scaled, takes_repeats=True),
    "C3GDCN": Block(C3GDCN, scaled, takes_repeats=True),
    "Concat": Block(Concat, joined),
    "Contract": Block(Contract, contracted),
    "Expand": Block(Expand, expanded),
    "Detect": Block(Detect, detection),
    "nn.ConvTranspose2d": Block(nn.ConvTranspose2d, scaled),
    "nn.BatchNorm2d": Block(batch_norm, norm),
    "nn.Upsample": Block(nn.Upsample, same),
    "nn.MaxPool2d": Block(nn.MaxPool2d, same),
    "nn.AvgPool2d": Block(nn.AvgPool2d, same),
    "nn.ZeroPad2d": Block(nn.ZeroPad2d, same),
    "nn.Dropout2d": Block(nn.Dropout2d, same),
    "nn.Identity": Block(nn.Identity, same),
}
"""Every name that a row may use."""


MAX_NUMBER = 4096
MAX_PARAMETERS = 1_000_000_000  # 4 GB; YOLOv5's largest model has 141 million


def parse_model(
    spec: ModelSpec, check: Callable[[int], None] = lambda values: None, empty: bool = False
) -> tuple[nn.Sequential, list[Layer]]:
    """Build the layers of a description, in order; ``check`` is called with the number of values that its state dict
    will hold, before there is memory for any. ``empty``: whatever is in that memory are the values, for who sets all.

    Each module carries ``i`` (index), ``f`` (from, as written), ``type`` (dotted class name) and ``np`` (parameters).
    Raises ConfigError with file and line for a row that cannot be built, when the last row is not Detect, and for more
    than MAX_PARAMETERS.
    """
    if sum(_repeats(spec, row) for row in spec.rows) > MAX_BLOCKS:
        raise ConfigError(f"{spec.rows[0].where}: more than {MAX_BLOCKS:,} blocks in all, repeats included")
    outline, layers = _outline(spec)
    check(_values(outline))
    return (_with_memory(outline), layers) if empty else _build_rows(spec)


def described_values(spec: ModelSpec) -> int:
    """How many values the state dict of a described model holds. Raises what :func:`parse_model` raises."""
    return _values(_outline(spec)[0])


def _outline(spec: ModelSpec) -> tuple[nn.Sequential, list[Layer]]:
    """The layers without memory for their values: a line of YAML may ask for more than there is."""
    with torch.device("meta"):
        return _build_rows(spec)


def _values(model: nn.Module) -> int:
    return sum(value.numel() for value in model.state_dict().values())


def _with_memory(outline: nn.Sequential) -> nn.Sequential:
    """Tensors on the CPU in place of those without memory. Module.to_empty would import torch's compiler for it."""
    for module in outline.modules():
        for name, value in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(value.shape, dtype=value.dtype)))
        for name, value in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(value.shape, dtype=value.dtype))
    return outline


def _build_rows(spec: ModelSpec) -> tuple[nn.Sequential, list[Layer]]:
    modules: list[nn.Module] = []
    layers: list[Layer] = []
    parameters = 0
    channels: list[int] = []
    for index, row in enumerate(spec.rows):
        if (row.block == "Detect") != (index == len(spec.rows) - 1):
            raise ConfigError(f"{row.where}: Detect must be the last row, and only there; this is '{row.block}'")
        inputs = _inputs(row, index)
        try:
            module, layer, c_out = _build(
                spec, row, index, inputs, [channels[i] if i >= 0 else spec.ch for i in inputs]
            )
        except (TypeError, ValueError, RuntimeError, AssertionError, ArithmeticError) as error:
            # Constructors of torch and of ours raise these for arguments that make no layer.
            raise ConfigError(f"{row.where}: {row.block}: {_first_line(error)}") from error
        parameters += module.np
        if parameters > MAX_PARAMETERS:
            raise ConfigError(f"{row.where}: {row.block}: the model has more than {MAX_PARAMETERS:,} parameters")
        modules.append(module)
        layers.append(layer)
        channels.append(c_out)
    return nn.Sequential(*modules), layers


def _inputs(row: Row, index: int) -> tuple[int, ...]:
    """Absolute numbers of the layers that a row reads; -1 (the image) only for the first row."""
    found = []
    for source in row.source if isinstance(row.source, list) else [row.source]:
        absolute = source if source >= 0 else index + source
        if absolute >= index or (absolute < 0 and not (index == 0 and source == -1)):
            seen = f"layers 0..{index - 1} come before it" if index else "the first row reads the image, as -1"
            raise ConfigError(f"{row.where}: 'from' {source} of layer {index} points nowhere: {seen}")
        found.append(absolute)
    return tuple(found)


def _build(spec: ModelSpec, row: Row, index: int, inputs: tuple, c_in: list[int]) -> tuple[nn.Module, Layer, int]:
    if row.block not in LAYERS:
        raise ConfigError(f"{row.where}: unknown block '{row.block}'{did_you_mean(row.block, LAYERS)}")
    block = LAYERS[row.block]
    if isinstance(row.source, list) != (block.rule in (joined, detection)):
        expected = "one layer number" if isinstance(row.source, list) else "a list of layer numbers"
        raise ValueError(f"'from' must be {expected} for this block, got {row.source!r}")
    repeats = _repeats(spec, row)
    if block.rule is detection and repeats != 1:
        raise ValueError(f"the number must be 1, got {row.number}")
    if repeats > MAX_REPEATS:
        raise ValueError(f"{repeats} repeats; {MAX_REPEATS} are allowed")
    if any(isinstance(a, int) and a > MAX_NUMBER for a in row.args[1:]):  # layers of a transformer, say
        raise ValueError(f"an argument after the first is more than {MAX_NUMBER}")
    args, c_out = block.rule(spec, c_in, [_resolve(a, spec) for a in row.args])
    if block.takes_repeats:
        args.insert(2, repeats)
    first = _construct(block, args, spec)
    following = [c_out, *args[1:]] if block.rule is scaled else args  # a copy reads what the first one wrote
    copies = [] if block.takes_repeats else [_construct(block, following, spec) for _ in range(repeats - 1)]
    module = nn.Sequential(first, *copies) if copies else first
    module.i, module.f = index, row.source
    module.type = f"{type(first).__module__}.{type(first).__name__}"
    module.np = sum(p.numel() for p in module.parameters())
    return module, Layer(index, row.source, inputs, repeats, module.type, args, row.where), c_out


def _repeats(spec: ModelSpec, row: Row) -> int:
    return max(round(min(row.number * spec.depth, 1e9)), 1) if row.number > 1 else row.number


def _resolve(arg: Any, spec: ModelSpec) -> Any:
    """An argument's value: the words nc, anchors, None, True, False; other text stays text."""
    if isinstance(arg, list):
        return [_resolve(item, spec) for item in arg]
    words = {"nc": spec.nc, "anchors": spec.anchors, "None": None, "True": True, "False": False}
    return words.get(arg, arg) if isinstance(arg, str) else arg


def _construct(block: Block, args: list, spec: ModelSpec) -> nn.Module:
    """Call the constructor; the model's activation fills an ``act`` that the row left at True."""
    signature = inspect.signature(block.build)
    try:
        bound = signature.bind(*args)
    except TypeError:
        raise ValueError(f"{len(args)} arguments {args!r} do not fit {_usage(signature)}") from None
    given = bound.arguments
    if "act" in signature.parameters:
        act = given.get("act", True)
        given["act"] = spec.activation if act is True else activation_from_text(act) if isinstance(act, str) else act
    if "join_act" in signature.parameters:
        given["join_act"] = spec.csp_activation
    for name, value in given.items():
        if isinstance(value, str) and name != "mode":
            raise ValueError(f"{name} = {value!r} is text; the words known here are nc, anchors, None, True, False")
    return block.build(*bound.args, **bound.kwargs)


def _usage(signature: inspect.Signature) -> str:
    names = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in signature.parameters.values()]
    return f"({', '.join(n for n in names if not n.startswith(('act=', 'join_act=')))})"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
