"""AdamW whose states take fewer bytes than the weights, in bfloat16 (ours) or 8 bits (torchao); the learning
rate of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from pact_fast.config import TrainConfig


class AdamWBF16(torch.optim.Optimizer):
    """AdamW with both moments in bfloat16, half the bytes; weights and arithmetic stay in fp32.

    The moments are rounded stochastically: rounded to nearest, the second one would stop following, for one
    step changes it by a thousandth (beta2 = 0.999) and bfloat16 knows steps of a 256th. Where the moments are
    exact in bfloat16 a step is torch.optim.AdamW's.

    Args:
        params, lr, betas, eps, weight_decay: as of torch.optim.AdamW.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        if closure is not None:
            raise ValueError("closure: this optimizer takes none; compute the gradients before step()")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return None

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        state["step"] += 1
        step, (beta1, beta2) = float(state["step"]), group["betas"]
        # Element by element: each rank works on its own shard.
        weight, grad = _local(parameter), _local(parameter.grad).float()
        first, second = _local(state["exp_avg"]), _local(state["exp_avg_sq"])
        mean = first.float().lerp_(grad, 1 - beta1)
        square = second.float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        scale = math.sqrt(1 - beta2**step)
        update = mean / (square.sqrt() / scale + group["eps"])
        weight.add_(update.to(weight.dtype), alpha=-group["lr"] / (1 - beta1**step))
        _round_into(first, mean)
        _round_into(second, square)


def adamw_8bit() -> Any:
    """torchao's AdamW8bit. Raises ImportError where torchao is missing."""
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise ImportError("train.optim=adamw_8bit needs `pip install torchao`") from error
    return AdamW8bit


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """For the next step; torchao holds it in a tensor, which must stay the same one."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def plain_states(states: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's optimizer states as plain tensors: one of torchao's in 8 bits becomes `<key>.<part>`."""
    plain: dict[str, Any] = {}
    for key, value in states.items():
        if hasattr(value, "__tensor_flatten__") and not isinstance(value, DTensor):
            plain |= {f"{key}.{part}": getattr(value, part) for part in value.__tensor_flatten__()[0]}
        else:
            plain[key] = value
    return plain


def rebuilt_states(plain: Mapping[str, Tensor], parameter: Tensor) -> dict[str, Tensor]:
    """The inverse of `plain_states`."""
    states = {key: value for key, value in plain.items() if "." not in key}
    for key in {key.partition(".")[0] for key in plain if "." in key}:
        from torchao.optim.subclass_8bit import OptimState8bit

        parts = {name.partition(".")[2]: value for name, value in plain.items() if name.startswith(f"{key}.")}
        states[key] = OptimState8bit(**parts, signed=key == "exp_avg", dtype=parameter.dtype)
    return states


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _round_into(target: Tensor, value: Tensor) -> None:
    """Rounds fp32 to bf16, up with the probability of the part that is cut off: right on average."""
    bits = value.view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device)
    target.copy_(((bits + noise) & -(1 << 16)).view(torch.float32))


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of step 0, 1, ...: linear warm-up, then constant, or down to 0 at max_steps."""
    factor = 1.0
    if step < config.warmup_steps:
        factor = (step + 1) / config.warmup_steps
    elif config.lr_scheduler_type != "constant":
        done = (step - config.warmup_steps) / max(config.max_steps - config.warmup_steps, 1)
        factor = 1 - done if config.lr_scheduler_type == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.learning_rate * factor
