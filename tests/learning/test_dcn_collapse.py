"""The recipe that keeps deformable layers alive, held to it on real pictures, and the study that explains it.

docs/dcn-collapse.md; the same arms as `python -m benchmarks.collapse` trains at size x.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.collapse import record
from benchmarks.collapse.arms import CHANGES, GROUPS, parse_arm, parse_arms
from benchmarks.collapse.findings import DIVERGED, ESCAPED, STALLED, TRAINS, UNCLEAR, judge
from benchmarks.collapse.layers import build_model, studied
from benchmarks.collapse.material import Material, prepare
from benchmarks.collapse.probe import Probe
from benchmarks.collapse.theories import CONFIRMED, OPEN, REFUTED, Evidence, verdicts
from benchmarks.collapse.training import Plan, Trial, run_arm
from models.common import DCN, DCNConv
from models.yolo import DetectionModel
from utils.config import DataConfig
from utils.errors import ConfigError, DataError
from utils.files import ROOT, load_yaml
from utils.schedule import ROLES, Schedule, StepSettings

CPU = torch.device("cpu")
NARROW = {**load_yaml(ROOT / "models" / "yolov5n.yaml"), "width_multiple": 0.125, "depth_multiple": 0.1}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    """Four batches of eight mosaics of the bundled pictures, 64 pixels."""
    folder = tmp_path_factory.mktemp("tiny")
    shutil.copytree(ROOT / "data" / "tiny", folder / "tiny", ignore=shutil.ignore_patterns("*.npz"))
    shutil.copy(ROOT / "data" / "tiny.yaml", folder)
    return prepare(DataConfig.load(folder / "tiny.yaml"), 64, 8, 4, seed=0, workers=0, device=CPU)


def plan(steps: int = 0) -> Plan:
    return Plan(NARROW, steps, 2, 0, CPU)


def twenty_steps(name: str, material: Material) -> tuple[np.ndarray, float, float]:
    """At ten times the usual rate, in float32: gradient norms, and of the worst layer at the end the share of samples
    that left the image and the mean length of the offsets in pixels."""
    trial = Trial(replace(parse_arm(name)[1], amp="off"), material, plan())
    probe, norms, seen = Probe(trial.model), [], []
    for step in range(20):
        Schedule.apply(trial.optimizer, StepSettings(dict.fromkeys(ROLES, 0.1), 0.937, 1, True))
        if step == 19:
            probe.arm()
        trial.backward(*material.batch(step))
        norms.append(trial.step(lambda last=step == 19: seen.append(probe.read()) if last else None)[0].item())
    layers = seen[0].view(len(probe.layers), len(record.LAYER)).numpy()
    rest = np.array([layer["rest"] for layer in probe.layers.values()])
    left = (layers[:, record.LAYER.index("dead")] - rest) / (1 - rest)
    return np.array(norms), left.max(), layers[:, record.LAYER.index("off_mean")].max()


@pytest.mark.slow
def test_the_default_recipe_keeps_four_and_more_layers_in_the_image_and_the_articles_form_does_not(material) -> None:
    norms, left, length = twenty_steps("article", material)
    assert left > 0.1 and length > 2.5, "the form of the article no longer runs away: is the test too mild?"
    for name, layers in (("default", 4), ("default+converted+six", 6), ("default+converted+all3x3", 14)):
        assert len(studied(build_model(parse_arm(name)[1], NARROW, 6, None))) >= layers
        norms, left_here, length_here = twenty_steps(name, material)
        assert np.isfinite(norms).all() and norms.max() < 300 and norms[-5:].min() > 0.01, (name, norms)
        assert left_here < 0.03 and length_here < 1.5, (name, left_here, length_here)
        assert length_here < length / 3


def test_arms_are_what_their_names_say() -> None:
    name, arm = parse_arm("article+offset-lr-0.1+clip")
    assert name == "article+clip+offset-lr-0.1" and (arm.clip, arm.offset_lr) == (10.0, 0.1)
    assert parse_arm("default")[1].offset_bias_warms is False
    assert len(parse_arms(["all", "article"])) == len(GROUPS["all"]), "names in groups are canonical and differ"
    assert all(name == parse_arm(name)[0] for name in GROUPS["all"])
    base = parse_arm("article")[1]
    assert all(replace(base, **change) != base or name in ("no-clip", "offset-lr-1", "warm-bias")
               for name, (change, _) in CHANGES.items())  # fmt: skip
    for wrong in ("articel", "article+clipp"):
        with pytest.raises(ConfigError, match="did you mean"):
            parse_arm(wrong)


def test_the_models_are_the_repositorys(material) -> None:
    """`article` and `default` compute what yolov5*-dcn4.yaml does, `default+converted` what --dcn makes."""
    torch.manual_seed(0)
    plain = DetectionModel(NARROW, nc=6).train()
    torch.manual_seed(0)
    made = build_model(parse_arm("default+converted")[1], NARROW, 6, None)
    x = torch.rand(2, 3, 64, 64)
    for expected, found in zip(plain(x), made(x)):
        assert torch.allclose(expected, found, atol=1e-4)
    article = build_model(parse_arm("article")[1], NARROW, 6, torch.float16)
    file = DetectionModel({**load_yaml(ROOT / "models" / "yolov5n-dcn4.yaml"), **dict(width_multiple=0.125,
                          depth_multiple=0.1)}, nc=6).train()  # fmt: skip
    assert [layer.name for layer in studied(article)] == ["1", "3", "5", "7"]
    assert all(type(file.model[i]) is DCN and type(article.model[i]) is DCNConv for i in (1, 3, 5, 7))
    for layer in studied(article):  # the weights of one in the other: the same output, but for rounding to half
        own = file.model[int(layer.name)]
        layer.dcn.load_state_dict(own.state_dict())
        maps = torch.rand(1, own.weight.shape[1], 16, 16)
        block = article.model[int(layer.name)]
        assert torch.allclose(block(maps), own(maps), rtol=2e-3, atol=1e-3)
        assert torch.equal(block(maps), own(maps).half().float())


def test_gradients_of_the_articles_layer_overflow_in_half() -> None:
    article = build_model(parse_arm("article")[1], NARROW, 6, torch.float16)
    free = build_model(parse_arm("article+fp32-layer")[1], NARROW, 6, torch.float16)
    for model, overflows in ((article, True), (free, False)):
        block = model.model[1]
        x = torch.rand(2, block.conv.dcn.weight.shape[1], 32, 32)
        (block(x).sum() * 1e4).backward()
        assert math.isinf(block.conv.dcn.bias.grad.abs().max()) == overflows
        assert math.isfinite(block.conv.dcn.weight.grad.abs().max()) or overflows


@pytest.mark.parametrize("change", ["symmetric", "bound", "coordinates"])
def test_changed_layers_still_convolve(change: str) -> None:
    """At rest each is the article's layer; bounded offsets stay bounded."""
    torch.manual_seed(0)
    usual = build_model(parse_arm("article")[1], NARROW, 6, torch.float16).model[1]
    torch.manual_seed(0)
    changed = build_model(parse_arm(f"article+{change}")[1], NARROW, 6, torch.float16).model[1]
    x = torch.rand(2, usual.conv.dcn.weight.shape[1], 32, 32)
    assert torch.allclose(usual(x), changed(x), atol=0.02)
    if change == "bound":
        torch.nn.init.constant_(changed.conv.dcn.conv_offset_mask.bias, 1e4)
        seen = []
        changed.conv.watcher = lambda layer, x, raw, out: seen.append(raw)
        changed(x)
        assert seen[0][:, :18].abs().max() <= 8
    if change == "symmetric":  # a ramp: forward and symmetric difference agree inside, and at a peak only one is 0
        peak = torch.zeros(1, 1, 8, 8)
        peak[..., 4, 4] = 1
        assert _derivative_at_peak(usual, peak) != 0 and abs(_derivative_at_peak(changed, peak)) < 1e-6


def _derivative_at_peak(block, peak: torch.Tensor) -> float:
    """d out / d offset of the middle tap where it samples the peak, along y."""
    dcn = block.conv.dcn
    x = peak.expand(1, dcn.weight.shape[1], 8, 8)
    torch.nn.init.zeros_(dcn.conv_offset_mask.weight)
    raw = dcn.conv_offset_mask(x).detach().requires_grad_()
    dcn.conv_offset_mask.forward = lambda _: raw
    block.conv(x).sum().backward()
    return raw.grad[0, 8, 2, 2].item()  # output (2, 2) has its middle tap at (4, 4); channel 8 is its y


def test_an_arm_is_recorded_and_read_back(material, tmp_path: Path) -> None:
    result = run_arm(parse_arm("article")[1], material, plan(4), lambda step, row: None)
    assert list(result.layers) == ["1", "3", "5", "7"] and result.dtype == "float16"
    header = [*record.STEP, *(f"{layer}:{column}" for layer in result.layers for column in record.LAYER)]
    meta = {"arm": "article", "seed": 0, "layers": result.layers, "seconds_per_step": 0.1}
    file = record.file_for(tmp_path, "article", 0)
    record.save(file, meta, header, result.rows)
    course = record.load(file)
    assert course.columns["loss"] == pytest.approx([row[1] for row in result.rows], rel=1e-3)
    assert course.columns["lr_bias"][0] == pytest.approx(0.1) and course.columns["lr"][0] == 0
    assert course.columns["lr_offset_bias"][0] == pytest.approx(0.1), "the article's offset biases warm up as others"
    assert course.escaped().shape == (4, len(course.steps)) and (course.escaped() < 0.1).all()
    assert 0 < course.columns["offset_share"][0] < 1 and course.columns["scale"][0] == pytest.approx(65536, rel=1e-3)
    file.write_text("step,loss\n1,2\n")
    with pytest.raises(DataError, match="is no record"):
        record.load(file)


def course(arm: str, loss: float, escaped: float = 0.0, stem: float = 1.0, **columns: float) -> record.Course:
    """Twenty rows: loss from 0.2 to ``loss``, samples out up to ``escaped``, the stem's gradient at last ``stem``."""
    steps = np.arange(20.0) * 5
    values = {name: np.full(20, 1.0) for name in record.STEP}
    values |= {"step": steps, "loss": np.linspace(0.2, loss, 20), "stem_grad": np.where(steps < 60, 1.0, stem)}
    layers = {} if arm.startswith("plain") else {"7": {"height": 40, "width": 40, "rest": 0.0}}
    for name in layers:
        values |= {f"{name}:{column}": np.full(20, 0.5) for column in record.LAYER}
        values[f"{name}:dead"] = np.clip(np.linspace(0, 2 * escaped, 20), 0, escaped)
    values |= {name: np.full(20, value) for name, value in columns.items()}
    return record.Course({"arm": arm, "seed": 0, "layers": layers, "seconds_per_step": 0.1}, values)


def test_outcomes_and_verdicts() -> None:
    arms = {
        "plain+clip": course("plain+clip", 0.1),
        "plain+clip+blind": course("plain+clip+blind", 0.16),
        "plain": course("plain", 0.1),
        "article": course("article", 0.16, escaped=1.0, stem=0.0),
        "article+clip": course("article+clip", 0.15, offset_share=0.8, clip_factor=0.02),
        "article+clip+clip-apart": course("article", 0.1),
        "article+norm": course("article+norm", 0.16, escaped=0.95),
        "article+offset-lr-0.1": course("article+offset-lr-0.1", 0.1),
        "article+bf16": course("article+bf16", math.nan),
    }
    findings = judge({name: [made] for name, made in arms.items()})
    states = {name: found[0].state for name, found in findings.items()}
    assert states["plain"] == states["article+offset-lr-0.1"] == TRAINS
    assert states["article"] == states["article+norm"] == ESCAPED and states["article+clip"] == STALLED
    assert states["article+bf16"] == DIVERGED
    assert findings["article"][0].died_at == 45 and findings["article+clip"][0].learned == pytest.approx(1 / 6, 0.2)
    evidence = Evidence.of(findings)
    assert evidence.base == "article"
    words = {theory.letter: verdict.word for theory, verdict in verdicts(evidence)}
    assert words["A"] == CONFIRMED and words["B"] == CONFIRMED and words["D"] == REFUTED
    assert words["C"] == words["J"] == OPEN, "nothing is concluded from arms that were not run"
    assert words["F"] == REFUTED and words["H"] == REFUTED


def test_nothing_is_concluded_where_nothing_died() -> None:
    arms = {"plain+clip": course("plain+clip", 0.199), "article": course("article", 0.199)}
    findings = judge({name: [made] for name, made in arms.items()})
    assert findings["article"][0].state == UNCLEAR
    assert {verdict.word for _, verdict in verdicts(Evidence.of(findings))} == {OPEN}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--arms", "nobody"], "--data: give a dataset YAML"),
        (["--data", "tiny.yaml", "--arms", "nobody"], "no base 'nobody'"),
        (["--data", "tiny.yaml", "--steps", "0"], "--steps 0: must be at least 1"),
        (["--report", "/nowhere"], "no records in it"),
    ],
)
def test_wrong_flags_are_one_line(flags: list[str], said: str) -> None:
    command = [sys.executable, "-m", "benchmarks.collapse", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1
