"""What the ahead-of-time report compiles of the decode kernels: the configurations their launchers pick."""

from collections.abc import Iterator

import torch

from bench.kernel_cases import QWEN_VOCAB, Case
from bench.tree_kernel_cases import TENSOR_CORES
from pact_fast.kernels.decode import attention, elementwise, extend, sampling
from pact_fast.kernels.decode.tasks import TILE_ROWS

TORCH_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INT32 = ("count", "tasks", "rows", "pages", "row_start", "row_length", "row_ptr", "row_partials", "tiles")
INT32 += ("segments", "blocks", "end", "best_token")
INT64 = ("positions", "slots", "seed", "position", "token")
FLOAT32 = ("partial_out", "partial_lse", "temperature", "floor", "best_score", "top", "total", "logprob")
SCALARS = {"eps": "fp32", "scale": "fp32", "cap": "fp32"}
INTEGERS = ("s_x", "s_r", "s_n", "s_q", "H", "F", "V", "window", "chunks")


def _case(name: str, kernel, dtype: str, constants: dict, launch: dict, **options) -> Case:
    types = {}
    for arg in kernel.arg_names:
        if arg in constants or arg in launch:
            continue
        if arg in SCALARS:
            types[arg] = SCALARS[arg]
        elif arg in INTEGERS:
            types[arg] = "i32"
        elif arg == "finite":
            types[arg] = "*i1"
        else:
            known = {"*i32": INT32, "*i64": INT64, "*fp32": FLOAT32}
            types[arg] = next((t for t, names in known.items() if arg in names), f"*{dtype}")
    if "total" in types and "residual" in types:
        types["total"] = f"*{dtype}"
    if "extend" in name:
        types["positions"] = "*i32"
    sizes = {key: value for key, value in launch.items() if key not in ("num_warps", "num_stages")}
    return Case(
        name,
        kernel,
        types,
        constants | sizes,
        num_warps=launch.get("num_warps", 4),
        num_stages=launch.get("num_stages", 3),
        aligned=("s_x", "s_r", "s_n", "s_q", "H", "F"),
        **options,
    )


def row_cases(dtype: str, hidden: int = 2048, vocab: int = QWEN_VOCAB) -> Iterator[Case]:
    for residual in (True, False):
        yield _case(
            f"add_rms_norm {'residual ' if residual else ''}H={hidden} {dtype}",
            elementwise.add_rms_norm_kernel,
            dtype,
            {"HAS_RESIDUAL": residual, "PLUS_ONE": False},
            elementwise.norm_config(hidden),
        )
    for kind in ("silu", "gelu"):
        yield _case(
            f"{kind}_mul {dtype}",
            elementwise.gated_kernel,
            dtype,
            {"IS_GELU": kind == "gelu"},
            {"BLOCK": elementwise.GATE_BLOCK, "num_warps": 4},
        )
    launch = sampling.chunk_config(vocab)
    for floor in (False, True):
        yield _case(
            f"sample chunk {'filtered ' if floor else ''}V={vocab} {dtype}",
            sampling.sample_chunk_kernel,
            dtype,
            {"HAS_FLOOR": floor},
            launch,
        )
    yield _case(f"sample row {dtype}", sampling.sample_row_kernel, dtype, {}, {"BLOCK_C": 16, "num_warps": 1})


def head_cases(
    dtype: str, heads: tuple[int, int], dim: int, *, window: bool = False, page: int = 16
) -> Iterator[Case]:
    num_q, num_kv = heads
    group = num_q // num_kv
    label = f"{heads[0]}/{heads[1]} heads D={dim} {'window ' if window else ''}{dtype}"
    shape = {"HQ": num_q, "HKV": num_kv, "D": dim}
    for norm in ("head", "full"):
        yield _case(
            f"qk_norm_rope_write {norm} {label}",
            elementwise.qk_norm_rope_write_kernel,
            dtype,
            {**shape, "ROT": dim, "HAS_NORM": True, "FULL_WIDTH": norm == "full", "PLUS_ONE": False},
            elementwise.rope_config(dim, num_q, norm == "full"),
        )
    block_d, block_m = attention.block_sizes(dim, group, min(TILE_ROWS, attention.MAX_TILE // group))
    common = {"HKV": num_kv, "GROUP": group, "D": dim, "PAGE": page, "WINDOW": window, "SOFTCAP": window}
    common |= {"PRECISION": "ieee", "BLOCK_D": block_d}
    tile = attention.choose_key_tile(block_d, block_m, TORCH_TYPES[dtype], (9, 0))._asdict()
    tile["BLOCK_N"] = tile.pop("block_n")
    yield _case(
        f"shared_prefix {label} page {page}",
        attention.shared_prefix_partial_kernel,
        dtype,
        common | {"BLOCK_M": block_m},
        tile,
        want=() if dtype == "fp32" else ("mma",),
    )
    yield _case(
        f"shared_prefix merge {label}",
        attention.shared_prefix_merge_kernel,
        dtype,
        {"HQ": num_q, "D": dim, "BLOCK_D": block_d},
        {"BLOCK_P": attention.MERGE_BLOCK, "num_warps": 2, "num_stages": 1},
    )
    for arch in (80, 90, 100):
        chosen = extend.choose_extend_tile(block_d, group, TORCH_TYPES[dtype], (arch // 10, 0))._asdict()
        chosen["BLOCK_M"], chosen["BLOCK_N"] = chosen.pop("block_m"), chosen.pop("block_n")
        yield _case(
            f"extend_attention {label} page {page}",
            extend.extend_attention_kernel,
            dtype,
            common,
            chosen,
            want=() if dtype == "fp32" else (TENSOR_CORES[arch],),
            arch=arch,
        )


VARIANTS = ("gelu", "filtered", "full", "add_rms_norm H=")  # of kernels that are there in another form


def _models() -> Iterator[Case]:
    """Qwen3-1.7B and SmolLM2-135M."""
    yield from row_cases("bf16")
    yield from head_cases("bf16", (16, 8), 128)
    yield from head_cases("bf16", (9, 3), 64)


def decode_cases() -> list[Case]:
    return [case for case in _models() if not any(word in case.name for word in VARIANTS)]


def more_decode_cases() -> list[Case]:
    cases = [case for case in _models() if any(word in case.name for word in VARIANTS)]
    cases += [*row_cases("fp16"), *row_cases("fp32"), *row_cases("bf16", 576, 512), *row_cases("bf16", 8192)]
    cases += [*head_cases("fp32", (16, 8), 128), *head_cases("bf16", (16, 8), 128, page=64)]
    for heads, dim in (((32, 8), 80), ((28, 4), 128), ((32, 32), 96), ((64, 8), 128)):
        cases += head_cases("bf16", heads, dim)
    cases += head_cases("bf16", (8, 1), 256, window=True)
    return [*cases, *head_cases("bf16", (16, 8), 128, window=True)]
