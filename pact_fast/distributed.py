"""Several processes, one run: FSDP2 under `torchrun`, gloo on CPU and NCCL on GPU.

What each rank does in a step, and why no two can wait for each other for ever:

    rollouts  ranks take the step's prompts in turn, with whole weights (gathered once, no communication while
              sampling), then exchange rollouts: every rank holds all of them, in the order of one process
    weights   of the tokens come from these same rollouts on every rank: normalisation is global by itself
    packs     planned alike everywhere and taken in turn; a rank that has one fewer runs an empty pack, which
              adds exactly zero. Gradients are summed (not averaged), in fp32, once an update
    gauges, losses, non-finite numbers, SIGTERM: exchanged, so that all ranks decide alike

There are two ways to run a share, and no third: `World.rounds` (with communication: as many rounds on every
rank, the plan compared first) and `Sharded.apart` (whole weights, no communication at all, then an exchange
that brings what one rank raised to all). A backward fetches weights by a fixed rule, not by what was run
before: what a rank did apart leaves no trace. Where every rank waits for another all the same, a watchdog in
each says which waits for what, and ends the run (`Watchdog`).

The model is sharded a decoder layer at a time; embedding, final norm and head belong to the root, and the
loss is computed inside the root's forward, where the head's weight is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
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
STALL = 30.0  # seconds that every rank waits before the run is given up
STALLED = 70  # exit status of a run given up
# What the collectives of a process say whose peer has died or hangs: gloo raises plain RuntimeErrors.
_LOST = ("closed by peer", "reset by peer", "timed out", "timeout", "broken pipe", "gloo/transport")


class RankLost(RuntimeError):
    """Another rank of the run has died or does not answer; the message says how to go on."""


class RanksDisagree(RuntimeError):
    """The ranks of a run are about to do, or wait for, different things; the message says which."""


class World:
    """The processes of a run; with one process every method is the identity.

    distributed: whether there is a process group: models are sharded, if only over one rank.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, local_rank: int = 0, *, distributed: bool = False
    ) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self.distributed = distributed or size > 1
        self.group: Any = (
            None  # of exchanges; never that of weights and gradients: neither can take the other's
        )
        self.passes = 0  # shares begun so far
        self.position = "the start"

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
        dist.all_gather_object(values, value, group=self.group)
        return values

    def concat(self, mine: Sequence[T]) -> list[T]:
        """The lists of all ranks, one after the other."""
        return [item for share in self.gather(list(mine)) for item in share]

    def join(self, mine: Sequence[T]) -> list[T]:
        """Puts shares together: the inverse of `shard`."""
        shares = self.gather(list(mine))
        return [share[i] for i in range(len(shares[0])) for share in shares if i < len(share)]

    def begin(self, name: str, plan: Any = None) -> None:
        """Notes that this rank begins a share of `name`. RanksDisagree on every rank unless all begin the
        same, of the same plan."""
        self.passes += 1
        self.position = f"{name} (share {self.passes})"
        if self.size == 1:
            return
        digest = hashlib.sha256(repr(plan).encode()).hexdigest()[:12]
        found = self.gather((self.position, digest))
        if len(set(found)) > 1:
            told = "; ".join(f"rank {i}: {where}, plan {mark}" for i, (where, mark) in enumerate(found))
            raise RanksDisagree(f"the ranks do not do the same: {told}")

    def rounds(self, name: str, items: Sequence[T], filler: T) -> list[T]:
        """This rank's share, filled up so that all ranks get equally many: for work that communicates."""
        self.begin(name, items)
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
    if size > 1:
        world.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=rank_timeout()))
        Watchdog(world).start()
    return world


class Watchdog(threading.Thread):
    """Ends a run whose ranks all wait for each other: none computes, so none will ever come.

    Every few seconds each rank notes in the group's store how long it has been at one place inside a
    collective, and which. Where every rank has been for `STALL` seconds, each says so and exits: a thread
    that waits in a collective cannot be interrupted otherwise. A rank that computes, however long, is no
    stall.
    """

    def __init__(self, world: World) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.world = world
        self.store = dist.PrefixStore("watchdog", dist.distributed_c10d._get_default_store())
        self.place: Any = None
        self.since = 0.0

    def run(self) -> None:
        while True:
            time.sleep(STALL / 10)
            try:
                if told := self.look():
                    break
            except RuntimeError:  # the store is gone: the run has ended, or its first rank has died
                return
        print(f"RanksDisagree: {told}", file=sys.stderr, flush=True)
        time.sleep(STALL / 5)  # for the others to say so too
        os._exit(STALLED)

    def look(self) -> str:
        """Notes this rank's place; what all ranks wait for, once all have waited long enough."""
        world, now = self.world, time.monotonic()
        place, name = waiting_place()
        if place is None or place != self.place:
            self.place, self.since = place, now
        waited = now - self.since if place is not None else 0.0
        note = {"waited": waited, "at": world.position, "in": name}
        self.store.set(str(world.rank), json.dumps(note))
        if waited < STALL:
            return ""
        notes = [json.loads(self.store.get(str(rank))) for rank in range(world.size)]
        if min(n["waited"] for n in notes) < STALL * 0.8:
            return ""
        told = "; ".join(f"rank {i}: {n['at']}, in {n['in']}" for i, n in enumerate(notes))
        return f"every rank has waited {STALL:g} s for the others, {told}. Start again with --resume"


def waiting_place() -> tuple[Any, str]:
    """Where a thread of this process is inside a collective, as something that changes when it moves on, and
    a name; (None, "") where all compute."""
    for thread, frame in sys._current_frames().items():
        inner = frame
        for _ in range(3):
            if "torch/distributed" in inner.f_code.co_filename.replace(os.sep, "/"):
                steps = tuple((id(f), f.f_lasti) for f in _stack(frame))
                return (thread, steps), inner.f_code.co_name
            if inner.f_back is None:
                break
            inner = inner.f_back
    return None, ""


def _stack(frame: Any) -> Iterator[Any]:
    while frame is not None:
        yield frame
        frame = frame.f_back


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
        # Which weights a backward fetches ahead: of the layer before. Left to itself FSDP goes by the order
        # of all forwards since the last backward, those without communication too: another order on each
        # rank.
        layers = [module for module in self._modules() if module is not self._root]
        for module, before in zip([*layers, self._root], [self._root, *layers], strict=True):
            module.set_modules_to_backward_prefetch([before])

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

    def apart(self, name: str, work: Callable[[], T]) -> list[T]:
        """What `work` gives on each rank, on every rank. Inside `work` every weight is whole and nothing is
        communicated, so that ranks may do as much or as little as they have to."""
        self.world.begin(name)
        result: Any = None
        problem: Exception | None = None
        with self.summon_full_params():
            try:
                result = work()
            except Exception as error:  # the others must not wait for what never comes
                if self.world.size == 1:
                    raise
                problem = error
        told = None if problem is None else f"{type(problem).__name__}: {problem}"
        found = self.world.gather((told, result))
        first = next(((rank, text) for rank, (text, _) in enumerate(found) if text), None)
        if problem is not None:
            raise problem
        if first is not None:
            raise RuntimeError(f"rank {first[0]} failed in {name}: {first[1]}")
        return [value for _, value in found]

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
