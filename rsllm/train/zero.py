"""Weights and AdamW moments of a DeepSpeed engine as whole tensors, however ZeRO shards them.

So a checkpoint is the same for every number of workers, ZeRO stage and offload, and holds no
pickle. Every rank must make each call, for the same parameters in the same order.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
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
    for name, parameter in parameters.items():
        yield f"weight/{name}", weight(engine, parameter)
        for moment in MOMENTS if parameter.requires_grad else ():
            yield f"{moment}/{name}", _moment(engine, parameter, moment)


def scatter(
    engine: DeepSpeedEngine,
    parameters: Mapping[str, nn.Parameter],
    tensor: Callable[[str], Tensor],
    steps: Sequence[int],
) -> None:
    """Take over what `gather` gave after so many steps of each group, by names for `tensor`."""
    for stepped, group in _stepped_tensors(engine):
        _adam(engine).state[stepped]["step"].fill_(steps[group])
    for name, parameter in parameters.items():
        value = tensor(f"weight/{name}")
        with GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)
        if engine.zero_optimization_stage() and parameter.requires_grad:
            utils.safe_set_full_fp32_param(parameter, value.to(engine.device))
        for moment in MOMENTS if parameter.requires_grad else ():
            value = tensor(f"{moment}/{name}").to(engine.device)
            if engine.zero_optimization_stage():
                utils.safe_set_full_optimizer_state(parameter, value, moment)
            else:
                _adam(engine).state[parameter][moment].copy_(value)


def _adam(engine: DeepSpeedEngine) -> Any:
    stage = engine.zero_optimization_stage()
    return engine.optimizer.optimizer if stage else engine.optimizer


def _stepped_tensors(engine: DeepSpeedEngine) -> list[tuple[Tensor, int]]:
    """What AdamW steps, the parameters or this rank's flat fp32 partitions, each with its group."""
    if engine.zero_optimization_stage() == 3:
        flat = engine.optimizer.fp32_partitioned_groups_flat
        return [(part, engine.optimizer.sub_group_to_group_id[i]) for i, part in enumerate(flat)]
    groups = _adam(engine).param_groups
    return [(part, i) for i, group in enumerate(groups) for part in group["params"]]


def make_moments(engine: DeepSpeedEngine) -> None:
    """As AdamW would at a parameter's first step, so that one that has yet to step has them too."""
    optimizer, state = engine.optimizer, _adam(engine).state
    for stepped, _ in _stepped_tensors(engine):
        zeros = {moment: torch.zeros_like(stepped) for moment in MOMENTS}
        state[stepped] = {"step": torch.tensor(0.0), **zeros}
    if engine.zero_optimization_stage() in (1, 2):  # parameters find their part of the flat ones
        for group, (flat, _) in zip(optimizer.bit16_groups, _stepped_tensors(engine), strict=True):
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
        value = _adam(engine).state[parameter][moment]
    return value.detach().cpu()
