"""Weights and AdamW moments of a DeepSpeed engine as whole tensors, however ZeRO shards them.

So a checkpoint is the same for every number of workers, ZeRO stage and offload, and holds no
pickle. Every rank must make each call, for the same parameters in the same order.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from deepspeed import DeepSpeedEngine, utils
from deepspeed.runtime.zero import GatheredParameters
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


def gather(
    engine: DeepSpeedEngine, parameters: Mapping[str, nn.Parameter]
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of weights and moments, in fp32; each may be dropped before the next."""
    stepped = any(_adam(engine).state.values())
    if stepped:
        _link_moments(engine)
    for name, parameter in parameters.items():
        yield f"weight/{name}", weight(engine, parameter)
        for moment in MOMENTS if stepped and parameter.requires_grad else ():
            yield f"{moment}/{name}", _moment(engine, parameter, moment)


def scatter(
    engine: DeepSpeedEngine,
    parameters: Mapping[str, nn.Parameter],
    tensor: Callable[[str], Tensor],
    steps: int,
) -> None:
    """Take over what `gather` gave after so many steps; `tensor` finds each by its name."""
    if steps:
        _make_moments(engine, steps)
    for name, parameter in parameters.items():
        _set_weight(engine, parameter, tensor(f"weight/{name}"))
        for moment in MOMENTS if steps and parameter.requires_grad else ():
            value = tensor(f"{moment}/{name}").to(engine.device)
            if engine.zero_optimization_stage():
                utils.safe_set_full_optimizer_state(parameter, value, moment)
            else:
                _adam(engine).state[parameter][moment].copy_(value)


def _adam(engine: DeepSpeedEngine) -> Any:
    stage = engine.zero_optimization_stage()
    return engine.optimizer.optimizer if stage else engine.optimizer


def _stepped_tensors(engine: DeepSpeedEngine) -> list[Tensor]:
    """What AdamW steps: the parameters, or this rank's flat fp32 partitions of them."""
    stage = engine.zero_optimization_stage()
    if not stage:
        return [p for group in engine.optimizer.param_groups for p in group["params"]]
    name = "fp32_partitioned_groups_flat" if stage == 3 else "single_partition_of_fp32_groups"
    return list(getattr(engine.optimizer, name))


def _make_moments(engine: DeepSpeedEngine, steps: int) -> None:
    """As after so many steps, but zero; DeepSpeed makes them at the first step."""
    for stepped in _stepped_tensors(engine):
        zeros = {moment: torch.zeros_like(stepped) for moment in MOMENTS}
        _adam(engine).state[stepped] = {"step": torch.tensor(float(steps)), **zeros}
    _link_moments(engine)


def _link_moments(engine: DeepSpeedEngine) -> None:
    """Let parameters find their part of the flat moments; DeepSpeed links the first group only."""
    if engine.zero_optimization_stage() not in (1, 2):
        return
    optimizer, state = engine.optimizer, _adam(engine).state
    for group, flat in zip(optimizer.bit16_groups, _stepped_tensors(engine), strict=True):
        utils.lazy_init_hp_params_optimizer_state(group, flat, state)


def weight(engine: DeepSpeedEngine, parameter: nn.Parameter) -> Tensor:
    """A whole parameter in fp32 on the CPU."""
    if engine.zero_optimization_stage() and parameter.requires_grad:
        return cast(Tensor, utils.safe_get_full_fp32_param(parameter)).detach().cpu()
    with GatheredParameters([parameter], modifier_rank=None):
        return parameter.detach().float().cpu().clone()


def _moment(engine: DeepSpeedEngine, parameter: nn.Parameter, moment: str) -> Tensor:
    if engine.zero_optimization_stage():
        value: Tensor = utils.safe_get_full_optimizer_state(parameter, moment)
    else:
        value = _adam(engine).state[parameter].get(moment, torch.zeros_like(parameter))
    return value.detach().cpu()


def _set_weight(engine: DeepSpeedEngine, parameter: nn.Parameter, value: Tensor) -> None:
    with GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(value)
    if engine.zero_optimization_stage() and parameter.requires_grad:
        utils.safe_set_full_fp32_param(parameter, value.to(engine.device))
