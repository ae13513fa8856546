"""Weights on their way to rollout servers: a fresh folder per version, whole or not there."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pact_fast.distributed import Sharded
from pact_fast.rollout.engine import RolloutError
from pact_fast.rollout.http.client import Weights
from pact_fast.rollout.http.engine import HTTPEngine
from pact_fast.rollout.in_process.weights import add_adapters

VERSION = re.compile(r"[0-9]{6}-[0-9a-f]{8}")
SHARD = 4 * 2**30  # bytes of one file
PROBE = 16  # tokens of the fixed sequence that new weights are recognised by
# Beside the weights: the trainer's log-probs of the probe, in safetensors' format.
EXPECTED = "expected.probe"
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
NARROW = 0.5  # of log-probs where trainer or server computes in half precision


class Publisher:
    """Gives a model's weights to an engine's servers where they have changed; every rank makes one.

    Args:
        sharded: the model over its ranks.
        folder: where versions are written; every server must see it under the same path.
        tolerance: largest gap of a log-prob between trainer and server; None: 1e-3, in half precision 0.5.
    """

    def __init__(self, sharded: Sharded, folder: Path, *, tolerance: float | None = None) -> None:
        self.sharded = sharded
        self.folder = folder.absolute()
        self.stale = True  # set by whoever changes the weights
        self.pinned: set[str] = set()  # versions whose folders stay besides the newest
        self.tolerance = TOLERANCE.get(sharded.compute_dtype, NARROW) if tolerance is None else tolerance
        self.count = 0

    @property
    def model(self) -> Any:
        return self.sharded.model

    def publish(self, engine: HTTPEngine) -> None:
        """Returns when the engine's servers hold the current weights; RolloutError on every rank if not."""
        if not self.stale:
            return
        world = self.sharded.world
        state = merged(self.sharded.state_dict(frozen=True), self.model)
        version = world.gather(f"{self.count:06d}-{uuid.uuid4().hex[:8]}")[0]
        before = engine.weights.expected if engine.weights else None
        with self.sharded.summon_full_params():
            expected = self._expected()
        weights = Weights(version, self.folder / version, self._probe, expected, before, self.tolerance)
        self._load(engine, weights, lambda: write_weights(weights.folder, state, expected))
        if world.main:
            _prune(self.folder, keep={version} | self.pinned)
        self.stale, self.count = False, self.count + 1

    def reuse(self, engine: HTTPEngine, version: str) -> bool:
        """Samples with a version that was published before, by this run or by the one it goes on from; False
        where its folder is gone. Every rank must call it; the next `publish` gives the current weights."""
        world, folder = self.sharded.world, self.folder / version
        there = VERSION.fullmatch(version) and (folder / EXPECTED).is_file()
        expected = world.gather(load_file(folder / EXPECTED)["expected"] if world.main and there else None)[0]
        if expected is None:
            return False
        self._load(engine, Weights(version, folder, self._probe, expected, None, self.tolerance))
        self.stale = True
        return True

    def _load(self, engine: HTTPEngine, weights: Weights, write: Callable[[], None] = lambda: None) -> None:
        """Gives weights to the engine on every rank, once rank 0 has written them."""
        world, problem = self.sharded.world, None
        try:
            if world.main:
                write()
            # The others first look at the servers after `gather`, when rank 0 is through.
            engine.load(weights, push=world.main)
        except RolloutError as error:
            problem = str(error)
        except (OSError, SafetensorError) as error:
            problem = (
                f"{weights.folder}: {error}: free some space, or choose another folder with "
                "rollout.weights_dir"
            )
        if first := next(filter(None, world.gather(problem)), None):
            raise RolloutError(first)

    @property
    def _probe(self) -> list[int]:
        return probe_ids(self.model.get_input_embeddings().weight.shape[0])

    @torch.no_grad()
    def _expected(self) -> Tensor:
        self.model.eval()
        logits = self.model(torch.tensor([self._probe], device=self.model.device)).logits[0]
        return logits.float().log_softmax(-1).cpu()


def probe_ids(vocabulary: int) -> list[int]:
    """A fixed sequence that meets tokens from all over the vocabulary."""
    return [(2 * i + 1) * vocabulary // (2 * PROBE) for i in range(PROBE)]


def merged(state: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The tensors under the plain model's names; adapters (peft LoRA) are added to the weights they adapt."""
    if not hasattr(model, "peft_config"):
        return dict(state)
    scales = {name: m.scaling for name, m in model.named_modules() if hasattr(m, "lora_A")}
    out = {}
    for name, tensor in state.items():
        if ".lora_" in name:
            continue
        layer = name.removesuffix(".base_layer.weight")
        if layer in scales and layer != name and tensor.numel():  # empty on ranks that do not write
            pairs = [
                (scale, *(state[f"{layer}.lora_{x}.{adapter}.weight"] for x in "AB"))
                for adapter, scale in scales[layer].items()
            ]
            tensor = add_adapters(tensor, pairs)
        out[name.removeprefix("base_model.model.").replace(".base_layer.", ".")] = tensor
    return out


def write_weights(path: Path, state: Mapping[str, Tensor], expected: Tensor | None = None) -> None:
    """Writes tensors (tied ones once) as safetensors into a new folder, built beside and renamed.

    expected: log-probs of the probe under these weights, kept beside them for `Publisher.reuse`.
    """
    building = path.with_name(f".building-{path.name}")
    building.mkdir(parents=True)
    shards: list[dict[str, Tensor]] = [{}]
    seen: set[int] = set()
    size = 0
    for name, tensor in state.items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if shards[-1] and size + tensor.nbytes > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach().contiguous()
        size += tensor.nbytes
    for number, shard in enumerate(shards, 1):
        save_file(shard, building / f"model-{number:05d}-of-{len(shards):05d}.safetensors", {"format": "pt"})
    if expected is not None:
        save_file({"expected": expected}, building / EXPECTED)
    os.replace(building, path)


def _prune(folder: Path, keep: set[str]) -> None:
    """Removes all versions but `keep`: the newest, which a server that restarts asks for, say; and what a
    killed run left half-written. Nothing else in the folder is touched."""
    for path in folder.iterdir():
        if VERSION.fullmatch(path.name.removeprefix(".building-")) and path.name not in keep:
            shutil.rmtree(path, ignore_errors=True)
