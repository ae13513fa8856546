"""New weights for a served model from a folder of safetensors: all of them, checked, or none."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel


class WeightsRefused(ValueError):
    """A folder whose weights are not taken; the model is as it was. The message says what is wrong."""


def inside(path: str, root: Path | None) -> Path:
    """`path` with its links followed, which must lie under `root`; PermissionError otherwise."""
    if root is None:
        raise PermissionError(
            "this server takes no weights: start it with --model-root DIR, the folder that weights come from"
        )
    resolved = Path(path).resolve()
    if not resolved.is_relative_to(root.resolve()):
        raise PermissionError(f"weights_path {path!r} is outside this server's model root {str(root)!r}")
    return resolved


def reload_weights(model: PreTrainedModel, path: str, root: Path | None) -> None:
    """Puts the tensors of a folder's *.safetensors into the model.

    Args:
        path: must lie under `root`, links followed. Every parameter must be in it once, under its Hugging
            Face name (one name for tied ones), with its shape and finite; values are cast to the model's
            dtype.

    Raises:
        PermissionError: outside root. WeightsRefused: not a folder of this model's weights.
    """
    folder = inside(path, root)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise WeightsRefused(f"weights_path {path!r} holds no *.safetensors")
    found: dict[str, Tensor] = {}
    for file in files:
        inside(str(file), root)
        try:
            with safe_open(file, "pt") as opened:
                found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no dict
        except (SafetensorError, OSError) as error:
            raise WeightsRefused(f"{file}: cannot be read: {error}") from error
    chosen = _match(model, found, path)
    with torch.no_grad():
        for target, value in chosen:
            target.copy_(value)


def _match(model: PreTrainedModel, found: dict[str, Tensor], path: str) -> list[tuple[Tensor, Tensor]]:
    """(tensor of the model, its new value) for all of them; raises WeightsRefused with what does not fit."""
    targets: dict[int, Tensor] = {}
    names: dict[int, list[str]] = {}  # tied tensors have several
    for name, tensor in model.state_dict(keep_vars=True).items():
        targets[id(tensor)] = tensor
        names.setdefault(id(tensor), []).append(name)
    known = {name for aliases in names.values() for name in aliases}
    problems = [f"{name} is no tensor of this model" for name in sorted(found.keys() - known)]
    chosen = []
    for key, aliases in names.items():
        given = [name for name in aliases if name in found]
        if not given:
            problems.append(f"{aliases[0]} is missing")
            continue
        value = found[given[0]]
        if value.shape != targets[key].shape:
            problems.append(f"{given[0]} is {list(value.shape)}, the model's {list(targets[key].shape)}")
        elif value.is_floating_point() and not bool(value.isfinite().all()):
            problems.append(f"{given[0]} is not finite")
        chosen.append((targets[key], value))
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise WeightsRefused(f"weights_path {path!r}: {'; '.join(problems[:3])}{more}; nothing was loaded")
    return chosen
