"""The whole loss of a language-model stage in one forward call.

The target's own branch is the joint pass of the contrasts: one forward gives L_NIP, the user and
target vectors and the scores of all candidates; only v^T, the target alone, is extra.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rsllm.config import LossConfig, Scorer
from rsllm.errors import ConfigError
from rsllm.model.branches import branch_scores, pointer_scores
from rsllm.model.hybrid import HybridLM, pool
from rsllm.model.losses import contrast, false_negatives, gather, next_item_loss, ranking_loss
from rsllm.prompts.collate import Batch


class LanguageObjective(nn.Module):
    """`HybridLM` under L = (1 - alpha - beta) L_NIP + alpha L_TT + beta L_UT + gamma L_rank.

    Raises:
        ConfigError: a ranking loss over branches for a model that has no one pass.
    """

    def __init__(self, model: HybridLM, loss: LossConfig, *, autocast: bool = False) -> None:
        super().__init__()
        if loss.gamma and loss.scorer == "likelihood" and not model.one_pass:
            raise ConfigError(
                f"loss.gamma is {loss.gamma}, but this backbone cannot rank by likelihood in one"
                ' pass; set loss.gamma to 0 or loss.scorer to "pointer", or choose another backbone'
            )
        self.model = model
        self.loss = loss
        self.autocast = autocast

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss and its parts, detached, for logs."""
        config = self.loss
        with torch.autocast(batch.ids_BT.device.type, torch.bfloat16, enabled=self.autocast):
            states_BTD = self.model.states(batch)
            logp_N = self.model.label_log_probs(states_BTD, batch)
            next_item = next_item_loss(_own_labels(logp_N, batch), batch.tokens_per_batch)
            loss = (1 - config.alpha - config.beta) * next_item
            parts = {"loss/next_item": next_item}
            if config.contrasts:
                contrasts, facts = self._contrasts(states_BTD, batch)
                loss, parts = loss + contrasts, parts | facts
            if config.gamma:
                scores_BK, target_B = _candidate_scores(states_BTD, logp_N, batch, config.scorer)
                ranking = ranking_loss(scores_BK, target_B)
                loss, parts = loss + config.gamma * ranking, parts | {"loss/ranking": ranking}
        parts["loss"] = loss
        return loss, {name: value.detach().float() for name, value in parts.items()}

    def _contrasts(self, states_BTD: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.loss
        targets_BD = self.model.target_states(batch)[batch.target_item_B]
        own_B, negatives_tt_BM, negatives_ut_BM = false_negatives(batch)
        total = states_BTD.new_zeros((), dtype=torch.float32)
        facts = {}
        for name, weight, span_BT, negative_BM in (
            ("target", config.alpha, batch.answer_BT, negatives_tt_BM),
            ("user", config.beta, batch.history_BT, negatives_ut_BM),
        ):
            vectors_MD = gather(pool(states_BTD, span_BT))
            part = contrast(targets_BD, vectors_MD, own_B, negative_BM, config.temperature)
            total = total + weight * part.loss
            facts[f"loss/{name}_contrast"] = part.loss
            facts[f"contrast/{name}_accuracy"] = part.accuracy
            facts[f"contrast/{name}_cosine"] = part.cosine
            facts[f"contrast/{name}_negatives"] = part.num_negatives
        return total, facts

    @torch.inference_mode()
    def score(self, batch: Batch, scorer: Scorer) -> Tensor:
        """Scores of the row's candidates, higher is better. [B, K], fp32."""
        with torch.autocast(batch.ids_BT.device.type, torch.bfloat16, enabled=self.autocast):
            states_BTD = self.model.states(batch)
            if scorer == "pointer":
                return pointer_scores(states_BTD, batch)
            return branch_scores(self.model.label_log_probs(states_BTD, batch), batch)


def _own_labels(logp_N: Tensor, batch: Batch) -> Tensor:
    """The labels of each row's own answer."""
    row_N = batch.label_branch_N // batch.num_branches
    return logp_N[batch.label_branch_N % batch.num_branches == batch.target_B[row_N]]


def _candidate_scores(
    states_BTD: Tensor, logp_N: Tensor, batch: Batch, scorer: Scorer
) -> tuple[Tensor, Tensor]:
    if scorer == "pointer":
        return pointer_scores(states_BTD, batch), batch.choice_target_B
    return branch_scores(logp_N, batch), batch.target_B
