"""The engine that a configuration asks for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from pact_fast.config import ConfigError, RolloutConfig
from pact_fast.distributed import Sharded
from pact_fast.rollout.engine import Engine
from pact_fast.rollout.http.engine import HTTPEngine
from pact_fast.rollout.http.publish import Publisher
from pact_fast.rollout.in_process.engine import InProcessEngine

TOKEN = "PACT_FAST_TOKEN"  # environment variable: config.json of a run is no place for a secret


def local_engine(model: Any, device: torch.device) -> Engine:
    """The engine of commands that sample with a model of this process and train nothing."""
    return InProcessEngine(model.to(device).eval(), device=device, kv_memory=0.5)


def build_engine(config: RolloutConfig, model: Any, sharded: Sharded, run_dir: Path) -> Engine:
    """`rollout.engine` over the model of this process or over `rollout.servers`.

    run_dir: weights for servers go to run_dir/weights unless rollout.weights_dir names another folder.
    """
    if config.engine != "http" and config.servers:
        raise ConfigError(
            f"rollout.servers={config.servers} needs rollout.engine=http, not {config.engine!r}"
        )
    if config.engine == "in_process":
        return InProcessEngine(
            model,
            dtype=sharded.compute_dtype,
            kv_memory=config.kv_memory,
            cuda_graphs=config.cuda_graphs,
            max_rows=config.batch_size,
        )
    folder = Path(config.weights_dir) if config.weights_dir else run_dir / "weights"
    return HTTPEngine(
        config.servers,
        token=os.environ.get(TOKEN),
        max_in_flight=config.max_in_flight,
        request_timeout=config.request_timeout,
        retry_timeout=config.retry_timeout,
        mix_weights=config.mix_weights,
        publisher=Publisher(sharded, folder, tolerance=config.probe_tolerance),
    )
