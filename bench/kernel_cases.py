"""What the ahead-of-time report compiles of the LM head: each kernel in the configuration its launcher picks.

A case is a kernel with its argument types, its compile-time values and its launch options; integers marked
`x16` are known to be divisible by 16, as the launcher's arguments are at real sizes (V = 151,936, padded
rows).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pact_fast.kernels.lm_head import divergence, reference, rows

QWEN_VOCAB = 151_936


@dataclass(frozen=True)
class Case:
    name: str
    kernel: Any
    types: dict[str, str]  # argument -> Triton type; pointers are 16-byte aligned
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    aligned: tuple[str, ...] = ()  # integers divisible by 16
    want: tuple[str, ...] = field(default=())  # instructions the PTX must contain
    arch: int | None = None  # only for this compute capability
    spills: int = 0  # bytes that this case may spill: the fastest tile measured is taken whatever it spills


def row_cases(dtype: str, vocab: int) -> Iterator[Case]:
    launch = rows.tile_config(vocab)
    options = {"num_warps": launch["num_warps"], "num_stages": launch["num_stages"]}
    label = f"{dtype} V={vocab}"
    aligned = ("stride", "V") if vocab % 16 == 0 else ("stride",)
    block = {"BLOCK": launch["BLOCK"]}
    for cap in (False, True):
        types = {"logits": f"*{dtype}", "bias": "*fp32", "target": "*i64", "scales": "*fp32"}
        types |= {"logprobs": "*fp32", "entropies": "*fp32", "normalizer": "*fp32"}
        types |= {"stride": "i32", "stride_n": "i32", "V": "i32", "softcap": "fp32"}
        yield Case(
            f"logits_rows_stats {'softcap ' if cap else ''}{label}",
            rows.logits_rows_stats_kernel,
            types,
            {"HAS_BIAS": cap, "HAS_CAP": cap} | block,
            **options,
            aligned=aligned,
        )
    types = {"logits": f"*{dtype}", "bias": "*fp32", "target": "*i64", "scales": "*fp32"}
    types |= dict.fromkeys(("normalizer", "entropies", "grad_logprob", "grad_entropy"), "*fp32")
    types |= {"stride": "i32", "stride_n": "i32", "start": "i32", "width": "i32"}
    types |= {"softcap": "fp32"}
    for name, on in (("", False), ("every option ", True)):
        yield Case(
            f"logits_rows_grad {name}{label}",
            rows.logits_rows_grad_kernel,
            types,
            {"HAS_ENTROPY": on, "HAS_BIAS": on, "HAS_CAP": on} | block,
            **options,
            aligned=("stride", "width", "start"),
        )
    yield from divergence_cases(dtype, vocab)


def divergence_cases(dtype: str, vocab: int) -> Iterator[Case]:
    launch = rows.tile_config(vocab)
    types = {"student": f"*{dtype}", "teacher": f"*{dtype}", "weights": "*fp32", "divergences": "*fp32"}
    types |= {"stride_s": "i32", "stride_t": "i32", "V": "i32"}
    types |= dict.fromkeys(("softcap", "scale_s", "scale_t", "beta", "clip"), "fp32")
    for number, kind in enumerate(reference.KINDS):
        for cap in (False, True):
            yield Case(
                f"divergence {kind} {'softcap ' if cap else ''}{dtype} V={vocab}",
                divergence.divergence_rows_kernel,
                types,
                {"KIND": number, "HAS_CAP": cap, "WRITE_GRAD": True, "BLOCK": launch["BLOCK"]},
                num_warps=launch["num_warps"],
                num_stages=launch["num_stages"],
                aligned=("stride_s", "stride_t", "V") if vocab % 16 == 0 else ("stride_s", "stride_t"),
            )


def gradient_cases(dtype: str) -> Iterator[Case]:
    yield Case(
        f"sum_rows {dtype}",
        rows.sum_rows_kernel,
        {"rows": f"*{dtype}", "order": "*i64", "starts": "*i64", "out": f"*{dtype}", "H": "i32"},
        {"BLOCK": rows.BLOCK_H},
        num_warps=4,
        num_stages=2,
        aligned=("H",),
    )
    yield Case(
        f"scale {dtype}",
        rows.scale_kernel,
        {"x": f"*{dtype}", "factor": "*fp32", "size": "i64"},
        {"BLOCK": rows.BLOCK_SCALE},
        num_warps=8,
        num_stages=3,
        aligned=("size",),
    )
