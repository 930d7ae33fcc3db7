"""The version of the code that makes each kind of artifact; it is part of the artifact's key.

A change of numbers that is meant raises one, so that what older code made is not taken for its own.
The golden tests ask for it: they keep a file for each version.
"""

from typing import Any

VERSIONS = {
    "data": 1,
    "titles": 1,
    "recommender": 1,
    "items": 1,
    "keys": 1,
    "stage-1": 2,
    "stage-2": 2,
    "evaluation": 1,
    "deployed": 1,
    "recommendations": 1,
    "answer": 1,
}
"""The versions by kind, sources before what is made of them."""
OF_FINISHED_MODELS = ("deployed", "recommendations", "answer")
"""Kinds that are made of a model which was trained and judged before."""


def deciding_results() -> dict[str, int]:
    """The versions on which it depends how a model is trained, and how good it is found to be."""
    return {kind: number for kind, number in VERSIONS.items() if kind not in OF_FINISHED_MODELS}


def decided_by(kind: str, inputs: Any) -> dict[str, Any]:
    """Return the facts whose hash is an artifact's key."""
    return {"version": VERSIONS.get(kind), "inputs": inputs}
