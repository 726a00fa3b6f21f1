"""A process of its own for the real registry of TensorRT 11 and the made-up driver; prints what happened, as JSON.

python -m tests.deploy.fake_driver FOLDER: of driver, harness and plugin.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.plugin import DTYPES, Case, Runner, error, exact, random_inputs, runner
from deploy.tensorrt.plugin.harness import HWC, HWC8, LINEAR, Harness, Plugin, Settings, Shapes
from utils.errors import ExportError

OWN = Case(8, 16, (24, 20), Settings((2, 2), (1, 1)))
"""The layer that has kernels of its own."""
BIG = replace(OWN, side=(196, 196))
CASES = (
    Case(3, 5, (7, 11), Settings((1, 1), (1, 1))),
    Case(8, 16, (13, 10), Settings((2, 1), (0, 2)), bias=False),
    Case(16, 24, (8, 12), Settings((1, 1), (1, 1), groups=(2,), offset_groups=(4,))),
    Case(24, 40, (7, 6), Settings((1, 1), (2, 2), groups=(4,), offset_groups=(2,)), (5, 5), 3),
    Case(12, 8, (15, 17), Settings((3, 2), (2, 4), (2, 3), offset_groups=(3,)), (3, 5)),
    Case(8, 264, (3, 2), Settings((1, 1), (0, 0)), (1, 1), 1),
)
STREAM = 7


def registry() -> Path:
    """The smallest library of TensorRT's that has its plugin registry."""
    import tensorrt_dispatch_libs

    return sorted(Path(tensorrt_dispatch_libs.__file__).parent.glob("libnvinfer_dispatch.so.*"))[0]


def enqueued(run: Runner) -> torch.Tensor:
    assert run.plugin.enqueue(run.shapes, run.inputs, run.out, run.workspace, STREAM)
    return run.out


def errors(harness: Harness) -> dict[str, float]:
    """Of the output, by case, type and format."""
    found = {}
    for case in (*CASES, OWN, BIG):
        for name in DTYPES if case is not BIG else ["fp16"]:
            inputs = random_inputs(case, DTYPES[name], device="cpu")
            expected = exact(case.settings, inputs)
            eights = case.channels % 8 == 0 and case.outputs % 8 == 0
            for channels_last in (False, True) if eights or name == "fp32" else (False,):
                run = runner(harness, case.settings, inputs, channels_last)
                found[f"{case} {name} {channels_last}"] = error(enqueued(run), expected)
    return found


def launches(harness: Harness, log: Path) -> list[list[str]]:
    """Of a layer with kernels of its own, channels-last, few programs; the same without a bias and linear; many."""
    found = []
    for case, channels_last in ((OWN, True), (replace(OWN, bias=False), False), (BIG, True)):
        run = runner(harness, case.settings, random_inputs(case, torch.float16, device="cpu"), channels_last)
        log.write_text("")
        enqueued(run)
        found.append(log.read_text().splitlines())
    return found


def changes_of_shape(harness: Harness) -> list[float]:
    """One object, told of batches and sizes up to what its workspace was asked for."""
    case = replace(OWN, batch=3)
    whole = runner(harness, case.settings, random_inputs(case, torch.float16, device="cpu"), False)
    found = []
    for smaller in (replace(case, batch=1), replace(case, side=(17, 9)), replace(case, side=(5, 36)), case):
        inputs = random_inputs(smaller, torch.float16, device="cpu")
        expected = exact(smaller.settings, inputs)
        shapes = Shapes.of([tuple(each.shape) for each in inputs], expected.shape, torch.float16, LINEAR)
        assert whole.plugin.shape_change(shapes)
        guarded = torch.full((whole.workspace.numel() + 64,), 0xFF, dtype=torch.uint8)
        run = replace(whole, shapes=shapes, inputs=inputs, out=expected.half(), workspace=guarded)
        found.append(error(enqueued(run), expected))
        assert bool((guarded[-64:] == 0xFF).all()), "beyond the workspace"
    return found


def formats(plugin: Plugin) -> dict[str, list[int]]:
    """For x, by channels and type: the formats it may have; for the others: whether they follow x."""
    found = {}
    for channels in (16, 12):
        shapes = Shapes.of([(1, channels, 8, 8), (1, 18, 8, 8), (1, 9, 8, 8), (16, channels, 3, 3)], (1, 16, 8, 8),
                           torch.float16, LINEAR)  # fmt: skip
        for type in (0, 1, 7, 2, 3):
            found[f"x {channels} {type}"] = [
                f for f in range(13) if plugin.supports(shapes, [type] * 5, [f, 0, 0, 0, 0], 0)
            ]
    others = {
        "weight as x": ([1] * 5, [HWC8, 0, 0, 0, 0], 3), "weight of another type": ([1, 1, 1, 0, 1], [0] * 5, 3),
        "offset of eights": ([1] * 5, [HWC8, HWC8, 0, 0, 0], 1), "output as x": ([1] * 5, [HWC8, 0, 0, 0, HWC8], 4),
        "output of another format": ([1] * 5, [HWC8, 0, 0, 0, 0], 4), "wide": ([0] * 5, [HWC, 0, 0, 0, HWC], 4),
    }  # fmt: skip
    return found | {name: plugin.supports(shapes, *given) for name, given in others.items()}


def refused(harness: Harness) -> dict[str, bool]:
    """Fields that are none, and shapes that do not go together."""
    found = {}
    for name, given, kind in (
        ("one stride", {"stride": (2,)}, 5), ("unknown", {"strides": (2, 2)}, 5), ("zero", {"dilation": (1, 0)}, 5),
        ("float", {"stride": (2, 2)}, 1), ("negative", {"padding": (-1, 0)}, 5),
    ):  # fmt: skip
        try:
            harness.create(given, kind=kind)
            found[name] = False
        except ExportError:
            found[name] = True
    plugin = harness.create(Settings((1, 1), (1, 1)))
    good = [(2, 16, 8, 8), (2, 18, 8, 8), (2, 9, 8, 8), (32, 16, 3, 3), (32,)]
    for name, place, shape in (
        ("channels", 0, (2, 15, 8, 8)), ("batch", 1, (1, 18, 8, 8)), ("pairs", 1, (2, 16, 8, 8)),
        ("masks", 2, (2, 18, 8, 8)), ("rows", 1, (2, 18, 7, 8)), ("columns", 2, (2, 9, 8, 9)), ("bias", 4, (31,)),
        ("taps", 3, (32, 16, 3, 5)), ("nothing", 0, (2, 16, 8, 8)), ("unknown batch", 0, (-1, 16, 8, 8)),
    ):  # fmt: skip
        shapes = Shapes.of([*good[:place], shape, *good[place + 1 :]], (2, 32, 8, 8), torch.float16, LINEAR)
        found[name] = not plugin.configure(shapes)
    return found


def failures(harness: Harness) -> dict[str, bool]:
    """What the driver refuses is told by the return code, and a card that there is no code for."""
    inputs = random_inputs(OWN, torch.float16, device="cpu")
    run = runner(harness, OWN.settings, inputs, True)
    os.environ["FAKE_FAIL"] = "cuLaunchKernel"
    found = {"launch": not run.plugin.enqueue(run.shapes, run.inputs, run.out, run.workspace, STREAM)}
    fresh = harness.create(OWN.settings)
    found["early"] = not fresh.enqueue(run.shapes, run.inputs, run.out, run.workspace, STREAM)
    for name, value in (("FAKE_FAIL", "cuLibraryLoadData"), ("FAKE_FAIL", "cuCtxGetDevice"), ("FAKE_FAIL", "")):
        os.environ[name] = value
        found[value or "again"] = not harness.create(OWN.settings).shape_change(run.shapes)
    for capability in (75, 80, 86, 89, 90, 100):
        os.environ["FAKE_CAPABILITY"] = str(capability)
        found[str(capability)] = not harness.create(OWN.settings).shape_change(run.shapes)
    return found


def main(folder: Path) -> None:
    ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    log = folder / "launches"
    os.environ["FAKE_LOG"] = str(log)
    torch.set_num_threads(1)
    harness = Harness(folder / "harness.so", registry(), folder / "plugin" / "libdcnv2.so")
    settings = Settings((2, 1), (0, 3), (1, 2), (2,), (4,))
    built = harness.create(settings)
    opened = harness.recreate(built)
    print(json.dumps({
        "names": harness.field_names(),
        "fields": [each.serialized() for each in (built, opened, opened.attached(), opened.cloned())],
        "formats": formats(built), "refused": refused(harness), "errors": errors(harness),
        "changes": changes_of_shape(harness), "launches": launches(harness, log), "failures": failures(harness),
    }))  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
