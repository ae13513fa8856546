"""Rollouts: tokens a second beside transformers, time to first token, prefill, share of the memory floor.

    pact-fast bench rollout [--model M] [--rows 8,64,256] [--prompt 0] [--group 8] [--new 64] [--out PATH]

G rows of a prompt stand beside each other (--group). On a CPU: fp32, one thread, the bundled model and its
real prompts (--prompt 0); processor time beside the wall's, which other load hardly touches. On a GPU: bf16,
random weights of a named shape, random prompts of --prompt tokens, and the share of the memory floor: what a
step must read at least, once, at the card's bandwidth,

    floor = steps x (weights + keys and values of each distinct token in flight) bytes / bandwidth

with a prompt counted once for its group. Providers take turns in one process. A vLLM server is measured where
--server names one (http://HOST:PORT, started with any model: its own is what is timed).
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, Qwen3Config

from bench.rows import LOCAL, OUT_HELP, Rows
from pact_fast.data.chat import ChatFormat
from pact_fast.envs.base import make_env
from pact_fast.envs.toolbox.base_model import base_model_path
from pact_fast.rollout import InProcessEngine

# Bytes a second of device memory, from the data sheets.
BANDWIDTH = {"H100 PCIe": 2.0e12, "H100": 3.35e12, "H200": 4.8e12, "A100": 2.04e12, "B200": 8.0e12}
SHAPES: dict[str, Callable[[], Any]] = {
    "qwen3-1.7b": lambda: Qwen3Config(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, max_position_embeddings=32768,
        tie_word_embeddings=True,
    ),
    "smollm2-135m": lambda: LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, head_dim=64, max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
}  # fmt: skip
Sample = Callable[[int], int]  # new tokens a row -> tokens sampled in all


def main(argv: Sequence[str]) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "pact-fast bench rollout", description=__doc__, formatter_class=formatter
    )
    parser.add_argument("--model", help=f"a folder, toolbox-base, or {', '.join(SHAPES)} with random weights")
    parser.add_argument("--rows", default="8,64,256", help="rows in flight (default 8,64,256)")
    parser.add_argument("--prompt", type=int, default=0, help="tokens of a prompt; 0: the toolbox's own")
    parser.add_argument("--group", type=int, default=8, help="rows of a prompt (default 8)")
    parser.add_argument("--new", type=int, default=64, help="tokens a row (default 64)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--provider", default="", help="only providers whose name contains this")
    parser.add_argument("--server", help="a vLLM server to be measured, too")
    parser.add_argument("--out", type=Path, default=LOCAL, help=OUT_HELP)
    args = parser.parse_args(argv)
    gpu = torch.cuda.is_available()
    if not gpu:
        torch.set_num_threads(1)
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    out = Rows(args.out, device)
    name = args.model or ("qwen3-1.7b" if gpu else "toolbox-base")
    model = load(name, dtype).to(device).eval()
    engine = InProcessEngine(model, kv_memory=0.5)
    for count in map(int, args.rows.split(",")):
        prompts = prompts_of(model, count, args.prompt, args.group)
        tokens = sum(map(len, prompts)) // count
        shape = f"model={name} rows={count} prompt={tokens} group={args.group} new={args.new}"
        samplers = providers(engine, model, prompts, args.server)
        chosen = {n: sample for n, sample in samplers.items() if args.provider in n}
        measure(out, shape, dtype, chosen, count, args.new, args.rounds)
        if "pact_fast/in_process" in chosen:
            more(out, shape, dtype, engine, prompts, args.new, args.rounds)
    return out.status()


def load(name: str, dtype: torch.dtype) -> Any:
    if name in SHAPES:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(SHAPES[name](), dtype=dtype)
    path = base_model_path() if name == "toolbox-base" else name
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def prompts_of(model: Any, rows: int, length: int, group: int) -> list[list[int]]:
    if length:
        torch.manual_seed(1)
        distinct = torch.randint(5, model.config.vocab_size, (-(-rows // group), length)).tolist()
    else:
        chat = ChatFormat.for_tokenizer(AutoTokenizer.from_pretrained(base_model_path()))
        env = make_env("toolbox", {})
        distinct = [chat.prompt(r.prompt, r.tools).ids for r in env.records("train")]
        env.close()
    return [distinct[i // group % len(distinct)] for i in range(rows)]


def providers(
    engine: InProcessEngine, model: Any, prompts: list[list[int]], server: str | None
) -> dict[str, Sample]:
    rows = len(prompts)

    def ours(new: int) -> int:
        engine.weights_changed()  # nothing is cached, and the copy of the weights is part of the time
        drawn = engine.generate(
            prompts, max_new_tokens=[new] * rows, temperature=1.0, stop_token_ids=(), seed=range(rows)
        )
        return sum(len(row.token_ids) for row in drawn)

    def config(new: int, **more: Any) -> GenerationConfig:
        options = {"do_sample": True, "top_k": 0, "eos_token_id": -1, "pad_token_id": 0}
        return GenerationConfig(max_new_tokens=new, min_new_tokens=new, **options, **more)

    def generate(new: int) -> int:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
        with torch.no_grad():
            drawn = model.generate(ids, attention_mask=mask, generation_config=config(new))
        return (drawn.shape[1] - width) * rows

    def generate_batch(new: int) -> int:
        drawn = model.generate_batch(inputs=prompts, generation_config=config(new), progress_bar=False)
        return sum(len(row.generated_tokens) for row in drawn.values())

    found: dict[str, Sample] = {
        "pact_fast/in_process": ours,
        "transformers/generate": generate,
        "transformers/generate_batch": generate_batch,
    }
    if server:
        found["vllm/http"] = http(server, prompts)
    return found


def http(server: str, prompts: list[list[int]]) -> Sample:
    import json
    import urllib.request

    def post(path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            server.rstrip("/") + path, data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)

    model = post("/v1/models")["data"][0]["id"]

    def sample(new: int) -> int:
        body = {"model": model, "prompt": prompts, "max_tokens": new, "temperature": 1.0, "ignore_eos": True}
        return int(post("/v1/completions", body)["usage"]["completion_tokens"])

    return sample


def measure(
    out: Rows, shape: str, dtype: torch.dtype, samplers: dict[str, Sample], rows: int, new: int, rounds: int
) -> None:
    wall: dict[str, list[float]] = {name: [] for name in samplers}
    processor: dict[str, list[float]] = {name: [] for name in samplers}
    failed: dict[str, str] = {}
    for number in range(rounds + 1):  # the first one warms up
        for name, sample in samplers.items():
            if name in failed:
                continue
            begin, used = time.perf_counter(), time.process_time()
            try:
                tokens = sample(new)
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {str(error)[:200]}"
                continue
            if tokens != rows * new:
                failed[name] = f"{tokens} tokens instead of {rows * new}"
            elif number:
                wall[name].append(tokens / (time.perf_counter() - begin))
                processor[name].append(tokens / (time.process_time() - used))
    for name in samplers:
        if name in failed:
            out.leave_out("rollout", name, failed[name])
            continue
        out.add("rollout", name, "sample", shape, dtype, "tokens", "1/s", wall[name])
        if out.where["gpu"] == "cpu":
            out.add(
                "rollout", name, "sample", shape, dtype, "tokens by processor time", "1/s", processor[name]
            )


def more(
    out: Rows, shape: str, dtype: torch.dtype, engine: InProcessEngine, prompts: list[list[int]], new: int,
    rounds: int,
) -> None:  # fmt: skip
    """Time to first token, prefill, and the share of the floor, of our own engine."""
    rows, name = len(prompts), "pact_fast/in_process"
    distinct = {tuple(p) for p in prompts}
    first: list[float] = []
    for _ in range(rounds):
        engine.prepare()
        engine.scheduler.forget()
        begin = time.perf_counter()
        engine.generate(
            prompts, max_new_tokens=[1] * rows, temperature=1.0, stop_token_ids=(), seed=range(rows)
        )
        first.append(time.perf_counter() - begin)
    out.add("rollout", name, "prefill", shape, dtype, "time to first token", "ms", [1e3 * t for t in first])
    out.add(
        "rollout",
        name,
        "prefill",
        shape,
        dtype,
        "prompt tokens",
        "1/s",
        [sum(map(len, distinct)) / t for t in first],
    )
    bandwidth = next((b for card, b in BANDWIDTH.items() if card in out.where["gpu"]), None)
    if bandwidth is None:
        return
    floor = floor_seconds(engine, [len(p) for p in distinct], rows, new, bandwidth)
    speed = statistics.median(
        [
            float(r["p50"])
            for r in out.rows
            if r["shape"] == shape and r["metric"] == "tokens" and r["impl"] == "in_process"
        ]
    )
    out.add(
        "rollout",
        name,
        "sample",
        shape,
        dtype,
        "share of the memory floor",
        "",
        [floor * speed / (rows * new)],
    )


def floor_seconds(
    engine: InProcessEngine, prompts: Sequence[int], rows: int, new: int, bandwidth: float
) -> float:
    """Seconds of reading for `new` tokens of every row; prompts: lengths of the distinct ones."""
    family, weights = engine.weights.family, engine.weights
    token = (
        2 * len(family.layers) * family.kv_heads * family.head_dim * weights.dtype.itemsize
    )  # keys and values
    keys = new * sum(prompts) + rows * new * (new - 1) / 2
    return (new * weights.bytes + token * keys) / bandwidth
