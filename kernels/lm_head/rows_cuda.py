"""csrc/logits_rows.cu through ctypes: the loss row kernel with one read and one write of the logits
(`impl="cuda"`).

Same arguments and results as `rows.rows_loss`. Needs the library that setup.py builds where nvcc is
found.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from pact_fast.kernels.lm_head.reference import PolicyLossConfig, RowTerms

LIBRARY = "liblogits_rows.so"
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
BEST, TWO_PASSES, ON_HOST = (
    0,
    1,
    2,
)  # modes of pact_rows_loss; ON_HOST: the device functions run on the CPU, for tests


class RowArgs(ctypes.Structure):
    """struct RowArgs of csrc/logits_rows.cuh, field for field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "bias", "target")),
        *((name, ctypes.c_void_p) for name in RowTerms._fields),
        *((name, ctypes.c_void_p) for name in ("logprobs", "parts")),
        *((name, ctypes.c_int64) for name in ("rows", "vocab", "stride", "parts_stride")),
        *((name, ctypes.c_float) for name in PolicyLossConfig._fields),
        *((name, ctypes.c_float) for name in ("softcap", "temperature")),
        ("write_grad", ctypes.c_int32),
    )


def library_path() -> Path | None:
    package = Path(__file__).parent.parent.parent  # or the repository, the symlink resolved
    places = (package / "_native" / LIBRARY, package / "pact_fast" / "_native" / LIBRARY)
    return next((path for path in places if path.exists()), None)


@functools.cache
def library() -> ctypes.CDLL:
    path = library_path()
    if path is None:
        raise RuntimeError(
            f'impl="cuda" needs {LIBRARY}, which was not built: install with PACT_FAST_CUDA=1 and nvcc, '
            'or pass impl="triton"'
        )
    native = ctypes.CDLL(str(path))
    native.pact_rows_loss.argtypes = (ctypes.POINTER(RowArgs), ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
    native.pact_error_string.restype = ctypes.c_char_p
    if native.pact_row_args_size() != ctypes.sizeof(RowArgs):
        raise RuntimeError(f"{path} was built from another version of csrc/logits_rows.cu: install again")
    return native


def rows_loss(
    logits: Tensor,
    bias: Tensor | None,
    target: Tensor,
    terms: RowTerms,
    config: PolicyLossConfig,
    logprobs: Tensor,
    parts: Tensor,
    temperature: float,
    softcap: float | None,
    write_grad: bool,
    mode: int = BEST,
) -> None:
    """Fills logprobs [n], parts [5, n] (a column slice); overwrites logits [n, V] by dL/dz if write_grad."""
    if logits.stride(1) != 1:
        raise ValueError(f"logits must have contiguous rows, got strides {logits.stride()}")
    bias = None if bias is None else bias.float()
    pointers = [None if t is None else t.data_ptr() for t in (logits, bias, target, *terms, logprobs, parts)]
    sizes = (*logits.shape, logits.stride(0), parts.stride(0))
    scalars = (
        config.epsilon_low,
        config.epsilon_high,
        config.dual_clip or 0.0,
        config.beta,
        config.entropy_coef,
    )
    args = RowArgs(*pointers, *sizes, *scalars, softcap or 0.0, temperature, int(write_grad))
    native, dtype = library(), DTYPES[logits.dtype]
    if logits.is_cuda:
        with torch.cuda.device(logits.device):
            stream = torch.cuda.current_stream().cuda_stream
            error = native.pact_rows_loss(ctypes.byref(args), dtype, mode, stream)
    else:
        error = native.pact_rows_loss(ctypes.byref(args), dtype, ON_HOST, None)
    if error:
        raise RuntimeError(f"logits_rows.cu: {native.pact_error_string(error).decode()} (error {error})")
