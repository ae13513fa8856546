"""The oracle of tree attention: the dense-mask definition in fp64, with gradients."""

import torch

from pact_fast.kernels.tree_attention import reference
from tests.helpers.trees import pact_sequences, random_sequences

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = pact_sequences(1, prompt=40, trace=10, rollout=9, group=2) + random_sequences(3)


def inputs(tokens, heads=4, kv_heads=2, head_dim=16, dtype=torch.float32, device="cpu", seed=0):
    torch.manual_seed(seed)
    shapes = [(tokens, heads, head_dim), (tokens, kv_heads, head_dim), (tokens, kv_heads, head_dim)]
    return [torch.randn(s, dtype=torch.float64).to(device, dtype).requires_grad_() for s in shapes]


def oracle(q, k, v, end, d_out, d_lse=None, window=None):
    """out, lse and the gradients of q, k, v by the definition in fp64."""
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, lse = reference.tree_attention_dense(*exact, end, window=window)
    outputs, upstream = ([out], [d_out]) if d_lse is None else ([out, lse], [d_out, d_lse])
    return out, lse, *torch.autograd.grad(outputs, exact, [g.double() for g in upstream])


def assert_near(got, want, dtype):
    """Within the rounding of `dtype`: inputs are O(1), and so is the error of a gradient that is 0."""
    bound = {torch.float64: 1e-11, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    error = (got.double() - want).norm() / want.norm().clamp(min=1.0)
    assert error <= bound, f"relative error {error:.2e}"
