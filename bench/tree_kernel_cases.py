"""What the ahead-of-time report compiles of tree attention: three kernels, at each architecture's tiles."""

from collections.abc import Iterator

import torch

from bench.kernel_cases import Case
from pact_fast.kernels.tree_attention import triton as kernels
from pact_fast.kernels.tree_attention.tiles import Tile, choose_tiles

KERNELS = {
    "fwd": kernels.tree_attention_fwd_kernel,
    "dq": kernels.tree_attention_dq_kernel,
    "dkv": kernels.tree_attention_dkv_kernel,
}
TORCH_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
HEADS, GROUP = 16, 2  # Qwen3-1.7B
# Tiles that were measured to be the fastest though they spill (bench/LOG.md): (kernel, head_dim, sm): bytes
# stored and loaded, the most of triton 3.6 and 3.9. Others must not spill at all.
STATED_SPILLS = {("fwd", 128, 90): 56}
INT32 = ("end", "depth", "order", "ptr", "split", "cols")
FLOAT32 = ("lse", "delta", "d_lse")


def _types(names: list[str], constants: dict, dtype: str, block: list[int]) -> dict[str, str]:
    types = {}
    for name in names:
        if name in constants:
            continue
        if name.startswith("s_") or name in ("T", "first", "window"):
            types[name] = "i32"
        elif name.startswith("scale"):
            types[name] = "fp32"
        elif name in INT32:
            types[name] = "*i32"
        elif name in FLOAT32:
            types[name] = "*fp32"
        else:
            types[name] = f"*{dtype}"
    if "HEADS" not in names:  # dK/dV takes queries and their gradients by descriptor
        types |= dict.fromkeys(("q", "d_out"), f"tensordesc<{dtype}{block}>")
    return types


def tree_cases(dtype: str, head_dim: int, *, window: bool = False) -> Iterator[Case]:
    for arch, instruction in TENSOR_CORES.items():
        for name, kernel in KERNELS.items():
            tile: Tile = getattr(choose_tiles(head_dim, TORCH_TYPES[dtype], (arch // 10, 0), window), name)
            block_d = kernels._block_d(head_dim)
            constants = {"HEADS": HEADS, "KV_HEADS": HEADS // GROUP, "GROUP": GROUP, "D": head_dim}
            constants |= {"BLOCK_D": block_d, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
            constants |= {"WINDOW": window, "PRECISION": "tf32"}
            names = kernel.arg_names
            constants = {key: value for key, value in constants.items() if key in names}
            few_rows = (
                arch != 80 and min(tile.block_m, tile.block_n) < 64
            )  # below 64 rows: the older instruction
            yield Case(
                f"tree_attention {name} D={head_dim} {'window ' if window else ''}{dtype}",
                kernel,
                _types(names, constants, dtype, [tile.block_m, block_d]),
                constants,
                tile.num_warps,
                tile.num_stages,
                aligned=tuple(n for n in names if n.startswith("s_")),
                want=() if few_rows else (instruction,),
                arch=arch,
                spills=STATED_SPILLS.get((name, head_dim, arch), 0) if not window else 0,
            )
