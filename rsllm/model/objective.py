"""The whole loss of a language-model stage in one forward call.

The target's own branch is the joint pass of the contrasts: one forward gives L_NIP, the user and
target vectors and the scores of all candidates; only v^T, the target alone, is extra.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rsllm.config import LossConfig, Scorer
from rsllm.errors import ConfigError
from rsllm.model import losses
from rsllm.model.branches import branch_scores, pointer_scores
from rsllm.model.hybrid import HybridLM, pool
from rsllm.prompts.collate import PROMPT, Batch
from rsllm.prompts.histories import HistoryBatch

Parts = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class CachedBatch:
    """A micro-batch, with the contrasts of its whole step and their gradient at its vectors."""

    batch: Batch
    contrasts: Tensor
    gradients: Parts
    """Of each kind of vector, times the number of micro-batches, over which losses are averaged."""
    facts: Parts

    def attached_to(self, vectors: Parts) -> Tensor:
        """The value of the contrasts, with the cached gradient."""
        products = [(vectors[name] * cached).sum() for name, cached in self.gradients.items()]
        surrogate = torch.stack(products).sum()
        return self.contrasts + (surrogate - surrogate.detach())


class Objective(nn.Module):
    """`HybridLM` under some of the losses of `LossConfig.weights`."""

    def __init__(self, model: HybridLM, loss: LossConfig, *, autocast: bool = False) -> None:
        super().__init__()
        self.model, self.loss, self.autocast = model, loss, autocast

    def precision(self, batch: Batch | HistoryBatch) -> torch.autocast:
        """In which the model runs."""
        return torch.autocast(batch.ids_BT.device.type, torch.bfloat16, enabled=self.autocast)


class LanguageObjective(Objective):
    """`HybridLM` under L = (1 - alpha - beta) L_NIP + alpha L_TT + beta L_UT + gamma L_rank.

    Raises:
        ConfigError: a ranking loss over branches for a model that has no one pass.
    """

    def __init__(self, model: HybridLM, loss: LossConfig, *, autocast: bool = False) -> None:
        super().__init__(model, loss, autocast=autocast)
        if loss.gamma and loss.scorer == "likelihood" and not model.one_pass:
            raise ConfigError(
                f"loss.gamma is {loss.gamma}, but this backbone cannot rank by likelihood in one"
                ' pass; set loss.gamma to 0 or loss.scorer to "pointer", or choose another backbone'
            )

    def forward(self, batch: Batch | CachedBatch) -> tuple[Tensor, Parts]:
        """The weighted loss and its parts, detached, for logs."""
        plain, cached = (batch.batch, batch) if isinstance(batch, CachedBatch) else (batch, None)
        config, states_BTD = self.loss, self._states(plain)
        logp_N = self.model.label_log_probs(states_BTD, plain)
        row_N = plain.label_branch_N // plain.num_branches
        own_N = plain.label_branch_N % plain.num_branches == plain.target_B[row_N]
        next_item = losses.next_item_loss(logp_N[own_N], plain.tokens_per_batch)
        terms = {"next_item": config.weights["next_item"] * next_item}
        facts = {"loss/next_item": next_item}
        if config.contrasts:
            vectors = self._vectors(states_BTD, plain)
            if cached:
                contrasts, found = {"contrasts": cached.attached_to(vectors)}, cached.facts
            else:
                contrasts, found = self._contrasts(vectors, [plain])
            terms, facts = terms | contrasts, facts | found
        if config.gamma:
            if config.scorer == "pointer":
                scores_BK, target_B = pointer_scores(states_BTD, plain), plain.choice_target_B
            else:
                scores_BK, target_B = branch_scores(logp_N, plain), plain.target_B
            ranking = losses.ranking_loss(scores_BK, target_B)
            terms["ranking"], facts["loss/ranking"] = config.gamma * ranking, ranking
        facts["loss"] = loss = total(terms)
        return loss, {name: value.detach().float() for name, value in facts.items()}

    def look_ahead(self, batches: Sequence[Batch]) -> Sequence[Batch | CachedBatch]:
        """Gradient caching (arXiv 2101.06983): contrast the rows of all micro-batches of a step.

        One pass without gradient gives the vectors, the contrasts and their gradient with respect
        to them. The usual pass then takes it from there, under the same dropout.
        """
        if not self.loss.contrasts:
            return batches
        device = batches[0].ids_BT.device
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            found = [self._vectors(self._states(batch), batch) for batch in batches]
        vectors = {n: torch.cat([part[n] for part in found]).requires_grad_() for n in found[0]}
        terms, facts = self._contrasts(vectors, batches)
        contrasts = total(terms)
        whole = torch.autograd.grad(contrasts, list(vectors.values()))
        sizes = [len(batch.user_B) for batch in batches]
        split = (torch.split(len(batches) * part, sizes) for part in whole)
        return [
            CachedBatch(batch, contrasts.detach(), dict(zip(vectors, share, strict=True)), facts)
            for batch, *share in zip(batches, *split, strict=True)
        ]

    def _states(self, batch: Batch) -> Tensor:
        with self.precision(batch):
            return self.model.states(batch)

    def _vectors(self, states_BTD: Tensor, batch: Batch) -> Parts:
        """What is contrasted, by its name, each in fp32 [B, width]."""
        config, vectors = self.loss, {}
        if config.alpha or config.beta:
            with self.precision(batch):
                vectors["target"] = self.model.item_states(batch.targets)[batch.target_item_B]
        if config.alpha:
            vectors["answer"] = pool(states_BTD, batch.answer_BT)
        if config.beta:
            whole = config.user_span == "prompt"
            sink_BT = batch.position_BT == 0  # says nothing of its row, see `items_alone`
            span_BT = (batch.branch_BT == PROMPT) & ~sink_BT if whole else batch.history_BT
            vectors["user"] = pool(states_BTD, span_BT)
        if config.alignment:
            vectors["slot"], vectors["title"] = self.model.slots_and_titles(batch)
        return vectors

    def _contrasts(self, vectors: Parts, batches: Sequence[Batch]) -> tuple[Parts, Parts]:
        """The weighted contrasts, and what they report."""
        config, pairs = self.loss, {}
        all_MD = {name: losses.gather(rows_BD) for name, rows_BD in vectors.items()}
        tt_MM, ut_MM = losses.negatives(batches)
        if config.alpha:
            pairs["target"] = all_MD["target"], all_MD["answer"], tt_MM
        if config.beta:
            pairs["user"] = all_MD["target"], all_MD["user"], ut_MM
        if config.alignment:
            assert self.model.slots is not None
            first_G, other_GG = losses.distinct_targets(batches, self.model.slots.items_IE)
            pairs["alignment"] = all_MD["slot"][first_G], all_MD["title"][first_G], other_GG
        terms: Parts = {}
        facts: Parts = {}
        for name, sides in pairs.items():
            part = losses.contrast(*sides, config.temperature, symmetric=config.symmetric)
            terms[f"{name}_contrast"] = config.weights[f"{name}_contrast"] * part.loss
            facts |= part.facts(name)
        return terms, facts

    @torch.inference_mode()
    def score(self, batch: Batch, scorer: Scorer) -> Tensor:
        """Scores of the row's candidates, higher is better. [B, K], fp32."""
        states_BTD = self._states(batch)
        if scorer == "pointer":
            return pointer_scores(states_BTD, batch)
        return branch_scores(self.model.label_log_probs(states_BTD, batch), batch)


def total(terms: Parts) -> Tensor:
    return torch.stack(list(terms.values())).sum()
