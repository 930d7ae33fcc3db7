"""`rsllm` with faults in its workers: `python driver.py FAULTS VERB ...` with faults as JSON."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import faults
import ray

from rsllm.cli import main
from rsllm.cluster import WORKER_ENVIRONMENT

if __name__ == "__main__":
    here = str(Path(__file__).parent)
    ray.init(
        address=os.environ.get("RSLLM_TEST_CLUSTER", "local"),
        **({} if "RSLLM_TEST_CLUSTER" in os.environ else {"num_cpus": 3}),
        include_dashboard=False,
        logging_level="ERROR",
        runtime_env={
            "env_vars": {**WORKER_ENVIRONMENT, faults.ENVIRONMENT: sys.argv[1], "PYTHONPATH": here},
            "worker_process_setup_hook": "faults.install",
        },
    )
    sys.exit(main(sys.argv[2:]))
