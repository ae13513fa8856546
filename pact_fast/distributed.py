"""Several processes, one run: FSDP2 under `torchrun`, gloo on CPU and NCCL on GPU.

What each rank does in a step, and why no two can wait for each other for ever:

    rollouts  ranks take the step's prompts in turn, with whole weights (gathered once, no communication while
              sampling), then exchange rollouts: every rank holds all of them, in the order of one process
    weights   of the tokens come from these same rollouts on every rank: normalisation is global by itself
    packs     planned alike everywhere and taken in turn; a rank that has one fewer runs an empty pack, which
              adds exactly zero. Gradients are summed (not averaged), in fp32, once an update
    gauges, losses, non-finite numbers, SIGTERM: exchanged, so that all ranks decide alike

The model is sharded a decoder layer at a time; embedding, final norm and head belong to the root, and the
loss is computed inside the root's forward, where the head's weight is whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from pact_fast.tree.families import decoder_layers

T = TypeVar("T")
# What the collectives of a process say whose peer has died or hangs: gloo raises plain RuntimeErrors.
_LOST = ("closed by peer", "reset by peer", "timed out", "timeout", "broken pipe", "gloo/transport")


class RankLost(RuntimeError):
    """Another rank of the run has died or does not answer; the message says how to go on."""


class World:
    """The processes of a run; with one process every method is the identity.

    distributed: whether there is a process group: models are sharded, if only over one rank.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, local_rank: int = 0, *, distributed: bool = False
    ) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self.distributed = distributed or size > 1

    @property
    def main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> list[T]:
        """This rank's share: every size-th item."""
        return list(items[self.rank :: self.size])

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order, on every rank (pickled: between our own processes)."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def concat(self, mine: Sequence[T]) -> list[T]:
        """The lists of all ranks, one after the other."""
        return [item for share in self.gather(list(mine)) for item in share]

    def join(self, mine: Sequence[T]) -> list[T]:
        """Puts shares together: the inverse of `shard`."""
        shares = self.gather(list(mine))
        return [share[i] for i in range(len(shares[0])) for share in shares if i < len(share)]

    def pad_shard(self, items: Sequence[T], filler: T) -> list[T]:
        """This rank's share, filled up so that all ranks get equally many."""
        share = self.shard(items)
        return share + [filler] * (-(-len(items) // self.size) - len(share))

    def any(self, flag: bool) -> bool:
        return any(self.gather(flag))

    @contextmanager
    def peers(self) -> Iterator[None]:
        """Inside, an exchange that fails because another rank is gone raises RankLost."""
        try:
            yield
        except RuntimeError as error:
            known = isinstance(error, dist.DistError) or any(w in str(error).lower() for w in _LOST)
            if self.size == 1 or not known:
                raise
            raise RankLost(
                f"rank {self.rank} of {self.size}: another rank is gone or has not answered for "
                f"{rank_timeout():g} s ({str(error).strip().splitlines()[-1][-200:]}). Its own output "
                "says why; start all ranks again with --resume to go on from the newest checkpoint"
            ) from error


def rank_timeout() -> float:
    """Seconds after which a rank that does not answer is given up: PACT_FAST_TIMEOUT, default 600."""
    return float(os.environ.get("PACT_FAST_TIMEOUT", "600"))


def join_world(device: str) -> World:
    """The world that torchrun describes in the environment, be it of one rank; one process without it.

    A rank that dies makes the others fail at once, one that hangs after `rank_timeout()`: see World.peers.
    """
    if not all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
        return World()
    size, local_rank = int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", "0"))
    world = World(int(os.environ["RANK"]), size, local_rank, distributed=True)
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(world.local_rank)
    if not dist.is_initialized():
        timeout = timedelta(seconds=rank_timeout())
        # gloo beside NCCL: Python objects travel over the host.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timeout)
    return world


class Sharded:
    """A model spread over the ranks of a world; in one process without torchrun, the model itself.

    Args:
        model: a causal LM; its parameters become sharded in place.
        param_dtype: dtype of the weights in compute; master weights and reduction stay as they are (fp32).
        cpu_offload: keep shards, gradients and optimizer state in host memory.
    """

    def __init__(
        self,
        model: nn.Module,
        world: World,
        *,
        param_dtype: torch.dtype | None = None,
        cpu_offload: bool = False,
    ) -> None:
        self.model, self.world, self.param_dtype = model, world, param_dtype
        self._root: Any = None
        if not world.distributed:
            return
        precision = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
        options: dict[str, Any] = {"mp_policy": precision}
        if cpu_offload:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
        for layer in decoder_layers(model):
            fully_shard(layer, **options)
        self._root = fully_shard(_Root(model), **options)
        # The loss carries its own normalisation, from global counts: gradients are summed.
        for module in self._modules():
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum

    @property
    def compute_dtype(self) -> torch.dtype:
        """In which the forward computes; the master weights may be wider."""
        return self.param_dtype or cast(Any, self.model).dtype

    def run(self, compute: Callable[[], T]) -> T:
        """Calls `compute` where the root's weights are whole; its tensors may be sent backward."""
        return compute() if self._root is None else self._root(compute)

    def sync_gradients(self, now: bool) -> None:
        """Whether the next backward exchanges gradients; without, they add up on each rank."""
        if self._root is not None:
            self._root.set_requires_gradient_sync(now)

    @contextmanager
    def summon_full_params(self) -> Iterator[None]:
        """Inside, every weight is whole on every rank: forwards communicate nothing, ranks need not agree."""
        if self._root is None:
            yield
            return
        modules = self._modules()
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
        try:
            with torch.no_grad():
                self._root(lambda: torch.zeros(()))  # lets the root, not a layer, set FSDP up
            for module in modules:
                module.unshard()
            yield
        finally:
            for module in modules:
                module.reshard()
                module.set_reshard_after_forward(module is not self._root, recurse=False)

    def state_dict(self, *, frozen: bool = False) -> dict[str, Tensor]:
        """The whole weights on the host of rank 0, names as in the model; of a model with adapters these
        alone, unless `frozen` asks for all. Every rank must call it."""
        parts = self.model.state_dict()
        if hasattr(self.model, "get_base_model") and not frozen:
            trained = {n for n, p in self.model.named_parameters() if p.requires_grad}
            parts = {name: tensor for name, tensor in parts.items() if name in trained}
        owner = {name: id(p) for name, p in self.model.named_parameters(remove_duplicate=False)}
        whole: dict[int, Tensor] = {}  # tied weights stay one tensor
        state = {}
        for name, tensor in parts.items():
            key = owner.get(name, id(tensor))
            if key not in whole:
                full = plain(tensor)
                whole[key] = full.cpu() if self.world.main else full.new_empty(0)
            state[name] = whole[key]
        return state

    def _modules(self) -> list[Any]:
        return [module for module in self._root.modules() if isinstance(module, FSDPModule)]


class _Root(nn.Module):
    """What FSDP2 takes for the root: its forward is whatever needs the root's weights whole."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[], T]) -> T:
        return compute()


def plain(value: Tensor) -> Tensor:
    """The whole of a DTensor (a norm, say); other tensors as they are."""
    return value.full_tensor() if isinstance(value, DTensor) else value
