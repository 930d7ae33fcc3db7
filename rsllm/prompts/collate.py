"""Rows -> `Batch`: each prompt once, its answers as parallel branches behind it.

Axes: B rows, T tokens (prompt, then branches, then padding), C branches of a row, M = B * C, U
states whose logits are asked for, N labels, G distinct target items, L tokens of an item alone,
H history.

Branch inputs are title tokens. The first label is read at the last prompt position, the
terminator's at the last title token. Token k of a branch has position |prompt| + k and sees the
prompt and its own branch only (`rsllm.model.branches`). A letter has no terminator: its branch is
empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsllm.prompts.encode import NO_ITEM, Prompt, PromptEncoder, Tokens

Ints = NDArray[np.int64]
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
class OnDevice:
    """What holds tensors, all of them on one device."""

    def to(self, device: torch.device) -> Self:
        """The same on another device, with all that it holds."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in held.items():
            if isinstance(value, Tensor | OnDevice):
                held[name] = value.to(device)
        return type(self)(**held)


@dataclass(frozen=True, slots=True)
class ItemTexts(OnDevice):
    """Items alone, each as it stands in a history, behind what opens a text."""

    ids_GL: Tensor
    item_GL: Tensor
    """Item id at slots, MARKER at markers, NO_ITEM elsewhere."""
    mask_GL: Tensor
    """True on the item's own tokens."""


@dataclass(frozen=True, slots=True)
class Batch(OnDevice):
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
    parallel: bool
    """Whether tokens of several branches stand in a row, so that a mask must part them."""
    target_B: Tensor
    """The target's place among the branches."""
    last_B: Tensor
    """Flat position of the last prompt token."""
    choice_BK: Tensor
    """Flat position of each prompt candidate's last token (its slot where it has one)."""
    choice_target_B: Tensor
    """The target's place among the prompt candidates."""
    history_BT: Tensor
    """True on the history span."""
    answer_BT: Tensor
    """True on the tokens of the target's branch: its title, or none where letters answer."""
    targets: ItemTexts
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

    @property
    def real_BT(self) -> Tensor:
        """False on padding."""
        return self.branch_BT != PADDING

    @property
    def num_tokens(self) -> int:
        """Of prompts and branches, without padding."""
        return int(self.real_BT.sum())


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
    prompts = [encoder.prompt(row.history, row.candidates, row.template) for row in rows]
    places = [list(row.candidates).index(row.target) for row in rows]
    answers = [encoder.answers(row.candidates) for row in rows]
    if not all_branches:
        answers = [[own[place]] for own, place in zip(answers, places, strict=True)]
    labels = [[answer + encoder.ending for answer in own] for own in answers]
    inputs = [
        prompt.tokens.ids + [token for label in own for token in label[:-1]]
        for prompt, own in zip(prompts, labels, strict=True)
    ]
    past = [title_keys[list(row.history)] for row in rows]
    layout = _Layout.of(prompts, labels)
    offset_B = np.arange(len(rows)) * layout.width
    target_B = np.array(places if all_branches else [0] * len(rows))
    targets, target_item_B = _targets(rows, encoder, len(title_keys))
    first_B = torch.tensor([row.table * len(title_keys) for row in rows])
    branch_BT, position_BT = layout.tokens()
    state_U, label_state_N, label_branch_N = layout.links()
    return Batch(
        ids_BT=padded(inputs, layout.width, encoder.terminator),
        item_BT=table_rows([prompt.tokens for prompt in prompts], first_B, layout.width),
        branch_BT=branch_BT,
        position_BT=position_BT,
        state_U=state_U,
        label_N=torch.tensor([token for own in labels for label in own for token in label]),
        label_state_N=label_state_N,
        label_branch_N=label_branch_N,
        num_branches=len(labels[0]),
        parallel=layout.parallel,
        target_B=torch.from_numpy(target_B),
        last_B=torch.from_numpy(offset_B + layout.start_BS[:, 1] - 1),
        choice_BK=torch.from_numpy(offset_B[:, None] + [prompt.choices for prompt in prompts]),
        choice_target_B=torch.tensor(places),
        history_BT=_spans([prompt.history for prompt in prompts], layout.width),
        answer_BT=_spans(layout.spans(1 + target_B), layout.width),
        targets=targets,
        target_item_B=target_item_B,
        slot_B=first_B + torch.tensor([row.target for row in rows]),
        user_B=torch.tensor([row.user for row in rows]),
        title_B=torch.as_tensor(title_keys[[row.target for row in rows]], dtype=torch.long),
        past_BH=padded(past, max(map(len, past)), PADDING),
        tokens_per_batch=tokens_per_batch or answer_tokens([row.target for row in rows], encoder),
    )


def answer_tokens(targets: Sequence[int], encoder: PromptEncoder) -> float:
    """Number of answer tokens (titles and terminators, or letters) of some targets."""
    return float(sum(encoder.answer_length(target) for target in targets))


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where a row's segments stand: the prompt first, then its branches. S = 1 + C segments."""

    start_BS: Ints
    length_BS: Ints

    @staticmethod
    def of(prompts: Sequence[Prompt], labels: Sequence[Sequence[Sequence[int]]]) -> _Layout:
        """A branch's inputs are its labels but the last."""
        rows = zip(prompts, labels, strict=True)
        length_BS = np.array(
            [[len(prompt.tokens), *(len(label) - 1 for label in own)] for prompt, own in rows]
        )
        return _Layout(_starts(length_BS), length_BS)

    @property
    def width(self) -> int:
        return int(self.length_BS.sum(1).max())

    @property
    def parallel(self) -> bool:
        return self.length_BS.shape[1] > 2 and bool(self.length_BS[:, 1:].any())

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Branch and position of every token. [B, T] each.

        Each branch goes on where the prompt ends; padding stays below the longest.
        """
        segments = range(self.length_BS.shape[1])
        branches = [np.repeat(segments, length_S) for length_S in self.length_BS]
        branch_BT = padded(branches, self.width, PADDING)
        prompt_B1 = self.length_BS[:, :1]
        shift_BS = np.maximum(self.start_BS - prompt_B1, 0)
        shift_BT = np.take_along_axis(shift_BS, branch_BT.numpy(), axis=1)
        last = (prompt_B1 + self.length_BS[:, 1:]).max() - 1
        return branch_BT, torch.from_numpy(np.minimum(np.arange(self.width) - shift_BT, last))

    def links(self) -> tuple[Tensor, Tensor, Tensor]:
        """States that predict, each once, and each label's state (among them) and branch.

        A row's states are those of its last prompt token, the fork of its branches, and of all
        branch tokens. A branch's first label is read at the fork, the others at its own tokens.
        """
        start_BC, length_BC = self.start_BS[:, 1:], self.length_BS[:, 1:]
        states_B, labels_M = 1 + length_BC.sum(1), 1 + length_BC.ravel()
        fork_B, first_M = _starts(states_B), _starts(labels_M)
        at_B = np.arange(len(states_B)) * self.width + start_BC[:, 0] - 1
        state_U = np.arange(states_B.sum()) + np.repeat(at_B - fork_B, states_B)
        before_M = (fork_B[:, None] + start_BC - start_BC[:, :1]).ravel()
        state_N = np.arange(labels_M.sum()) + np.repeat(before_M - first_M, labels_M)
        state_N[first_M] = np.repeat(fork_B, length_BC.shape[1])
        branch_N = np.repeat(np.arange(len(labels_M)), labels_M)
        return torch.from_numpy(state_U), torch.from_numpy(state_N), torch.from_numpy(branch_N)

    def spans(self, segment_B: Ints) -> Ints:
        """Start and end of one segment of each row. [B, 2]."""
        rows = np.arange(len(segment_B))
        start_B = self.start_BS[rows, segment_B]
        return np.stack([start_B, start_B + self.length_BS[rows, segment_B]], axis=1)


def _starts(lengths: Ints) -> Ints:
    """Where runs of these lengths start, laid end to end along the last axis."""
    return np.asarray(lengths.cumsum(-1) - lengths)


def padded(lists: Sequence[Sequence[int] | Ints], width: int, fill: int) -> Tensor:
    """Lists of numbers as rows of a matrix, `fill` behind each."""
    out = np.full((len(lists), width), fill, dtype=np.int64)
    for row, values in enumerate(lists):
        out[row, : len(values)] = values
    return torch.from_numpy(out)


def _targets(rows: Sequence[Row], encoder: PromptEncoder, size: int) -> tuple[ItemTexts, Tensor]:
    """Each distinct target on its own, and which of them is each row's."""
    wanted = [(row.target, row.table) for row in rows]
    distinct, place_B = np.unique(wanted, axis=0, return_inverse=True)
    alone = [encoder.item(item, item + table * size) for item, table in distinct.tolist()]
    return items_alone(alone, encoder), torch.from_numpy(place_B.ravel())


def table_rows(texts: Sequence[Tokens], first_B: Tensor, width: int) -> Tensor:
    """Items at their slots, counted from where each row's item table starts."""
    item_BT = padded([text.items for text in texts], width, NO_ITEM)
    return torch.where(item_BT >= 0, item_BT + first_B[:, None], item_BT)


def _spans(bounds: Sequence[tuple[int, int]] | Ints, width: int) -> Tensor:
    bounds_B2, at_T = torch.as_tensor(bounds), torch.arange(width)
    return (at_T >= bounds_B2[:, :1]) & (at_T < bounds_B2[:, 1:])


def items_alone(items: Sequence[Tokens], encoder: PromptEncoder) -> ItemTexts:
    """Lay items out, right-padded, each behind the tokenizer's prefix, or else a terminator.

    The first token of a text takes attention as a sink (arXiv 2309.17453), and its state is nearly
    the same whatever it is: were it the item's own, all items would look alike.
    """
    opening = encoder.prefix or [encoder.terminator]
    texts = [Tokens.of(opening) + tokens for tokens in items]
    width = max(map(len, texts))
    return ItemTexts(
        ids_GL=padded([text.ids for text in texts], width, encoder.terminator),
        item_GL=padded([text.items for text in texts], width, NO_ITEM),
        mask_GL=_spans([(len(opening), len(text)) for text in texts], width),
    )
