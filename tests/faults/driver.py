"""`rsllm` with faults in its workers: `python driver.py FAULTS VERB ...` with faults as JSON."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import faults
import ray

from rsllm.cli import main
from rsllm.cluster import WORKER_ENVIRONMENT

CLUSTER = "RSLLM_TEST_CLUSTER"
OF_ITS_OWN = {"num_cpus": 3, "include_dashboard": True, "dashboard_port": 0}

if __name__ == "__main__":
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    ray.init(
        address=os.environ.get(CLUSTER, "local"),
        logging_level="ERROR",
        runtime_env={
            "env_vars": {
                **WORKER_ENVIRONMENT,
                faults.ENVIRONMENT: sys.argv[1],
                "PYTHONPATH": os.pathsep.join(paths),
            },
            "worker_process_setup_hook": "faults.install",
        },
        **({} if CLUSTER in os.environ else OF_ITS_OWN),
    )
    sys.exit(main(sys.argv[2:]))
