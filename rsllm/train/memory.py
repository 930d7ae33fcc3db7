"""What a training step holds in memory, found out without weights and without the memory.

One forward and backward pass over fake tensors allocates nothing, but tells of every tensor how
large it is and how long it lives. A network is traced one and two layers deep, for each further
layer costs what the second did. What ZeRO and AdamW hold follows from their code (DeepSpeed 0.19;
arXiv 1910.02054, 2101.06840). All sizes are in bytes, of what is allocated: holes that an
allocator cannot fill come on top, on CPUs up to as much again (experiments/benchmarks/memory.py).

Axes: B rows, T tokens, D width, U states whose logits are asked for, V vocabulary, G distinct
target items, L tokens of an item.
"""

from __future__ import annotations

import os
import weakref
from collections import Counter
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from rsllm.compute.layout import Layout
from rsllm.config import REPRESENTATIONS, BackboneConfig, Experiment, Offload, StageConfig
from rsllm.errors import ConfigError
from rsllm.model.backbone import load_tokenizer, tunable
from rsllm.model.files import read_config
from rsllm.model.hybrid import HybridLM
from rsllm.prompts.collate import ItemTexts

Sizes = dict[str, float]
GIB = 2**30
CERTAINLY = 1.15
"""A launch is refused where it needs more than the memory by more than an estimate's error."""
PROCESS = {False: 0.65 * GIB, True: 1.0 * GIB}
"""Libraries and tokenizer on CPUs (measured, experiments/results/benchmarks/memory-2-cores.json);
a GPU's context and workspaces (assumed)."""
TEXT_TOKENS = 26
"""Tokens of a prompt that are neither titles nor slots (the three templates, SmolLM2's)."""
BUCKET, GATHERED = 20_000_000, 1_000_000_000
"""Elements: gradients that wait to be reduced (`rsllm.train.engine`), and what ZeRO 3 keeps
gathered (DeepSpeed's `stage3_max_live_parameters`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Sizes of one micro-batch, in tokens of its longest row."""

    rows: int
    prompt: int
    branches: int = 0
    """Behind the prompt: of one answer, or of all."""
    asked: int = 1
    """Of the prompt: after how many tokens the next one is to be foretold."""
    alone: int = 0
    """Of a target item on its own and the token before it, where there are contrasts."""
    parallel: bool = False
    """Whether a mask parts the branches."""

    @staticmethod
    def of(experiment: Experiment, stage: StageConfig, workers: int, title: float) -> Shape:
        """A worker's micro-batch of full histories, for titles of so many tokens on average."""
        prompt, loss = experiment.prompt, stage.loss
        letters, count = prompt.answer == "letter", experiment.data.num_candidates
        parts = REPRESENTATIONS[stage.representation]
        named = not {"title", "number"}.isdisjoint(parts)  # a number counts as a title does
        item = len(parts) - named + named * title
        rows = max(1, stage.batch_size // (workers * stage.accumulation))
        if stage.prompts == "history":
            tokens = min(prompt.history_items * (item + 1), prompt.max_tokens)
            silent = not named or loss.alpha + loss.beta == 1
            names = 0 if silent else (prompt.history_items - 1) * (title + 1)
            return Shape(rows=rows, prompt=round(tokens), asked=round(names))
        choice = (item if prompt.candidate_slots else title) + 3 * letters
        text = experiment.data.window * (item + 1) + count * (choice + 1) + TEXT_TOKENS
        ranked = loss.gamma > 0 and loss.scorer == "likelihood" and not letters
        return Shape(
            rows=rows,
            prompt=round(min(text, prompt.max_tokens)),
            branches=0 if letters else round((count if ranked else 1) * title),
            alone=1 + round(item) if loss.alpha or loss.beta else 0,
            parallel=ranked,
        )


class Step:
    """A training step of a causal LM, from its config alone.

    Args:
        source: a folder with a config.json.
        tuning: what of it trains.
        shape: its micro-batches.
        layout: how many workers share it, where, and in which precision.

    Attributes:
        whole: of one pass: `parameters` of the backbone, `trained` elements, bytes of `activations`
            and `logits` at their peak, and `flops`, operations, recomputed ones included.

    Raises:
        ConfigError: no config of a causal LM there.
    """

    def __init__(
        self, source: str | Path, tuning: BackboneConfig, shape: Shape, layout: Layout
    ) -> None:
        self.source, self.tuning, self.shape, self.layout = Path(source), tuning, shape, layout
        bf16, gpu = layout.precision == "bf16", layout.use_gpu
        self.dtype = torch.bfloat16 if bf16 and gpu else torch.float32
        self.autocast = bf16 and not gpu
        try:
            config = read_config(self.source)
            self.layers = tuning.layers or config.num_hidden_layers
            self.width = config.hidden_size
            # All layers are alike: what a second one adds, every further one does.
            self.first, two = (self._pass(copy(config), layers) for layers in (1, 2))
        except ConfigError:
            raise
        except Exception as error:  # whatever a foreign architecture makes of fake tensors
            raise ConfigError(f"cannot plan for backbone {source}: {error}") from error
        more = self.layers - 1
        self.whole = {n: size + more * (two[n] - size) for n, size in self.first.items()}

    def _pass(self, config: Any, layers: int) -> Sizes:
        from transformers import AttentionInterface, AutoModelForCausalLM
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        # Under a name for which transformers makes no masks of positions that it cannot read.
        AttentionInterface.register("rsllm", sdpa_attention_forward)
        config.num_hidden_layers = layers
        slots: Any = lambda tokens_BTD, item_BT: tokens_BTD.requires_grad_()  # noqa: E731
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=False
            )
            parameters = sum(p.numel() for p in model.requires_grad_(False).parameters())
            model = tunable(model, replace(self.tuning, gradient_checkpointing=False)).train()
            if model.config._attn_implementation == "sdpa":
                model.config._attn_implementation = "rsllm"
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        with FakeTensorMode(), FlopCounterMode(display=False) as flops:
            _make_fake(model, self.dtype)
            with _Alive(model, config.vocab_size) as alive:
                loss = _loss(HybridLM(model, slots), self.shape, self.autocast)
                again = flops.get_total_flops() if self.tuning.gradient_checkpointing else 0
                loss.backward()  # type: ignore[no-untyped-call]
        found = {"parameters": parameters, "trained": trained, **alive.peak}
        return found | {"flops": again + flops.get_total_flops()}

    def need(self, zero_stage: int, offload: Offload = "none") -> Sizes:
        """Bytes by part that a worker holds at the peak of a step, and their sum, `total`.

        The peak is where the backward pass starts (activations) or ends (gradients, one layer's
        activations), or in AdamW's update. What does not live then counts as 0.
        """
        state, first = self._state(zero_stage, offload), self.first["activations"]
        gradients, update = state.pop("gradients"), state.pop("update")
        backward, last = {"gradients": gradients, "activations": first}, {"gradients": gradients}
        moments: list[Sizes] = [self._forward(), backward, last | {"update": update}]
        empty = dict.fromkeys(("gradients", "update", "activations", "logits", "branches"), 0.0)
        largest: Sizes = max(moments, key=lambda moment: sum(moment.values()))
        parts = {"process": PROCESS[self.layout.use_gpu]} | state | empty | largest
        return parts | {"total": sum(parts.values())}

    def _forward(self) -> Sizes:
        """What the forward pass leaves: everything, or all layers' inputs and one layer."""
        shape, whole = self.shape, self.whole["activations"]
        if self.tuning.gradient_checkpointing:
            tokens = shape.rows * (shape.prompt + shape.branches + shape.alone)
            inputs = self.layers * tokens * self.width * self.dtype.itemsize
            whole = self.first["activations"] + inputs
        share = shape.branches / (shape.prompt + shape.branches) if shape.parallel else 0.0
        own, branches = (1 - share) * whole, share * whole
        return {"activations": own, "logits": self.whole["logits"], "branches": branches}

    def _state(self, zero_stage: int, offload: Offload) -> Sizes:
        """What DeepSpeed keeps; `update`: the flat gradient, and two temporaries of AdamW."""
        size, trained, workers = self.dtype.itemsize, self.whole["trained"], self.layout.workers
        own = trained / workers if zero_stage else trained
        held = 0.0 if offload == "parameters" else 1 / workers if zero_stage == 3 else 1.0
        weights = self.whole["parameters"] * size
        gathered = min(weights, GATHERED * size) if held < 1 else 0.0
        waiting = min(trained, BUCKET) * size if workers > 1 or size < 4 else 0.0
        state = {
            "weights": weights * held + gathered,
            "lora": trained * size * held if self.tuning.tuning == "lora" else 0.0,
            "optimizer": own * (12 if zero_stage else 8),  # fp32: its own weights, two moments
            "gradients": own * 4 + waiting if zero_stage >= 2 else trained * size,
            "update": own * 12 if zero_stage else 0.0,
        }
        away = {"optimizer": 0.0, "gradients": waiting, "update": 0.0}
        return state if offload == "none" else state | away


def _make_fake(model: Any, dtype: torch.dtype) -> None:
    """From `meta` to fake tensors of the CPU, of which kernels and casts are known."""
    made: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, old in [*module.named_parameters(recurse=False)]:
            new = nn.Parameter(torch.empty(old.shape, dtype=dtype), old.requires_grad)
            setattr(module, name, made.setdefault(old, new))
        for name, old in [*module.named_buffers(recurse=False)]:
            setattr(module, name, torch.empty(old.shape, dtype=old.dtype))
    for parameter in model.parameters():
        if parameter.requires_grad:  # gradients are counted apart, for ZeRO shares them
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))


def _loss(model: HybridLM, shape: Shape, autocast: bool) -> Tensor:
    """Stands for `LanguageObjective` or `HistoryObjective`, with tensors of the same sizes."""
    ids_BT = torch.zeros(shape.rows, shape.prompt + shape.branches, dtype=torch.long)
    ids_GL = torch.zeros(shape.rows, shape.alone, dtype=torch.long)
    at_U = torch.zeros(shape.rows * (shape.asked + shape.branches), dtype=torch.long)
    tokens = dict.fromkeys(("ids_BT", "item_BT", "branch_BT", "position_BT"), ids_BT)
    labels = dict.fromkeys(("state_U", "label_N", "label_state_N"), at_U)
    batch: Any = SimpleNamespace(parallel=shape.parallel, **tokens, **labels)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        states_BTD = model.states(batch)
        alone_GD = model.item_states(ItemTexts(ids_GL, ids_GL, ids_GL)) if shape.alone else None
    loss = model.label_log_probs(states_BTD, batch).sum()
    return loss if alone_GD is None else loss + states_BTD.float().sum() + alone_GD.sum()


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that live beside the model's own.

    Attributes:
        peak: bytes of activations and of logits when there were the most of both.
    """

    def __init__(self, model: Any, vocabulary: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak, self._now = Counter(activations=0, logits=0), Counter(activations=0, logits=0)
        self._seen = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
        self._vocabulary = vocabulary

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._seen:
                logits = tensor.shape[1:] == (self._vocabulary,)
                self._born(tensor.untyped_storage(), "logits" if logits else "activations")
        return out

    def _born(self, storage: Any, kind: str) -> None:
        self._seen.add(storage._cdata)
        self._now[kind] += storage.nbytes()
        if self._now.total() > self.peak.total():
            self.peak = self._now.copy()
        weakref.finalize(storage, self._died, storage._cdata, kind, storage.nbytes())

    def _died(self, key: int, kind: str, size: int) -> None:
        self._seen.discard(key)
        self._now[kind] -= size


def device_memory(gpu: bool) -> float:
    """Bytes of a GPU that this process sees, or of this machine."""
    if gpu:
        return float(torch.cuda.get_device_properties(0).total_memory)
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE"))


def check_fits(need: Sizes, name: str, memory: float) -> None:
    """Refuse to launch a stage that is doomed.

    Args:
        need: of its step, under the ZeRO stage and offload of the run.
        name: of the stage.
        memory: bytes that a worker can have at most.

    Raises:
        ConfigError: a step needs clearly more; the message names the settings that save memory.
    """
    *parts, total = need
    if need[total] > CERTAINLY * memory:
        raise ConfigError(
            f"{name} needs {need[total] / GIB:.1f} GiB per worker, most of it"
            f" {max(parts, key=lambda part: need[part])}, and there are {memory / GIB:.1f}; try"
            f" more {name}.accumulation or a smaller {name}.batch_size,"
            " backbone.gradient_checkpointing=true, a higher compute.zero_stage over more"
            " compute.workers, compute.offload, or a smaller backbone"
        )


def check_launch(
    experiment: Experiment, name: str, backbone: str | Path, titles: Sequence[str], layout: Layout
) -> None:
    """Refuse a stage that the memory of this worker cannot hold, before any weight is read.

    Raises:
        ConfigError: it cannot.
    """
    try:
        ids = load_tokenizer(backbone)(list(titles[:1000]), add_special_tokens=False).input_ids
        title, stage = fmean(map(len, ids)), getattr(experiment, name)
        shape = Shape.of(experiment, stage, layout.workers, title)
        step = Step(backbone, experiment.backbone, shape, layout)
    except ConfigError:
        return  # what cannot be planned may run all the same, or says more of itself
    compute, here = experiment.compute, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    memory = device_memory(layout.use_gpu) / (1 if layout.use_gpu else here)
    check_fits(step.need(compute.zero_stage, compute.offload), name, memory)
