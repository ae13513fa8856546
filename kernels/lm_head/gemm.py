"""Matrix products of the LM head: operands of the model's dtype, sums in fp32, rounded once; chunk sizes."""

import math

import torch
from torch import Tensor

ALIGN_BYTES = 16  # of a logits row: what 16-byte loads and the fastest GEMMs ask for
ALIGN_ROWS = 256  # of a chunk: rows of the largest GEMM tile; a half-filled last one cost 10% (1,408 rows)
DEVICE_SHARE = 20  # a chunk's logits take at most this part of a device's memory
LOW_BYTES = 256 << 20  # of a chunk's logits where memory matters more; as fast for a forward alone
CPU_BYTES = 64 << 20  # of the kernels under the interpreter


def logits_budget(like: Tensor) -> int:
    """Bytes of logits that may be held at once: a fixed part of the device.

    Not of what is free on it, so that a run's chunks, and with them its roundings, do not depend on what
    else is allocated.
    """
    if not like.is_cuda:
        return CPU_BYTES
    return torch.cuda.get_device_properties(like.device).total_memory // DEVICE_SHARE


def chunk_rows(rows: int, vocab: int, like: Tensor, budget: int) -> int:
    """Rows of a chunk of logits [rows, vocab] in the dtype of `like`: all if they fit, else equal chunks."""
    most = budget // (like.element_size() * max(vocab, 1))
    return min(equal_chunks(rows, most, ALIGN_ROWS), rows)


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


class ChunkGradients:
    """dX per loss row, dW and db summed over chunks in fp32; a single chunk writes dW in its final dtype."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: int,
        step: int,
        needs: tuple[bool, bool, bool],
    ):
        needs_hidden, needs_weight, needs_bias = needs
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.d_rows = hidden.new_empty(rows, hidden.shape[1]) if needs_hidden else None
        self.d_weight, self.d_bias = None, None
        if needs_weight:
            dtype = weight.dtype if rows == step else torch.float32
            make = torch.zeros if rows == 0 else torch.empty
            self.d_weight = make(weight.shape, dtype=dtype, device=weight.device)
        if bias is not None and needs_bias:
            self.d_bias = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)

    def add(self, chunk: slice, x: Tensor, dz: Tensor) -> None:
        """One chunk's loss rows x [n, H] and dL/dz [n, V]."""
        if self.d_rows is not None:
            torch.mm(dz, self.weight, out=self.d_rows[chunk])
        if self.d_weight is not None:
            add_product(self.d_weight, dz.t(), x, first=chunk.start == 0)
        if self.d_bias is not None:
            self.d_bias += dz.sum(0, dtype=torch.float32)

    def result(self, row_index: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        d_rows = d_hidden = self.d_rows
        if d_rows is not None and row_index is not None:
            from pact_fast.kernels.lm_head.rows import sum_rows

            d_hidden = d_rows.new_empty(self.hidden.shape)
            sum_rows(d_rows, row_index, d_hidden)
        d_weight = None if self.d_weight is None else self.d_weight.to(self.weight.dtype)
        if self.d_bias is None or self.bias is None:
            return d_hidden, d_weight, None
        return d_hidden, d_weight, self.d_bias.to(self.bias.dtype)
