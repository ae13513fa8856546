"""The decode ops beside what PyTorch offers without them. One mode, "step": a layer of one decoding step, a
layer of one prefill, or one draw a row.

`torch/whole rows` is attention without pages and without sharing: every row has its own copy of its prompt,
in one tensor, and one SDPA call reads it all. The copy is made beforehand.
"""

from types import SimpleNamespace

import torch
from torch.nn import functional as F

from bench.registry import Op, Run, Shape, Unavailable, provider, register
from pact_fast.kernels.decode import ops
from pact_fast.kernels.decode.tasks import RowPath, Segment, decode_tasks, extend_tasks, segment_slots

STEP = "step"
PAGE = 64
QWEN3 = {"Hq": 16, "Hkv": 8, "D": 128}  # Qwen3-1.7B
SMOL = {"Hq": 9, "Hkv": 3, "D": 64}  # SmolLM2-135M
TINY = {"Hq": 4, "Hkv": 2, "D": 32}


def shape(heads: dict[str, int], why: str = "", **sizes: int) -> Shape:
    return Shape({**sizes, **heads}, why=why)


def cache(i: SimpleNamespace, s: dict[str, int], tokens: int, dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator(device=device).manual_seed(0)
    i.draw = lambda *size: torch.randn(*size, generator=generator, device=device).to(dtype)
    pages = -(-tokens // PAGE) + 1
    i.k, i.v = (i.draw(pages * PAGE, s["Hkv"], s["D"]) for _ in range(2))
    i.free = torch.randperm(pages, generator=torch.Generator().manual_seed(0)).tolist()
    i.scale = s["D"] ** -0.5


def take(i: SimpleNamespace, tokens: int) -> list[int]:
    return [i.free.pop() for _ in range(-(-tokens // PAGE))]


def decode_inputs(shape: Shape, dtype: torch.dtype, device: str) -> SimpleNamespace:
    """`prompts` prompts of `prompt` tokens, `group` rows below each with `own` tokens of their own."""
    s, i = shape.sizes, SimpleNamespace()
    rows = s["prompts"] * s["group"]
    cache(i, s, s["prompts"] * (s["prompt"] + PAGE) + rows * (s["own"] + PAGE), dtype, device)
    segments = [Segment(take(i, s["prompt"]), s["prompt"]) for _ in range(s["prompts"])]
    paths = [RowPath([n // s["group"]], take(i, s["own"])) for n in range(rows)]
    i.tasks = decode_tasks(segments, paths, page_size=PAGE).to(device)
    i.length = torch.full((rows,), s["own"], dtype=torch.int32, device=device)
    i.q = i.draw(rows, s["Hq"], s["D"])
    keys = [[segments[p.segments[0]], Segment(p.own_pages, s["own"])] for p in paths]
    i.slots = torch.stack([torch.from_numpy(segment_slots(k, PAGE)) for k in keys]).to(device)
    return i


def exact_decode(i: SimpleNamespace, mode: str) -> dict[str, torch.Tensor]:
    args = i.q.double(), i.k.double(), i.v.double(), i.tasks, i.length
    return {"out": ops.shared_prefix_attention(*args, scale=i.scale, impl="torch")}


decode = register(
    Op(
        "shared_prefix_attention",
        (STEP,),
        decode_inputs,
        exact_decode,
        (
            shape(QWEN3, "64 rows of 8 prompts", prompts=8, group=8, prompt=3000, own=256),
            shape(QWEN3, "256 rows", prompts=32, group=8, prompt=3000, own=256),
            shape(QWEN3, "nothing is shared", prompts=64, group=1, prompt=3000, own=256),
            shape(QWEN3, "one row", prompts=1, group=1, prompt=3000, own=256),
            shape(SMOL, "256 short rows", prompts=32, group=8, prompt=500, own=256),
        ),
        (shape(TINY, "the toolbox", prompts=8, group=8, prompt=300, own=60),),
        shape(TINY, prompts=3, group=5, prompt=130, own=70),
        plain="torch/whole rows",
    )
)


@provider(decode, "torch/whole rows")
def whole_rows(i: SimpleNamespace, mode: str) -> Run:
    k, v = (x[i.slots].transpose(1, 2) for x in (i.k, i.v))
    q = i.q[:, :, None]
    return lambda: {"out": F.scaled_dot_product_attention(q, k, v, scale=i.scale, enable_gqa=True)[:, :, 0]}


def need_gpu(impl: str, x: torch.Tensor) -> None:
    if impl == "triton" and not x.is_cuda:
        raise Unavailable("its kernels need a GPU")


def ours_decode(impl: str):
    def make(i: SimpleNamespace, mode: str) -> Run:
        need_gpu(impl, i.q)
        args = i.q, i.k, i.v, i.tasks, i.length
        return lambda: {"out": ops.shared_prefix_attention(*args, scale=i.scale, impl=impl)}

    return make


def extend_inputs(shape: Shape, dtype: torch.dtype, device: str) -> SimpleNamespace:
    """`rows` runs of `new` tokens, each on a cached path of `cached` tokens that `group` of them share."""
    s, i = shape.sizes, SimpleNamespace()
    total, paths = s["rows"] * s["new"], -(-s["rows"] // s["group"])
    cache(i, s, total + PAGE + paths * (s["cached"] + PAGE), dtype, device)
    above = [[Segment(take(i, s["cached"]), s["cached"])] for _ in range(paths)]
    i.slots = torch.from_numpy(segment_slots([Segment(take(i, total), total)], PAGE)).to(device)
    ends = [n * s["new"] for n in range(1, s["rows"] + 1) for _ in range(s["new"])]
    i.tasks = extend_tasks(ends, [above[n // s["group"]] for n in range(s["rows"])], page_size=PAGE)
    i.q = i.draw(total, s["Hq"], s["D"])
    i.pairs = s["rows"] * (s["new"] * (s["new"] + 1) // 2 + s["new"] * s["cached"])
    return i


def exact_extend(i: SimpleNamespace, mode: str) -> dict[str, torch.Tensor]:
    args = i.q.double(), i.k.double(), i.v.double(), i.slots, i.tasks
    return {"out": ops.extend_attention(*args, scale=i.scale, impl="torch")}


extend = register(
    Op(
        "extend_attention",
        (STEP,),
        extend_inputs,
        exact_extend,
        (
            shape(QWEN3, "prompts", rows=8, new=3000, cached=0, group=1),
            shape(QWEN3, "tool responses", rows=64, new=64, cached=3300, group=8),
        ),
        (shape(TINY, "tool responses of the toolbox", rows=64, new=20, cached=300, group=8),),
        shape(TINY, rows=5, new=37, cached=100, group=2),
        plain="pact_fast/torch",
        flops=lambda i, mode: 4.0 * i.pairs * i.q.shape[1] * i.q.shape[2],
    )
)


def ours_extend(impl: str):
    def make(i: SimpleNamespace, mode: str) -> Run:
        need_gpu(impl, i.q)
        args = i.q, i.k, i.v, i.slots, i.tasks
        return lambda: {"out": ops.extend_attention(*args, scale=i.scale, impl=impl)}

    return make


def sample_inputs(shape: Shape, dtype: torch.dtype, device: str) -> SimpleNamespace:
    """fp32 logits [N, V], temperature 1."""
    n, v = shape.sizes["N"], shape.sizes["V"]
    generator = torch.Generator(device=device).manual_seed(0)
    logits = 3 * torch.randn(n, v, generator=generator, device=device)
    rows = torch.arange(n, device=device)
    return SimpleNamespace(logits=logits, temperature=torch.ones(n, device=device), seed=rows, position=rows)


def exact_sample(i: SimpleNamespace, mode: str) -> dict[str, torch.Tensor]:
    """The log-probs of the tokens that the counter-based noise chooses."""
    token = draw(i, "torch")["token"]
    return {"logprob": i.logits.double().log_softmax(-1).gather(1, token[:, None])[:, 0]}


def draw(i: SimpleNamespace, impl: str) -> dict[str, torch.Tensor]:
    args = i.logits, i.temperature, None, None, None, i.seed, i.position
    token, logprob, _ = ops.sample(*args, impl=impl)
    return {"logprob": logprob, "token": token}


sampling = register(
    Op(
        "sample",
        (STEP,),
        sample_inputs,
        exact_sample,
        (Shape({"N": 64, "V": 151_936}), Shape({"N": 256, "V": 151_936}), Shape({"N": 1, "V": 151_936})),
        (Shape({"N": 64, "V": 512}, why="the toolbox"), Shape({"N": 64, "V": 49_152})),
        Shape({"N": 9, "V": 5000}),
        plain="pact_fast/torch",
    )
)


def ours_sample(impl: str):
    def make(i: SimpleNamespace, mode: str) -> Run:
        need_gpu(impl, i.logits)
        return lambda: draw(i, impl)

    return make


for impl in ("torch", "triton"):
    provider(decode, f"pact_fast/{impl}", always=True)(ours_decode(impl))
    provider(extend, f"pact_fast/{impl}", always=True)(ours_extend(impl))
    provider(sampling, f"pact_fast/{impl}", always=True)(ours_sample(impl))
