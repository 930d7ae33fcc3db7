"""The prompt once, its answers as parallel branches: mask and scores.

Axes: B rows, T tokens, C branches, K prompt candidates, N labels, D language-model width.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from rsllm.prompts.collate import PADDING, PROMPT, Batch


def branch_mask(branch_BT: Tensor) -> Tensor:
    """True where a query may look: causal, and only at the prompt or its own branch. [B, 1, T, T].

    Padding sees the prompt, so no row of the mask is empty; nothing sees padding.
    """
    query_BT1, key_B1T = branch_BT[:, :, None], branch_BT[:, None, :]
    length = branch_BT.shape[1]
    causal_TT = torch.ones(length, length, dtype=torch.bool, device=branch_BT.device).tril()
    same = (key_B1T == PROMPT) | (key_B1T == query_BT1)
    return (causal_TT & same & (key_B1T != PADDING))[:, None]


def branch_scores(logp_N: Tensor, batch: Batch) -> Tensor:
    """Log-probability of each answer, terminator included (titles become prefix-free). [B, C]."""
    num_rows = len(batch.target_B)
    scores = logp_N.new_zeros(num_rows * batch.num_branches)
    return scores.index_add(0, batch.label_branch_N, logp_N).view(num_rows, batch.num_branches)


def pointer_scores(states_BTD: Tensor, batch: Batch) -> Tensor:
    """Scaled dot products of the last prompt state with each candidate's last state. [B, K].

    An extension of ours, not RSLLM's: it costs no branch and no parsing. Both states are brought to
    unit root mean square first; otherwise the gain of the backbone's final norm sets the softmax's
    temperature (SmolLM2's starts it at a cross-entropy of 9.6 over 20 candidates, chance is 3.0).
    """
    flat_D = states_BTD.flatten(0, 1)
    width = (flat_D.shape[-1],)
    query_BD = F.rms_norm(flat_D[batch.last_B].float(), width)
    keys_BKD = F.rms_norm(flat_D[batch.choice_BK].float(), width)
    return torch.einsum("bd,bkd->bk", query_BD, keys_BKD) / math.sqrt(keys_BKD.shape[-1])
