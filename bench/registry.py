"""The registry of microbenchmarks: ops x providers x shapes. head, tree_attention and decode register."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

# A provider makes, from an op's inputs and a mode, a function that runs once and returns named outputs.
Run = Callable[[], dict[str, torch.Tensor]]
Maker = Callable[[Any, str], Run]


class Unavailable(Exception):
    """The provider cannot run here: not installed, other hardware, or a mode it does not have."""


@dataclass(frozen=True)
class Shape:
    """Sizes by name, plus how the inputs are distributed; `peers` says whether every provider runs on it."""

    sizes: dict[str, int]
    logits: str = "random"
    peers: bool = True
    why: str = ""

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.sizes.items())
        return sizes if self.logits == "random" else f"{sizes} {self.logits}"


@dataclass
class Op:
    name: str
    modes: tuple[str, ...]
    make_inputs: Callable[[Shape, torch.dtype, str], Any]
    exact: Callable[[Any, str], dict[str, torch.Tensor]]  # fp64 outputs for the correctness gate
    gpu_shapes: tuple[Shape, ...]
    cpu_shapes: tuple[Shape, ...]
    gate_shape: Shape
    plain: str = "torch/logits"  # the provider whose error the gate allows others four times of
    # What a run of a provider gave, as `exact` names it; for runs whose outputs have a form of their own.
    collect: Callable[[Any, Run, dict[str, torch.Tensor]], dict[str, torch.Tensor]] = lambda i, run, out: out
    flops: Callable[[Any, str], float] | None = None  # useful operations of a run, of inputs and mode
    providers: dict[str, Maker] = field(default_factory=dict)  # "provider/impl" -> maker
    ours: tuple[str, ...] = ()  # providers run on shapes without peers, too


OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    OPS[op.name] = op
    return op


def provider(op: Op, name: str, *, always: bool = False) -> Callable[[Maker], Maker]:
    """Registers a maker as "provider/impl"; `always`: also on shapes where peers are left out."""

    def add(maker: Maker) -> Maker:
        op.providers[name] = maker
        if always:
            op.ours += (name,)
        return maker

    return add
