"""A table of trials in the terminal, printed whenever one reports."""

from __future__ import annotations

import time
from typing import Any

from ray import tune
from tabulate import tabulate

from rsllm.config import Experiment


class TrialTable(tune.Callback):  # type: ignore[misc]
    """Prints every trial's tuned values, state, samples and score as the search goes."""

    def __init__(self, metric: str, total: int) -> None:
        self.metric, self.total = metric, total
        self.rows: dict[str, dict[str, Any]] = {}
        self.start = time.monotonic()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial begins."""
        self._update(trial, "running")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial validated."""
        self._update(trial, "running", result)
        self._print()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial ended, by itself or stopped early."""
        self._update(trial, "done", trial.last_result)
        self._print()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial failed."""
        self._update(trial, "failed")
        self._print()

    def _update(self, trial: Any, state: str, result: dict[str, Any] | None = None) -> None:
        row = self.rows.setdefault(trial.trial_id, {"trial": len(self.rows), **shown(trial.config)})
        row["state"] = state
        found = result or {}
        row |= {name: found[name] for name in ("samples", self.metric, "HR@1") if name in found}

    def _print(self) -> None:
        best = max((row.get(self.metric, 0.0) for row in self.rows.values()), default=0.0)
        done = sum(row["state"] != "running" for row in self.rows.values())
        print(
            f"\n{done} of {self.total} trials done, best {self.metric} {best:.3f}, "
            f"{(time.monotonic() - self.start) / 60:.1f} min\n"
            + tabulate(list(self.rows.values()), headers="keys", floatfmt=".3g"),
            flush=True,
        )


def shown(config: dict[str, Any]) -> dict[str, Any]:
    """The tuned values by the last part of their path."""
    return {path.rsplit(".", 1)[-1]: value for path, value in overrides(config).items()}


def overrides(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a trial's values that are paths into `Experiment`."""
    roots = set(Experiment.__dataclass_fields__)
    return {path: value for path, value in config.items() if path.split(".")[0] in roots}
