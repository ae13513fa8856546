"""What the ahead-of-time report compiles of the LM head: each kernel in the configuration its launcher picks.

A case is a kernel with its argument types, its compile-time values and its launch options; integers marked
`x16` are known to be divisible by 16, as the launcher's arguments are at real sizes (V = 151,936, padded
rows).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pact_fast.kernels.lm_head import gradient_rows, rows

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


LOSS_POINTERS = (
    "policy_weight",
    "advantages",
    "old_logprobs",
    "ref_logprobs",
    "sft_weight",
    "logprobs",
    "parts",
)
LOSS_FLAGS = ("HAS_POLICY", "HAS_SFT", "HAS_OLD", "HAS_DUAL", "HAS_KL", "HAS_ENTROPY", "HAS_BIAS", "HAS_CAP")
LOSS_VARIANTS = {
    "sft": {"HAS_SFT"},
    "pact": {"HAS_POLICY", "HAS_SFT", "HAS_OLD"},
    "every option": set(LOSS_FLAGS),
}


def row_cases(dtype: str, vocab: int) -> Iterator[Case]:
    launch = rows.tile_config(vocab)
    options = {"num_warps": launch["num_warps"], "num_stages": launch["num_stages"]}
    label = f"{dtype} V={vocab}"
    floats = {"softcap": "fp32", "scale": "fp32"}
    block = {"BLOCK": launch["BLOCK"]}
    for variant, on in LOSS_VARIANTS.items():
        types = {"logits": f"*{dtype}", "bias": "*fp32", "target": "*i64"}
        types |= dict.fromkeys(LOSS_POINTERS, "*fp32") | {"stride": "i32", "stride_r": "i32", "V": "i32"}
        types |= dict.fromkeys(
            ("epsilon_low", "epsilon_high", "dual_clip", "beta", "entropy_coef", *floats), "fp32"
        )
        constants = {flag: flag in on for flag in LOSS_FLAGS} | {"WRITE_GRAD": True} | block
        yield Case(
            f"logits_rows_loss {variant} {label}",
            rows.logits_rows_loss_kernel,
            types,
            constants,
            **options,
            aligned=("stride", "V") if vocab % 16 == 0 else ("stride",),
        )
    for cap in (False, True):
        types = {"logits": f"*{dtype}", "bias": "*fp32", "target": "*i64"}
        types |= {"logprobs": "*fp32", "entropies": "*fp32", "normalizer": "*fp32"}
        types |= {"stride": "i32", "stride_n": "i32", "V": "i32"} | floats
        yield Case(
            f"logits_rows_stats {'softcap ' if cap else ''}{label}",
            rows.logits_rows_stats_kernel,
            types,
            {"HAS_BIAS": cap, "HAS_CAP": cap} | block,
            **options,
            aligned=("stride", "V") if vocab % 16 == 0 else ("stride",),
        )
    types = {"logits": f"*{dtype}", "bias": "*fp32", "target": "*i64"}
    types |= dict.fromkeys(("normalizer", "entropies", "grad_logprob", "grad_entropy"), "*fp32")
    types |= {"stride": "i32", "stride_n": "i32", "start": "i32", "width": "i32"} | floats
    yield Case(
        f"logits_rows_grad {label}",
        rows.logits_rows_grad_kernel,
        types,
        {"HAS_ENTROPY": True, "HAS_BIAS": True, "HAS_CAP": True} | block,
        **options,
        aligned=("stride", "width", "start"),
    )


def gradient_cases(dtype: str) -> Iterator[Case]:
    yield Case(
        f"sum_rows {dtype}",
        gradient_rows.sum_rows_kernel,
        {"rows": f"*{dtype}", "order": "*i64", "starts": "*i64", "out": f"*{dtype}", "H": "i32"},
        {"BLOCK": gradient_rows.BLOCK_H},
        num_warps=4,
        num_stages=2,
        aligned=("H",),
    )
    yield Case(
        f"scale {dtype}",
        gradient_rows.scale_kernel,
        {"x": f"*{dtype}", "factor": "*fp32", "size": "i64"},
        {"BLOCK": gradient_rows.BLOCK_SCALE},
        num_warps=8,
        num_stages=3,
        aligned=("size",),
    )
