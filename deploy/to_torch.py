"""A model as TorchScript, and compiled ahead of time by AOTInductor."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from deploy.cxx import shared_cxx_library
from deploy.metadata import Metadata
from deploy.wrap import ExportModel, dynamic_axes, quiet

ENTRIES = "metadata.json"
"""The extra file in a .torchscript."""


def export_torchscript(model: ExportModel, example: Tensor, path: Path, meta: Metadata) -> None:
    """Write the trace of the model; the program that opens it must have loaded torchvision where there are DCN layers.
    A trace takes any batch and size; what ``meta`` says is what was checked."""
    with quiet(), torch.no_grad():  # about deprecation, and comparisons of shapes, which hold for every size
        traced = torch.jit.trace(model, example, check_trace=False)
        torch.jit.save(traced, str(path), _extra_files={ENTRIES: json.dumps(meta.entries())})


def export_aoti(model: ExportModel, example: Tensor, path: Path, meta: Metadata) -> None:
    """Compile the model for the device of ``example`` and write the package. Raises ExportError without a
    compiler, or with one that does not serve."""
    shapes = {"images": dynamic_axes(meta.stride)} if meta.dynamic else None
    with quiet("torch.utils.cpp_extension"), torch.no_grad(), shared_cxx_library() as compiler:
        settings = {"aot_inductor.metadata": meta.entries(), **compiler}
        program = torch.export.export(model, (example,), dynamic_shapes=shapes)
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)
