"""Does RSLLM beat traditional recommenders and language-model baselines? The paper's main table.

Trains every method on every data set at equal samples, and gives each claim of the paper a
verdict, under its own losses (gamma = 0) and with our ranking loss, and says whether a gain is as
large as the published one. Published figures stand in columns of their own. A cell that is on file
is not trained again; a run that was stopped goes on by the same command.

    python experiments/reproduce_main_table.py                              # MovieLens-100K
    python experiments/reproduce_main_table.py --budget hour --only SASRec --only "RSLLM (SASRec)"
    python experiments/reproduce_main_table.py --data "movielens-100k, all users" --seeds 3
    python experiments/reproduce_main_table.py --budget hour --render   # what is on file
    ray submit cluster/gpu.yaml experiments/reproduce_main_table.py -- --budget full

LLaRA's LastFM is in one global order of items: its figures say nothing about sequences and stand
beside the rule that knows that order. Only a sample of LLaRA's Steam training rows is at hand.

Cost: 16 tuned methods a data set, see --help. Expected: not known. Last measured: ten methods
on MovieLens, of several seeds where a seed matters, see experiments/results/reproduce_main_table/;
a longer schedule, all 943 users, LastFM and Steam, of one seed, in folders there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rsllm.cli import run_script
from rsllm.config import Experiment
from rsllm.config.models import recommender_titles
from rsllm.study.claims import Claim
from rsllm.study.grid import Grid, run
from rsllm.study.paper import BASE, NO_CONTRASTS, RANKED, SOURCES
from rsllm.study.results import Entry

MODELS = recommender_titles()
OURS = " + ranking"
LOSSES: dict[str, dict[str, Any]] = {"": {"stage2.loss.gamma": 0.0}, OURS: RANKED}
"""The paper's, and with our ranking loss."""


def entries(base: Experiment) -> list[Entry]:
    """The lines of the table; what has one stage sees the samples of both."""
    one_stage = {"stage1.samples": 0, "stage2.samples": base.stage1.samples + base.stage2.samples}
    plain = {**NO_CONTRASTS, **one_stage}
    llara = {**plain, "stage2.representation": "llara", "stage2.curriculum": True}
    found = [
        Entry(name="popularity", kind="popularity"),
        Entry(name="order rule", kind="order-rule"),
        *(traditional(name, {"recommender.model": model}) for name, model in MODELS.items()),
        traditional("MoRec-like", {"recommender.items": "title"}),
        Entry(name="zero-shot", kind="zero-shot"),
    ]
    for suffix, loss in LOSSES.items():
        text = {**plain, "stage2.representation": "text", **loss}
        found.append(Entry(name=f"text only{suffix}", settings=text))
        for kind, settings in {"LLaRA-like": llara, "RSLLM": {}}.items():
            for name, model in MODELS.items():
                full = {**settings, **loss, "recommender.model": model}
                found.append(Entry(name=f"{kind} ({name}){suffix}", settings=full))
        bare = {**NO_CONTRASTS, **loss, "recommender.model": "sasrec"}
        found.append(Entry(name=f"RSLLM (SASRec), no contrasts{suffix}", settings=bare))
    return found


def traditional(name: str, settings: Mapping[str, Any]) -> Entry:
    """A recommender by itself."""
    return Entry(name=name, kind="recommender", settings=settings)


def by_data(figures: Mapping[str, tuple[float, ...]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Rows of ValidRatio and HitRatio@1 on MovieLens, Steam, LastFM -> data set, entry, metric."""
    columns = {"movielens-100k": 0, "llara-steam-sample": 2, "llara-lastfm": 4}
    return {
        source: {
            entry: {"HitRatio@1": row[at + 1], "ValidRatio": row[at]}
            for entry, row in figures.items()
        }
        for source, at in columns.items()
    }


LLARA = by_data(
    {
        "GRU4Rec": (1.0, 0.3750, 1.0, 0.4168, 1.0, 0.2616),
        "Caser": (1.0, 0.3861, 1.0, 0.4368, 1.0, 0.2233),
        "SASRec": (1.0, 0.3444, 1.0, 0.4010, 1.0, 0.2233),
        "zero-shot": (0.4421, 0.0421, 0.1653, 0.0135, 0.3443, 0.0246),
        "GPT-4": (0.9895, 0.2000, 0.9798, 0.3626, 1.0, 0.3770),
        "MoRec-like": (1.0, 0.2822, 1.0, 0.3911, 1.0, 0.1652),
        "text only": (0.9263, 0.3895, 0.9840, 0.4637, 0.9836, 0.4180),
        "LLaRA-like (GRU4Rec)": (0.9684, 0.4421, 0.9975, 0.4924, 0.9836, 0.4344),
        "LLaRA-like (Caser)": (0.9684, 0.4737, 0.9966, 0.4874, 0.9918, 0.4344),
        "LLaRA-like (SASRec)": (0.9684, 0.4421, 0.9975, 0.4949, 1.0, 0.4508),
    }
)
"""LLaRA (arXiv 2312.02445v4), Table 2: Llama2-7B, untuned as zero-shot; TALLRec as text only."""
CORRECTED = by_data(
    {
        "LLaRA-like (GRU4Rec)": (0.9684, 0.4000, 0.9840, 0.4916, 0.9672, 0.4918),
        "LLaRA-like (Caser)": (0.9684, 0.4211, 0.9519, 0.4621, 0.9754, 0.4836),
        "LLaRA-like (SASRec)": (0.9789, 0.4526, 0.9958, 0.5051, 0.9754, 0.5246),
    }
)
"""The same in its README of July 2024, after corrections of its code."""
VALID_RATIO = 0.969
RSLLM = {
    source: {
        f"RSLLM ({name})": {"HitRatio@1": "unknown", "ValidRatio": f"> {VALID_RATIO}"}
        for name in ("GRU4Rec", "Caser", "SASRec")
    }
    for source in SOURCES
}
"""RSLLM (arXiv 2412.16933): of its figures only a bound on the ratio of valid answers is known."""


def gains(first: str, second: str) -> dict[str, float]:
    """By data source, how far `first` is published above `second`, where both are."""
    hits = {
        source: [found[name]["HitRatio@1"] for name in (first, second)]
        for source, found in LLARA.items()
        if found.keys() >= {first, second}
    }
    return {source: round(one - other, 4) for source, (one, other) in hits.items()}


def claims() -> list[Claim]:
    """The paper's, under its losses and with ours.

    With our ranking loss it is another method. How far RSLLM was above others is unknown. It claims
    to beat LLaRA, so LLaRA's published gain over the same baseline is the least that its claims
    amount to.
    """
    found = []
    for suffix in LOSSES:
        best, like = f"RSLLM (SASRec){suffix}", "LLaRA-like (SASRec)"
        for name in MODELS:
            ours, llara = f"RSLLM ({name})", f"LLaRA-like ({name})"
            found += [
                Claim(
                    text=f"RSLLM beats {name}",
                    first=ours + suffix,
                    second=name,
                    gains=gains(llara, name),
                ),
                Claim(text="RSLLM beats LLaRA", first=ours + suffix, second=llara + suffix),
                Claim(text="answers are valid", first=ours + suffix, above=VALID_RATIO),
            ]
        for text, second in {
            "RSLLM beats the untuned language model": "zero-shot",
            "RSLLM beats text-only tuning": "text only",
        }.items():
            other = second if second == "zero-shot" else second + suffix
            found.append(Claim(text=text, first=best, second=other, gains=gains(like, second)))
        bare = f"RSLLM (SASRec), no contrasts{suffix}"
        alone = "RSLLM without contrasts beats SASRec"
        found += [
            Claim(text=alone, first=bare, second="SASRec", gains=gains(like, "SASRec")),
            Claim(text="the contrasts help", first=best, second=bare),
            Claim(text="slots beat text-only tuning", first=bare, second=f"text only{suffix}"),
            Claim(text="RSLLM without contrasts beats LLaRA", first=bare, second=like + suffix),
        ]
    return found


GRID = Grid(
    title="Reproduce the main table",
    question="Does RSLLM beat traditional recommenders and language-model baselines?",
    base=BASE,
    entries=entries,
    claims=claims(),
    published={"LLaRA, Table 2": LLARA, "LLaRA, README": CORRECTED, "RSLLM": RSLLM},
    notes=[
        "All tuned methods see the same number of samples; recommenders see every training row, for"
        " several epochs. gamma is 0 as published, and candidates are ranked by the likelihood of"
        " their titles; + ranking adds our ranking loss and ranks by the pointer: another method.",
        "order rule: one order of all items, that in which histories have them, and nothing of the"
        " user. MoRec-like: SASRec over the language model's vectors of titles. text only: titles"
        " without slots. LLaRA-like: LLaRA's prompt and curriculum in this code, which shows slots"
        " in about half of its samples, where RSLLM does in all of stage 2. Both have one stage,"
        " with the samples of two, and no contrasts: RSLLM without contrasts (in stage 2; stage 1"
        " has them) is nearer to them, and still has a stage of text first. It was set apart as a"
        " claim after a first look at one seed on these users.",
        "Order artefact: LLaRA's LastFM stands in one order of items, the order rule's, so that"
        " scores say nothing about sequences there. Its files and Steam's come by rsllm fetch."
        " evaluation.test_rows = 0 judges all users.",
        "Published figures are of Llama2-7B, other candidate draws and, beside all users, of other"
        " users; those on Steam saw all of its training rows. RSLLM's HitRatio@1 is not known.",
        "A published gain is that of LLaRA over the same baseline, the least that RSLLM, which"
        " claims to beat LLaRA, amounts to. It is of Table 2; LLaRA's README has since"
        " corrected its own figures, on MovieLens with SASRec from 0.4421 to 0.4526.",
    ],
)


if __name__ == "__main__":
    run_script(lambda: run(GRID, __doc__ or "", __file__))
