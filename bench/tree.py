"""Token trees beside one-by-one packing: attention, training step, scoring pass, packer.

    python bench/tree.py [attention] [model] [packer] [--seconds 3] [--out FOLDER]

On a GPU: attention at the head counts of Qwen3-1.7B and 4B, and a Qwen3-1.7B-shaped model with random
weights.
Elsewhere: a 4-layer model on the CPU, in fp32. All variants of a comparison are checked against each other
    first, and then timed in turn in one process. Attention is given in effective TFLOP/s: floating-point
    operations of the visible pairs of the tree only, whatever a provider computes beside them. Without an
    argument: everything.
"""

import argparse
import gc
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from report import write_csv  # noqa: E402
from runner import machine, memory, times  # noqa: E402
from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: E402

from pact_fast import (  # noqa: E402
    Policy,
    TreePack,
    context_logprobs,
    linear_logprob,
    linear_pact_loss,
    pack_linear,
    pack_tree,
)
from pact_fast.kernels import tree_native  # noqa: E402
from pact_fast.ops import tree_attention, tree_plan  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32
H100_BF16_FLOPS = 989e12  # dense, from the data sheet


@dataclass(frozen=True)
class Geometry:
    """Lengths of the prompt x, the trace h and a rollout y, and rollouts per prompt."""

    x: int
    h: int
    y: int
    group: int

    def __str__(self) -> str:
        return f"x={self.x} h={self.h} y={self.y} G={self.group}"

    def sequences(self, contexts: str, vocab: int) -> tuple[list[np.ndarray], list[int]]:
        """Sequences of one prompt, where their scored part begins; contexts "trace", "both" or "score"."""
        draw = np.random.default_rng(0)
        x, h, shown = (draw.integers(0, vocab, n) for n in (self.x, self.h, self.h))
        rollouts = [draw.integers(0, vocab, self.y) for _ in range(self.group)]
        plain = [np.concatenate((x, y)) for y in rollouts]
        conditioned = [np.concatenate((x, shown, y)) for y in rollouts]
        chosen = conditioned if contexts == "trace" else plain + conditioned
        starts = [len(s) - self.y for s in chosen]
        if contexts == "score":
            return chosen, starts
        return [np.concatenate((x, h)), *chosen], [self.x, *starts]


MAIN = Geometry(3000, 2000, 1500, 8) if GPU else Geometry(600, 400, 300, 8)
OTHERS = (
    ((3000, 2000, 1500, 16), (3000, 2000, 1500, 2), (500, 2000, 6000, 8), (12000, 2000, 1500, 8))
    if GPU
    else ((600, 400, 300, 2), (100, 100, 600, 8))
)
SWEEP = [MAIN, *(Geometry(*lengths) for lengths in OTHERS)]


class Rows:
    """CSV rows of one comparison."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []
        self.where = machine()

    def add(self, op, name, mode, shape, metric, unit, values) -> None:
        marks = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 4
        provider, impl = name.split("/")
        row = {"op": op, "provider": provider, "impl": impl, "mode": mode, "shape": str(shape)}
        row |= {"dtype": str(DTYPE).removeprefix("torch."), "metric": metric, "unit": unit}
        row |= {"p20": f"{marks[0]:.4g}", "p50": f"{statistics.median(values):.4g}", "p80": f"{marks[3]:.4g}"}
        self.rows.append(row | self.where)
        print(f"{op:20s} {name:30s} {mode:17s} {shape}: {row['p50']} {unit} {metric}", flush=True)


def free() -> None:
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()


# ---- attention


def sdpa_one_by_one(q, k, v, pack: TreePack):
    """What tree packing replaces: every sequence alone, its prefix again each time."""
    group = q.shape[1] // k.shape[1]
    out = []
    for index in pack.token_index:
        heads = (
            x[index].transpose(0, 1)[None]
            for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
        )
        out.append(F.scaled_dot_product_attention(*heads, is_causal=True)[0].transpose(0, 1))
    return out


def attention_providers(q, k, v, pack: TreePack):
    """name -> function that returns outputs to differentiate; and why the absent ones are left out."""
    providers, left_out = {}, {}
    for impl in ("triton", "flex", "flash") if GPU else ("torch",):
        try:
            plan = tree_plan(pack.subtree_end, impl=impl)
            run = lambda plan=plan: [tree_attention(q, k, v, pack.subtree_end, plan=plan)]  # noqa: E731
            run()
            providers[f"{'pact_fast' if impl in ('triton', 'torch') else impl}/{impl}"] = run
        except Exception as error:
            left_out[impl] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    providers["torch/sdpa_one_by_one"] = lambda: sdpa_one_by_one(q, k, v, pack)
    return providers, left_out


def check_attention(head_dim: int, heads: tuple[int, int]) -> None:
    """RuntimeError unless every provider agrees with the fp32 reference on a small tree, gradients too."""
    sequences, _ = Geometry(200, 120, 90, 3).sequences("both", 1000)
    pack = pack_tree(sequences).to(DEVICE)
    q, k, v = attention_inputs(pack.num_tokens, heads, head_dim)
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    reference = tree_attention(*exact, pack.subtree_end, impl="torch")
    d_out = torch.randn_like(reference)
    # One by one, a shared row takes part once for each sequence that holds it: weigh it by how many do.
    count = torch.bincount(torch.cat(pack.token_index), minlength=pack.num_tokens)[:, None, None]
    want = [reference, *torch.autograd.grad(reference, exact, d_out)]
    providers, _ = attention_providers(q, k, v, pack)
    for name, run in providers.items():
        out = run()
        upstream = (
            [d_out.to(DTYPE)] if len(out) == 1 else [(d_out / count)[i].to(DTYPE) for i in pack.token_index]
        )
        grads = torch.autograd.grad(out, (q, k, v), upstream)
        full = (
            out[0]
            if len(out) == 1
            else reference.detach()
            .clone()
            .index_copy_(0, torch.cat(pack.token_index), torch.cat(out).float())
        )
        for what, got, exact_value in zip(("out", "dq", "dk", "dv"), [full, *grads], want, strict=True):
            error = ((got.float() - exact_value).norm() / exact_value.norm()).item()
            if not error < (2e-2 if GPU else 1e-4):
                raise RuntimeError(f"{name}: {what} is off by {error:.1e}")


def attention_inputs(tokens: int, heads: tuple[int, int], head_dim: int):
    torch.manual_seed(0)
    shapes = [(tokens, n, head_dim) for n in (heads[0], heads[1], heads[1])]
    return [torch.randn(s, device=DEVICE).to(DTYPE).requires_grad_() for s in shapes]


def bench_attention(seconds: float) -> list[dict[str, object]]:
    rows = Rows()
    models = {"Qwen3-1.7B": (16, 8), "Qwen3-4B": (32, 8)} if GPU else {"tiny": (4, 2)}
    head_dim = 128 if GPU else 32
    for model, heads in models.items():
        check_attention(head_dim, heads)
        for geometry in SWEEP:
            pack = pack_tree(geometry.sequences("both", 1000)[0]).to(DEVICE)
            q, k, v = attention_inputs(pack.num_tokens, heads, head_dim)
            providers, left_out = attention_providers(q, k, v, pack)
            flops = 4 * int((pack.position_ids + 1).sum()) * heads[0] * head_dim
            shape = f"{model} {geometry} T={pack.num_tokens}"
            for mode, factor in (("forward", 1.0), ("backward", 2.5), ("forward+backward", 3.5)):
                for name, samples in times(
                    attention_runs(providers, (q, k, v), mode), DEVICE, seconds
                ).items():
                    rows.add("tree_attention", name, mode, shape, "time", "ms", samples)
                    rates = [factor * flops / ms / 1e9 for ms in samples]
                    rows.add("tree_attention", name, mode, shape, "effective", "TFLOP/s", rates)
            for name, why in left_out.items():
                print(f"tree_attention: {name} left out: {why}")
            del q, k, v, providers
            free()
    return rows.rows


def attention_runs(providers, inputs, mode: str):
    def forward(run):
        with torch.no_grad():
            return {"out": run()[0]}

    def both(run):
        out = run()
        return dict(enumerate(torch.autograd.grad(out, inputs, [torch.ones_like(o) for o in out])))

    def backward(out, upstream):
        return dict(enumerate(torch.autograd.grad(out, inputs, upstream, retain_graph=True)))

    runs = {}
    for name, run in providers.items():
        if mode == "backward":
            out = run()
            upstream = [torch.ones_like(o) for o in out]
            runs[name] = lambda out=out, upstream=upstream: backward(out, upstream)
        else:
            step = forward if mode == "forward" else both
            runs[name] = lambda run=run, step=step: step(run)
    return runs


# ---- whole model


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


def check_equal(runs) -> None:
    """RuntimeError unless all variants give the same outputs."""
    names = list(runs)
    want = {key: value.float().clone() for key, value in runs[names[-1]]().items()}
    for name in names[:-1]:
        for key, value in runs[name]().items():
            error = ((value.float() - want[key]).norm() / want[key].norm()).item()
            # bf16 noise of 28 layers on a gradient; a wrong mask is off by its own size
            if not error < ((0.15 if key == "grad" else 2e-2) if GPU else 1e-4):
                raise RuntimeError(f"{name}: {key} differs from {names[-1]} by {error:.1e}")


def model_flops(model, pack: TreePack, rows: int, passes: int) -> float:
    """Useful operations of a pack: matrix weights, visible pairs, the head's rows; a backward counts 2."""
    c = model.config
    weights = sum(p.numel() for n, p in model.model.named_parameters() if p.dim() == 2 and "embed" not in n)
    pairs = int((pack.position_ids + 1).sum())
    attention = 4 * pairs * c.num_attention_heads * c.head_dim * c.num_hidden_layers
    return passes * (2 * weights * pack.num_tokens + attention + 2 * rows * c.hidden_size * c.vocab_size)


def bench_model(seconds: float) -> list[dict[str, object]]:
    rows = Rows()
    model = make_model()
    policy = Policy(model, gradient_checkpointing=GPU)  # a long one-by-one pass does not fit without it
    vocab = model.config.vocab_size
    for geometry in SWEEP:
        for contexts in ("trace", "both"):
            sequences, starts = geometry.sequences(contexts, vocab)
            runs, tree, packed_tokens = train_steps(policy, sequences, starts)
            shape = f"{geometry} {contexts} tree={tree.num_tokens} packed={packed_tokens}"
            flops = model_flops(model, tree, rows_of(tree, starts).numel(), 3)
            measure_model(rows, "train_step", shape, runs, seconds, flops)
            free()
        runs = scoring_passes(policy, geometry, vocab)
        sequences, starts = geometry.sequences("score", vocab)
        tree = pack_tree(sequences).to(DEVICE)
        flops = model_flops(model, tree, rows_of(tree, starts).numel(), 1)
        measure_model(rows, "score_both_contexts", f"{geometry} tree={tree.num_tokens}", runs, seconds, flops)
        model.zero_grad(set_to_none=True)
        free()
    return rows.rows


def measure_model(rows: Rows, op: str, shape: str, runs, seconds: float, flops: float) -> None:
    check_equal(runs)
    samples = times(runs, DEVICE, seconds) if GPU else cpu_times(rows, op, shape, runs, seconds)
    ours = statistics.median(samples["pact_fast/tree"])
    for name, values in samples.items():
        rows.add(op, name, "whole", shape, "time", "ms", values)
        rows.add(op, name, "whole", shape, "speed-up of the tree", "x", [statistics.median(values) / ours])
        if GPU:
            used = [flops / (ms / 1e3) / H100_BF16_FLOPS for ms in values]
            rows.add(op, name, "whole", shape, "useful share of 989 TFLOP/s", "", used)
            rows.add(op, name, "whole", shape, "peak_memory", "GiB", [memory(runs[name])["peak_memory"]])


def cpu_times(rows: Rows, op: str, shape: str, runs, seconds: float) -> dict[str, list[float]]:
    """Milliseconds on the wall, variants in turn. The processor's own time, which other load on the machine
    does not touch, becomes rows of its own."""
    wall: dict[str, list[float]] = {name: [] for name in runs}
    used: dict[str, list[float]] = {name: [] for name in runs}
    begin = time.perf_counter()
    while len(wall["pact_fast/tree"]) < 5 or time.perf_counter() - begin < seconds:
        for name, run in runs.items():
            start, cpu = time.perf_counter(), time.process_time()
            run()
            used[name].append((time.process_time() - cpu) * 1e3)
            wall[name].append((time.perf_counter() - start) * 1e3)
    ours = statistics.median(used["pact_fast/tree"])
    for name, values in used.items():
        rows.add(op, name, "whole", shape, "processor time", "ms", values)
        ratio = [statistics.median(values) / ours]
        rows.add(op, name, "whole", shape, "speed-up of the tree, processor time", "x", ratio)
    return wall


# ---- packer


def bench_packer(seconds: float) -> list[dict[str, object]]:
    """Sequence tokens a second: 2,048 sequences of 5,000 tokens, 32 behind each of 64 prompts of 3,500."""
    rows = Rows()
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, 150_000, 3500) for _ in range(64)]
    sequences = [np.concatenate((x, draw.integers(0, 150_000, 1500))) for x in prompts for _ in range(32)]
    total = sum(map(len, sequences))
    for impl in ("native", "numpy") if tree_native.library() is not None else ("numpy",):
        rates, begin = [], time.perf_counter()
        while len(rates) < 5 or time.perf_counter() - begin < seconds:
            start = time.perf_counter()
            pack_tree(sequences, impl=impl)
            rates.append(total / (time.perf_counter() - start) / 1e6)
        rows.add("pack_tree", f"pact_fast/{impl}", "whole", "2048 x 5000", "throughput", "Mtoken/s", rates)
    return rows.rows


BENCHES = {"attention": bench_attention, "model": bench_model, "packer": bench_packer}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", help=f"of {', '.join(BENCHES)}; default: all")
    parser.add_argument("--seconds", type=float, default=3.0, help="time per comparison (default 3)")
    parser.add_argument("--main-shape", action="store_true", help="only the main lengths")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    args = parser.parse_args(argv)
    if unknown := set(args.what) - set(BENCHES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(BENCHES)}")
    if args.main_shape:
        SWEEP[1:] = []
    label = torch.cuda.get_device_name().replace(" ", "-").lower() if GPU else "cpu"
    for what in args.what or BENCHES:
        rows = BENCHES[what](args.seconds)
        write_csv(args.out / f"{label}.csv", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
