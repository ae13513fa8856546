"""Models under torch's DistributedDataParallel (DDP): only its own forward makes it exchange gradients.

DDP arms itself in `ddp.forward` and averages gradients as the next backward makes them. A forward of what
it wraps, `ddp.module`, arms nothing: every rank then trains on its own gradients, and nothing says so. What
needs the parts of the model (hidden states, the head's weight) therefore runs inside of `ddp.forward`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


def within_forward(model: nn.Module, compute: Callable[[], T]) -> T:
    """`compute()`, inside of the forward of a DDP model so that its gradients are exchanged in the backward;
    for any other model, and without gradients, just `compute()`.

    With `find_unused_parameters` DDP takes what the returned tensors do not depend on for unused: return what
    the loss is made of. Every rank must call it equally often.
    """
    if not isinstance(model, DistributedDataParallel) or not torch.is_grad_enabled():
        return compute()
    inner: Any = model.module
    own = vars(inner).get("forward")
    inner.forward = lambda run: run()
    try:
        return model(compute)
    finally:
        if own is None:
            del inner.forward
        else:
            inner.forward = own


def check_exchanged(model: nn.Module) -> None:
    """ValueError where `model` lies inside of a DDP model that is to exchange the next gradients.

    Looks through the process's objects (0.1 s), and only where there are several ranks: a module does not
    know what wraps it.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    own = {id(p) for p in model.parameters()}
    for item in gc.get_objects():
        if not issubclass(type(item), DistributedDataParallel) or not item.require_backward_grad_sync:
            continue
        if any(id(p) in own for p in item.module.parameters()):
            raise ValueError(
                "the model is inside of a DistributedDataParallel, and a forward of ddp.module exchanges no "
                "gradients: every rank would train on its own. Give the wrapped model: Policy(ddp), "
                "sequence_logprobs(ddp, ...); or call it within ddp.no_sync() and reduce gradients yourself"
            )
