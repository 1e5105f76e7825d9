"""AdamW, clipping over stages and the learning rate. Values in, values out: no file, no scheduler object, no clock."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from swarm_core.learning.errors import UnfitError

Schedule = Literal["constant", "linear", "cosine"]
MOMENTS = ("exp_avg", "exp_avg_sq")


class OptimizerError(UnfitError):
    """Settings, gradients or a saved state do not fit."""


@dataclass(frozen=True)
class OptimizerSpec:
    """AdamW (decoupled weight decay on every tensor, as torch's) and its learning rate over committed steps.

    `max_grad_norm` None: no clipping. `total_steps` is where linear and cosine reach `learning_rate * final_fraction`.
    """

    learning_rate: float = 1e-6
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    schedule: Schedule = "constant"
    warmup_steps: int = 0
    total_steps: int = 0
    final_fraction: float = 0.0

    def __post_init__(self) -> None:
        _require(self.learning_rate >= 0 and math.isfinite(self.learning_rate), "learning_rate", self, ">= 0")
        _require(0 <= self.beta1 < 1, "beta1", self, "0 <= beta1 < 1")
        _require(0 <= self.beta2 < 1, "beta2", self, "0 <= beta2 < 1")
        _require(self.epsilon > 0, "epsilon", self, "> 0")
        _require(self.weight_decay >= 0, "weight_decay", self, ">= 0")
        _require(self.max_grad_norm is None or self.max_grad_norm > 0, "max_grad_norm", self, "> 0, or none")
        _require(self.schedule in ("constant", "linear", "cosine"), "schedule", self, "constant, linear or cosine")
        _require(self.warmup_steps >= 0, "warmup_steps", self, ">= 0")
        _require(0 <= self.final_fraction <= 1, "final_fraction", self, "0 <= final_fraction <= 1")
        if self.schedule != "constant":
            least = max(1, self.warmup_steps)
            _require(self.total_steps >= least, "total_steps", self, f">= {least} (warmup_steps, and at least 1)")


def learning_rate(spec: OptimizerSpec, committed_steps: int) -> float:
    """The rate of the step that follows `committed_steps` committed ones (0 for the first). A pure function.

    Warmup is linear and reaches the full rate at its last step; skipped ticks do not count. Past `total_steps` it
    stays at the final rate.
    """
    if committed_steps < 0:
        raise OptimizerError("committed_steps", committed_steps, ">= 0", "count committed ticks from 0")
    if committed_steps < spec.warmup_steps:
        return spec.learning_rate * (committed_steps + 1) / spec.warmup_steps
    if spec.schedule == "constant":
        return spec.learning_rate
    progress = min(1.0, (committed_steps - spec.warmup_steps) / max(1, spec.total_steps - spec.warmup_steps))
    left = 1.0 - progress if spec.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return spec.learning_rate * (spec.final_fraction + (1.0 - spec.final_fraction) * left)


def build_optimizer(parameters: Iterable[nn.Parameter], spec: OptimizerSpec) -> torch.optim.AdamW:
    """One AdamW over one stage's parameters, in their order. Every update is elementwise, so any split of the
    parameters over stages gives the same bits as one optimizer over all of them."""
    held = list(parameters)
    if not held:
        raise OptimizerError("parameters", "none", "at least one", "pass stage.parameters()")
    return torch.optim.AdamW(
        held, lr=spec.learning_rate, betas=(spec.beta1, spec.beta2), eps=spec.epsilon, weight_decay=spec.weight_decay
    )


def fill_missing_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give zeros to parameters without a gradient: for a stage that had no microbatch in a tick."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def gradient_norms(parameters: Iterable[nn.Parameter]) -> list[float]:
    """The 2-norm of each gradient, in parameter order: exact as floats, so they may cross a link and come back.

    The stages' lists one after the other feed `clip_coefficient`. A parameter without a gradient is an error: torch
    leaves it out of the reduction and a zero would not, so stages could no longer agree on the bits.
    """
    gradients = []
    for position, parameter in enumerate(parameters):
        if parameter.grad is None:
            raise OptimizerError(
                f"gradient of parameter {position} (shape {list(parameter.shape)})",
                "none",
                "a tensor",
                "run the backward first, or call fill_missing_gradients",
            )
        gradients.append(parameter.grad)
    # The same kernel as clip_grad_norm_ uses: on an accelerator it differs in the last bits from vector_norm.
    return [float(norm) for norm in torch._foreach_norm(gradients, 2.0)] if gradients else []


def total_norm(norms: Sequence[float], dtype: torch.dtype = torch.float32) -> float:
    """The norm of the whole gradient from all per-tensor norms in model order. May be inf or nan: then skip."""
    if not norms:
        return 0.0
    return float(torch.linalg.vector_norm(torch.tensor(norms, dtype=dtype), 2.0))


def clip_coefficient(norms: Sequence[float], max_norm: float | None, dtype: torch.dtype = torch.float32) -> float:
    """What every gradient is multiplied by: min(1, max_norm / (total + 1e-6)), reduced in one fixed order.

    `norms` are those of the whole model in parameter order, `dtype` the gradients' element type. On CPU the same bits
    as `torch.nn.utils.clip_grad_norm_` in one process, for any split. nan when a norm is nan, 0 when one is inf:
    look at `total_norm` first and skip the tick.
    """
    if max_norm is None or not norms:
        return 1.0
    total = torch.linalg.vector_norm(torch.tensor(norms, dtype=dtype), 2.0)
    return float(torch.clamp(float(max_norm) / (total + 1e-6), max=1.0))


@torch.no_grad()
def apply(optimizer: torch.optim.Optimizer, coefficient: float = 1.0, rate: float | None = None) -> None:
    """Scale the gradients, set the learning rate when given, step, and drop the gradients."""
    if not math.isfinite(coefficient):
        raise OptimizerError("clip coefficient", coefficient, "a finite number", "skip ticks with a non-finite norm")
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if coefficient != 1.0 and gradients:
        torch._foreach_mul_(gradients, coefficient)
    if rate is not None:
        for group in optimizer.param_groups:
            group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def export_state(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """AdamW's state as ({"exp_avg/NAME": tensor, "exp_avg_sq/NAME": tensor}, {NAME: steps taken}).

    `names` are those of the optimizer's parameters in order. Tensors are copies on the CPU, so the optimizer may step
    on while they are written. A parameter that never stepped is absent from the tensors and has 0 steps.
    """
    tensors: dict[str, Tensor] = {}
    steps: dict[str, int] = {}
    for name, parameter in _named(optimizer, names):
        state = optimizer.state.get(parameter, {})
        steps[name] = int(state["step"]) if state else 0
        for moment in MOMENTS if state else ():
            tensors[f"{moment}/{name}"] = state[moment].detach().to("cpu", copy=True).contiguous()
    return tensors, steps


def import_state(
    optimizer: torch.optim.Optimizer,
    names: Sequence[str],
    tensors: Mapping[str, Tensor],
    steps: Mapping[str, int],
) -> None:
    """Put an exported state back, bit for bit. Checks everything before it changes anything; raises OptimizerError."""
    pairs = _named(optimizer, names)
    wanted = {f"{moment}/{name}" for name in names if steps.get(name, 0) for moment in MOMENTS}
    off = sorted(wanted ^ set(tensors)) + sorted(set(steps) ^ set(names))
    if off:
        raise OptimizerError(
            "optimizer state",
            f"{len(off)} missing or unknown entries {off[:4]}",
            "exactly the names given",
            "load the state of this stage with this split",
        )
    for name, parameter in pairs:
        if isinstance(steps[name], bool) or not isinstance(steps[name], int) or steps[name] < 0:
            raise OptimizerError(f"steps of {name}", repr(steps[name]), "a whole number >= 0", "load another state")
        for moment in MOMENTS if steps[name] else ():
            saved = tensors[f"{moment}/{name}"]
            if saved.shape != parameter.shape or saved.dtype != parameter.dtype:
                raise OptimizerError(
                    f"{moment} of {name}",
                    f"{saved.dtype} {list(saved.shape)}",
                    f"{parameter.dtype} {list(parameter.shape)}",
                    "load the state of this model at this precision",
                )
    for name, parameter in pairs:
        optimizer.state.pop(parameter, None)
        if steps[name]:
            # The count as torch itself keeps it: a float tensor on the CPU.
            optimizer.state[parameter] = {
                "step": torch.tensor(float(steps[name]), dtype=torch.get_default_dtype()),
                **{m: tensors[f"{m}/{name}"].to(parameter.device, copy=True) for m in MOMENTS},
            }


def _named(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> list[tuple[str, nn.Parameter]]:
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if len(held) != len(names) or len(set(names)) != len(names):
        raise OptimizerError(
            "parameter names",
            f"{len(set(names))} distinct of {len(names)}",
            f"{len(held)}, one per parameter",
            "pass the names of hf_named_parameters()",
        )
    return list(zip(names, held, strict=True))


def _require(holds: bool, field: str, spec: OptimizerSpec, wanted: str) -> None:
    if not holds:
        raise OptimizerError(field, getattr(spec, field), wanted, "change the [optimizer] section")
