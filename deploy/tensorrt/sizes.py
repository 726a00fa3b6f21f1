"""Words for a network's size: n s m l x, with 6, _dcn, _dcn4 or _dcn_best behind; c with your own depth and width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from models.loading import described_by
from models.spec import read_spec
from models.yolo import DetectionModel
from utils.checkpoint import Checkpoint
from utils.errors import CheckpointError, ConfigError, did_you_mean

LETTERS = {"n": 16, "s": 32, "m": 48, "l": 64, "x": 80}
"""And the channels of their first layer."""
FORMS = {
    "": "yolov5{}.yaml",
    "6": "hub/yolov5{}6.yaml",
    "_dcn": "yolov5{}-dcn.yaml",
    "_dcn4": "yolov5{}-dcn4.yaml",
    "_dcn_best": "yolov5{}-dcn-best.yaml",
}
"""By what stands behind the letter."""
SIZES = {letter + form: name.format(letter) for form, name in FORMS.items() for letter in LETTERS}
OWN = {f"c{form}": name.format("l") for form, name in FORMS.items()}
USAGE = (
    "expected one of n s m l x, also with 6, _dcn, _dcn4 or _dcn_best behind, or c DEPTH WIDTH, also c6, c_dcn, "
    "c_dcn4 and c_dcn_best"
)


def layers_of(words: Sequence[str]) -> str | dict[str, Any] | None:
    """The model YAML that the words behind -s stand for, or its content; None for no words. Raises ConfigError."""
    if not words:
        return None
    word, *numbers = words
    if word in OWN:
        return _own(word, numbers)
    if word not in SIZES:
        alike = [size for size in (*SIZES, *OWN) if size[0] == word[:1]]
        raise ConfigError(f"-s: {word}: no such size{did_you_mean(word, alike)}; {USAGE}")
    if numbers:
        raise ConfigError(f"-s: {' '.join(words)}: numbers go with c; {USAGE}")
    return SIZES[word]


def _own(word: str, numbers: list[str]) -> dict[str, Any]:
    try:
        depth, width = (float(number) for number in numbers)
    except ValueError:
        given = " ".join(numbers) or "nothing"
        raise ConfigError(f"-s: {word} takes depth and width, like {word} 0.33 0.5; got {given}") from None
    return read_spec({**read_spec(OWN[word]).yaml, "depth_multiple": depth, "width_multiple": width}).yaml


def check_fit(checkpoint: Checkpoint, words: Sequence[str]) -> None:
    """Raise CheckpointError, naming the tensors and the size that would fit, unless the checkpoint holds just the
    tensors of the network that ``words`` stand for. tensorrtx builds garbage from others."""
    layers = layers_of(words)
    if layers is None:
        return
    wrong = misfits(checkpoint, layers)
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        fitting = size_of(checkpoint)
        hint = f"; its tensors are those of {fitting}" if fitting else ""
        raise CheckpointError(f"{checkpoint.path}: not a {' '.join(words)}: {', '.join(wrong[:3])}{more}{hint}")


def size_of(checkpoint: Checkpoint) -> str | None:
    """The word for a size with just these tensors; None where there is none."""
    stem = checkpoint.model.get("model.0.conv.weight")
    for word, name in SIZES.items():
        likely = stem is not None and stem.numel() == 3 * 6 * 6 * LETTERS[word[0]]  # building all would take seconds
        if likely and not misfits(checkpoint, name):
            return word
    return None


def misfits(checkpoint: Checkpoint, layers: str | dict[str, Any]) -> list[str]:
    """What of the checkpoint is not as in a network of these layers and the checkpoint's number of classes."""
    described = described_by(layers, checkpoint)
    with torch.device("meta"):
        model = DetectionModel(described.meta["yaml"])
    wanted = {name: value.numel() for name, value in model.state_dict().items()}
    held = {name: value.numel() for name, value in checkpoint.model.items()}
    beside = {f"model.{len(model.model) - 1}.{name}" for name in ("anchor_grid", "strides")}
    lacking = [f"{name} is not in it" for name in wanted if name not in held]
    other = [
        f"{name} has {held[name]:,} values, not {count:,}"
        for name, count in wanted.items()
        if held.get(name, count) != count
    ]
    return [*lacking, *other, *(f"{name} has no place" for name in held if name not in wanted and name not in beside)]
