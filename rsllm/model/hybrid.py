"""`HybridLM`: embed tokens, put projected items in their slots, run the language model.

Axes: B rows, T tokens, D language-model width, E recommender width, I items, V vocabulary,
S slots and markers, U states whose logits are asked for, N labels, G distinct target items,
L tokens of an item.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from rsllm.config import ProjectorConfig
from rsllm.model.branches import branch_mask
from rsllm.model.catalogue import CatalogueHead
from rsllm.model.projector import Projector, embedding_scale
from rsllm.prompts.collate import Batch, ItemTexts
from rsllm.prompts.encode import NO_ITEM
from rsllm.prompts.histories import HistoryBatch


class ItemSlots(nn.Module):
    """Replaces the vectors of markers and slots: one learned vector, and projected items."""

    items_IE: Tensor

    def __init__(self, items_IE: Tensor, embeddings_VD: Tensor, config: ProjectorConfig) -> None:
        super().__init__()
        width = embeddings_VD.shape[1]
        scale = embedding_scale(embeddings_VD)
        self.projector = Projector(items_IE.shape[1], width, config, config.scale * scale)
        self.marker_D = nn.Parameter(scale * torch.randn(width))
        self.register_buffer("items_IE", items_IE.float(), persistent=False)

    def forward(self, tokens_D: Tensor, item: Tensor) -> Tensor:
        """`tokens_D` [..., D], filled where `item` [...] names a slot or a marker."""
        places = torch.where(item != NO_ITEM)
        item_S = item[places]
        filling_SD = self.projected(item_S.clamp(min=0)).where(item_S[:, None] >= 0, self.marker_D)
        return tokens_D.index_put(places, filling_SD.to(tokens_D.dtype))

    def projected(self, item: Tensor) -> Tensor:
        """What a slot holds for rows `item` [...] of the item tables. [..., D]."""
        return cast(Tensor, self.projector(self.items_IE[item]))


class HybridLM(nn.Module):
    """A LoRA-tuned causal LM that reads items as text, or as text, marker and slot.

    RSLLM (arXiv 2412.16933), "hybrid encoding": text goes through the LM's own embedding table,
    an item slot holds the projection of the frozen recommender's item vector. No token is added.

    Attributes:
        one_pass: whether its attention keeps parallel branches apart, so that one pass scores all
            candidates; otherwise every branch needs a pass of its own.
        catalogue: what ranks all items by a history prompt, where the model has learned to.
    """

    def __init__(
        self,
        llm: Any,
        slots: ItemSlots | None,
        catalogue: CatalogueHead | None = None,
        *,
        one_pass: bool = True,
    ) -> None:
        super().__init__()
        self.llm, self.slots, self.catalogue, self.one_pass = llm, slots, catalogue, one_pass

    @property
    def backbone(self) -> Any:
        """The causal LM itself, with LoRA layers inside."""
        return self.llm.get_base_model() if hasattr(self.llm, "get_base_model") else self.llm

    def embed(self, ids: Tensor, item: Tensor) -> Tensor:
        """Input vectors [..., D] of token ids and item slots of the same shape."""
        tokens: Tensor = self.backbone.get_input_embeddings()(ids)
        return tokens if self.slots is None else self.slots(tokens, item)

    def states(self, batch: Batch) -> Tensor:
        """Final-norm hidden states of prompts and branches. [B, T, D]."""
        mask = branch_mask(batch.branch_BT) if batch.parallel else None
        return self._run(batch.ids_BT, batch.item_BT, batch.position_BT, mask)

    def history_states(self, batch: HistoryBatch) -> Tensor:
        """Final-norm hidden states of history prompts. [B, T, D]."""
        position_BT = torch.arange(batch.ids_BT.shape[1], device=batch.ids_BT.device)
        return self._run(batch.ids_BT, batch.item_BT, position_BT.expand_as(batch.ids_BT), None)

    def item_states(self, items: ItemTexts) -> Tensor:
        """Mean final-norm state of each item on its own. [G, D]."""
        ids_GL = items.ids_GL
        position_GL = torch.arange(ids_GL.shape[1], device=ids_GL.device).expand_as(ids_GL)
        return pool(self._run(ids_GL, items.item_GL, position_GL, mask=None), items.mask_GL)

    def slots_and_titles(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What each target's slot holds, and the mean embedding of its title's tokens. [B, D]."""
        assert self.slots is not None
        embeddings_BTD = self.backbone.get_input_embeddings()(batch.ids_BT)
        titles_BD = pool(embeddings_BTD, batch.answer_BT)
        return self.slots.projected(batch.slot_B).float(), titles_BD

    def _run(self, ids: Tensor, item: Tensor, position: Tensor, mask: Tensor | None) -> Tensor:
        """Without a mask attention is plainly causal: enough where padding only follows."""
        if mask is not None and self.backbone.config._attn_implementation == "eager":
            mask = torch.where(mask, 0.0, torch.finfo(self.backbone.dtype).min)  # added to scores
        output = self.backbone.get_decoder()(
            inputs_embeds=self.embed(ids, item),
            attention_mask=mask,
            position_ids=position,
            use_cache=False,
        )
        return cast(Tensor, output.last_hidden_state)

    def label_log_probs(self, states_BTD: Tensor, batch: Batch) -> Tensor:
        """Log-probability of every label, logits computed only where there are labels. [N]."""
        logits_UV = self.logits(states_BTD.flatten(0, 1)[batch.state_U])
        logits_N = logits_UV[batch.label_state_N, batch.label_N]
        return logits_N - logits_UV.logsumexp(-1)[batch.label_state_N]

    def logits(self, states_UD: Tensor) -> Tensor:
        """What the output head makes of some states, in fp32. [U, V]."""
        head = self.backbone.get_output_embeddings()
        with torch.autocast(states_UD.device.type, enabled=False):
            return cast(Tensor, head(states_UD.to(head.weight.dtype)).float())


def pool(states_BTD: Tensor, span_BT: Tensor) -> Tensor:
    """Mean state over a span, in fp32. [B, D]."""
    weights = span_BT.float()
    with torch.autocast(states_BTD.device.type, enabled=False):
        sums_BD = torch.einsum("btd,bt->bd", states_BTD.float(), weights)
    return sums_BD / weights.sum(1, keepdim=True)
