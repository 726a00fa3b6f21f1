"""The optimizer and its parameter groups, one per role; the nominal batch size that learning rates refer to."""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any

import torch
from torch import nn

from utils.errors import CheckpointError, ConfigError, did_you_mean

OPTIMIZERS = ("SGD", "Adam", "AdamW")

NOMINAL_BATCH = 64
"""Images that one optimizer step should see; smaller batches add up gradients until they do."""

_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)
_OFFSET_BRANCH = "conv_offset_mask"


def accumulation(batch_size: int, nominal: float = NOMINAL_BATCH) -> int:
    """Batches per optimizer step after warm-up, for steps that should see ``nominal`` images."""
    return max(round(nominal / batch_size), 1)


def scaled_weight_decay(weight_decay: float, batch_size: int, nominal: float = NOMINAL_BATCH) -> float:
    """Weight decay for steps that see ``batch_size`` x accumulation images rather than 64, for which it is given."""
    return weight_decay * batch_size * accumulation(batch_size, nominal) / NOMINAL_BATCH


def parameter_roles(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters of ``model`` by role, each once, in module order.

    bias: named exactly "bias". norm: "weight" of a normalisation layer. dcn_offset_weight, dcn_offset_bias: those of
    a ``conv_offset_mask`` branch (roles left out when there is none). weight: everything else. The first three are
    always there, in the order of the x/lr0, x/lr1, x/lr2 columns: bias, weight, norm.
    Frozen parameters keep their place: optimizers pass over parameters without a gradient, and a checkpoint's
    optimizer state then fits whatever is frozen when it is resumed.
    """
    roles: dict[str, list[nn.Parameter]] = {
        "bias": [],
        "weight": [],
        "norm": [],
        "dcn_offset_weight": [],
        "dcn_offset_bias": [],
    }
    seen: set[int] = set()
    for path, module in model.named_modules():
        offset_branch = _OFFSET_BRANCH in path.split(".")
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if offset_branch:
                role = "dcn_offset_bias" if name == "bias" else "dcn_offset_weight"
            elif name == "bias":
                role = "bias"
            elif name == "weight" and isinstance(module, _NORMS):
                role = "norm"
            else:
                role = "weight"
            roles[role].append(parameter)
    return {role: found for role, found in roles.items() if found or not role.startswith("dcn")}


def build_optimizer(
    model: nn.Module, name: str, lr: float, momentum: float, weight_decay: float, dcn_offset_lr: float = 0.1
) -> torch.optim.Optimizer:
    """SGD (with Nesterov momentum), Adam or AdamW over :func:`parameter_roles`; each group has "role" and "lr_scale".

    momentum: SGD's, or the first beta of the Adams. weight_decay: for the weights (see :func:`scaled_weight_decay`);
    biases and norms have none. dcn_offset_lr: learning rate of the DCN offset branches relative to ``lr``; the DCNv2
    paper (arXiv 1811.11168, section 3.2) uses 0.1, and at 1 offsets tend to run out of the image, where every
    gradient is zero. Their biases are not "bias" either, because the warm-up starts those at ten times the rate.
    Raises ConfigError for another name.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(f"--optimizer {name}: choose one of {', '.join(OPTIMIZERS)}{did_you_mean(name, OPTIMIZERS)}")
    groups = []
    for role, parameters in parameter_roles(model).items():
        scale = dcn_offset_lr if role.startswith("dcn") else 1.0
        decay = weight_decay if role in ("weight", "dcn_offset_weight") else 0.0
        groups.append({"params": parameters, "role": role, "lr_scale": scale, "lr": lr * scale, "weight_decay": decay})
    # None leaves torch's own choice (foreach on a GPU, plain loops on the CPU)
    fused = all(p.is_cuda and p.is_floating_point() for p in model.parameters()) or None
    kind = without_compiler(getattr(torch.optim, name))
    if name == "SGD":
        sgd = kind(groups, lr=lr, momentum=momentum, nesterov=momentum > 0, fused=fused)
        return start_momentum_at_zero(sgd) if fused and momentum > 0 else sgd
    return kind(groups, lr=lr, betas=(momentum, 0.999), fused=fused)


@functools.cache
def without_compiler(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """The optimizer, whose use does not import torch's compiler.

    Some methods of torch's import it when they are called, only to tell it to leave them alone: more than a second of
    a start, for a compiler that never sees an optimizer here. Such an optimizer cannot be pickled (its state can), and
    knows no ``differentiable``.
    """
    methods = {
        name: inspect.unwrap(getattr(kind, name))
        for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    }
    return type(kind.__name__, (kind,), {**methods, "step": torch.no_grad()(inspect.unwrap(kind.step))})


def start_momentum_at_zero(optimizer: torch.optim.SGD) -> torch.optim.SGD:
    """Momentum as zeros before a parameter's first step, which is then what it would have been. Returns ``optimizer``.

    torch's fused SGD begins with uninitialised memory and relies on its first step to fill it; a first step that is
    skipped, as the loss scale of float16 makes it, leaves what lay there, perhaps NaN, to the second (torch 2.14).
    It looks at every step (40 us for yolov5s), because a rollback may restore the state of the run's beginning.
    """

    def fill(optimizer: torch.optim.SGD, args: tuple, kwargs: dict) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and optimizer.state[parameter].get("momentum_buffer") is None:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.grad)

    optimizer.register_step_pre_hook(fill)
    return optimizer


def clip_gradients(optimizer: torch.optim.Optimizer, most: float) -> torch.Tensor:
    """Scale gradients down to a norm of ``most`` (0: leave them), those of DCN offset branches and those of all else
    each on their own. Returns the norm of them all before, a scalar on their device.

    At size x the offset branches have most of the norm, and clipped together with them a network hardly learns in its
    first hundreds of steps (docs/dcn-collapse.md).
    """
    branches, rest = [], []
    for group in optimizer.param_groups:
        here = branches if group.get("role", "").startswith("dcn") else rest
        here += [parameter for parameter in group["params"] if parameter.grad is not None]  # others are frozen
    norms = [nn.utils.clip_grad_norm_(parameters, most or math.inf) for parameters in (rest, branches) if parameters]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def step_if_finite(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, norm: torch.Tensor) -> None:
    """Step, unless a gradient is not finite, of all of which ``norm`` is the norm, unscaled; then update the scale."""
    if scaler.is_enabled():
        scaler.step(optimizer)  # looks for itself
    elif optimizer.defaults.get("fused"):  # the kernels look at found_inf: nothing waits for the device
        optimizer.found_inf = (~torch.isfinite(norm)).float()
        optimizer.step()
    elif torch.isfinite(norm):
        optimizer.step()
    scaler.update()


def describe(optimizer: torch.optim.Optimizer) -> str:
    """``SGD(lr=0.01) with parameter groups 57 weight(decay=0.0), 60 weight(decay=0.0005), 60 bias``, and the DCN
    offset branches where there are any."""
    groups = {group["role"]: group for group in optimizer.param_groups}
    parts = [
        f"{len(groups[r]['params'])} weight(decay={round(groups[r]['weight_decay'], 8)})" for r in ("norm", "weight")
    ]
    parts.append(f"{len(groups['bias']['params'])} bias")
    offsets = [group for role, group in groups.items() if role.startswith("dcn")]
    if offsets:
        count = sum(len(group["params"]) for group in offsets)
        parts.append(f"{count} DCN offset(lr x {offsets[0]['lr_scale']:g})")
    return f"{type(optimizer).__name__}(lr={groups['weight']['lr']:g}) with parameter groups {', '.join(parts)}"


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], source: str) -> None:
    """Load a checkpoint's optimizer state, in place, keeping this run's kernels (fused, foreach) and lr_scale.

    A run may move between CPU and GPU, and the saved choice of kernel would not follow. ``source``: the file's name.
    Raises CheckpointError when the groups differ from this model's.
    """
    own = [(group["role"], len(group["params"])) for group in optimizer.param_groups]
    stored = [(group.get("role"), len(group["params"])) for group in state["param_groups"]]
    if own != stored:
        raise CheckpointError(
            f"{source}: its optimizer state is of another model or another version (groups {stored}, here {own}); "
            f"start anew with --weights {source}"
        )
    kept = ("role", "lr_scale", "fused", "foreach", "capturable", "differentiable")
    merged = []
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        merged.append({**saved, **{key: group[key] for key in kept if key in group}})
    optimizer.load_state_dict({"state": state["state"], "param_groups": merged})
    for parameter, held in optimizer.state.items():
        for name, value in held.items():
            if torch.is_tensor(value) and value.dim() and value.shape != parameter.shape:
                raise CheckpointError(f"{source}: its {name} is of {tuple(value.shape)}, not {tuple(parameter.shape)}")
