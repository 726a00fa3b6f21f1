"""Every block alone: names, shapes and outputs equal to upstream's."""

from __future__ import annotations

import ast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import activations, common, extra, ghost, transformer
from models.activations import activation_from_text
from tests.models.reference import fill, image, stored

CASES = [name for name in stored("modules.json") if name != "Proto"]  # segmentation is not part of this repository


def construct(call: str) -> nn.Module:
    """``"Conv(4,6,3,2)"`` -> the block."""
    node = ast.parse(call, mode="eval").body
    places = (common, extra, ghost, transformer)
    block = next(getattr(place, node.func.id) for place in places if hasattr(place, node.func.id))
    return block(*map(ast.literal_eval, node.args), **{k.arg: ast.literal_eval(k.value) for k in node.keywords})


@pytest.mark.parametrize("name", CASES)
def test_block_equals_reference(name: str) -> None:
    case = stored("modules.json")[name]
    block = fill(construct(case["call"]))
    assert [[key, list(value.shape)] for key, value in block.state_dict().items()] == case["keys"]
    assert sum(p.numel() for p in block.parameters()) == case["params"]
    with torch.no_grad():
        output = block(2 * image(case["input"], "modin") - 1)
    # Saturated attention amplifies rounding: the stored values are themselves 3e-3 from float64, on maps of 300, and
    # another processor rounds otherwise.
    rtol = 1e-4 if name in ("C3TR", "TransformerBlock") else 1e-7
    atol = 5e-4 if name == "TransformerBlock" else 1e-4
    np.testing.assert_allclose(output.numpy(), stored("modules.npz")[name], rtol=rtol, atol=atol)


def test_norms_have_the_published_constants() -> None:
    for call in ("Conv(4,6)", "BottleneckCSP(8,8)", "MixConv2d(8,8)", "C3TR(8,16)"):
        norms = [m for m in construct(call).modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms and all((m.eps, m.momentum) == (1e-3, 0.03) for m in norms)


def test_given_activation_reaches_every_convolution_and_nothing_else() -> None:
    relu = nn.ReLU()
    for block in (common.C3(8, 16, 2, act=relu), ghost.C3Ghost(8, 16, act=relu), extra.C3x(8, 16, act=relu)):
        kinds = {type(m) for m in block.modules() if not list(m.children())}
        assert nn.ReLU in kinds and nn.SiLU not in kinds
    assert isinstance(common.Conv(4, 4).act, nn.SiLU)
    assert isinstance(common.Conv(4, 4, act=False).act, nn.Identity)


def test_autopad_keeps_the_size_at_stride_one() -> None:
    assert [common.autopad(k) for k in (1, 3, 5, 6)] == [0, 1, 2, 3]
    assert common.autopad(3, d=2) == 2
    assert common.autopad((1, 5)) == (0, 2)
    assert common.autopad(3, 0) == 0


def test_contract_and_expand_undo_each_other() -> None:
    x = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    assert torch.equal(extra.Expand(2)(extra.Contract(2)(x)), x)


def test_activations_against_their_formulas() -> None:
    x = torch.linspace(-5, 5, 41, dtype=torch.float64).view(1, 1, 1, -1)
    assert torch.allclose(activations.Hardswish()(x), F.hardswish(x))
    assert torch.allclose(activations.Mish()(x), F.mish(x))
    frelu = activations.FReLU(4).eval()
    y = torch.randn(1, 4, 5, 5)
    assert torch.equal(frelu(y), torch.maximum(y, frelu.bn(frelu.conv(y))))
    for acon in (activations.AconC(4), activations.MetaAconC(4)):
        assert acon(y).shape == y.shape


def test_memory_efficient_mish_has_the_right_gradient() -> None:
    x = torch.linspace(-3, 3, 13, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(activations.MemoryEfficientMish(), (x,))


def test_activation_text_is_looked_up() -> None:
    leaky = activation_from_text("nn.LeakyReLU(0.1)")
    assert isinstance(leaky, nn.LeakyReLU) and leaky.negative_slope == 0.1
    assert isinstance(activation_from_text("torch.nn.SiLU()"), nn.SiLU)
    assert activation_from_text("nn.ELU(alpha=0.5)").alpha == 0.5


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "nn.LeakyReLU(open('x'))",
        "nn.Linear(1, 2)",
        "nn.SiLU(",
        "nn.SiLU(1, 2, 3)",
        "",
        "3",
    ],
)
def test_activation_text_is_never_run(text: str) -> None:
    with pytest.raises(ValueError, match="activation"):
        activation_from_text(text)
