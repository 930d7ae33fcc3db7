"""DeepSpeed ZeRO 0-3 on GPUs or CPUs: the only place that knows DeepSpeed."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from torch import Tensor, nn

from rsllm.config import Offload
from rsllm.errors import TrainingError
from rsllm.train import zero

BUCKET_ELEMENTS = 20_000_000
"""Elements per communication bucket; DeepSpeed's default allocates 2 GB per bucket."""


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Parameters that share a peak learning rate; frozen ones are only handed through."""

    parameters: list[nn.Parameter]
    learning_rate: float
    weight_decay: float = 0.0
    rests: Callable[[int], bool] = lambda step: False
    """Whether a step tells it nothing: it stands still then. A pure function, for resuming."""


class RestingAdamW(torch.optim.AdamW):
    """AdamW that leaves a group whose rate is 0 as it is, with its moments.

    Gradients of zeros would move it on by its momentum, and ZeRO knows no others.
    """

    def step(self, closure: Any = None) -> Any:
        """Step the groups that do not rest."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if group["lr"]]
        super().step(closure)
        self.param_groups = groups


ZERO_SUPPORTED_OPTIMIZERS.append(RestingAdamW)  # known by its exact class, or refused


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimization:
    """How an objective is optimized."""

    groups: Sequence[ParameterGroup]
    schedule: Callable[[int], float]
    """Step -> factor on the peak learning rates; a pure function, so resuming needs no state."""
    micro_batch: int
    """Rows per forward pass and worker."""
    accumulation: int = 1
    max_gradient_norm: float = 0.0
    """0 turns clipping off."""
    look_ahead: Callable[[Sequence[Any]], Sequence[Any]] = list
    """Micro-batches of a step -> what the objective is called with (gradient caching)."""


def warmup_then_cosine(steps: int, warmup: int, floor: float = 0.1) -> Callable[[int], float]:
    """Linear warm-up, then a cosine down to `floor` of the peak at the last step."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        share = (step - warmup) / max(1, steps - warmup)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))

    return factor


class Engine:
    """An objective under ZeRO: `step` it, take and set its `state`, take its `trainable` tensors.

    The objective maps a batch to (loss, parts); torch.distributed must be initialised.
    """

    def __init__(
        self,
        objective: nn.Module,
        optimization: Optimization,
        *,
        zero_stage: int,
        bf16: bool,
        offload: Offload = "none",
    ) -> None:
        if get_accelerator().device_name() == "cpu":
            # The shared-memory op serves inference only, and compiling it takes a minute.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.optimization = optimization
        self._exported = {id(p) for group in optimization.groups for p in group.parameters}
        self._learning = [
            g for g in optimization.groups if any(p.requires_grad for p in g.parameters)
        ]
        groups = [
            {"params": g.parameters, "lr": g.learning_rate, "weight_decay": g.weight_decay}
            for g in self._learning
        ]
        self._engine, *_ = deepspeed.initialize(
            model=objective,
            optimizer=RestingAdamW(groups),
            config=_deepspeed_config(optimization, zero_stage, bf16, offload),
            dist_init_required=False,
        )
        zero.make_moments(self._engine)

    @property
    def objective(self) -> nn.Module:
        """The objective inside the engine; every rank must call it under ZeRO 3."""
        return cast(nn.Module, self._engine.module)

    @property
    def device(self) -> torch.device:
        """Where batches belong."""
        return torch.device(self._engine.device)

    def step(self, batches: Sequence[Any], step: int) -> dict[str, float]:
        """One optimizer step over this worker's micro-batches.

        Returns:
            The objective's parts, averaged over micro-batches and workers.

        Raises:
            TrainingError: a loss that is not finite on any worker; no weight has changed then.
        """
        self._engine.train()
        groups = zip(self._engine.optimizer.param_groups, self._learning, strict=True)
        for live, group in groups:
            rate = 0.0 if group.rests(step) else group.learning_rate
            live["lr"] = rate * self.optimization.schedule(step)
        sums: dict[str, Tensor] = {}
        for batch in self.optimization.look_ahead([b.to(self.device) for b in batches]):
            loss, parts = self._engine(batch)
            bad_W = torch.zeros(dist.get_world_size(), device=loss.device)
            bad_W[dist.get_rank()] = ~torch.isfinite(loss.detach())
            if workers := _sum(bad_W).nonzero().flatten().tolist():
                raise TrainingError(
                    f"the loss of step {step} is not finite on worker"
                    f" {', '.join(map(str, workers))}; lower the learning rates or raise"
                    " loss.temperature"
                )
            self._engine.backward(loss)
            self._engine.step()
            sums = {name: sums.get(name, 0) + part for name, part in parts.items()}
        total = _sum(torch.stack([value.detach().float() for value in sums.values()]))
        means = total / (len(batches) * dist.get_world_size())
        return dict(zip(sums, means.tolist(), strict=True))

    def agree(self, rank0: bool, any_rank: bool) -> tuple[bool, bool]:
        """Tell all ranks what rank 0 answers, and whether any rank says yes."""
        own = torch.tensor([rank0 and dist.get_rank() == 0, any_rank], device=self.device)
        first, second = _sum(own.float()).tolist()
        return bool(first), bool(second)

    def trainable(self) -> dict[str, Tensor]:
        """The tensors of all groups, gathered, fp32 on the CPU. Every rank must call it."""
        return {name: zero.weight(self._engine, p) for name, p in self._named().items()}

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of weights and moments; see `rsllm.train.zero`."""
        return zero.gather(self._engine, self._named())

    def load_state(self, tensor: Callable[[str], Tensor], steps: int) -> None:
        """Go on from the `state` after so many steps; `tensor` finds each by its name."""
        stepped = [sum(not group.rests(s) for s in range(steps)) for group in self._learning]
        zero.scatter(self._engine, self._named(), tensor, stepped)

    def _named(self) -> dict[str, nn.Parameter]:
        named = self.objective.named_parameters()
        return {name: p for name, p in named if id(p) in self._exported}


def _sum(value: Tensor) -> Tensor:
    """Sum over the workers; one alone is spared the call, which costs a small model a tenth."""
    if dist.get_world_size() > 1:
        dist.all_reduce(value)
    return value


def _deepspeed_config(
    optimization: Optimization, zero_stage: int, bf16: bool, offload: Offload
) -> dict[str, Any]:
    world = dist.get_world_size()
    to_cpu = {"none": [], "optimizer": ["optimizer"], "parameters": ["optimizer", "param"]}
    return {
        "train_micro_batch_size_per_gpu": optimization.micro_batch,
        "gradient_accumulation_steps": optimization.accumulation,
        "train_batch_size": optimization.micro_batch * optimization.accumulation * world,
        "gradient_clipping": optimization.max_gradient_norm,
        "bf16": {"enabled": bf16},
        "zero_optimization": {
            "stage": zero_stage,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
            "stage3_prefetch_bucket_size": BUCKET_ELEMENTS,
            **{f"offload_{part}": {"device": "cpu"} for part in to_cpu[offload]},
        },
        # DeepSpeed's own CPU Adam is compiled on first use and steps to slightly other numbers.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
    }
