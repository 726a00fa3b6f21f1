"""The folder of a study as Markdown and pictures."""

from __future__ import annotations

import math
from pathlib import Path

from benchmarks.collapse.drawing import draw_arms, draw_layers
from benchmarks.collapse.findings import Finding, judge
from benchmarks.collapse.record import load_folder
from benchmarks.collapse.theories import Evidence, check_base, control_of, mostly_died, outcome, verdicts
from benchmarks.report import table
from utils.files import atomic_write

HEADER = (
    "arm", "seed", "outcome", "loss first", "loss last", "learned", "gradient norm", "clip factor", "offset share",
    "samples left, peak", "samples left, end", "mean offset, peak px", "largest offset px", "loss scale, least",
    "skipped", "stem gradient, end", "std before norm", "steps", "s/step",
)  # fmt: skip
BEFORE_AFTER = (
    "plain+clip+blind",
    "plain",
    "plain+clip",
    "article",
    "article+clip",
    "article+clip+offset-lr-0.1",
    "default",
    "default+converted",
    "default+clip-together+converted",
)
DEPTH = (
    "article+three",
    "article",
    "default",
    "default+converted",
    "default+converted+six",
    "default+converted+all3x3",
)


def write_report(folder: Path, base: str = "", out: Path | None = None) -> str:
    """Read the records of ``folder``, write report.md and pictures to ``out`` (the same folder by default), and return
    the report's text. DataError without records, ConfigError for a ``base`` that is not among them."""
    findings = judge(load_folder(folder))
    check_base(base, findings)
    evidence = Evidence.of(findings, base)
    out = out or folder
    out.mkdir(parents=True, exist_ok=True)
    pictures = _draw(findings, evidence, out)
    text = "\n\n".join([arms_table(findings), theories_table(evidence), *(f"![]({name})" for name in pictures)]) + "\n"
    atomic_write(out / "report.md", text)
    return text


def arms_table(findings: dict[str, list[Finding]]) -> str:
    """One row an arm and seed."""
    meta = next(iter(findings.values()))[0].course.meta
    said = ("cfg", "imgsz", "batch", "batches", "data", "device", "torch", "date")
    heading = ", ".join(f"{key} {meta[key]}" for key in said if key in meta)
    return f"{heading}\n\n" + table(HEADER, [_row(name, f) for name, found in findings.items() for f in found])


def _row(name: str, f: Finding) -> list[object]:
    state = f.state + (f" at {f.died_at:.0f}" if math.isfinite(f.died_at) else "")
    before = f.extent("before_norm")
    cells = [
        name, f.course.meta["seed"], state, f.first_loss, f.last_loss, f.learned, f.median("grad_norm"),
        f.median("clip_factor"), f.median("offset_share"), f.escaped_peak, f.escaped_end, f.peak("off_mean"),
        f.peak("off_max"), f.lowest("scale"), int(f.last("skipped")), f.last("stem_grad"),
        f"{before[0]:.2g} to {before[1]:.2g}", int(f.last("step")) + 1, f.course.meta["seconds_per_step"],
    ]  # fmt: skip
    return ["" if isinstance(c, float) and math.isnan(c) else "" if c == "nan to nan" else c for c in cells]


def theories_table(evidence: Evidence) -> str:
    """One row a theory: prediction, verdict, the numbers it rests on."""
    base = f"base: {evidence.base} ({outcome(evidence.dying)})" if evidence.base else "base: none died"
    control = ", ".join(
        f"{name}: {outcome(evidence.findings.get(name, []))}" for name in ("plain", "plain+clip", "plain+clip+blind")
    )
    rows = [
        [f"{theory.letter} {theory.claim}", theory.prediction, verdict.word, verdict.numbers.replace("|", "\\|")]
        for theory, verdict in verdicts(evidence)
    ]
    caution = ""
    if evidence.base and mostly_died(evidence.findings.get(control_of(evidence.base), [])):
        caution = ". **The base's own control dies too: its death is not DCN's alone**"
    return f"{base}; controls: {control}{caution}\n\n" + table(["theory", "prediction", "verdict", "numbers"], rows)


def _draw(findings: dict[str, list[Finding]], evidence: Evidence, out: Path) -> list[str]:
    base = evidence.base or "article"
    changed = [name for name in findings if name.startswith(f"{base}+")]
    names = []
    for file, arms in (("before-after.png", BEFORE_AFTER), ("changes.png", (base, *changed)), ("depth.png", DEPTH)):
        if draw_arms(findings, arms, out / file):
            names.append(file)
    for arm in dict.fromkeys((base, "default", "default+converted+all3x3")):
        if arm in findings and draw_layers(findings[arm][0].course, out / f"layers-{arm}.png"):
            names.append(f"layers-{arm}.png")
    return names
