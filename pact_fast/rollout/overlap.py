"""Rollouts one step ahead (`rollout.overlap`): while step t is trained, servers sample the prompts of t + 1.

    servers   sample t+1 with w_t         sample t+2 with w_t+1
    trainer   score t, update to w_t+1    score t+1, update to w_t+2

So rollouts are one step old when they are trained, and never of two versions: weights are published between
two batches of rollouts. Before an evaluation or a checkpoint nothing is sampled ahead; the step after it is
sampled on the spot, with the current weights, in every run alike. A run that is stopped elsewhere notes the
version behind the rollouts under way, whose folder stays: they are sampled from it again after a resume.

Left out on purpose: more than one step ahead, and engines that share the weights with the trainer.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future, wait

from pact_fast.config import Config, ConfigError
from pact_fast.distributed import World
from pact_fast.rollout.engine import Engine
from pact_fast.rollout.http.engine import HTTPEngine
from pact_fast.rollout.http.publish import Publisher
from pact_fast.rollout.loop import Rollout
from pact_fast.rollout.spread import join_shares

GIVE_UP_TIMEOUT_S = 5.0  # seconds for a tool that is running when sampling is given up

Share = Callable[[], list[Rollout]]


class Overlap:
    """Samples each step's rollouts while the step before is trained; does nothing unless `rollout.overlap`.

    Args:
        config, engine, world: of the run; each rank makes one and calls the same methods in the same order.
        share: share(step) makes ready what samples this rank's rollouts of the step, in a thread of its own.

    Raises ConfigError for an engine that samples with the weights under training.
    """

    def __init__(self, config: Config, engine: Engine, world: World, share: Callable[[int], Share]) -> None:
        self.config, self.world, self.share = config, world, share
        self.versions: dict[int, str] = {}  # of the weights behind rollouts sampled ahead, by step
        self._resumed: set[str] = set()
        self._sampling: Future[list[Rollout]] | None = None
        self._parts: tuple[HTTPEngine, Publisher] | None = None
        if not config.rollout.overlap:
            return
        if not isinstance(engine, HTTPEngine) or engine.publisher is None:
            raise ConfigError(
                f"rollout.overlap=true needs rollout.engine=http, not {config.rollout.engine!r}, which "
                "samples with the weights under training: start pact-fast serve, or set rollout.overlap to "
                "false"
            )
        self._parts = engine, engine.publisher

    def start(self, step: int) -> None:
        """Publishes the current weights and begins a step's rollouts, where these are to be sampled ahead."""
        if self._parts is None or not self._due(step):
            return
        engine, publisher = self._parts
        self.versions = {s: version for s, version in self.versions.items() if s == step - 1}
        publisher.pinned = {*self._resumed, *self.versions.values()}
        engine.prepare()
        assert engine.weights is not None
        self.versions[step] = engine.weights.version
        publisher.pinned.add(engine.weights.version)
        self._sampling = _begin(self.share(step))

    def take(self, step: int) -> list[Rollout] | None:
        """The rollouts sampled ahead for a step, all of them on every rank; None where there are none.

        RolloutError on every rank where one of them could not sample.
        """
        if step not in self.versions or (self._sampling is None and not self._sample_again(step)):
            return None
        assert self._sampling is not None
        rollouts = join_shares(self.world, self._sampling.result, self.config.rollout.num_generations)
        self._sampling = None
        return rollouts

    def stop(self) -> None:
        """Gives up what is under way; `take` samples it again, from the same weights."""
        if self._parts is not None and self._sampling is not None:
            self._parts[0].interrupt()
            wait([self._sampling], timeout=GIVE_UP_TIMEOUT_S)
            self._sampling = None

    def restore(self, step: int, version: str | None) -> None:
        """Takes up `versions.get(step)` of the run that wrote the checkpoint after `step` steps."""
        if self._parts is not None and version is not None:
            self.versions[step] = version
            # The checkpoint may be resumed from once more.
            self._resumed = self._parts[1].pinned = {version}

    def metrics(self, step: int) -> dict[str, float]:
        """`pact/staleness` of a step's rollouts: updates since the weights that sampled them."""
        if self._parts is None:
            return {}
        updates = self.config.train.num_mini_batches * self.config.train.num_iterations
        return {"pact/staleness": updates if step in self.versions else 0}

    def __enter__(self) -> Overlap:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _due(self, step: int) -> bool:
        """Whether a step is sampled ahead: a function of the config, so that a resumed run does the same."""
        config = self.config
        breaks = (config.eval.every, config.checkpoint.every)
        return step < config.train.max_steps and all(not every or step % every for every in breaks)

    def _sample_again(self, step: int) -> bool:
        """Begins rollouts that were given up; False where the folder of their weights is gone."""
        assert self._parts is not None
        engine, publisher = self._parts
        version = self.versions[step]
        if not publisher.reuse(engine, version):
            del self.versions[step]
            warnings.warn(
                f"step {step}: the weights {version} that its rollouts were begun with are no longer in "
                f"{publisher.folder}: they are sampled with the present ones, and the run goes another way "
                "than an undisturbed one",
                stacklevel=3,
            )
            return False
        self._sampling = _begin(self.share(step))
        return True


def _begin(share: Share) -> Future[list[Rollout]]:
    """Runs `share` in a thread that no exit of the process waits for."""
    future: Future[list[Rollout]] = Future()

    def run() -> None:
        try:
            future.set_result(share())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="overlap", daemon=True).start()
    return future
