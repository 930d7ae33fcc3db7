"""The paper's data sets, and what may be spent on them."""

import tomllib
from pathlib import Path
from typing import Any

from rsllm.config import Experiment
from rsllm.config.plain import replace_in
from rsllm.flags import Budget

TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
SOURCES: dict[str, dict[str, Any]] = TABLE["sources"]
LABELS: dict[str, str] = TABLE["labels"]
BUDGETS = {name: Budget(**budget) for name, budget in TABLE["budgets"].items()}
USUAL = dict.fromkeys(("quick", "tiny", "hour", "evening"), ("movielens-100k",))
"""By budget, the data sets without --data; all of them where nothing is said."""
DATA: dict[str, dict[str, Any]] = {
    **{name: {"data.source": name, **settings} for name, settings in SOURCES.items()},
    **{
        f"{name}, all users": {"data.source": name, "data.split": "leave-one-out"}
        for name in ("movielens-100k", "llara-lastfm")
    },
}
"""The published splits, and for power the last item of every user: MovieLens' 943, and of LLaRA's
LastFM the 976 sequences put together again and the 244 windows held out."""
OWN_TABLES: dict[str, dict[str, Any]] = {
    name: {
        "data.source": name,
        "data.split": "leave-one-out",
        "data.min_history": 1,
        "data.table.domain": domain,
    }
    for name, domain in {"toys": "item", "steam": "game"}.items()
}
"""Data that are at hand only where somebody may have them: left out elsewhere."""
BASE = replace_in(Experiment(), {"stage2.validations": 4})
RANKED = {"stage2.loss.gamma": 3.0, "stage2.loss.scorer": "pointer"}
"""Our ranking loss; without it gamma is 0, as published."""
NO_CONTRASTS = {"stage2.loss.alpha": 0.0, "stage2.loss.beta": 0.0}
