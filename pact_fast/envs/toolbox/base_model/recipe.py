"""Recipe of the small base model: what an instruct model is to the real benchmarks, this one is to the
toolbox.

    python -m pact_fast.envs.toolbox.base_model.recipe --out DIR

trains the tokenizer and the model from nothing on `toolbox.base_records` (generic call format, copying,
plans, spelled-out procedures and worked references, on worlds that no split uses): about 10 minutes on one
core, the same weights for the same seed, torch and thread count. The base follows the format mostly and
solves some tasks, well under half; every preset starts from it.

`--reference turns` makes another base, for the question of docs/results.md ("Transfer"): worked references
stand before it as turns of the conversation, as PACT's `trace_context: concat` shows them.

Left out on purpose: dropout, weight averaging, checkpoints. It is one short run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import DynamicCache, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from pact_fast.data.chat import ChatFormat, Component, Tokens
from pact_fast.data.records import Record
from pact_fast.envs.toolbox import BaseMix, base_records
from pact_fast.envs.toolbox.base_model.induction import write_induction_circuit
from pact_fast.envs.toolbox.base_model.tokenizer import record_texts, train_tokenizer

TARGETS = (
    Component.REASONING,
    Component.STRUCTURE,
    Component.TOOL_CALL,
    Component.ANSWER,
    Component.THINK_TAG,
)


DRILL = BaseMix(
    copy_share=0.3,
    command_share=0.6,
    plan_share=0.1,
    procedure_share=0.0,
    reference_share=0.0,
    hasty_share=0.0,
)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights."""

    seed: int = 0
    steps: int = 1300
    batch_rows: int = 32
    learning_rate: float = 3e-3
    warmup: int = 60
    drill_steps: int = 40  # first steps: short rows, names copied and calls spelled out
    hidden: int = 64
    layers: int = 4
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 32
    intermediate: int = 256
    reference: str = "message"  # or "turns": where a worked reference stands


def make_base(recipe: Recipe, out: Path) -> None:
    """Train tokenizer and model and write them to `out` in the Hugging Face layout, weights in bfloat16."""
    torch.manual_seed(recipe.seed)
    tokenizer = make_tokenizer(recipe.seed)
    chat = ChatFormat.for_tokenizer(tokenizer)
    model = Qwen3ForCausalLM(model_config(recipe, tokenizer))
    write_induction_circuit(model)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, vocabulary {len(tokenizer)}")
    drills = recipe.drill_steps * recipe.batch_rows
    records = base_records(drills, recipe.seed + 1, DRILL)
    records += base_records(recipe.steps * recipe.batch_rows - drills, recipe.seed)
    rows = [conversation(chat, record, recipe.reference) for record in records]
    train(model, rows, recipe)
    out.mkdir(parents=True, exist_ok=True)
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Trained on demonstrations of every difficulty, so that harder settings need no other tokenizer."""
    records = base_records(1500, seed)
    for difficulty in (2, 3):
        records += base_records(500, seed, BaseMix(difficulty=difficulty))
    return train_tokenizer(record_texts(records))


def model_config(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        initializer_range=0.05,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )


def conversation(chat: ChatFormat, record: Record, reference: str = "message") -> Tokens:
    """A record as the model is taught it; its worked reference, if any, in the user message or as turns,
    then without the answer and not taught."""
    shown = record.env.get("reference")
    if shown and reference == "turns":
        turns = chat.trace(shown if shown[-1]["role"] == "tool" else shown[:-1])
        turns.components = [int(Component.CONTEXT)] * len(turns)
        return chat.prompt(record.prompt, record.tools) + turns + chat.trace(record.expert_trace)
    privileged = chat.render_trace(shown) if shown else None
    return chat.prompt(record.prompt, record.tools, privileged=privileged) + chat.trace(record.expert_trace)


def batches(rows: Sequence[Tokens], recipe: Recipe) -> Iterator[list[Tokens]]:
    """One pass over the rows; rows of like length share a batch (twice the speed), the batches come in
    random order."""
    generator = torch.Generator().manual_seed(recipe.seed)
    pool = 40 * recipe.batch_rows
    for start in range(0, len(rows), pool):
        chunk = sorted(rows[start : start + pool], key=len)
        starts = range(0, len(chunk), recipe.batch_rows)
        for i in torch.randperm(len(starts), generator=generator).tolist():
            yield chunk[starts[i] : starts[i] + recipe.batch_rows]


def train(model: Qwen3ForCausalLM, rows: Sequence[Tokens], recipe: Recipe) -> None:
    decay = [p for p in model.parameters() if p.ndim > 1]
    no_decay = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": no_decay, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_scale(step, recipe))
    begin, tokens, shown_loss = time.perf_counter(), 0, 0.0
    for step, batch in enumerate(batches(rows, recipe), 1):
        loss = batch_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        tokens += sum(map(len, batch))
        shown_loss = loss.item() if step == 1 else 0.95 * shown_loss + 0.05 * loss.item()
        if step % 50 == 0:
            seconds = time.perf_counter() - begin
            speed = f"{tokens / seconds:,.0f} tokens/s {seconds:.0f} s"
            print(f"step {step}/{recipe.steps} loss {shown_loss:.3f} {speed}", flush=True)


def learning_rate_scale(step: int, recipe: Recipe) -> float:
    """Linear warm-up, constant for half of the run, then linear to a fiftieth."""
    left = (recipe.steps - step) / (recipe.steps / 2)
    return min((step + 1) / recipe.warmup, 1.0, max(left, 0.02))


def batch_loss(model: Qwen3ForCausalLM, batch: Sequence[Tokens]) -> torch.Tensor:
    """Mean cross-entropy of what the assistant writes. The rows' common beginning is run once."""
    shared = common_prefix(batch)
    width = max(map(len, batch)) - shared
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    targets = torch.full((len(batch), width), -100)
    for i, row in enumerate(batch):
        tail = row[shared:]
        ids[i, : len(tail)] = torch.tensor(tail.ids)
        wanted = torch.tensor([component in TARGETS for component in tail.components])
        targets[i, : len(tail)] = torch.where(wanted, ids[i, : len(tail)], -100)
    cache = DynamicCache(config=model.config)
    # By position: transformers 5.17 calls the fourth argument past_key_values, later ones cache.
    model.model(torch.tensor([batch[0].ids[:shared]]), None, None, cache, use_cache=True)
    cache.batch_repeat_interleave(len(batch))
    hidden = model.model(ids, None, None, cache, use_cache=True).last_hidden_state
    live = targets[:, 1:] >= 0
    logits = model.lm_head(hidden[:, :-1][live])
    return torch.nn.functional.cross_entropy(logits, targets[:, 1:][live])


def common_prefix(batch: Sequence[Tokens]) -> int:
    """Number of leading tokens that all rows share; at least one is left for every row, and at least one
    taken."""
    first = batch[0].ids
    limit = min(map(len, batch)) - 1
    shared = next((i for i in range(limit) if any(row.ids[i] != first[i] for row in batch)), limit)
    return max(1, shared)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pact_fast.envs.toolbox.base_model.recipe", description=__doc__
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--reference", choices=("message", "turns"), default=Recipe.reference)
    arguments = parser.parse_args(argv)
    made = Recipe(seed=arguments.seed, steps=arguments.steps, reference=arguments.reference)
    make_base(made, arguments.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
