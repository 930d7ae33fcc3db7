"""Tokenizers of three kinds: byte-level, SentencePiece-like, and a slow one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rsllm.model.backbone import load_tokenizer

SPECIAL = ["<unk>", "<s>", "</s>"]


@pytest.fixture(scope="session", params=["tiny_llm", "random_llm", "metaspace", "slow"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """A real Llama-2-like one, a byte-level BPE, a small Llama-like one, bytes in plain Python."""
    if request.param == "metaspace":
        return metaspace()
    if request.param == "slow":
        from transformers import ByT5Tokenizer

        return ByT5Tokenizer()
    return load_tokenizer(request.getfixturevalue(request.param))


def metaspace() -> Any:
    """BPE over words that begin with U+2581, bytes for unknown characters, and a BOS token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    texts = ["The Last Voyage of the Heat, (1996)", "a user has watched the next movie, the title"]
    trained.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=120, show_progress=False, initial_alphabet=ALPHABET)
    )
    model = json.loads(trained.to_str())["model"]
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    tokenizer = Tokenizer(
        models.BPE(
            {token: place for place, token in enumerate(tokens)},
            [tuple(pair) for pair in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


ALPHABET = [chr(code) for code in range(ord("!"), ord("~") + 1)]
