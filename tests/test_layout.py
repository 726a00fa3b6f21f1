"""The architecture, pinned: who imports whom (docs/architecture.md), and that importing changes nothing."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("engine", "models", "utils", "deploy", "comparison")
SCRIPTS = ("train", "val", "detect", "export", "gen_wts", "compare")

# From the bottom up; a module imports only from levels below its own.
LEVELS = (
    """
utils.signals utils.safe_names utils.process_name utils.cores utils.repeats models.ops.precision models.ops.layout \
    models.ops.geometry models.ops.nvrtc models.ops.dcn_kernels
models.ops.dcn_launch models.ops.dcn_cuda utils.pickle_records
models.ops.dcn_op utils.torch_tensors utils.pickle_reader
utils.errors utils.console utils.boxes utils.augmentations utils.frames utils.crops utils.label_index \
    utils.batch_memory utils.device_augment utils.assign utils.autoanchor utils.batched_nms utils.dcn_watch \
    utils.early_stopping utils.background utils.ema utils.nan_search utils.stages utils.torch_legacy \
    utils.cuda_recording utils.side_stream utils.gc_pause models.activations models.offsets models.ops.deform_conv
utils.files utils.run_lock utils.torch_file utils.npz utils.device utils.dist utils.images utils.label_table \
    utils.labels utils.mosaic utils.plots utils.curves utils.metrics utils.matching utils.coco utils.coco_ap \
    utils.optim utils.autobatch utils.shared_gradients utils.streams utils.cuda_graphs models.common models.head
utils.helpers utils.confusion utils.config utils.checkpoint utils.peer_watch utils.wts utils.loggers \
    utils.label_cache utils.sources models.extra models.ghost \
    models.transformer models.sampling models.spec models.surgery models.deform models.summary models.results
utils.cli utils.nms utils.check_data utils.image_cache utils.loss utils.schedule models.parser models.map_size \
    models.upstream
utils.dataset models.yolo
utils.dataloaders models.ensemble
models.loading models.tta
models.api models.convert
models
deploy.fused_dcn
deploy.formats deploy.dcn_forms deploy.metadata deploy.checking deploy.tensorrt.backend deploy.tensorrt.sizes \
    deploy.tensorrt.plugin.kernels
deploy.contract deploy.cxx deploy.wrap deploy.to_int8 deploy.to_wts deploy.tensorrt.network \
    deploy.tensorrt.onnx_backend deploy.tensorrt.trt_backend deploy.tensorrt.engine_file deploy.tensorrt.plugin.compile
deploy.to_onnx deploy.to_torch deploy.to_openvino deploy.to_ncnn deploy.tensorrt.plugin_backend \
    deploy.tensorrt.plugin.build
deploy.run_onnx deploy.run_torch deploy.run_openvino deploy.run_ncnn \
    deploy.tensorrt.run_engine deploy.tensorrt.plugin.harness
deploy.runtime deploy.tensorrt.build
deploy.exporter
engine.window engine.feature_maps engine.read_ahead engine.resume engine.diagnosis engine.graphs engine.evaluator \
    engine.writers
engine.compiling
engine.epoch
engine.state engine.parts engine.eval_outputs engine.offset_pictures engine.predictor
engine.run
engine.trainer
train val detect export gen_wts
deploy.tensorrt.__main__ deploy.tensorrt.plugin.__main__
comparison.intervals comparison.groups comparison.plan comparison.costs
comparison.verdict comparison.matching comparison.trainings comparison.checks
comparison.resampling comparison.predictions
comparison.findings
comparison.report
comparison.report_text comparison.charts comparison.examples
comparison.report_html comparison.offset_examples
comparison.measuring
compare
""".replace("\\\n", "")
    .strip()
    .splitlines()
)

# The one import upwards: `python -m models.yolo` is a command line that lives beside what it shows.
UPWARDS = {("models.yolo", "models.summary")}


def modules() -> dict[str, Path]:
    found = {name: ROOT / f"{name}.py" for name in SCRIPTS if (ROOT / f"{name}.py").exists()}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def level(module: str) -> int | None:
    for number, names in enumerate(LEVELS):
        for name in names.split():
            if module == name or (name.endswith(".*") and module.startswith(name[:-1])):
                return number
    return None


def imports_of(path: Path) -> set[str]:
    """First-party modules that a file imports anywhere, functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in MODULES else node.module for a in node.names
            }
    return {name for name in found if name.split(".")[0] in (*PACKAGES, *SCRIPTS)}


EMPTY = {"utils", "engine", "comparison", "models.ops", "deploy", "deploy.tensorrt", "deploy.tensorrt.plugin"}


@pytest.mark.parametrize("module", sorted(set(MODULES) - EMPTY))
def test_imports_go_down(module: str) -> None:
    own = level(module)
    assert own is not None, f"{module} has no level: add it to LEVELS and to docs/architecture.md"
    for target in imports_of(MODULES[module]):
        if target == module or target in EMPTY:
            continue
        assert target in MODULES, f"{module} imports {target}, which does not exist"
        fine = level(target) < own or (module, target) in UPWARDS
        assert fine, f"{module} (level {own}) imports {target} (level {level(target)})"


@pytest.mark.parametrize("package", ["models", "utils"])
def test_packages_keep_their_direction(package: str) -> None:
    forbidden = {"models": ("engine", "deploy", *SCRIPTS), "utils": ("models", "engine", "deploy", *SCRIPTS)}[package]
    for module, path in MODULES.items():
        if module.split(".")[0] == package:
            assert not [t for t in imports_of(path) if t.split(".")[0] in forbidden], module


SNAPSHOT = """
import os, sys, random, socket, subprocess, warnings
import numpy, torch, torchvision, cv2, yaml, PIL.Image
def refuse(*a, **k): raise RuntimeError("imports must not touch the network or start processes")
socket.socket.connect = refuse; subprocess.Popen.__init__ = refuse; os.system = refuse
def state():
    return (dict(os.environ), list(sys.path), torch.get_num_threads(), cv2.getNumThreads(), random.getstate(),
            torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist(), repr(numpy.get_printoptions()),
            torch.are_deterministic_algorithms_enabled(), list(warnings.filters))
before = state()
import importlib
for name in sys.argv[1:]:
    importlib.import_module(name)
    after = state()
    assert after == before, name + " changes global state when imported"
"""


def test_importing_changes_nothing() -> None:
    names = sorted(set(MODULES))
    done = subprocess.run([sys.executable, "-c", SNAPSHOT, *names], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s in MODULES])
def test_flags_are_parsed_before_torch_is_loaded(script: str) -> None:
    code = (
        f"import sys, {script}\n"
        f"assert not [m for m in ('torch', 'cv2', 'numpy', 'matplotlib') if m in sys.modules], 'heavy import'\n"
        f"{script}.build_parser().parse_args([])\n"
        f"assert 'torch' not in sys.modules"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_common_words_of_danger_are_absent() -> None:
    """No eval, exec, pickle, shell or unrestricted torch.load anywhere in the program."""
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in {"eval", "exec", "os.system", "pickle.load", "pickle.loads", "yaml.load"}, module
                if name == "torch.load":
                    assert "weights_only=True" in ast.unparse(node), module
                assert not any(k.arg == "shell" for k in node.keywords), module


def defined_in(path: Path) -> set[str]:
    """Names a module binds outside functions and classes."""
    names: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        for node in ast.iter_child_nodes(waiting.pop()):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            else:
                names |= {node.id} if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else set()
                waiting.append(node)
    return names


def test_what_is_imported_is_there() -> None:
    """Also by imports inside functions, which no test may run: benchmarks and scripts have many."""
    inner = [*PACKAGES, "benchmarks", "scripts", "tests"]
    found = set()
    for path in [*ROOT.glob("*.py"), *(file for package in inner for file in (ROOT / package).rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in (*inner, *SCRIPTS):
                source = ROOT.joinpath(*node.module.split("."))
                found |= {(path, node.module, alias.name, source) for alias in node.names}
    names: dict[Path, set[str]] = {}
    missing = []
    for path, module, name, source in found:
        if source not in names:
            file = source / "__init__.py" if source.is_dir() else source.with_suffix(".py")
            parts = {part.stem for part in source.iterdir()} if source.is_dir() else set()
            names[source] = parts | (defined_in(file) if file.is_file() else set())
        if name not in names[source]:
            missing.append(f"{path.relative_to(ROOT)}: from {module} import {name}")
    assert len(found) > 500 and not missing, missing


def test_nothing_listed_is_stale() -> None:
    """Modules and exceptions that no longer exist are removed from the lists."""
    edges = {(module, target) for module, path in MODULES.items() for target in imports_of(path)}
    assert not UPWARDS - edges
    listed = {name for names in LEVELS for name in names.split() if not name.endswith(".*")}
    assert listed <= set(MODULES)
