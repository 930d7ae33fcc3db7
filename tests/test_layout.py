"""Layouts of a training run on machines of every shape, and what is refused."""

from __future__ import annotations

import pytest

from rsllm.compute.layout import Layout, Resources, lay_out
from rsllm.config import ComputeConfig
from rsllm.errors import ConfigError

MACHINES = {
    "one core": (
        Resources(cpus=1, gpus=0),
        ComputeConfig(),
        Layout(
            workers=1,
            cpus_per_worker=0.45,
            use_gpu=False,
            threads=1,
            precision="fp32",
            concurrent_trials=1,
        ),
    ),
    "two cores, two workers": (
        Resources(cpus=2, gpus=0),
        ComputeConfig(workers=2),
        Layout(
            workers=2,
            cpus_per_worker=0.45,
            use_gpu=False,
            threads=1,
            precision="fp32",
            concurrent_trials=1,
        ),
    ),
    "two cores, one thread": (
        Resources(cpus=2, gpus=0),
        ComputeConfig(threads=1),
        Layout(
            workers=1,
            cpus_per_worker=0.45,
            use_gpu=False,
            threads=1,
            precision="fp32",
            concurrent_trials=2,
        ),
    ),
    "16 cores with bf16": (
        Resources(cpus=16, gpus=0, bf16=True),
        ComputeConfig(),
        Layout(
            workers=1,
            cpus_per_worker=7.0,
            use_gpu=False,
            threads=16,
            precision="bf16",
            concurrent_trials=1,
        ),
    ),
    "16 cores, three workers, threads given": (
        Resources(cpus=16, gpus=0, bf16=True),
        ComputeConfig(workers=3, threads=4, precision="fp32", zero_stage=0),
        Layout(
            workers=3,
            cpus_per_worker=2.0,
            use_gpu=False,
            threads=4,
            precision="fp32",
            concurrent_trials=1,
        ),
    ),
    "four nodes of 8 cores": (
        Resources(cpus=32, gpus=0, nodes=4),
        ComputeConfig(),
        Layout(
            workers=1,
            cpus_per_worker=3.0,
            use_gpu=False,
            threads=8,
            precision="fp32",
            concurrent_trials=4,
        ),
    ),
    "four nodes of 8 cores, two workers": (
        Resources(cpus=32, gpus=0, nodes=4),
        ComputeConfig(workers=2),
        Layout(
            workers=2,
            cpus_per_worker=3.0,
            use_gpu=False,
            threads=8,
            precision="fp32",
            concurrent_trials=2,
        ),
    ),
    "four nodes of 8 cores, two threads": (
        Resources(cpus=32, gpus=0, nodes=4),
        ComputeConfig(threads=2),
        Layout(
            workers=1,
            cpus_per_worker=0.9,
            use_gpu=False,
            threads=2,
            precision="fp32",
            concurrent_trials=16,
        ),
    ),
    "one GPU": (
        Resources(cpus=16, gpus=1),
        ComputeConfig(),
        Layout(
            workers=1,
            cpus_per_worker=7.0,
            use_gpu=True,
            threads=0,
            precision="bf16",
            concurrent_trials=1,
        ),
    ),
    "one GPU, few cores": (
        Resources(cpus=2, gpus=1),
        ComputeConfig(zero_stage=0, precision="fp32"),
        Layout(
            workers=1,
            cpus_per_worker=0.9,
            use_gpu=True,
            threads=0,
            precision="fp32",
            concurrent_trials=1,
        ),
    ),
    "two nodes of four GPUs": (
        Resources(cpus=256, gpus=8, nodes=2),
        ComputeConfig(workers=2),
        Layout(
            workers=2,
            cpus_per_worker=8.0,
            use_gpu=True,
            threads=0,
            precision="bf16",
            concurrent_trials=4,
        ),
    ),
}


@pytest.mark.parametrize(("resources", "compute", "expected"), MACHINES.values(), ids=MACHINES)
def test_layout(resources: Resources, compute: ComputeConfig, expected: Layout) -> None:
    layout = lay_out(compute, resources)
    assert layout == expected
    reserved = layout.concurrent_trials * layout.workers * layout.cpus_per_worker
    assert reserved <= resources.cpus / 2, "Ray Data and the drivers have room"


@pytest.mark.parametrize(
    ("resources", "compute", "message"),
    [
        (Resources(cpus=2, gpus=0), ComputeConfig(workers=3), r"is 3, .* 2 CPU cores; lower it"),
        (Resources(cpus=16, gpus=2), ComputeConfig(workers=4), r"is 4, .* 2 GPUs; lower it"),
        (
            Resources(cpus=16, gpus=4, nodes=1),
            ComputeConfig(workers=2, placement="spread"),
            r"a node for each of 2 workers, but there are 1; lower compute.workers or choose pack",
        ),
        (
            Resources(cpus=16, gpus=1),
            ComputeConfig(zero_stage=0),
            r"zero_stage 0 .* use stage 1, 2 or 3, or compute.precision fp32",
        ),
    ],
)
def test_refusals(resources: Resources, compute: ComputeConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lay_out(compute, resources)
