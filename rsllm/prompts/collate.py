"""Rows -> `Batch`: each prompt once, its answers as parallel branches behind it.

Axes: B rows, T tokens (prompt, then branches, then padding), C branches of a row, U states whose
logits are asked for, N labels, G distinct target items, L tokens of an item alone, H history.

Branch inputs are title tokens. The first label is read at the last prompt position, the
terminator's at the last title token. Token k of a branch has position |prompt| + k and sees the
prompt and its own branch only (`rsllm.model.branches`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsllm.prompts.encode import NO_ITEM, Prompt, PromptEncoder, Tokens

PADDING = -1
PROMPT = 0


@dataclass(frozen=True, slots=True)
class Row:
    """One decision: a history, candidates to choose from, and the target among them."""

    history: Sequence[int]
    candidates: Sequence[int]
    target: int
    user: int
    template: int = 0
    table: int = 0
    """Which item table fills the slots: 0 for the one of all users, see `ItemEmbeddings`."""


@dataclass(frozen=True, slots=True)
class Items:
    """Items alone, each as it stands in the prompts: title, then marker and slot if unified."""

    ids_GL: Tensor
    item_GL: Tensor
    """Item id at slots, MARKER at markers, NO_ITEM elsewhere."""
    mask_GL: Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward pass needs, for one representation."""

    ids_BT: Tensor
    item_BT: Tensor
    """Row of the stacked item tables at slots, MARKER at markers, NO_ITEM elsewhere."""
    branch_BT: Tensor
    """PROMPT, 1..C for branch tokens, PADDING."""
    position_BT: Tensor
    state_U: Tensor
    """Flat positions (row * T + token) whose next-token distribution is needed."""
    label_N: Tensor
    label_state_N: Tensor
    """Index into U of the state that predicts each label."""
    label_branch_N: Tensor
    """Flat branch (row * C + branch) each label belongs to."""
    num_branches: int
    target_B: Tensor
    """The target's place among the branches."""
    last_B: Tensor
    """Flat position of the last prompt token."""
    choice_BK: Tensor
    """Flat position of each prompt candidate's last token (its slot in unified prompts)."""
    choice_target_B: Tensor
    """The target's place among the prompt candidates."""
    history_BT: Tensor
    """True on the history span."""
    answer_BT: Tensor
    """True on the title tokens of the target's branch."""
    targets: Items
    target_item_B: Tensor
    """Index into G of each row's target."""
    slot_B: Tensor
    """Row of the stacked item tables of each target."""
    user_B: Tensor
    title_B: Tensor
    """Distinct-title index of each target."""
    past_BH: Tensor
    """Distinct-title indices of the history, padded with PADDING."""
    tokens_per_batch: float
    """Answer tokens of the global batch / number of micro-batches it is split into."""

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        moved: Batch = _move(self, device)
        return moved


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return type(value)(**{f.name: _move(getattr(value, f.name), device) for f in fields})
    return value


def collate(
    rows: Sequence[Row],
    encoder: PromptEncoder,
    title_keys: np.ndarray,
    *,
    all_branches: bool,
    tokens_per_batch: float | None = None,
) -> Batch:
    """Encode rows and lay them out, right-padded.

    Args:
        title_keys: distinct-title index of every item, [I].
        all_branches: one branch per candidate, in their order; otherwise the target's only.
        tokens_per_batch: see `Batch`; by default these rows are the whole batch.
    """
    layouts = [_layout(row, encoder, all_branches) for row in rows]
    width = max(len(layout.tokens) for layout in layouts)
    num_branches = len(rows[0].candidates) if all_branches else 1
    states, labels, label_states, label_branches = _labels(layouts, width, num_branches)
    places = [list(row.candidates).index(row.target) for row in rows]
    offsets = torch.arange(len(rows)) * width
    last_position = max(max(layout.position) for layout in layouts)
    targets, target_item_B = _targets(rows, encoder, len(title_keys))
    return Batch(
        ids_BT=_padded([x.tokens.ids for x in layouts], width, encoder.terminator),
        item_BT=_slots(layouts, [row.table * len(title_keys) for row in rows], width),
        branch_BT=_padded([x.branch for x in layouts], width, PADDING),
        position_BT=_padded([x.position for x in layouts], width, range(width)).clamp(
            max=last_position
        ),
        state_U=states,
        label_N=labels,
        label_state_N=label_states,
        label_branch_N=label_branches,
        num_branches=num_branches,
        target_B=torch.tensor(places if all_branches else [0] * len(rows)),
        last_B=offsets + torch.tensor([x.prompt_length - 1 for x in layouts]),
        choice_BK=offsets[:, None] + torch.tensor([x.prompt.choices for x in layouts]),
        choice_target_B=torch.tensor(places),
        history_BT=_spans([x.prompt.history for x in layouts], width),
        answer_BT=_spans(
            [
                x.answers[place if all_branches else 0]
                for x, place in zip(layouts, places, strict=True)
            ],
            width,
        ),
        targets=targets,
        target_item_B=target_item_B,
        slot_B=torch.tensor([row.table * len(title_keys) + row.target for row in rows]),
        user_B=torch.tensor([row.user for row in rows]),
        title_B=torch.as_tensor(title_keys[[row.target for row in rows]], dtype=torch.long),
        past_BH=_padded(
            [title_keys[list(row.history)].tolist() for row in rows],
            max(len(row.history) for row in rows),
            PADDING,
        ),
        tokens_per_batch=tokens_per_batch or answer_tokens([row.target for row in rows], encoder),
    )


def answer_tokens(targets: Sequence[int], encoder: PromptEncoder) -> float:
    """Number of answer tokens (titles and terminators) of some targets."""
    return float(sum(len(encoder.title_ids[target]) + 1 for target in targets))


@dataclass(slots=True)
class _Layout:
    prompt: Prompt
    prompt_length: int
    tokens: Tokens
    branch: list[int]
    position: list[int]
    answers: list[tuple[int, int]]
    """Span of each branch's title tokens."""
    endings: list[list[int]]
    """Labels of each branch: its title tokens and the terminator."""


def _layout(row: Row, encoder: PromptEncoder, all_branches: bool) -> _Layout:
    prompt = encoder.prompt(row.history, row.candidates, row.template)
    tokens = Tokens()
    tokens.extend(prompt.tokens)
    length = len(tokens)
    branch, position = [PROMPT] * length, list(range(length))
    answers, endings = [], []
    for number, item in enumerate(row.candidates if all_branches else [row.target], start=1):
        title = encoder.title_ids[item]
        answers.append((len(tokens), len(tokens) + len(title)))
        endings.append([*title, encoder.terminator])
        tokens.text(title)
        branch.extend([number] * len(title))
        position.extend(range(length, length + len(title)))
    return _Layout(prompt, length, tokens, branch, position, answers, endings)


def _labels(
    layouts: Sequence[_Layout], width: int, num_branches: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States that predict (each once, also where branches share it), labels, and their links."""
    states: list[int] = []
    labels: list[int] = []
    links: list[int] = []
    branches: list[int] = []
    for row, layout in enumerate(layouts):
        fork = len(states)
        states.append(row * width + layout.prompt_length - 1)
        answers = zip(layout.answers, layout.endings, strict=True)
        for number, ((start, end), ending) in enumerate(answers):
            links.extend([fork, *range(len(states), len(states) + end - start)])
            states.extend(range(row * width + start, row * width + end))
            labels.extend(ending)
            branches.extend([row * num_branches + number] * len(ending))
    return tuple(torch.tensor(x) for x in (states, labels, links, branches))  # type: ignore[return-value]


def _padded(lists: Sequence[Sequence[int]], width: int, fill: int | range) -> Tensor:
    out = np.full((len(lists), width), fill, dtype=np.int64)
    for row, values in enumerate(lists):
        out[row, : len(values)] = values
    return torch.from_numpy(out)


def _targets(rows: Sequence[Row], encoder: PromptEncoder, size: int) -> tuple[Items, Tensor]:
    """Each distinct target on its own, and which of them is each row's."""
    wanted = [(row.target, row.table) for row in rows]
    distinct = sorted(set(wanted))
    alone = [encoder.item(item, item + table * size) for item, table in distinct]
    indices = torch.tensor([distinct.index(target) for target in wanted])
    return items_alone(alone, encoder.terminator), indices


def _slots(layouts: Sequence[_Layout], first: Sequence[int], width: int) -> Tensor:
    """Items at their slots, counted from where each row's item table starts."""
    item_BT = _padded([layout.tokens.items for layout in layouts], width, NO_ITEM)
    return torch.where(item_BT >= 0, item_BT + torch.tensor(first)[:, None], item_BT)


def _spans(spans: Sequence[tuple[int, int]], width: int) -> Tensor:
    bounds_B2 = torch.tensor(spans)
    at_T = torch.arange(width)
    return (at_T >= bounds_B2[:, :1]) & (at_T < bounds_B2[:, 1:])


def items_alone(items: Sequence[Tokens], fill: int) -> Items:
    """Lay items out, right-padded with the token `fill`."""
    width = max(len(tokens) for tokens in items)
    lengths_G1 = torch.tensor([[len(tokens)] for tokens in items])
    return Items(
        ids_GL=_padded([tokens.ids for tokens in items], width, fill),
        item_GL=_padded([tokens.items for tokens in items], width, NO_ITEM),
        mask_GL=torch.arange(width) < lengths_G1,
    )
