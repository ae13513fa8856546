"""The LM-head ops beside their peers. Modes: forward, forward+backward, live30 (forward+backward, 30% of the
rows live).

A provider is timed on exactly what its users call; translation of the inputs (masks, weights) happens
beforehand.
"""

from types import SimpleNamespace

import torch
from torch.nn import functional as F

from bench.registry import Op, Run, Shape, Unavailable, provider, register
from pact_fast import (
    linear_cross_entropy,
    linear_divergence,
    linear_logprob,
    linear_pact_loss,
    linear_token_loss,
)

FORWARD, TRAIN, LIVE30 = "forward", "forward+backward", "live30"
OWN, LOW = "loss of one's own", "low memory"  # of linear_pact_loss, forward+backward

QWEN = 151_936
GPU_SHAPES = (
    Shape({"N": 8192, "H": 4096, "V": QWEN}, why="the shape of the published peers' numbers"),
    Shape(
        {"N": 8192, "H": 4096, "V": QWEN},
        logits="peaked",
        why="filtering peers look good on random logits only",
    ),
    Shape({"N": 8192, "H": 2048, "V": QWEN}, why="Qwen3-1.7B; the shape at which QuACK runs"),
    Shape({"N": 8192, "H": 2560, "V": QWEN}, peers=False, why="Qwen3-4B"),
    Shape({"N": 32768, "H": 4096, "V": QWEN}, peers=False, why="a long pack: offsets past 2^31"),
)
CPU_SHAPES = (
    Shape({"N": 512, "H": 64, "V": 512}, why="the CPU trainer's head"),
    Shape({"N": 128, "H": 64, "V": 8192}, logits="peaked", why="a vocabulary wider than the chunk"),
)
GATE = Shape({"N": 200, "H": 64, "V": 1000})


def make_inputs(shape: Shape, dtype: torch.dtype, device: str) -> SimpleNamespace:
    """hidden [N, H], weight [V, H], target and per-token inputs [N]; peaked: a target's logit is about 15."""
    g = torch.Generator(device=device).manual_seed(0)
    n, h, v = (shape.sizes[name] for name in "NHV")
    draw = lambda *size: torch.randn(*size, generator=g, device=device)  # noqa: E731
    weight = (draw(v, h) / h**0.5).to(dtype)
    target = torch.randint(0, v, (n,), generator=g, device=device)
    hidden = draw(n, h)
    if shape.logits == "peaked":
        hidden += 15 * weight[target].float()
    live = torch.rand(n, generator=g, device=device) < 0.3
    return SimpleNamespace(
        hidden=hidden.to(dtype).requires_grad_(),
        weight=weight.requires_grad_(),
        target=target,
        token_weight=torch.full((n,), 1 / n, device=device),
        live_weight=live / live.sum().clamp(min=1),
        live_rows=live.nonzero().squeeze(1),
        advantages=draw(n),
        grad=draw(n) / n,
    )


def gradients(i: SimpleNamespace, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    d_hidden, d_weight = torch.autograd.grad(loss, (i.hidden, i.weight))
    return {"loss": loss.detach(), "d_hidden": d_hidden, "d_weight": d_weight}


def widened(i: SimpleNamespace) -> SimpleNamespace:
    values = {k: v.double() if v.is_floating_point() else v for k, v in vars(i).items()}
    values |= {k: values[k].detach().requires_grad_() for k in ("hidden", "weight")}
    return SimpleNamespace(**values)


# ---- linear_cross_entropy


def exact_cross_entropy(i: SimpleNamespace, mode: str) -> dict[str, torch.Tensor]:
    return run_torch(widened(i), mode)()


cross_entropy = register(
    Op(
        "linear_cross_entropy",
        (TRAIN, LIVE30),
        make_inputs,
        exact_cross_entropy,
        GPU_SHAPES,
        CPU_SHAPES,
        GATE,
    )
)


def need_gpu(impl: str, i: SimpleNamespace) -> None:
    if impl != "torch" and not i.hidden.is_cuda:
        raise Unavailable("its kernels need a GPU")


def ours_cross_entropy(impl: str):
    def make(i: SimpleNamespace, mode: str) -> Run:
        need_gpu(impl, i)
        live = mode == LIVE30
        rows = i.live_rows if live else None  # the trainer knows its live rows on the host, and names them
        target = i.target[rows] if live else i.target
        weight = i.live_weight[rows] if live else i.token_weight

        def run():
            loss = linear_cross_entropy(
                *(i.hidden, i.weight, target),
                token_weight=weight,
                reduction="sum",
                row_index=rows,
                impl=impl,
            )
            return gradients(i, loss)

        return run

    return make


@provider(cross_entropy, "torch/logits")
def run_torch(i: SimpleNamespace, mode: str) -> Run:
    weight = i.live_weight if mode == LIVE30 else i.token_weight

    def run():
        logits = (i.hidden @ i.weight.T).to(torch.promote_types(i.hidden.dtype, torch.float32))
        return gradients(i, (F.cross_entropy(logits, i.target, reduction="none") * weight).sum())

    return run


@provider(cross_entropy, "gemms/3", always=True)
def three_gemms(i: SimpleNamespace, mode: str) -> Run:
    """The floor: logits, dX and dW without anything between; its outputs mean nothing."""
    x = (i.hidden[i.live_rows] if mode == LIVE30 else i.hidden).detach()
    w = i.weight.detach()

    def run():
        logits = x @ w.T
        return {"d_hidden": logits @ w, "d_weight": logits.T @ x}

    return run


def only_uniform(mode: str) -> None:
    if mode == LIVE30:
        raise Unavailable("has no per-token weights")


@provider(cross_entropy, "liger/fused_linear_ce")
def liger_cross_entropy(i: SimpleNamespace, mode: str) -> Run:
    if not i.hidden.is_cuda:
        raise Unavailable("its Triton kernel needs a GPU")
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    target = i.target if mode == TRAIN else torch.where(i.live_weight > 0, i.target, -100)
    loss = LigerFusedLinearCrossEntropyLoss(reduction="mean")
    return lambda: gradients(i, loss(i.weight, i.hidden, target))


@provider(cross_entropy, "trl/chunked_nll")
def trl_cross_entropy(i: SimpleNamespace, mode: str) -> Run:
    function, chunk = trl_function()
    rows = i.live_rows if mode == LIVE30 else slice(None)
    weight = (i.live_weight if mode == LIVE30 else i.token_weight)[rows]

    def run():
        logprobs = function(i.hidden[rows], i.weight, None, i.target[rows], 1.0, chunk, None, 1.0, ())[0]
        return gradients(i, -(logprobs * weight).sum())

    return run


def trl_function():
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer import utils

    return ChunkedLogProbFunction.apply, getattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 8192)


def cut_cross_entropy(impl: str):
    def make(i: SimpleNamespace, mode: str) -> Run:
        from cut_cross_entropy import linear_cross_entropy as cce

        if not i.hidden.is_cuda:
            raise Unavailable("its kernels need a GPU")
        target = i.target if mode == TRAIN else torch.where(i.live_weight > 0, i.target, -100)
        return lambda: gradients(i, cce(i.hidden, i.weight, target, impl=impl))

    return make


@provider(cross_entropy, "quack/chunked")
def quack_cross_entropy(i: SimpleNamespace, mode: str) -> Run:
    only_uniform(mode)
    if not i.hidden.is_cuda:
        raise Unavailable("its kernels need a GPU")
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda: gradients(i, chunked_linear_cross_entropy(i.hidden, i.weight, i.target, reduction="mean"))


for impl in ("torch", "triton"):
    provider(cross_entropy, f"pact_fast/{impl}", always=True)(ours_cross_entropy(impl))
for impl in ("cce", "cce_exact"):
    provider(cross_entropy, f"cut-cross-entropy/{impl}")(cut_cross_entropy(impl))


# ---- linear_pact_loss


def plain_pact_loss(i: SimpleNamespace, mode: str) -> Run:
    def run():
        logits = (i.hidden @ i.weight.T).to(torch.promote_types(i.hidden.dtype, torch.float32))
        logprobs = logits.log_softmax(-1).gather(1, i.target[:, None])[:, 0]
        ratio = (logprobs - logprobs.detach()).exp()
        surrogate = torch.min(ratio * i.advantages, ratio.clip(0.8, 1.2) * i.advantages)
        return gradients(i, -(i.token_weight * surrogate).sum())

    return run


def exact_pact_loss(i: SimpleNamespace, mode: str) -> dict[str, torch.Tensor]:
    return plain_pact_loss(widened(i), mode)()


pact_loss = register(
    Op("linear_pact_loss", (TRAIN, OWN, LOW), make_inputs, exact_pact_loss, GPU_SHAPES, CPU_SHAPES, GATE)
)
provider(pact_loss, "torch/logits")(plain_pact_loss)


@provider(pact_loss, "gemms/floor", always=True)
def pact_gemms(i: SimpleNamespace, mode: str) -> Run:
    """Three products; four where the logits are computed again."""
    return four_gemms(i, mode) if mode == LOW else three_gemms(i, mode)


def own_loss(i: SimpleNamespace, logprobs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The same loss as a user of linear_token_loss writes it."""
    ratio, advantages = (logprobs - logprobs.detach()).exp(), i.advantages[rows]
    return -i.token_weight[rows] * torch.min(ratio * advantages, ratio.clip(0.8, 1.2) * advantages)


def ours_pact_loss(impl: str):
    def make(i: SimpleNamespace, mode: str) -> Run:
        need_gpu(impl, i)
        memory = "low" if mode == LOW else "fast"

        def run():
            if mode == OWN:
                loss_fn = lambda logprobs, entropy, rows: own_loss(i, logprobs, rows)  # noqa: E731
                return gradients(i, linear_token_loss(i.hidden, i.weight, i.target, loss_fn, impl=impl).loss)
            terms = {"policy_weight": i.token_weight, "advantages": i.advantages}
            out = linear_pact_loss(i.hidden, i.weight, i.target, **terms, memory=memory, impl=impl)
            return gradients(i, out.loss)

        return run

    return make


@provider(pact_loss, "liger/chunked_grpo")
def liger_grpo(i: SimpleNamespace, mode: str) -> Run:
    """Sequences of one token, so that its per-sequence advantages are per-token ones; chunks of 1,024."""
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

    settings = {"beta": 0.0, "use_ref_model": False, "loss_type": "dapo", "compiled": i.hidden.is_cuda}
    if mode != TRAIN:
        raise Unavailable("is what it is in the mode forward+backward")
    loss = LigerFusedLinearGRPOLoss(**settings, chunk_size=1024)
    ids, mask = i.target[:, None], torch.ones_like(i.target[:, None], dtype=torch.float32)
    return lambda: gradients(i, loss(i.hidden[:, None], i.weight, ids, mask, i.advantages)[0])


for impl in ("torch", "triton"):
    provider(pact_loss, f"pact_fast/{impl}", always=True)(ours_pact_loss(impl))


# ---- linear_logprob


def logprob_outputs(i: SimpleNamespace, mode: str, logprobs_of) -> Run:
    def forward():
        with torch.no_grad():
            return {"logprobs": logprobs_of()}

    def train():
        logprobs = logprobs_of()
        d_hidden, d_weight = torch.autograd.grad(logprobs, (i.hidden, i.weight), i.grad.to(logprobs.dtype))
        return {"logprobs": logprobs.detach(), "d_hidden": d_hidden, "d_weight": d_weight}

    return forward if mode == FORWARD else train


def plain_logprobs(i: SimpleNamespace, mode: str) -> Run:
    def logprobs():
        logits = (i.hidden @ i.weight.T).to(torch.promote_types(i.hidden.dtype, torch.float32))
        return logits.log_softmax(-1).gather(1, i.target[:, None])[:, 0]

    return logprob_outputs(i, mode, logprobs)


def exact_logprobs(i: SimpleNamespace, mode: str) -> dict[str, torch.Tensor]:
    return plain_logprobs(widened(i), mode)()


logprob = register(
    Op("linear_logprob", (FORWARD, TRAIN), make_inputs, exact_logprobs, GPU_SHAPES, CPU_SHAPES, GATE)
)
provider(logprob, "torch/logits")(plain_logprobs)


@provider(logprob, "gemms/1+3", always=True)
def four_gemms(i: SimpleNamespace, mode: str) -> Run:
    """The floor: one GEMM to score; one more, then dX and dW, with a gradient."""
    x, w = i.hidden.detach(), i.weight.detach()
    if mode == FORWARD:
        return lambda: {"logits": x @ w.T}

    def run():
        logits = x @ w.T
        del logits
        return three_gemms(i, TRAIN)()

    return run


@provider(logprob, "trl/chunked_logprob")
def trl_logprobs(i: SimpleNamespace, mode: str) -> Run:
    function, chunk = trl_function()
    call = lambda: function(i.hidden, i.weight, None, i.target, 1.0, chunk, None, 1.0, ())[0]  # noqa: E731
    return logprob_outputs(i, mode, call)


def ours_logprobs(impl: str):
    def make(i: SimpleNamespace, mode: str) -> Run:
        need_gpu(impl, i)
        return logprob_outputs(i, mode, lambda: linear_logprob(i.hidden, i.weight, i.target, impl=impl))

    return make


for impl in ("torch", "triton"):
    provider(logprob, f"pact_fast/{impl}", always=True)(ours_logprobs(impl))


# ---- linear_divergence: pairs of rows of one model, every row once the student and once the teacher

KINDS = ("reverse_kl", "forward_kl", "jsd")
TOP_K = "reverse_kl top 100"


def exact_divergence(i: SimpleNamespace, mode: str) -> dict[str, torch.Tensor]:
    return plain_divergence(widened(i), mode)()


divergence = register(
    Op(
        "linear_divergence",
        (*KINDS, TOP_K),
        make_inputs,
        exact_divergence,
        tuple(shape for shape in GPU_SHAPES if shape.sizes["N"] == 8192),
        CPU_SHAPES,
        GATE,
    )
)


def pairs(i: SimpleNamespace) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.arange(len(i.target), device=i.target.device)
    return rows, rows.roll(1)


@provider(divergence, "torch/logits")
def plain_divergence(i: SimpleNamespace, mode: str) -> Run:
    student, teacher = pairs(i)

    def run():
        logits = (i.hidden @ i.weight.T).to(torch.promote_types(i.hidden.dtype, torch.float32))
        p, q = logits[student].log_softmax(-1), logits[teacher].detach().log_softmax(-1)
        if mode == TOP_K:
            index = q.topk(100).indices
            p, q = (bucketed(l, index) for l in (p, q))
        if mode == "forward_kl":
            rows = (q.exp() * (q - p)).sum(-1)
        elif mode == "jsd":
            m = torch.logaddexp(p, q) - torch.tensor(2.0).log()
            rows = ((q.exp() * (q - m)).sum(-1) + (p.exp() * (p - m)).sum(-1)) / 2
        else:
            rows = (p.exp() * (p - q)).sum(-1)
        return gradients(i, (rows * i.token_weight).sum())

    return run


def bucketed(logp: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    rest = logp.scatter(1, index, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat((logp.gather(1, index), rest), -1)


@provider(divergence, "gemms/4", always=True)
def divergence_gemms(i: SimpleNamespace, mode: str) -> Run:
    """The floor: logits of both sides, dX and dW."""
    return four_gemms(i, TRAIN)


@provider(divergence, "trl/chunked_divergence")
def trl_divergence(i: SimpleNamespace, mode: str) -> Run:
    if mode == TOP_K:
        raise Unavailable("has no buckets")
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    (student, teacher), w = pairs(i), i.weight.detach()
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}[mode]

    def run():
        x, y = i.hidden[student], i.hidden.detach()[teacher]
        rows, _ = ChunkedDivergenceFunction.apply(x, i.weight, None, y, w, None, beta)
        return gradients(i, (rows * i.token_weight).sum())

    return run


def ours_divergence(impl: str):
    def make(i: SimpleNamespace, mode: str) -> Run:
        need_gpu(impl, i)
        rows = pairs(i)
        options = {"kind": "reverse_kl", "top_k": 100} if mode == TOP_K else {"kind": mode}

        def run():
            loss = linear_divergence(
                i.hidden, i.weight, *rows, row_weight=i.token_weight, impl=impl, **options
            )
            return gradients(i, loss)

        return run

    return make


for impl in ("torch", "triton"):
    provider(divergence, f"pact_fast/{impl}", always=True)(ours_divergence(impl))
