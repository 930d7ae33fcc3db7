"""The endpoint on Ray Serve: `rsllm serve` on one machine, `build` on a cluster."""
