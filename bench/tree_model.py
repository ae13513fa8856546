"""A model on token trees: training step and scoring pass, beside the usual packed form and one by one."""

from collections.abc import Sequence

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from bench.geometry import CONTEXTS, SWEEP, Geometry
from bench.registry import Run
from bench.rows import Rows
from bench.runner import DEVICE, DTYPE, GPU, free, memory, reason, timings
from pact_fast import (
    Policy,
    TreePack,
    context_logprobs,
    linear_logprob,
    linear_pact_loss,
    pack_linear,
    pack_tree,
)
from pact_fast.tree.families import attention_pairs, model_flops


def make_model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    if GPU:
        sizes = {
            "vocab_size": 151_936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
        }
        heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    else:
        sizes = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    config = Qwen3Config(**sizes, **heads, max_position_embeddings=32768, tie_word_embeddings=True)
    with torch.device(DEVICE):
        return Qwen3ForCausalLM(config).to(DTYPE)


def rows_of(pack: TreePack, starts: list[int]) -> torch.Tensor:
    """Packed tokens that carry a loss, each once."""
    return torch.cat([index[start:] for index, start in zip(pack.token_index, starts, strict=True)]).unique()


def loss_of(policy: Policy, pack: TreePack, starts: list[int], total: int) -> torch.Tensor:
    rows = rows_of(pack, starts)
    weight = torch.full((rows.numel(),), 1 / total, device=DEVICE)
    return linear_pact_loss(
        policy.hidden(pack), policy.head.weight, pack.input_ids[rows], row_index=pack.parent[rows],
        policy_weight=weight, advantages=torch.ones_like(weight), sft_weight=0.1 * weight,
    ).loss  # fmt: skip


def train_steps(policy: Policy, sequences, starts):
    """name -> forward, loss and backward over all sequences; both have the same rows and weights."""
    total = sum(len(s) - start for s, start in zip(sequences, starts, strict=True))

    def step(packs):
        policy.model.zero_grad(set_to_none=True)
        loss = 0.0
        for pack, begin in packs:
            value = loss_of(policy, pack, begin, total)
            value.backward()
            loss = loss + value.detach()
        return {"loss": loss, "grad": policy.model.model.layers[0].self_attn.q_proj.weight.grad}

    tree = pack_tree(sequences).to(DEVICE)
    runs = {"pact_fast/tree": lambda: step([(tree, starts)])}
    # The usual packed form, same kernels: as many whole sequences as give a pack of the tree's size.
    packs, begin = [], 0
    while begin < len(sequences):
        stop = begin + 1
        while stop < len(sequences) and sum(map(len, sequences[begin : stop + 1])) <= tree.num_tokens:
            stop += 1
        packs.append((pack_linear(sequences[begin:stop]).to(DEVICE), starts[begin:stop]))
        begin = stop
    runs["pact_fast/packed"] = lambda: step(packs)
    runs["transformers/sdpa_one_by_one"] = lambda: plain_step(policy, sequences, starts, total)
    return runs, tree, sum(pack.num_tokens for pack, _ in packs)


def plain_step(policy: Policy, sequences, starts, total: int):
    """Every sequence alone through transformers' own SDPA attention, with our loss head."""
    model = policy.model
    model.zero_grad(set_to_none=True)
    loss = 0.0
    for sequence, start in zip(sequences, starts, strict=True):
        ids = torch.as_tensor(sequence, device=DEVICE)
        with policy.fused_layers():  # the same layers on both sides
            hidden = model.model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        weight = torch.full((len(sequence) - start,), 1 / total, device=DEVICE)
        value = linear_pact_loss(
            hidden[start - 1 : -1], policy.head.weight, ids[start:], policy_weight=weight,
            advantages=torch.ones_like(weight), sft_weight=0.1 * weight,
        ).loss  # fmt: skip
        value.backward()
        loss = loss + value.detach()
    return {"loss": loss, "grad": model.model.layers[0].self_attn.q_proj.weight.grad}


def scoring_passes(policy: Policy, geometry: Geometry, vocab: int):
    sequences, starts = geometry.sequences("score", vocab)
    half = geometry.group
    x, shown = sequences[0][: geometry.x], sequences[half][: geometry.x + geometry.h]
    rollouts = [s[start:] for s, start in zip(sequences[:half], starts, strict=False)]

    @torch.no_grad()
    def tree():
        return {
            "logprobs": torch.cat([y for side in context_logprobs(policy, x, shown, rollouts) for y in side])
        }

    @torch.no_grad()
    def plain():
        out = []
        for sequence, start in zip(sequences, starts, strict=True):
            ids = torch.as_tensor(sequence, device=DEVICE)
            with policy.fused_layers():
                hidden = policy.model.model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
            out.append(linear_logprob(hidden[start - 1 : -1], policy.head.weight, ids[start:]))
        return {"logprobs": torch.cat(out)}

    @torch.no_grad()
    def packed():
        out = []
        for part in (slice(0, half), slice(half, None)):
            pack = pack_linear(sequences[part]).to(DEVICE)
            rows = torch.cat([i[start:] for i, start in zip(pack.token_index, starts[part], strict=True)])
            hidden = policy.hidden(pack)[rows - 1]
            out.append(linear_logprob(hidden, policy.head.weight, pack.input_ids[rows]))
        return {"logprobs": torch.cat(out)}

    return {"pact_fast/tree": tree, "pact_fast/packed": packed, "transformers/sdpa_one_by_one": plain}


def check_equal(runs: dict[str, Run]) -> dict[str, str]:
    """Variants that throw, or whose outputs are not those of the last that runs: name -> reason."""
    wrong: dict[str, str] = {}
    want: dict[str, torch.Tensor] = {}
    for name, run in reversed(runs.items()):
        try:
            got = {key: value.float() for key, value in run().items()}
        except Exception as error:
            wrong[name] = reason(error)
            free()
            continue
        want = want or {key: value.clone() for key, value in got.items()}
        for key, value in got.items():
            error = ((value - want[key]).norm() / want[key].norm()).item()
            # bf16 noise of 28 layers on a gradient; a wrong mask is off by its own size
            if not error < ((0.15 if key == "grad" else 2e-2) if GPU else 1e-4):
                wrong[name] = f"gate: {key} is off by {error:.1e}"
    return wrong


def tree_flops(policy: Policy, pack: TreePack, rows: int, *, backward: bool) -> float:
    """Useful operations of a pack, whichever way it is computed."""
    pairs = attention_pairs(policy.family, pack.position_ids)
    return model_flops(policy.family, pack.num_tokens, pairs, rows, backward=backward)


def peak_of_device() -> float | None:
    """FLOP/s of the data sheet; None for a device that the trainer does not know, or without its packages."""
    try:
        from pact_fast.train.step_metrics import peak_flops
    except ImportError as error:
        print(f"  left out: the share of the device's FLOP/s: {reason(error)}")
        return None
    return peak_flops(torch.device(DEVICE), None)


def bench_model(
    out: Rows,
    seconds: float,
    least: int = 5,
    sweep: Sequence[Geometry] = SWEEP,
    contexts: Sequence[str] = CONTEXTS,
) -> None:
    model = make_model()
    policy = Policy(
        model, gradient_checkpointing="keep_attention" if GPU else "none", kernels="auto"
    )  # a long one-by-one pass does not fit without it
    vocab = model.config.vocab_size
    for geometry in sweep:
        for chosen in contexts:
            sequences, starts = geometry.sequences(chosen, vocab)
            runs, tree, packed_tokens = train_steps(policy, sequences, starts)
            shape = f"{geometry} {chosen} tree={tree.num_tokens} packed={packed_tokens}"
            if out.has("train_step", "whole", shape):
                continue
            flops = tree_flops(policy, tree, rows_of(tree, starts).numel(), backward=True)
            measure_model(out, "train_step", shape, runs, seconds, flops, least)
            free()
        runs = scoring_passes(policy, geometry, vocab)
        sequences, starts = geometry.sequences("score", vocab)
        tree = pack_tree(sequences).to(DEVICE)
        flops = tree_flops(policy, tree, rows_of(tree, starts).numel(), backward=False)
        shape = f"{geometry} tree={tree.num_tokens}"
        if not out.has("score_both_contexts", "whole", shape):
            measure_model(out, "score_both_contexts", shape, runs, seconds, flops, least)
        model.zero_grad(set_to_none=True)
        free()


def measure_model(
    out: Rows, op: str, shape: str, runs: dict[str, Run], seconds: float, flops: float, least: int
) -> None:
    left_out = check_equal(runs)
    runs = {name: run for name, run in runs.items() if name not in left_out}
    kinds, failed = timings(runs, DEVICE, seconds, least)

    def add(name: str, metric: str, unit: str, values: list[float]) -> None:
        out.add(op, name, "whole", shape, DTYPE, metric, unit, values)

    for what, samples in kinds.items():
        for name, values in samples.items():
            add(name, what, "ms", values)
            if ours := samples.get("pact_fast/tree"):  # ratios of neighbours in time
                add(name, f"{what} over the tree's", "x", [a / b for a, b in zip(values, ours, strict=True)])
    peak = peak_of_device() if GPU else None
    for name, values in kinds["time"].items():
        if peak is not None:
            used = [flops / (ms / 1e3) / peak for ms in values]
            add(name, f"useful share of {peak / 1e12:.0f} TFLOP/s", "", used)
        if GPU:
            try:
                add(name, "peak_memory", "GiB", [memory(runs[name])["peak_memory"]])
            except Exception as error:
                failed[name] = reason(error)
    for name, why in (left_out | failed).items():
        out.leave_out(f"{op} {shape}", name, why)
