"""Divides the machine: workers, threads, precision and concurrent trials."""

from dataclasses import dataclass
from typing import Literal

from rsllm.config import ComputeConfig
from rsllm.errors import ConfigError

DRIVER_CPUS = 0.05
"""The CPU share of a trial's driver, which only waits."""
TRAINING_SHARE = 0.45
"""Share of the CPUs that training reserves; what encodes its batches takes half as much again, and
the rest keeps Ray Data from waiting for ever."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """The CPUs and GPUs of the nodes that train."""

    cpus: float
    gpus: float
    nodes: int = 1
    bf16: bool = False
    """Whether the CPUs multiply bf16 in hardware (AVX-512-BF16 or AMX)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The share of the machine that one training run takes, and how many run side by side."""

    workers: int
    cpus_per_worker: float
    use_gpu: bool
    threads: int
    """Torch threads per CPU worker."""
    precision: Literal["fp32", "bf16"]
    concurrent_trials: int

    @property
    def encoder_cpus(self) -> float:
        """CPU share of the process that encodes a worker's batches."""
        return min(1.0, self.cpus_per_worker / 2)


def lay_out(compute: ComputeConfig, resources: Resources) -> Layout:
    """Fit a training run to the cluster: GPUs if there are any, else one trial per node.

    Raises:
        ConfigError: more workers, or nodes for them, than the cluster can ever give, or ZeRO 0
            with a bf16 engine.
    """
    use_gpu = resources.gpus >= 1
    slots = int(resources.gpus if use_gpu else resources.cpus)
    workers = compute.workers or 1
    if workers > slots:
        raise ConfigError(
            f"compute.workers is {workers}, but the cluster has {slots}"
            f" {'GPUs' if use_gpu else 'CPU cores'}; lower it"
        )
    if compute.placement == "spread" and workers > resources.nodes:
        raise ConfigError(
            f"compute.placement is spread, a node for each of {workers} workers, but there are"
            f" {resources.nodes}; lower compute.workers or choose pack"
        )
    precision = compute.precision
    if precision == "auto":
        precision = "bf16" if use_gpu or resources.bf16 else "fp32"
    if use_gpu and precision == "bf16" and compute.zero_stage == 0:
        raise ConfigError(
            "compute.zero_stage 0 with DeepSpeed's bf16 trains to other numbers than stages 1 to 3;"
            " use stage 1, 2 or 3, or compute.precision fp32"
        )
    if use_gpu:
        concurrent, threads = int(resources.gpus) // workers, 0
        cpus = min(8.0, _cpus(TRAINING_SHARE * resources.cpus / resources.gpus))
    else:
        cores = resources.cpus / resources.nodes
        side_by_side = int(cores) // compute.threads if compute.threads else 1
        concurrent = max(1, resources.nodes * max(1, side_by_side) // workers)
        per_node = -(-workers * concurrent // resources.nodes)
        threads = compute.threads or max(1, int(cores) // per_node)
        cpus = _cpus(TRAINING_SHARE * cores / per_node)
    return Layout(
        workers=workers,
        cpus_per_worker=cpus,
        use_gpu=use_gpu,
        threads=threads,
        precision=precision,
        concurrent_trials=concurrent,
    )


def _cpus(share: float) -> float:
    """The share as Ray can reserve it: less than one CPU, or whole ones."""
    return share if share < 1 else float(int(share))


def cpu_has_bf16() -> bool:
    """Whether this machine's CPU multiplies bf16 in hardware."""
    import torch

    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
