"""What is measured in a step, on the device; one transfer brings it to the host."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.collapse.layers import Studied, next_norms, studied
from models.yolo import DetectionModel
from utils.dcn_watch import displaced, geometry_of


class Probe:
    """Statistics of the DCN layers of ``model`` in the forward pass after :meth:`arm`, and of their gradients.

    ``layers``: by name, the map size and the share of samples outside with zero offsets, once a pass was measured.
    """

    def __init__(self, model: DetectionModel) -> None:
        self.modules = {layer.name: layer for layer in studied(model)}
        self.layers: dict[str, dict[str, float]] = {}
        self._passed: dict[str, Tensor] = {}
        self._before_norm: dict[str, Tensor] = {}
        self._next_norms = next_norms(model)
        self._handles: list = []

    def arm(self) -> None:
        """Measure from now on, until :meth:`disarm`."""
        for layer in self.modules.values():
            layer.watcher = self._watch
        self._handles = [conv.register_forward_hook(self._hook(name)) for name, conv in self._next_norms.items()]

    def disarm(self) -> None:
        for layer in self.modules.values():
            layer.watcher = None
        for handle in self._handles:
            handle.remove()

    def read(self) -> Tensor:
        """(layers * 14,) float32 on the device, a layer's in the order of record.LAYER; gradients as they stand."""
        rows = []
        for name, layer in self.modules.items():
            passed = self._passed.pop(name)
            out, rest = passed[:2], passed[2:]
            dcn = layer.dcn
            grads = [_norm(p) for p in (dcn.weight, dcn.conv_offset_mask.weight, dcn.conv_offset_mask.bias)]
            before = self._before_norm.pop(name, out[0] if layer.arm.norm else out[0] * float("nan"))
            rows.append(torch.cat((out, torch.stack(grads), rest, before[None])))
        return torch.cat(rows) if rows else torch.empty(0)

    @torch.no_grad()
    def _watch(self, layer: Studied, x: Tensor, raw: Tensor, out: Tensor) -> None:
        geometry = geometry_of(layer.dcn.conv_offset_mask, x, raw)
        if layer.name not in self.layers:
            height, width = geometry.size
            self.layers[layer.name] = {"height": height, "width": width, "rest": geometry.outside_at_rest()}
        offset, inside = displaced(raw, geometry)
        length = torch.hypot(*offset.unbind(4))
        dy, dx = offset.mean((0, 1, 2, 3, 5, 6))
        shift = offset.mean((0, 5, 6)).square().mean().sqrt()
        mask = raw[:, raw.shape[1] // 3 * 2 :].float().sigmoid()
        values = (
            out.float().std(), out.abs().amax().float(), length.mean(), length.amax(), dy, dx,
            (offset > 0).float().mean(), shift, 1 - inside.float().mean(), mask.mean(),
        )  # fmt: skip
        self._passed[layer.name] = torch.stack(values)

    def _hook(self, name: str):
        @torch.no_grad()
        def record(conv: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._before_norm[name] = output.float().std()

        return record


def _norm(parameter: nn.Parameter) -> Tensor:
    return parameter.new_zeros(()) if parameter.grad is None else parameter.grad.norm()
