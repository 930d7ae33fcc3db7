"""`rsllm` with faults in its workers: `python driver.py FAULTS VERB ...` with faults as JSON."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import faults
import ray

from rsllm.cli import main
from rsllm.compute.start import WORKER_ENVIRONMENT, _free_port

CLUSTER = "RSLLM_TEST_CLUSTER"
OF_ITS_OWN = {"num_cpus": 3, "include_dashboard": True, "dashboard_port": 0}


def started_here() -> dict[str, Any]:
    """For a Ray of its own, whose workers ask its dashboard and no other's."""
    port = _free_port()
    os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
    return {**OF_ITS_OWN, "dashboard_port": port}


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
        **({} if CLUSTER in os.environ else started_here()),
    )
    sys.exit(main(sys.argv[2:]))
