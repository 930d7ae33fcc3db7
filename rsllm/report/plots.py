"""The report's charts as places between 0 and 1, which `report.html` draws.

A line of one point is a dot. What belongs to a trial is of class `t` and its number, so that the
page can show it in all charts at once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from rsllm.report import trials as facts
from rsllm.report.trials import Trial

Point = tuple[Any, Any]

MARGIN = 0.05
STEPS = 5
"""About as many steps from tick to tick."""


class Axis:
    """Places of values, or of names in alphabetical order.

    Args:
        label: what is along it.
        values: what it has to hold.
        tuned: whether equal factors rather than steps may be equally far apart.
    """

    def __init__(self, label: str, values: Sequence[Any], *, tuned: bool = False) -> None:
        self.label = label
        self.kinds = [] if facts.numeric(values) else sorted(set(map(str, values)))
        self.whole = all(isinstance(value, int) for value in values)
        self.logarithmic = tuned and not self.kinds and facts.spans_decades(values)
        marks = [self._mark(value) for value in values]
        margin = MARGIN * (max(marks) - min(marks)) or abs(marks[0]) / 10 or 0.5
        self.low, self.high = min(marks) - margin, max(marks) + margin

    def __call__(self, value: Any) -> float:
        """The place of a value."""
        return (self._mark(value) - self.low) / (self.high - self.low)

    def _mark(self, value: Any) -> float:
        if self.kinds:
            return self.kinds.index(str(value))
        return math.log10(value) if self.logarithmic else value

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Places and texts of a few values."""
        values = self.kinds or (self._decades() if self.logarithmic else self._steps())
        return [(self(v), v if isinstance(v, str) else f"{v:,.6g}") for v in values]

    def _decades(self) -> list[float]:
        exponents = range(math.floor(self.low), math.ceil(self.high) + 1)
        factors = (1, 3) if self.high - self.low < STEPS / 2 else (1,)
        values = [factor * 10.0**exponent for exponent in exponents for factor in factors]
        return [value for value in values if self.low <= math.log10(value) <= self.high]

    def _steps(self) -> list[float]:
        rough = (self.high - self.low) / STEPS
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
        step = max(step, 1.0) if self.whole else step
        return [n * step for n in range(math.ceil(self.low / step), int(self.high // step) + 1)]


class Line(NamedTuple):
    """Points, x to the right and y up; in a chart they are in [0, 1]."""

    classes: str
    told: str
    points: Sequence[Point]


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines on axes: x and y, or one per column of parallel coordinates."""

    title: str
    axes: Sequence[Axis]
    lines: Sequence[Line]
    parallel: bool = False


def learning_curves(
    trials: Sequence[Trial], metric: str, title: str, chance: float | None = None
) -> Chart | None:
    """`metric` against training samples; None where no trial has reported it."""
    curves = [
        _of(trial, metric, [(point["samples"], point.get(metric)) for point in trial["curve"]])
        for trial in trials
    ]
    samples = [x for line in curves for x, y in line.points if y is not None]
    if samples and chance is not None:
        curves.append(Line("level", "chance", [(min(samples), chance), (max(samples), chance)]))
    return _chart(title, "training samples", metric, curves)


def history(trials: Sequence[Trial], metric: str, *, by_cost: bool = False) -> Chart | None:
    """Each trial's score and the best so far, in order or against the minutes trained in all."""
    minutes = accumulate(trial["seconds"] / 60 for trial in trials)
    places = list(minutes) if by_cost else [trial["number"] for trial in trials]
    best = Line(
        "steps", "best so far", [*zip(places, facts.best_so_far(trials, metric), strict=True)]
    )
    placed = zip(places, trials, strict=True)
    dots = [_of(trial, metric, [(place, trial.get(metric))]) for place, trial in placed]
    title, x = ("cost", "minutes of training, summed") if by_cost else ("trials", "trial")
    return _chart(f"Best so far over {title}", x, metric, [best, *dots])


def tuned_values(trials: Sequence[Trial], parameter: str, metric: str) -> Chart | None:
    """Each trial's value of one tuned parameter against its `metric`."""
    points = [(trial, (trial["parameters"].get(parameter), trial.get(metric))) for trial in trials]
    dots = [_of(trial, metric, [point]) for trial, point in points]
    return _chart(f"{metric} by {parameter}", parameter, metric, dots, tuned=True)


def pareto(trials: Sequence[Trial]) -> Chart | None:
    """The score against its cost; a line joins the trials that nothing beats in both."""
    able = [trial for trial in trials if len(trial.get("objectives") or ()) == 2]
    if not able:
        return None
    cost, score = sorted(able[0]["objectives"], key=facts.rising)

    def place(trial: Trial) -> Point:
        return trial["objectives"][cost], trial["objectives"][score]

    front = Line("steps", "Pareto front", sorted(map(place, facts.pareto_front(trials))))
    dots = [_of(trial, score, [place(trial)]) for trial in able]
    return _chart(f"Pareto front of {score} and {cost}", cost, score, [front, *dots])


def fusion(curve: Sequence[Sequence[float]], chosen: float) -> Chart | None:
    """Validation MRR of two methods joined, against the weight of the recommender."""
    finite = [(weight, mrr) for weight, mrr, *_ in curve if 0 < weight < 1e6]
    best = [point for point in finite if point[0] == chosen]
    lines = [Line("curve", "MRR", finite), Line("best", f"chosen: {chosen:.3g}", best)]
    title = f"Joined with the recommender, whose weight is {chosen:.3g}"
    return _chart(title, "weight of the recommender", "MRR", lines, tuned=True)


def parallel_coordinates(trials: Sequence[Trial], metric: str) -> Chart | None:
    """A line per trial through its values to its score, from the worst to the best.

    It passes by what the trial has no value of.
    """
    shown = sorted(facts.scored(trials, metric), key=lambda trial: trial[metric])
    tuned = facts.names([trial["parameters"] for trial in shown])
    if len(shown) < 2 or not tuned:
        return None
    values = [{**trial["parameters"], metric: trial[metric]} for trial in shown]
    axes = [
        Axis(name, [v[name] for v in values if v.get(name) is not None], tuned=name != metric)
        for name in [*tuned, metric]
    ]
    paths = [
        [(x, axis(v[axis.label])) for x, axis in enumerate(axes) if v.get(axis.label) is not None]
        for v in values
    ]
    lines = [_of(trial, metric, path) for trial, path in zip(shown, paths, strict=True)]
    return Chart("Each trial to its score, the better the stronger", axes, lines, parallel=True)


def _of(trial: Trial, metric: str, points: Sequence[Point]) -> Line:
    number, score = trial["number"], trial.get(metric)
    told = f"{trial.get('name', f'trial {number}')}, {trial['state']}"
    told += "" if score is None else f", {metric} {score:.4g}"
    return Line(f"t{number} {trial['state']}", told, points)


def _chart(
    title: str, x: str, y: str, lines: Sequence[Line], *, tuned: bool = False
) -> Chart | None:
    """Lines without their points that lack a value, put in their places."""
    known = [ln._replace(points=[p for p in ln.points if None not in p]) for ln in lines]
    points = [point for line in known for point in line.points]
    if not points:
        return None
    across, up = Axis(x, [p for p, _ in points], tuned=tuned), Axis(y, [q for _, q in points])
    placed = [ln._replace(points=[(across(p), up(q)) for p, q in ln.points]) for ln in known]
    return Chart(title, (across, up), placed)
