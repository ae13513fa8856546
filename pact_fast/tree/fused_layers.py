"""RMSNorm, RoPE and SwiGLU of a model's decoder by fused kernels, for as long as a context lasts.

The kernels are Liger's; how they are put into the model is not: each norm and MLP module gets a forward of
its own instance, and the family's RoPE function is exchanged, all on entry and all undone on exit. So the
model stays what it was outside of `Policy`, and so does every other model of its family.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor, nn

from pact_fast.tree.families import Family, decoder_layers, final_norm

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # whose fused layers a test compares with the plain model
ROPE = "apply_rotary_pos_emb"


class Kernels(NamedTuple):
    """rms_norm(x [..., D], weight [D], eps); rope(q, k, cos, sin), heads second; silu_mul(gate, up)."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    rope: Callable[..., tuple[Tensor, Tensor]]
    silu_mul: Callable[[Tensor, Tensor], Tensor]


def installed() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


@lru_cache(maxsize=1)
def liger_kernels() -> Kernels:
    """ImportError without the package liger-kernel."""
    try:
        from liger_kernel.ops import LigerRMSNormFunction, LigerSiLUMulFunction
        from liger_kernel.transformers.rope import liger_rotary_pos_emb
    except ImportError as error:
        raise ImportError(
            "kernels=liger needs the package liger-kernel: pip install liger-kernel, or kernels=none"
        ) from error

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        # Not in place: the gradient that comes in may be a residual's, too.
        return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)

    def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
        return LigerSiLUMulFunction.apply(gate, up, 1.0, 1.0)

    return Kernels(rms_norm, liger_rotary_pos_emb, silu_mul)


def check_family(family: Family) -> None:
    if family.name not in FAMILIES:
        raise ValueError(
            f"kernels=liger: fused layers of {family.name!r} are not tested here, only "
            f"{', '.join(FAMILIES)}; use kernels=none"
        )


@contextmanager
def fused_layers(model: nn.Module, kernels: Kernels) -> Iterator[None]:
    """Inside, the decoder of `model` runs on `kernels`."""
    layers: list[Any] = decoder_layers(model)
    norms: list[Any] = [final_norm(model)]
    for layer in layers:
        norms += [m for m in layer.modules() if type(m).__name__.endswith("RMSNorm")]
    mlps = [layer.mlp for layer in layers]
    changed = [m for m in (*norms, *mlps) if "forward" not in vars(m)]
    modeling = sys.modules[type(layers[0]).__module__]
    rope = getattr(modeling, ROPE)
    for norm in norms:
        vars(norm).setdefault("forward", _norm_forward(norm, kernels))
    for mlp in mlps:
        vars(mlp).setdefault("forward", _mlp_forward(mlp, kernels))
    setattr(modeling, ROPE, kernels.rope)
    try:
        yield
    finally:
        setattr(modeling, ROPE, rope)
        for module in changed:
            vars(module).pop("forward", None)


def _norm_forward(norm: Any, kernels: Kernels) -> Callable[[Tensor], Tensor]:
    return lambda x: kernels.rms_norm(x, norm.weight, norm.variance_epsilon)


def _mlp_forward(mlp: Any, kernels: Kernels) -> Callable[[Tensor], Tensor]:
    return lambda x: mlp.down_proj(kernels.silu_mul(mlp.gate_proj(x), mlp.up_proj(x)))
