"""Checks of the LM-head ops' arguments, before anything is computed, and the choice of implementation."""

import math
import os
from typing import Any

import torch
from torch import Tensor

from pact_fast.kernels.lm_head.shard import Shard


def autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Casts what F.linear would cast under torch.autocast; the casts are differentiable."""
    if (
        isinstance(hidden, Tensor)
        and isinstance(weight, Tensor)
        and torch.is_autocast_enabled(hidden.device.type)
    ):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        if hidden.dtype != torch.float64:
            return hidden.to(dtype), weight.to(dtype), bias
    return hidden, weight, bias


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> None:
    if not isinstance(hidden, Tensor) or not hidden.is_floating_point():
        raise TypeError(f"hidden must be a floating-point tensor, got {describe(hidden)}")
    if hidden.dim() != 2:
        raise ValueError(
            f"hidden must be [N, H], got {describe(hidden)}; flatten the leading dimensions first"
        )
    if not isinstance(weight, Tensor) or weight.dtype != hidden.dtype:
        raise TypeError(
            f"weight must have the dtype of hidden ({hidden.dtype}), got {describe(weight)}; cast one"
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] == 0:
        raise ValueError(
            f"weight must be [V, H] with V >= 1 and H = {hidden.shape[1]}, got {describe(weight)}"
        )
    check_device("weight", weight, hidden)
    if bias is not None:
        if not isinstance(bias, Tensor) or not bias.is_floating_point():
            raise TypeError(f"bias must be a floating-point tensor, got {describe(bias)}")
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be [V] = [{weight.shape[0]}], got {describe(bias)}")
        check_device("bias", bias, hidden)
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap must be finite and > 0, or None for no cap, got {softcap}")


def check_temperature(
    temperature: float | Tensor, rows: int, hidden: Tensor, name: str = "temperature"
) -> tuple[float, Tensor | None]:
    """One temperature of all rows, or 1.0 and that of each [rows], whose values the op checks."""
    if not isinstance(temperature, Tensor):
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"{name} must be finite and > 0, got {temperature}")
        return float(temperature), None
    return 1.0, row_values(name, temperature, rows, hidden)


def check_rows(name: str, value: Tensor, rows: int | None, hidden: Tensor, *, integer: bool = False) -> int:
    """`value` is [rows] on hidden's device; its length."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {describe(value)}")
    if integer and value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32, got {describe(value)}")
    if value.dim() != 1 or (rows is not None and value.shape[0] != rows):
        raise ValueError(f"{name} must be [{'R' if rows is None else rows}], got {describe(value)}")
    check_device(name, value, hidden)
    return value.shape[0]


def row_values(name: str, value: Tensor, rows: int, hidden: Tensor) -> Tensor:
    """A per-row input in the accumulation dtype."""
    check_rows(name, value, rows, hidden)
    if value.is_complex():
        raise TypeError(f"{name} must be real, got {describe(value)}")
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, but the loss has none for it; pass {name}.detach()")
    return value.to(row_dtype(hidden))


def row_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def check_device(name: str, value: Tensor, hidden: Tensor) -> None:
    if value.device != hidden.device:
        raise ValueError(f"{name} is on {value.device} but hidden is on {hidden.device}; move one of them")


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__


def choose(impl: str, hidden: Tensor) -> str:
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f'impl must be "auto", "torch" or "triton", got {impl!r}')
    if impl == "auto":
        return "triton" if hidden.is_cuda and hidden.dtype != torch.float64 else "torch"
    if impl == "torch":
        return impl
    if hidden.dtype == torch.float64:
        raise TypeError(
            f'impl="{impl}" takes bf16, fp16 or fp32 hidden, got {hidden.dtype}; pass impl="torch"'
        )
    if not hidden.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        hint = "move the tensors to a GPU, or set TRITON_INTERPRET=1 before importing triton"
        raise ValueError(f'impl="{impl}" needs CUDA tensors, hidden is on {hidden.device}: {hint}')
    return impl


def shard_of(tp_group: Any) -> Shard:
    """This rank's part of a vocabulary spread over a torch.distributed process group; None: all of it."""
    if tp_group is None:
        return Shard()
    if not all(hasattr(tp_group, name) for name in ("group_name", "rank", "size")):
        raise TypeError(f"tp_group must be a torch.distributed process group, got {describe(tp_group)}")
    return Shard(tp_group.group_name, tp_group.rank(), tp_group.size())


def check_memory(memory: str) -> None:
    if memory not in ("fast", "low"):
        raise ValueError(f'memory must be "fast" or "low", got {memory!r}')
