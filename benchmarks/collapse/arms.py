"""The arms of the study: a base and changes to it, written ``article+clip+offset-lr-0.1``."""

from __future__ import annotations

from dataclasses import dataclass, replace

from utils.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Arm:
    """One way to train. Its defaults are the article's: DCN without norm and activation at four places, fp16
    conversions around it, one learning rate for all, offset biases in the bias warm-up, no clipping.

    layers: as --dcn takes them, "" for a plain model. norm: BatchNorm and SiLU after each DCN. doubled: start weights
    x2, as --dcn makes them (the mask starts at 1/2). conversions: what happens around the deformable operator,
    "half": output and all gradients are rounded to the autocast dtype; "amp": as this repository's layers do;
    "fp32": nothing is; "coordinates": everything in half, coordinates too (torchvision's operator on half tensors).
    amp: fp16, bf16, off, or auto as train.py chooses. clip, clip_offsets: largest norm of all gradients, and of the
    offset branches' on their own (0: not clipped; clipped with the rest). offset_lr, rate: factors on the learning
    rate of the offset branches, and of everything. offset_bias_warms: offset biases follow the bias warm-up.
    warmup, warmup_bias_lr: its iterations (None: the schedule's own), and the rate of biases at its start. bound: r of
    r*tanh(raw/r), pixels; 0 unbounded. mask_logit: start of the mask's bias. bn_eps: of all BatchNorms. offset_decay:
    factor on the weight decay of offset weights. symmetric: offset gradients by the symmetric difference. blind: all
    images are black and only the last layer learns, so that a constant is its best. backend: as --dcn-backend.
    """

    layers: str = "1,3,5,7"
    norm: bool = False
    doubled: bool = False
    conversions: str = "half"
    amp: str = "fp16"
    clip: float = 0.0
    clip_offsets: float = 0.0
    offset_lr: float = 1.0
    rate: float = 1.0
    offset_bias_warms: bool = True
    warmup: int | None = None
    warmup_bias_lr: float = 0.1
    bound: float = 0.0
    mask_logit: float = 0.0
    bn_eps: float = 1e-3
    offset_decay: float = 1.0
    symmetric: bool = False
    blind: bool = False
    backend: str = "auto"


BASES = {
    "plain": (Arm(layers=""), "no DCN; the control"),
    "article": (Arm(), "the article's layer at 1, 3, 5, 7, trained as everything else"),
    "default": (
        Arm(conversions="amp", amp="auto", clip=10.0, clip_offsets=10.0, offset_lr=0.1, offset_bias_warms=False),
        "yolov5*-dcn4.yaml as train.py trains it without flags",
    ),
}

CHANGES = {
    "clip": (dict(clip=10.0), "gradients clipped by their total norm at 10"),
    "no-clip": (dict(clip=0.0, clip_offsets=0.0), "gradients not clipped"),
    "clip-together": (dict(clip=10.0, clip_offsets=0.0), "offset branches clipped with the rest"),
    "clip-apart": (dict(clip=10.0, clip_offsets=10.0), "offset branches clipped at 10, the rest at 10"),
    "norm": (dict(norm=True), "BatchNorm and SiLU after each DCN"),
    "converted": (dict(norm=True, doubled=True), "as --dcn makes it: norm, activation, start weights doubled"),
    "offset-lr-1": (dict(offset_lr=1.0), "offset branches learn as everything else"),
    "offset-lr-0.1": (dict(offset_lr=0.1), "offset branches learn at a tenth"),
    "offset-lr-0.01": (dict(offset_lr=0.01), "offset branches learn at a hundredth"),
    "lr-0.1": (dict(rate=0.1), "every rate a tenth"),
    "cold-bias": (dict(offset_bias_warms=False), "offset biases not in the bias warm-up"),
    "warm-bias": (dict(offset_bias_warms=True), "offset biases in the bias warm-up"),
    "bound": (dict(bound=8.0), "offsets 8*tanh(raw/8) pixels"),
    "fp32-layer": (dict(conversions="fp32", backend="torchvision"), "the deformable operator in fp32, nothing rounded"),
    "bf16": (dict(amp="bf16"), "bf16 in place of fp16, no loss scale"),
    "fp32": (dict(amp="off"), "everything in fp32"),
    "torchvision": (dict(backend="torchvision"), "torchvision's operator in fp32, as the article called it"),
    "coordinates": (dict(conversions="coordinates"), "sampling coordinates in fp16 too"),
    "no-warmup": (dict(warmup=1, warmup_bias_lr=0.01), "full rate from the second iteration"),
    "long-warmup": (dict(warmup=300), "300 iterations of warm-up"),
    "mask-open": (dict(mask_logit=3.0), "mask starts at 0.95"),
    "bn-eps": (dict(bn_eps=1e-5), "BatchNorm's eps 1e-5"),
    "decay-x10": (dict(offset_decay=10.0), "weight decay of offset weights x10"),
    "symmetric": (dict(symmetric=True), "offset gradients by the symmetric difference"),
    "blind": (dict(blind=True), "black images: what a constant can reach"),
    "three": (dict(layers="1,3,5"), "DCN at 1, 3, 5 only, as yolov5*-dcn.yaml"),
    "six": (dict(layers="1,3,5,7,18,21"), "all six 3x3 convolutions of stride 2"),
    "all3x3": (dict(layers="all3x3"), "every 3x3 convolution"),
}

CORE = (
    "plain+clip", "plain", "plain+clip+blind", "article", "article+clip", "default", "article+offset-lr-0.1",
    "article+norm", "article+clip+offset-lr-0.1", "article+lr-0.1", "article+cold-bias", "article+fp32-layer",
    "article+bf16", "default+converted", "article+three",
)  # fmt: skip
"""Who settles the question of the cause, most telling first."""
REST = (
    "article+clip-apart", "article+bound", "article+offset-lr-0.01", "article+symmetric", "article+decay-x10",
    "article+mask-open", "article+bn-eps", "article+no-warmup", "article+long-warmup", "article+coordinates",
    "default+converted+six", "default+converted+all3x3", "default+clip-together+converted", "article+torchvision",
    "article+fp32",
)  # fmt: skip
"""The other theories, and more layers by the default recipe."""
GROUPS = {"core": CORE, "rest": REST, "all": CORE + REST}


def parse_arm(text: str) -> tuple[str, Arm]:
    """``base+change+change`` -> (that name with the changes in the table's order, the arm). Where two changes set the
    same thing, the later in the table wins. ConfigError for a name that is not there."""
    base, *changes = (part.strip() for part in text.split("+"))
    if base not in BASES:
        raise ConfigError(f"--arms {text}: no base '{base}'{did_you_mean(base, list(BASES))} ({', '.join(BASES)})")
    for change in changes:
        if change not in CHANGES:
            raise ConfigError(f"--arms {text}: no change '{change}'{did_you_mean(change, list(CHANGES))} (see --list)")
    ordered = [name for name in CHANGES if name in changes]
    arm = BASES[base][0]
    for name in ordered:
        arm = replace(arm, **CHANGES[name][0])
    return "+".join((base, *ordered)), arm


def parse_arms(words: list[str]) -> dict[str, Arm]:
    """Names of arms or of GROUPS -> arms by name, each once, in the order given."""
    texts = [text for word in words for text in GROUPS.get(word, (word,))]
    return dict(parse_arm(text) for text in texts)


def listing() -> str:
    """What --list prints."""
    lines = ["bases:", *(f"  {name:16}{about}" for name, (_, about) in BASES.items())]
    lines += ["changes:", *(f"  {name:16}{about}" for name, (_, about) in CHANGES.items())]
    lines += [f"group {name}: {' '.join(arms)}" for name, arms in GROUPS.items() if name != "all"]
    return "\n".join(lines)
