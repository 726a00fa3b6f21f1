"""The theories of why training died (docs/dcn-collapse.md), each with its prediction and a verdict from numbers.

A verdict compares the arm that died, the *base*, with the same arm and one thing changed. Where no base died, or the
changed arm was not run, it is "not decided": nothing is concluded from what was not measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.collapse.arms import parse_arm
from benchmarks.collapse.findings import CONTROL, Finding
from utils.errors import ConfigError

CONFIRMED, REFUTED, PARTLY, OPEN = "confirmed", "refuted", "partly", "not decided"
BASES = ("article", "article+clip")
MANY = 0.5


@dataclass(frozen=True)
class Verdict:
    word: str
    numbers: str


@dataclass(frozen=True)
class Evidence:
    """Findings by arm, and the base: the first of BASES that died in most seeds (None: none did)."""

    findings: dict[str, list[Finding]]
    base: str | None

    @classmethod
    def of(cls, findings: dict[str, list[Finding]], base: str = "") -> Evidence:
        """``base``: the arm to take, else it is found. A base whose control, the plain model with the same clipping,
        dies too is passed over while there is another."""
        died = [name for name in ((base,) if base else BASES) if name in findings and mostly_died(findings[name])]
        own = [name for name in died if not mostly_died(findings.get(control_of(name), []))]
        return cls(findings, next(iter(own or died), None))

    def changed(self, change: str) -> list[Finding]:
        """The base with one change; empty where it was not run."""
        return self.findings.get(parse_arm(f"{self.base}+{change}")[0], [])

    @property
    def dying(self) -> list[Finding]:
        return self.findings[self.base]


def control_of(base: str) -> str:
    """The plain model with the same clipping."""
    return CONTROL if "clip" in base.split("+") else "plain"


def mostly_died(found: list[Finding]) -> bool:
    """Whether more than half of the seeds died."""
    return sum(f.died for f in found) * 2 > len(found)


def outcome(found: list[Finding]) -> str:
    """In words, seeds in order: escapes at 140, trains."""
    return ", ".join(f.state + (f" at {f.died_at:.0f}" if math.isfinite(f.died_at) else "") for f in found) or "not run"


def _cures(evidence: Evidence, *changes: str) -> Verdict:
    """Confirmed where every change that was run cures; partly, where one does; refuted, where none does."""
    runs = {change: evidence.changed(change) for change in changes}
    known = {change: found for change, found in runs.items() if found}
    numbers = "; ".join(
        f"{change}: {outcome(found)}" + (f" (learned {_mean(f.learned for f in found):.2f})" if found else "")
        for change, found in runs.items()
    )
    if not known:
        return Verdict(OPEN, numbers)
    cured = [not mostly_died(found) for found in known.values()]
    return Verdict(CONFIRMED if all(cured) else PARTLY if any(cured) else REFUTED, numbers)


def _mean(values) -> float:
    known = [v for v in values if math.isfinite(v)]
    return float(np.mean(known)) if known else math.nan


def escape(evidence: Evidence) -> Verdict:
    dying = evidence.dying
    left, silent = [f.escaped_at(MANY) for f in dying], [f.lowest("stem_grad") == 0 for f in dying]
    peak = ", ".join(f"{f.escaped_peak:.2f}" for f in dying)
    steps = ", ".join("never" if math.isnan(step) else f"{step:.0f}" for step in left)
    numbers = f"{outcome(dying)}; most samples outside {peak}; half of a layer outside at step {steps}; "
    numbers += f"stem gradient exactly 0: {sum(silent)} of {len(dying)}; "
    numbers += f"overflowed at the end: {sum(math.isnan(f.last('grad_norm') * 0) for f in dying)} of {len(dying)}"
    if not any(f.escaped_peak >= MANY for f in dying):
        return Verdict(REFUTED, numbers)
    first = all(step <= f.died_at for f, step in zip(dying, left))  # never for those that only stall
    return Verdict(CONFIRMED if first else PARTLY, numbers)


def offset_rate(evidence: Evidence) -> Verdict:
    return _cures(evidence, "offset-lr-0.1", "offset-lr-0.01", "lr-0.1")


def bias_warmup(evidence: Evidence) -> Verdict:
    verdict = _cures(evidence, "cold-bias")
    early = [_shift_share(f) for f in evidence.dying]
    text = f"{verdict.numbers}; common shift / mean |offset| in the first 50 steps {_mean(early):.2f}"
    return Verdict(verdict.word, text)


def _shift_share(found: Finding) -> float:
    """How much of the offsets is the same at every pixel, as what a bias moves is, over the first 50 steps."""
    shift, length = found.course.layers("shift"), found.course.layers("off_mean")
    early = (found.course.steps <= 50) & (found.course.steps > 0)
    ratio = shift[:, early] * math.sqrt(2) / np.maximum(length[:, early], 1e-12)  # rms over axes against a length
    return float(np.nanmean(ratio)) if np.isfinite(ratio).any() else math.nan


def no_norm(evidence: Evidence) -> Verdict:
    return _cures(evidence, "norm")


def clip_share(evidence: Evidence) -> Verdict:
    clipped = evidence.findings.get("article+clip", [])
    names = (
        "article+clip-apart",
        "article+clip+clip-apart",
    )  # the second: as a base's change
    apart = next((evidence.findings[name] for name in names if name in evidence.findings), [])
    if not clipped:
        return Verdict(OPEN, "article+clip: not run")
    share, factor = _mean(f.median("offset_share") for f in clipped), _mean(f.median("clip_factor") for f in clipped)
    together, alone = _mean(f.learned for f in clipped), _mean(f.learned for f in apart)
    numbers = f"article+clip: median share {share:.2f}, clip factor {factor:.3f}, {outcome(clipped)} "
    numbers += f"(learned {together:.2f}); apart: {outcome(apart)} (learned {alone:.2f})"
    if share <= MANY or factor > MANY:
        return Verdict(REFUTED, numbers)
    if not apart:
        return Verdict(OPEN, numbers)
    cured = mostly_died(clipped) and not mostly_died(apart)
    better = alone > together + 0.1
    return Verdict(CONFIRMED if cured else PARTLY if better else REFUTED, numbers)


def half_gradients(evidence: Evidence) -> Verdict:
    verdict = _cures(evidence, "fp32-layer", "bf16", "fp32")
    lowest = min(f.lowest("scale") for f in evidence.dying)
    skipped = max(f.last("skipped") for f in evidence.dying)
    base = f"base: loss scale down to {lowest:.3g}, {skipped:.0f} steps skipped"
    return Verdict(verdict.word, f"{verdict.numbers}; {base}")


def coordinates(evidence: Evidence) -> Verdict:
    """The base computes coordinates in fp32, so that its death refutes it unless offsets passed what fp16 resolves."""
    reach = []
    for found in evidence.dying:
        until = found.course.steps < (found.died_at if math.isfinite(found.died_at) else math.inf)
        lengths = found.course.layers("off_max")[:, until]
        reach.append(float(np.nanmax(lengths)) if np.isfinite(lengths).any() else math.nan)
    verdict = _cures(evidence, "fp32-layer", "bf16")
    numbers = f"largest offset before death {max(reach):.0f} px; {verdict.numbers}; "
    numbers += f"coordinates in fp16: {outcome(evidence.changed('coordinates'))}"
    if verdict.word in (OPEN, REFUTED):
        return Verdict(verdict.word, numbers)
    return Verdict(PARTLY if max(reach) > 2048 else REFUTED, numbers)


def faded_mask(evidence: Evidence) -> Verdict:
    dying = evidence.dying
    mask = min(_low(f, "mask") for f in dying)
    signal = min(_low(f, "before_norm") for f in dying)
    verdict = _cures(evidence, "mask-open", "bn-eps")
    numbers = f"least mean mask {mask:.2f}, least std before a norm {signal:.3f}; {verdict.numbers}"
    if mask >= 0.1 and signal >= 0.03:
        return Verdict(REFUTED, numbers)
    return Verdict(verdict.word, numbers)


def _low(found: Finding, column: str) -> float:
    """Least value of a layer while fewer than half of its samples were outside."""
    values = np.where(found.course.escaped() < MANY, found.course.layers(column), np.nan)
    return float(np.nanmin(values)) if np.isfinite(values).any() else math.nan


def kink_bias(evidence: Evidence) -> Verdict:
    shares = []
    for found in evidence.dying:
        early = found.course.steps <= (found.died_at if math.isfinite(found.died_at) else 500)
        for row in found.course.layers("positive")[:, early & (found.course.steps > 0)]:
            shares.append(_mean(row))
    verdict = _cures(evidence, "symmetric")
    listed = ", ".join(f"{share:.2f}" for share in shares)
    numbers = f"share of offsets above 0 until death, by layer: {listed}; {verdict.numbers}"
    if shares and not all(share > 0.6 for share in shares):
        return Verdict(REFUTED, numbers)
    return Verdict(verdict.word, numbers)


def decay(evidence: Evidence) -> Verdict:
    return _cures(evidence, "decay-x10")


@dataclass(frozen=True)
class Theory:
    letter: str
    claim: str
    prediction: str
    judge: Callable[[Evidence], Verdict]


THEORIES = (
    Theory("A", "escape", "samples of a layer leave the image before it dies; the stem's gradient is then 0, or it "
           "overflows", escape),
    Theory("B", "rate of the offsets", "offset rate x0.1 or x0.01 cures, and so does every rate x0.1", offset_rate),
    Theory("C", "bias warm-up", "offset biases move first; without their warm-up it trains", bias_warmup),
    Theory("D", "no norm or activation", "BatchNorm and SiLU after DCN alone cure", no_norm),
    Theory("E", "offsets own the clipped norm", "clip factor far below 1, share above 0.5; clipping apart cures",
           clip_share),
    Theory("F", "fp16 gradients", "the loss scale falls, steps are skipped; fp32 and bf16 train", half_gradients),
    Theory("G", "fp16 coordinates", "dies with coordinates in fp16 only, or offsets beyond 2048 px", coordinates),
    Theory("H", "mask fades under BN's eps", "mean mask below 0.1 and std before the norm below 0.03 while offsets are "
           "small", faded_mask),
    Theory("I", "kink of the bilinear weights", "offsets drift to + in all layers; the symmetric difference cures",
           kink_bias),
    Theory("J", "weight decay of offsets", "decay x10 on offset weights cures", decay),
)  # fmt: skip


def verdicts(evidence: Evidence) -> list[tuple[Theory, Verdict]]:
    """One for each theory; all "not decided" where no base died."""
    if evidence.base is None:
        runs = "; ".join(f"{name}: {outcome(evidence.findings.get(name, []))}" for name in BASES)
        return [(theory, Verdict(OPEN, f"no base died ({runs})")) for theory in THEORIES]
    return [(theory, theory.judge(evidence)) for theory in THEORIES]


def check_base(base: str, findings: dict[str, list[Finding]]) -> None:
    """ConfigError when --base names no record of the folder."""
    if base and base not in findings:
        raise ConfigError(f"--base {base}: the folder has no record of it (there are: {', '.join(findings)})")
