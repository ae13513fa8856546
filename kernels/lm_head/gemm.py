"""Matrix products of the LM head: operands of the model's dtype, sums in fp32, rounded once."""

import math

import torch
from torch import Tensor

ALIGN_BYTES = 16  # of a logits row: what 16-byte loads and the fastest GEMMs ask for


def padded_rows(rows: int, columns: int, like: Tensor) -> Tensor:
    """An uninitialised [rows, columns] view of `like`'s dtype whose rows start on 16-byte borders."""
    step = ALIGN_BYTES // like.element_size()
    return like.new_empty(rows, -(-columns // step) * step)[:, :columns]


def add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """total [M, N] (+)= a [M, K] @ b [K, N], total in fp32 or the operands' dtype; `first` overwrites."""
    if total.dtype == a.dtype:
        torch.mm(a, b, out=total) if first else total.addmm_(a, b)
    elif a.is_cuda:  # one GEMM with an fp32 output; since torch 2.11 it also takes the fp32 sum it adds to
        if first:
            torch.mm(a, b, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # out_dtype exists on CUDA only; here for the interpreter
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=0 if first else 1)


def equal_chunks(total: int, most: int, multiple: int = 128) -> int:
    """Size of equal chunks of about `most`, rounded up to `multiple`: no small last chunk, aligned tiles."""
    count = math.ceil(total / max(most, 1)) or 1
    return math.ceil(total / count / multiple) * multiple or multiple


def capturing(like: Tensor) -> bool:
    """Whether a CUDA graph is being recorded, so that the host may not wait for the device."""
    return like.is_cuda and torch.cuda.is_current_stream_capturing()
