"""Configuration: frozen dataclasses, one YAML file, `--section.field value` overrides. Names follow TRL
where it has one.

A preset (docs/method.md, "Presets") is a set of values for the `objective` section; what the file or the
command line says wins. A `--preset` other than the file's own keeps the values that define it, whatever the
file says.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from pact_fast.objective import ADVANTAGE_MODES, NORMALIZATIONS, PRESETS, ObjectiveConfig


@dataclass(frozen=True)
class ModelConfig:
    """The policy.

    path: a Hugging Face folder or hub name; "toolbox-base" is the small model that ships with the package.
    chat_format: "auto" takes what the tokenizer's own template speaks.
    compile: backend of torch.compile for the decoder layers in scoring and training ("inductor"); None: off.
    """

    path: str = "toolbox-base"
    dtype: Literal["float32", "bfloat16"] = "float32"
    chat_format: str = "auto"
    attention: str = "auto"
    gradient_checkpointing: bool = False
    compile: str | None = None


@dataclass(frozen=True)
class LoraConfig:
    """Adapters on every linear layer but the head, through peft; the rest is frozen. rank 0: none."""

    rank: int = 0
    alpha: int = 32


@dataclass(frozen=True)
class EnvConfig:
    """The environment and its own settings (checked by the environment)."""

    name: str = "toolbox"
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RolloutConfig:
    """per_sequence_seed: draw each rollout from a seed of its own, as several ranks and servers always do:
    one process then samples what the same run samples on many.

    engine: in this process, "hf" or "hf-batching" (transformers' continuous batching); "http" on `servers`,
    addresses such as http://HOST:PORT. The rest is for servers:

    weights_dir: shared folder that new weights go through; None: weights/ in the run folder. max_in_flight:
    requests under way at once, of one rank. request_timeout: seconds for one answer; retry_timeout: seconds
    that one request is tried for before the run stops. probe_tolerance: largest gap of a log-prob between
    trainer and server right after new weights; None: 1e-3, in half precision 0.5. mix_weights: a rollout
    under way may go on with new weights. overlap: sample a step's rollouts while the step before is trained,
    with weights one step old, which objective.importance_ratio_cap corrects; the step after an evaluation or
    a checkpoint is sampled with the current ones.
    """

    num_generations: int = 8
    temperature: float = 1.0
    max_turns: int = 10
    max_completion_length: int = 512
    max_turn_length: int = 128
    max_prompt_length: int = 1024
    batch_size: int = 256
    per_sequence_seed: bool = False
    engine: Literal["hf", "hf-batching", "http"] = "hf"
    servers: list[str] = field(default_factory=list)
    weights_dir: str | None = None
    max_in_flight: int = 64
    request_timeout: float = 120.0
    retry_timeout: float = 600.0
    probe_tolerance: float | None = None
    mix_weights: bool = False
    overlap: bool = False


@dataclass(frozen=True)
class TrainConfig:
    """The loop. prompts_per_step times num_generations rollouts are drawn a step and used in
    num_mini_batches updates, num_iterations times over. token_budget: packed tokens of one forward. packing:
    "tree", or "none" for comparison. optim: states of AdamW in the weights' dtype, in bfloat16, or in 8 bits
    (torchao)."""

    max_steps: int = 160
    prompts_per_step: int = 8
    num_mini_batches: int = 1
    num_iterations: int = 1
    learning_rate: float = 1e-3
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    optim: Literal["adamw", "adamw_bf16", "adamw_8bit"] = "adamw"
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    token_budget: int = 16384
    packing: Literal["tree", "none"] = "tree"
    max_skipped_steps: int = 10


@dataclass(frozen=True)
class EvalConfig:
    """every: steps between validation scores (0: none before the end). samples: rollouts a task at
    temperature 1."""

    every: int = 40
    validation_tasks: int = 64
    test_tasks: int = 200
    samples: int = 1
    score_test: bool = True
    score_base: bool = True
    gauge_every: int = 20


@dataclass(frozen=True)
class CheckpointConfig:
    """every: steps between checkpoints (0: only at the end and at a stop). keep_last: how many of the newest
    stay; the one with the best validation score stays besides. resume: go on from the newest, if any.
    overwrite: delete another run that is in the run folder; without, it is moved aside."""

    every: int = 50
    keep_last: int = 2
    asynchronous: bool = True
    resume: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class DistributedConfig:
    """Under torchrun. compute_dtype: of weights and activations in the forward (None: model.dtype); master
    weights, gradient sums and optimizer keep model.dtype. cpu_offload: these three live in host memory."""

    compute_dtype: Literal["bfloat16", "float32"] | None = None
    cpu_offload: bool = False


@dataclass(frozen=True)
class RunConfig:
    """report_to: trackers beside metrics.jsonl and TensorBoard: "wandb", "trackio". peak_tflops: of one
    device in the dtype of compute, for `mfu`; None takes the data sheet's of a known GPU."""

    name: str = "toolbox-pact"
    dir: str = "runs"
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    report_to: list[str] = field(default_factory=list)
    peak_tflops: float | None = None


@dataclass(frozen=True)
class Config:
    """Everything a run is made of."""

    preset: str = "pact"
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    env: EnvConfig = field(default_factory=EnvConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


RENAMED_KEYS = {  # old key: what it is called now
    "objective.reasoning_segments": "objective.reasoning_levels",
    "objective.engine_correction_cap": "objective.importance_ratio_cap",
    "rollout.row_seeds": "rollout.per_sequence_seed",
    "env.train_file": "env.settings.train_path",
    "env.validation_file": "env.settings.validation_path",
    "env.test_file": "env.settings.test_path",
}


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and the way out."""


def config_parser() -> ArgumentParser:
    """Parser of every config key, for `--help` and for overrides."""
    parser = ArgumentParser(prog="pact-fast train CONFIG", exit_on_error=False)
    parser.add_class_arguments(Config, fail_untyped=False)
    return parser


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file and applies `--section.field value` overrides.

    Args:
        path: YAML file; None takes the defaults.
        overrides: command line words such as ["--train.max_steps", "20"].

    Raises:
        ConfigError: the file is missing or no mapping, a key is unknown (the nearest is named) or a value is
            of the wrong type or out of range.
    """
    source = str(path) if path is not None else "command line"
    values = _read_yaml(Path(path)) if path is not None else {}
    _check_keys(values, source)
    _check_words(overrides)
    parser = config_parser()
    preset = _preset_of(values, overrides)
    if preset not in PRESETS:
        raise ConfigError(f"{source}: preset={preset!r} is unknown; nearest: {_nearest(preset, PRESETS)}")
    parser.set_defaults({f"objective.{k}": v for k, v in PRESETS[preset].items()})
    if preset != values.get("preset", "pact") and isinstance(values.get("objective"), dict):
        # Another preset than the file was written for: what defines it is not the file's to change.
        kept = {k: v for k, v in values["objective"].items() if k not in PRESETS[preset]}
        values = {**values, "objective": kept}
    try:
        # File first, then words: the command line wins.
        parsed: Namespace = parser.parse_object(values)
        parsed = parser.parse_args(list(overrides), namespace=parsed)
        config = parser.instantiate(parsed)
    except (ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(f"{source}: {_first_lines(error)}") from None
    result = Config(**{f.name: getattr(config, f.name) for f in dataclasses.fields(Config)})
    _check_values(result, source)
    return result


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        known = sorted(str(p) for p in Path("configs").glob("*.yaml"))
        raise ConfigError(f"config {str(path)!r} does not exist; there are {', '.join(known) or 'none here'}")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, found {type(values).__name__}")
    return values


def all_keys() -> list[str]:
    """Every key, dotted: "preset", "model.path", ..."""
    keys = []
    for section in dataclasses.fields(Config):
        factory = section.default_factory
        if factory is dataclasses.MISSING:
            keys.append(section.name)
        else:
            keys += [f"{section.name}.{f.name}" for f in dataclasses.fields(cast(Any, factory))]
    return keys


def _nearest(key: str, known) -> str:
    known = list(known)
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    if not close and "." in key:
        leaf = key.rsplit(".", 1)[1]
        close = [k for k in known if k.rsplit(".", 1)[-1] == leaf][:1]
    return repr(close[0]) if close else ", ".join(sorted(known))


def _unknown(source: str, key: str, known: Sequence[str]) -> ConfigError:
    if key in RENAMED_KEYS:
        return ConfigError(f"{source}: {key!r} was renamed to {RENAMED_KEYS[key]!r}")
    return ConfigError(f"{source}: unknown key {key!r}; nearest: {_nearest(key, known)}")


def _check_keys(values: dict[str, Any], source: str) -> None:
    known = all_keys()
    sections = {k.split(".")[0] for k in known if "." in k}
    for key, value in values.items():
        if key in sections:
            if not isinstance(value, dict):
                raise ConfigError(f"{source}: {key} is a section, give it keys, not {value!r}")
            for leaf in value:
                if f"{key}.{leaf}" not in known:
                    raise _unknown(source, f"{key}.{leaf}", known)
        elif key not in known:
            raise _unknown(source, key, [*known, *sections])


def _check_words(words: Sequence[str]) -> None:
    known = all_keys()
    for word in words:
        if not word.startswith("--") or word in ("--help",):
            continue
        key = word[2:].split("=")[0]
        # env.settings.x reaches into a free mapping that the environment itself checks.
        if key not in known and not key.startswith("env.settings."):
            raise _unknown("command line", key, known)


def _preset_of(values: dict[str, Any], words: Sequence[str]) -> str:
    preset = values.get("preset", "pact")
    for i, word in enumerate(words):
        if word == "--preset" and i + 1 < len(words):
            preset = words[i + 1]
        elif word.startswith("--preset="):
            preset = word.split("=", 1)[1]
    return str(preset)


def _first_lines(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())[:600]


def _check_values(config: Config, source: str) -> None:
    o, t, r = config.objective, config.train, config.rollout
    checks: list[tuple[bool, str, object, str]] = [
        (
            0 <= o.anchor_probability <= 1,
            "objective.anchor_probability",
            o.anchor_probability,
            "a value in [0, 1]",
        ),
        (0 <= o.rl_start <= 1, "objective.rl_start", o.rl_start, "a share in [0, 1]"),
        (0 <= o.sft_end <= 1, "objective.sft_end", o.sft_end, "a share in [0, 1]"),
        (o.sft_weight >= 0, "objective.sft_weight", o.sft_weight, "a weight >= 0"),
        (o.advantages in ADVANTAGE_MODES, "objective.advantages", o.advantages, f"one of {ADVANTAGE_MODES}"),
        (
            o.normalization in NORMALIZATIONS,
            "objective.normalization",
            o.normalization,
            f"one of {NORMALIZATIONS}",
        ),
        (0 < o.epsilon < 1, "objective.epsilon", o.epsilon, "a clip range in (0, 1)"),
        (o.dual_clip is None or o.dual_clip > 1, "objective.dual_clip", o.dual_clip, "a bound above 1"),
        (o.reasoning_levels >= 1, "objective.reasoning_levels", o.reasoning_levels, "at least 1"),
        (
            (o.reasoning_anneal == "sequence") == (o.call_anneal == "sequence"),
            "objective.call_anneal",
            o.call_anneal,
            "sequence to both reasoning_anneal and call_anneal, or to none: it anneals both as one",
        ),
        (
            not o.trace_answer or o.rl_context != "trace" or o.trace_context == "message",
            "objective.trace_answer",
            o.trace_answer,
            "false with trace_context=concat: a rollout's first turn cannot follow an answer",
        ),
        (
            (o.mu_start is None) == (o.mu_end is None),
            "objective.mu_end",
            o.mu_end,
            "both mu_start and mu_end, or none",
        ),
        (o.beta >= 0, "objective.beta", o.beta, "a coefficient >= 0"),
        (
            o.importance_ratio_cap is None or o.importance_ratio_cap > 0,
            "objective.importance_ratio_cap",
            o.importance_ratio_cap,
            "a cap above 0 (2, say), or none",
        ),
        (
            o.importance_ratio_cap is None or o.ratio_denominator == "context",
            "objective.importance_ratio_cap",
            o.importance_ratio_cap,
            "none with ratio_denominator=rollout: that ratio has the engine's log-probs in it already",
        ),
        (
            not r.overlap or o.importance_ratio_cap is not None or o.ratio_denominator == "rollout",
            "objective.importance_ratio_cap",
            o.importance_ratio_cap,
            "a cap (2, say) with rollout.overlap, whose rollouts are drawn with weights one step old; or "
            "objective.ratio_denominator=rollout, the ratio to the log-probs they were drawn with",
        ),
        (t.max_steps >= 1, "train.max_steps", t.max_steps, "at least 1"),
        (t.prompts_per_step >= 1, "train.prompts_per_step", t.prompts_per_step, "at least 1"),
        (t.learning_rate >= 0, "train.learning_rate", t.learning_rate, "a value >= 0"),
        (t.num_mini_batches >= 1, "train.num_mini_batches", t.num_mini_batches, "at least 1"),
        (t.num_iterations >= 1, "train.num_iterations", t.num_iterations, "at least 1"),
        (t.token_budget >= 1, "train.token_budget", t.token_budget, "at least 1"),
        (r.num_generations >= 1, "rollout.num_generations", r.num_generations, "at least 1"),
        (r.temperature > 0, "rollout.temperature", r.temperature, "above 0 (greedy rollouts have no spread)"),
        (config.lora.rank >= 0, "lora.rank", config.lora.rank, "a rank, or 0 for full training"),
        (config.checkpoint.keep_last >= 1, "checkpoint.keep_last", config.checkpoint.keep_last, "at least 1"),
        (r.max_turns >= 1, "rollout.max_turns", r.max_turns, "at least 1"),
        (
            (r.engine != "http" or r.servers != [])
            and all(s.startswith(("http://", "https://")) for s in r.servers),
            "rollout.servers",
            r.servers,
            "[http://HOST:PORT, ...]",
        ),
        (r.max_in_flight >= 1, "rollout.max_in_flight", r.max_in_flight, "at least 1"),
    ]
    for good, key, value, want in checks:
        if not good:
            raise ConfigError(f"{source}: {key}={value!r} cannot be used: give {want}")


def changed_keys(then: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ between two configurations (`Config.to_dict()`) and change what is trained."""
    changed: dict[str, tuple[Any, Any]] = {}
    for section, value in now.items():
        before = then.get(section)
        if section == "run":
            value, before = ({"seed": run["seed"]} for run in (value, before or {"seed": None}))
        if section in ("checkpoint", "eval") and now["rollout"]["overlap"]:  # they decide what is ahead
            value, before = ({"every": part["every"]} for part in (value, before or {"every": None}))
        elif section in ("checkpoint", "distributed", "eval"):
            continue
        if value == before:
            continue
        if isinstance(value, dict) and isinstance(before, dict):
            changed |= {f"{section}.{k}": (before.get(k), v) for k, v in value.items() if v != before.get(k)}
        else:
            changed[section] = (before, value)
    return changed
