"""What of a training process is saved: which tensors under which names, and the random generators."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pact_fast.optimizer import plain_states, rebuilt_states


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message names it and says what to do."""


def collect(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {f"model/{name}": tensor.detach() for name, tensor in model_tensors(model).items()}
    names: dict[Any, str] = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, values in optimizer.state.items():
        for key, value in plain_states(values).items():
            if not isinstance(value, Tensor):
                raise CheckpointError(
                    f"optimizer state {key!r} of {names[parameter]} is no tensor: {value!r}"
                )
            # safetensors slices need a dimension; AdamW's step counter has none.
            scalar = value.ndim == 0
            prefix = "scalar" if scalar else "optimizer"
            tensors[f"{prefix}/{key}/{names[parameter]}"] = (
                value.detach().reshape(1) if scalar else value.detach()
            )
    return tensors


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters (tied ones once) and persistent buffers, by name."""
    tensors: dict[str, Tensor] = {n: p.data for n, p in model.named_parameters() if p.requires_grad}
    persistent = model.state_dict().keys()
    return tensors | {n: b for n, b in model.named_buffers() if n in persistent}


def empty_optimizer_state(path: Path, metadata: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    empty: dict[str, Tensor] = {}
    for full, meta in metadata.items():
        kind, _, rest = full.partition("/")
        if kind == "model":
            continue
        name = rest.partition("/")[2]
        if name not in parameters:
            raise CheckpointError(f"{path}: holds optimizer state of {name!r}, which the model has not")
        dtype = meta.properties.dtype
        if kind == "scalar":
            empty[full] = torch.zeros(1, dtype=dtype)
        elif tuple(meta.size) != tuple(parameters[name].shape):  # a part of a quantised state
            empty[full] = torch.zeros(meta.size, dtype=dtype, device=parameters[name].device)
        else:  # sharded as its parameter is
            empty[full] = torch.zeros_like(parameters[name].data, dtype=dtype)
    return empty


def set_optimizer_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    states: dict[str, dict[str, Tensor]] = {}
    for full, value in tensors.items():
        kind, _, rest = full.partition("/")
        if kind != "model":
            key, _, name = rest.partition("/")
            states.setdefault(name, {})[key] = value.reshape(()) if kind == "scalar" else value
    for name, values in states.items():
        optimizer.state[parameters[name]] = rebuilt_states(values, parameters[name])


def check_names(path: Path, saved: Mapping[str, tuple[int, ...]], wanted: Mapping[str, Tensor]) -> None:
    problems = [f"{name} is missing in it" for name in sorted(wanted.keys() - saved.keys())]
    problems += [f"{name} is unknown to the model" for name in sorted(saved.keys() - wanted.keys())]
    problems += [
        f"{name} is {list(saved[name])}, the model's {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in saved and saved[name] != tuple(tensor.shape)
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{path} is of another model: {'; '.join(problems[:3])}{more}. Use the config the run began with"
        )


def generators() -> dict[str, Any]:
    legacy: Any = np.random.get_state()  # noqa: NPY002 - the global state is what libraries draw from
    name, keys, position, has_gauss, cached = legacy
    return {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), position, has_gauss, cached],
        "torch": bytes(torch.get_rng_state().tolist()).hex(),
        "cuda": [bytes(s.tolist()).hex() for s in torch.cuda.get_rng_state_all()],
    }


def set_generators(saved: Mapping[str, Any]) -> None:
    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = saved["numpy"]
    state = (name, np.array(keys, dtype=np.uint32), position, has_gauss, cached)
    np.random.set_state(state)  # noqa: NPY002
    torch.set_rng_state(_bytes(saved["torch"]))
    if len(saved["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_bytes(state) for state in saved["cuda"]])


def _bytes(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
