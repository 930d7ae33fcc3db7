"""LLM sequential recommendation with items as a language of their own, on Ray.

The pipeline, each arrow a function from artifacts to an artifact on disk:

    raw interactions  -> prepare  -> sequences in Parquet shards       (rsllm.data)
    sequences         -> fit      -> a recommender, its item embeddings (rsllm.recommenders)
    titles, items     -> keys     -> what ranks the catalogue by itself (rsllm.train.keys)
    titles, items     -> prompts  -> token ids with item slots          (rsllm.prompts)
    prompts, items    -> train    -> projector and LoRA, in two stages  (rsllm.model, rsllm.train)
    tuned model       -> evaluate -> rankings, intervals, paired tests  (rsllm.evaluate)
    a search space    -> tune     -> the best of many such runs         (rsllm.study)
    a paper's grid    -> cells    -> its tables, figures and verdicts   (rsllm.study)
    all of these      -> report   -> tables, pictures and pages         (rsllm.report)
    a trained model   -> load     -> lists of items for users           (rsllm.recommend)

`Experiment` says everything a run depends on; `Pipeline` runs it, computing nothing twice.
"""

from typing import TYPE_CHECKING, Any

from rsllm.assets.catalogue import fetch
from rsllm.config import Experiment
from rsllm.config.plain import replace_in
from rsllm.errors import RsllmError
from rsllm.pipeline import Pipeline

if TYPE_CHECKING:
    from rsllm.recommend.load import load

__all__ = ["Experiment", "Pipeline", "RsllmError", "fetch", "load", "replace_in"]


def __getattr__(name: str) -> Any:
    """`load`, which most that import rsllm do not need."""
    if name == "load":
        from rsllm.recommend.load import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__version__ = "0.1.0"
