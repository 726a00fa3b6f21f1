"""DCN layers as training's kernel, in the form that torch.export looks into; packages are made on a GPU only."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from deploy.dcn_forms import use_dcn_form
from deploy.exporter import form_of
from models.common import DCN
from models.loading import load_model
from utils.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]

TRACED = """
import torch, triton
from triton.backends.compiler import GPUTarget
from torch import nn
from deploy.dcn_forms import use_dcn_form
from models.common import DCN

class Driver:  # of a GPU that is not there: enough for Triton to parse a kernel
    def get_current_target(self): return GPUTarget("cuda", 90, 32)

triton.runtime.driver.set_active(Driver())
model = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), DCN(16, 32, 3, 2), nn.SiLU()).eval().requires_grad_(False)
assert use_dcn_form(model, "fused") == 1
model = model.to(memory_format=torch.channels_last)
axes = {0: torch.export.Dim("batch"), 2: 32 * torch.export.Dim("rows"), 3: 32 * torch.export.Dim("columns")}
for shapes in (None, {"input": axes}):
    program = torch.export.export(model, (torch.rand(2, 3, 64, 96),), dynamic_shapes=shapes)
    graph = program.run_decompositions(decompose_custom_triton_ops=True).graph
    (kernel,) = [node for node in graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    assert kernel.kwargs["tensors_to_clone"] == ["out"], kernel.kwargs  # nothing else is written to, so none is copied
    assert not [node for node in graph.nodes if str(node.target).startswith("dcn.")]
print("seen")
"""


def test_export_sees_the_kernel() -> None:
    """In a process of its own, because Triton's kernels in this one are those of its interpreter."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", TRACED], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "seen\n", done.stderr[-3000:]


@pytest.mark.parametrize("layer", [(16, 32, 3, 2), (16, 16, 3, 1, None, 1, 2, 2), (12, 20, (3, 1), 1)])
def test_equals_the_layer(layer: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the kernels are those of the interpreter already (tests/conftest.py)
    torch.manual_seed(2)
    own = DCN(*layer).eval().requires_grad_(False)
    nn.init.normal_(own.conv_offset_mask.weight, std=0.1)
    nn.init.normal_(own.bias)
    own.silu = True
    x = torch.randn(2, layer[0], 20, 24)
    model = nn.Sequential(own)
    expected = model(x)
    use_dcn_form(model, "fused")
    torch.testing.assert_close(model.to(memory_format=torch.channels_last)(x), expected, atol=1e-5, rtol=1e-5)


def test_where_it_cannot_be(weights: Path) -> None:
    model = load_model(weights)
    assert form_of(model, "", "aoti") == "gridsample"
    with pytest.raises(ConfigError, match="--dcn fused: not in aoti here: it needs a CUDA device, not cpu"):
        form_of(model, "fused", "aoti")
    with pytest.raises(ConfigError, match="--dcn fused: not in onnx here: it is for aoti only"):
        form_of(model, "fused", "onnx")
