"""The training loop: sample, score, update, evaluate. Every method is a choice of token weights.

Left out on purpose: anything about how a model shards, what a tool does, or how a chat is written.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.nn.utils import clip_grad_norm_

from pact_fast.config import Config, ConfigError, changed_keys
from pact_fast.data.chat import ChatFormat
from pact_fast.data.records import Record
from pact_fast.distributed import join_world, plain
from pact_fast.envs.base import make_env
from pact_fast.evaluation.evaluate import eval_row, evaluate, transcript
from pact_fast.files import write_json, writing
from pact_fast.metrics import MetricsLogger, ProgressDisplay, check_trackers
from pact_fast.objective import Schedule, SFTStrength
from pact_fast.rollout import Overlap, Rollout, RolloutError, RolloutLimits, build_engine
from pact_fast.train.batch import pack_losses
from pact_fast.train.build import (
    base_out_of_place,
    build_model,
    build_optimizer,
    build_policy,
    device_of,
    set_threads,
)
from pact_fast.train.checkpoint import Checkpointer
from pact_fast.train.contexts import Contexts, context_metrics
from pact_fast.train.distill import check_head
from pact_fast.train.optimizer import learning_rate, set_learning_rate
from pact_fast.train.preemption import Preempted, StopSignal
from pact_fast.train.rollouts import StepSampler, load_split
from pact_fast.train.run_folder import claim
from pact_fast.train.run_lock import RunLock
from pact_fast.train.samples import Sample, SampleBuilder, needed, trim
from pact_fast.train.score import score_step
from pact_fast.train.step_metrics import (
    Phases,
    Update,
    pack_metrics,
    peak_flops,
    rollout_metrics,
    speed,
    update_metrics,
)
from pact_fast.train.teacher import shard_policy
from pact_fast.train.transfer import context_transfer, transfer_metrics

COUNTERS = ("skipped_steps", "skipped_in_a_row", "tokens_trained", "evaluated")


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says why, the last good weights are kept."""


class Trainer:
    """Trains one policy on one environment.

    Args:
        config: see `pact_fast.config`; `Trainer(load_config("configs/toolbox.yaml")).train()`.
        stop: listens for SIGTERM already, while the run is being built.
    """

    def __init__(self, config: Config, stop: StopSignal | None = None) -> None:
        self.config = config
        torch.manual_seed(config.run.seed)
        check_trackers(config.run.report_to)  # before a model loads
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        self.world = join_world(config.run.device)
        self.device = device_of(config.run.device, self.world.local_rank)
        self.run_dir = Path(config.run.dir) / config.run.name
        self.model, self.tokenizer = build_model(config.model, config.lora, self.device)
        set_threads(config.run.threads, self.model)
        if note := base_out_of_place(config.model.path, config.env.name):
            self._say(note)
        self.policy = build_policy(self.model, config.model, config.train.token_budget, self.world.size)
        self.chat = ChatFormat.for_tokenizer(
            self.tokenizer, config.model.chat_format, levels=config.objective.reasoning_levels
        )
        self.env = make_env(config.env.name, config.env.settings)
        self.schedule = Schedule(config.objective, config.run.seed)
        self.limits = RolloutLimits(
            config.rollout.max_turns,
            config.rollout.max_completion_length,
            config.rollout.max_turn_length,
            getattr(self.model.config, "max_position_embeddings", None),
        )
        self.builder = SampleBuilder(
            self.chat,
            config.objective,
            config.rollout.max_completion_length,
            max_prompt_length=config.rollout.max_prompt_length,
            context_length=self.limits.context_length,
        )
        splits = ("train", "validation", *(["test"] if config.eval.score_test else []))
        self.splits = {split: load_split(config, self.env, self.builder, split) for split in splits}
        self.records = self.splits["train"]
        check_head(self.policy.head, config.objective)
        self.sharded, self.reference, self.teacher = shard_policy(self.policy, config, self.world)
        self.optimizer = build_optimizer(self.model, config.train, self.world)
        self.engine = build_engine(config.rollout, self.model, self.sharded, self.run_dir)
        self.sampler = StepSampler(
            config, self.sharded, self.engine, self.env, self.builder, self.records, self.limits
        )
        self.overlap = Overlap(config, self.engine, self.world, self.sampler.share)
        self.checkpoints = Checkpointer(
            self.run_dir / "checkpoints",
            keep_last=config.checkpoint.keep_last,
            asynchronous=config.checkpoint.asynchronous,
        )
        self.stop = stop or StopSignal()
        self.stop.immediate = self.world.size == 1  # ranks have to stop at the same place
        self.skipped_steps = self.skipped_in_a_row = self.tokens_trained = self.evaluated = 0
        self.saving = 0.0  # seconds since the last row
        self.saved = -1  # steps done at the last checkpoint
        self.peak = peak_flops(self.device, config.run.peak_tflops, self.world.size)

    # -- one step ----------------------------------------------------------------------------------

    def train_step(self, step: int) -> dict[str, float]:
        """Rolls out, scores and updates once; returns the row of metrics.jsonl."""
        config, o = self.config, self.config.objective
        phases = Phases(self.device)
        progress = step / config.train.max_steps
        records = self.sampler.records(step)
        strength = self.schedule.sft_strength(progress)
        with phases("rollout"), self.stop.interruptible():
            rollouts = self.rollout(records, step) if self.schedule.has_policy_term(progress) else []
        row = rollout_metrics(rollouts, config.rollout.num_generations)
        row |= self.overlap.metrics(step) if rollouts else {}
        contexts = self.builder.contexts.of(rollouts, config.rollout.num_generations)
        anchored = self.schedule.anchored([r.id for r in records], step)
        mini_batches = self.mini_batches(records, rollouts, anchored, strength, progress, contexts)
        several = config.train.num_mini_batches * config.train.num_iterations > 1
        gauge = bool(rollouts) and config.eval.gauge_every > 0 and step % config.eval.gauge_every == 0
        gauge |= row.get("pact/staleness", 0) > 0
        if o.shows_privileged:
            row |= context_metrics(contexts, rollouts, self.builder, words=gauge)
        with phases("score"):
            row |= self.score(mini_batches, {r.id: r for r in records}, several or gauge, gauge)
            if config.eval.transfer_every and step % config.eval.transfer_every == 0:
                row |= self.transfer(mini_batches, {r.id: r for r in records})
        updates = []
        with phases("update"):
            for _ in range(config.train.num_iterations):
                for samples in mini_batches:
                    updates.append(self.update(samples, step))
                    if len(updates) == 1 and (several or gauge) and o.ratio_denominator == "context":
                        self._check_first_update(updates[0])
        if self.teacher is not None:
            self.teacher.follow(self.model, step)
        row |= update_metrics(updates) | phases.finish()
        if rollouts:
            row["rollout_tokens_per_second"] = sum(r.num_sampled for r in rollouts) / row["time/rollout"]
        packs = [pack for update in updates for pack in update.losses]
        row |= speed(packs, row, self.policy.family, self.peak, frozen=bool(config.lora.rank))
        self.tokens_trained += int(sum(pack["tokens"] for pack in packs))
        row |= {
            "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
            "num_tokens": self.tokens_trained,
            "pact/skipped_steps": self.skipped_steps,
            "pact/anchored": sum(anchored.values()) / len(anchored),
            "time/checkpoint": self.saving,
        }
        self.saving = 0.0
        return row | self.schedule.sft_metrics(progress)

    def score(
        self,
        mini_batches: Sequence[Sequence[Sample]],
        records: dict[str, Record],
        old: bool,
        gauge: bool = False,
    ) -> dict[str, float]:
        """The passes without gradient that this step needs; the samples are changed by what they give."""
        return score_step(
            self.policy,
            self.builder,
            [s for part in mini_batches for s in part if s.is_policy],
            records,
            self.config,
            old=old,
            gauge=gauge,
            sharded=self.sharded,
            reference=self.reference,
            teacher=self.teacher,
        )

    def transfer(
        self, mini_batches: Sequence[Sequence[Sample]], records: dict[str, Record]
    ) -> dict[str, float]:
        """`pact/context_transfer` of a step."""
        if self.world.size > 1:
            every = self.config.eval.transfer_every
            raise ConfigError(f"eval.transfer_every={every}: takes one process, there are more: give 0")
        found = context_transfer(
            self.policy,
            self.builder,
            [s for part in mini_batches for s in part],
            records,
            temperature=self.config.rollout.temperature,
            token_budget=self.config.train.token_budget,
        )
        return transfer_metrics(found)

    def rollout(self, records: Sequence[Record], step: int) -> list[Rollout]:
        """The step's rollouts, sampled ahead or now; begins the next step's where these are to be ahead."""
        self.model.eval()
        rollouts = self.overlap.take(step)
        if rollouts is None:
            rollouts = self.sampler.sample(records, step)
        self.overlap.start(step + 1)
        return rollouts

    def mini_batches(
        self,
        records: Sequence[Record],
        rollouts: Sequence[Rollout],
        anchored: dict[str, bool],
        strength: SFTStrength | None,
        progress: float,
        contexts: Sequence[Contexts] | None = None,
    ) -> list[list[Sample]]:
        """Samples of every update: prompts dealt to the mini-batches in turn, weights from each one's own
        counts. contexts: of the rollouts; None looks for them here."""
        o, count = self.config.objective, self.config.train.num_mini_batches
        size = self.config.rollout.num_generations
        rewards = [r.outcome.reward for r in rollouts if r.outcome is not None]
        advantages = self.schedule.advantages(rewards, [r.turn_rewards for r in rollouts], size)
        out = []
        for part in range(count):
            samples: list[Sample] = []
            rows = [i for i in range(len(rollouts)) if i // size % count == part]
            if rows:
                samples += self.builder.rollout_samples(
                    [rollouts[i] for i in rows],
                    [advantages[i] for i in rows],
                    anchored,
                    self.schedule.rl_scale(progress),
                    size,
                    None if contexts is None else [contexts[i] for i in rows],
                )
            if strength is not None and records[part::count]:
                samples += self.builder.trace_samples(
                    records[part::count], strength, self.schedule.sft_scale(progress), anchored
                )
            out.append([trim(s) for s in samples if needed(s, o)])
        return out

    def update(self, samples: Sequence[Sample], step: int) -> Update:
        """One optimizer update. A non-finite loss or gradient leaves the weights as they are."""
        config = self.config
        self.model.train()
        set_learning_rate(self.optimizer, learning_rate(config.train, step))
        self.optimizer.zero_grad(set_to_none=True)
        losses, bad = [], []
        for pack in pack_losses(
            self.policy,
            samples,
            config.objective,
            token_budget=config.train.token_budget,
            packing=config.train.packing,
            prefix=config.train.prefix,
            temperature=config.rollout.temperature,
            sharded=self.sharded,
            teacher=self.teacher,
        ):
            pack.loss.backward()
            if pack.samples:
                losses.append(pack_metrics(pack))
            if losses and not math.isfinite(losses[-1]["loss"]):
                bad += [s.record_id for s in pack.samples]
        # All ranks decide alike: the norm is of the whole gradient, losses and records are exchanged.
        norm = float(plain(clip_grad_norm_(self.model.parameters(), config.train.max_grad_norm)))
        losses, bad = self.world.concat(losses), self.world.concat(bad)
        skipped = bool(bad) or not math.isfinite(norm)
        if skipped:
            self._skip(step, sorted(set(bad or [s.record_id for s in samples])))
        elif losses:
            self.optimizer.step()
            self.skipped_in_a_row = 0
        self.engine.weights_changed()
        return Update(losses, norm, skipped)

    def _skip(self, step: int, record_ids: list[str]) -> None:
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        limit = self.config.train.max_skipped_steps
        self._say(
            f"step {step}: non-finite loss or gradient, update skipped; records: {', '.join(record_ids)}"
        )
        if self.skipped_in_a_row >= limit:
            raise TrainingStopped(
                f"{limit} updates in a row had a non-finite loss or gradient, last records "
                f"{', '.join(record_ids)}: the weights before them are kept; lower "
                "train.learning_rate or check those records"
            )

    def _say(self, text: str) -> None:
        if self.world.main:
            print(text)

    def _check_first_update(self, update: Update) -> None:
        """The ratio is 1 on the first update after a rollout, or else two passes disagree."""
        metrics = update_metrics([update])
        kl, clipped = metrics.get("pact/ppo_kl", 0.0), metrics.get("clip_ratio", 0.0)
        exact = "bfloat16" not in (self.config.model.dtype, self.config.distributed.compute_dtype)
        if exact and not update.skipped and (abs(kl) > 1e-6 or clipped > 0):
            raise TrainingStopped(
                f"first update after a rollout: ppo_kl={kl:.2e}, clip fraction {clipped:.2e}, both should "
                "be 0: the scoring pass and the training pass compute different log-probs"
            )

    # -- the run -----------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """Trains to max_steps, scores, writes the run folder; returns what `summary.json` holds.

        Raises RunInUse where another process trains there, CheckpointError where the last checkpoint could
        not be written: all else is done and written then.
        """
        with RunLock(self.run_dir, self.world):
            return self._train()

    def _train(self) -> dict[str, Any]:
        config = self.config
        self._claim_folder()
        self._write("config.json", config.to_dict())
        summary: dict[str, Any] = {"preset": config.preset, "seed": config.run.seed}
        summary["config"] = config.to_dict()
        start, base = self.resume() if config.checkpoint.resume else (0, None)
        main, total = self.world.main, config.train.max_steps
        logger = MetricsLogger(
            self.run_dir,
            resume_step=start - 1 if start else None,
            report_to=config.run.report_to,
            run_config=config.to_dict(),
            tracker_options={
                "project": config.run.project,
                "group": config.run.group,
                "tags": config.run.tags,
            },
            write=main,
        )
        progress = ProgressDisplay(total, start_step=start, console=Console(quiet=not main))
        done = start  # steps whose update has been made
        with logger, progress, self.stop, self.world.peers(), self.overlap:
            try:
                if base or (config.eval.score_base and start == 0):
                    summary["base"] = base or self.final_scores()[0]
                score = self.validate(done, logger, progress)
                for step in range(start, total):
                    row = logger.log(step, self.train_step(step))
                    done = step + 1
                    progress.update(done, row)
                    score = self.validate(done, logger, progress)
                    if config.checkpoint.every and done % config.checkpoint.every == 0:
                        self.checkpoint(done, summary.get("base"), score)
                    if self.world.any(self.stop.requested):
                        raise Preempted(self.stop.by or "a signal to another rank")
                if self.saved != total:  # a run always ends in a checkpoint: it can be exported and extended
                    self.checkpoint(total, summary.get("base"), score, wait=True)
                self.save()
                summary["final"], shown = self.final_scores()
            except (Preempted, RolloutError, TrainingStopped) as stop:  # of all ranks: they save together
                if isinstance(stop, TrainingStopped):
                    self.checkpoints.wait(warn=True)
                else:
                    self.checkpoint(done, summary.get("base"), wait=True)
                self.save()
                raise
            for split, temperatures in summary["final"].items():
                for mode, scores in temperatures.items():
                    logger.log(total, eval_row(scores, split, float(mode == "sampled")))
        self._write("transcript.json", transcript(shown, self.chat))
        self._write("summary.json", summary)
        self.checkpoints.wait()  # a run is done when its last save is known to be on disk
        return summary

    def _claim_folder(self) -> None:
        """Makes the run folder this run's own, on the first rank; what is wrong with it is said on all."""
        c, told, problem = self.config.checkpoint, [], None
        if self.world.main:
            try:
                told = claim(self.run_dir, resume=c.resume, overwrite=c.overwrite)
            except ConfigError as error:
                problem = str(error)
        if problem := next(filter(None, self.world.gather(problem)), None):
            raise ConfigError(problem)
        for line in told:
            self._say(line)

    def validate(self, done: int, logger: MetricsLogger, progress: ProgressDisplay) -> float | None:
        """Scores the policy after `done` steps where that is due and not done yet -> share solved."""
        every = self.config.eval.every
        if not every or not done or done % every or self.evaluated == done:
            return None
        begin = time.perf_counter()
        scores = self.evaluate("validation", self.config.eval.validation_tasks)[0]
        row = eval_row(scores, "validation", 1.0) | {"time/eval": time.perf_counter() - begin}
        logger.log(done - 1, row)
        progress.message(f"step {done}: validation solved {scores['solved']:.3f}")
        self.evaluated = done
        return scores["solved"]

    def _write(self, name: str, value: Any) -> None:
        if self.world.main:
            write_json(self.run_dir / name, value)

    def checkpoint(self, step: int, base: Any, score: float | None = None, *, wait: bool = False) -> None:
        """Saves what later steps depend on; data order, anchors and annealing are functions of the step."""
        begin = time.perf_counter()
        counters = {name: getattr(self, name) for name in COUNTERS}
        state = {"counters": counters, "base": base, "config": self.config.to_dict()}
        state["ahead"] = self.overlap.versions.get(step)
        self.checkpoints.save(
            step, self.model, self.optimizer, state, score=score, wait=wait, average=self._average()
        )
        self.saved = step
        self.saving += time.perf_counter() - begin

    def _average(self) -> torch.nn.Module | None:
        return self.teacher.policy.model if self.teacher is not None and self.teacher.update_rate else None

    def resume(self) -> tuple[int, Any]:
        """Puts the newest whole checkpoint back -> (steps done, base scores); (0, None) without one."""
        path = self.checkpoints.latest()
        if path is None:
            return 0, None
        record = self.checkpoints.load(path, self.model, self.optimizer, self._average())
        self.engine.weights_changed()
        vars(self).update(record["state"]["counters"])
        self.saved = record["step"]
        self.overlap.restore(record["step"], record["state"].get("ahead"))
        for key, (then, now) in changed_keys(record["state"]["config"], self.config.to_dict()).items():
            self._say(f"resumed with another {key}: {now!r}, the checkpoint's is {then!r}")
        return record["step"], record["state"]["base"]

    def save(self) -> None:
        """Writes the policy as a plain Hugging Face folder."""
        state = self.sharded.state_dict()
        if not self.world.main:
            return
        with writing(self.run_dir / "model"):
            self.model.save_pretrained(self.run_dir / "model", state_dict=state)
            self.tokenizer.save_pretrained(self.run_dir / "model")

    def evaluate(
        self, split: str, tasks: int, temperature: float = 1.0
    ) -> tuple[dict[str, Any], list[Rollout]]:
        """Prompt-only scores on a split and the rollouts behind them; SIGTERM ends it at once."""
        self.overlap.stop()  # else its weights would change under way
        self.model.eval()
        records = self.splits[split][:tasks]
        with self.stop.interruptible():
            return evaluate(
                self.engine,
                self.env,
                self.chat,
                records,
                prompts=[self.builder.prompt(r) for r in records],
                limits=self.limits,
                temperature=temperature,
                samples=self.config.eval.samples if temperature else 1,
                seed=self.config.run.seed,
                batch_size=self.config.rollout.batch_size,
                sharded=self.sharded,
            )

    def final_scores(self) -> tuple[dict[str, dict[str, Any]], Rollout]:
        """Scores at temperature 1 and greedy, and one held-out rollout to show."""
        e = self.config.eval
        splits = {"validation": e.validation_tasks} | ({"test": e.test_tasks} if e.score_test else {})
        scores: dict[str, dict[str, Any]] = {}
        shown: list[Rollout] = []
        for split, tasks in splits.items():
            sampled, _ = self.evaluate(split, tasks)
            greedy, shown = self.evaluate(split, tasks, temperature=0.0)
            scores[split] = {"sampled": sampled, "greedy": greedy}
        return scores, max(shown, key=lambda r: len(r.turn_rewards) if r.outcome and r.outcome.solved else 0)
