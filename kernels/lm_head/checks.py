"""Checks of values inside the ops: always on CPU; on a device under PACT_FAST_DEBUG=1, without a sync."""

import os

import torch
from torch import Tensor


def checked(values: Tensor) -> bool:
    return values.device.type == "cpu" or os.environ.get("PACT_FAST_DEBUG") == "1"


def require(good: Tensor, message: str) -> None:
    """`good` must hold everywhere: ValueError on CPU, a device-side assert elsewhere."""
    if good.device.type != "cpu":
        torch._assert_async(good.all(), message)
    elif not bool(good.all()):
        raise ValueError(message)


def require_indices(name: str, index: Tensor, size: int, live: Tensor | None = None) -> None:
    if not checked(index):
        return
    good = (index >= 0) & (index < size)
    where = ""
    if live is not None:
        good, where = good | ~live, " on a row with a weight; give masked rows weight 0"
    worst = ""
    if index.device.type == "cpu" and not bool(good.all()):
        worst = f", got {int(index[~good][0])}"
    require(good, f"{name} must be in [0, {size}){where}{worst}")


def require_weights(name: str, weights: Tensor | None) -> None:
    if weights is not None and checked(weights):
        good = (weights >= 0) & (weights < float("inf"))  # False for NaN
        worst = ""
        if weights.device.type == "cpu" and not bool(good.all()):
            worst = f", got {float(weights[~good][0])}"
        require(good, f"{name} must be finite and >= 0{worst}")


def require_positive(name: str, values: Tensor) -> None:
    if checked(values):
        good = (values > 0) & (values < float("inf"))
        worst = ""
        if values.device.type == "cpu" and not bool(good.all()):
            worst = f", got {float(values[~good][0])}"
        require(good, f"{name} must be finite and > 0{worst}")
