"""Configuration: frozen dataclasses, one YAML file, `--section.field value` overrides. Names follow TRL
where it has one.

A preset (docs/method.md, "Presets") is a set of values for the `objective` section; what the file or the
command line says wins. A `--preset` other than the file's own keeps the values that define it, whatever the
file says.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from pact_fast.keys import (
    ALIASES,
    DROPPED_KEYS,
    NOT_THE_SAME,
    RENAMED_KEYS,
    RENAMED_VALUES,
    count,
    described,
    key,
    out_of_bounds,
)
from pact_fast.objective import PRESETS, ObjectiveConfig, objective_problems

BUNDLED = Path(__file__).parent / "configs"  # a link to configs/, which the wheel holds as files


@dataclass(frozen=True)
class ModelConfig:
    """The policy"""

    path: str = key("toolbox-base", "Hugging Face folder, hub name, run folder, or toolbox-base (bundled)")
    dtype: Literal["float32", "bfloat16"] = key("float32", "of the weights; under torchrun, of masters")
    chat_format: str = key("auto", "auto (what the tokenizer's template speaks), hermes, compact or llama")
    attention: str = key("auto", "tree attention: auto, or an implementation by name (see pact-fast doctor)")
    gradient_checkpointing: Literal["auto", "none", "full", "keep_attention"] = key(
        "auto", "recompute each layer in the backward, wholly or but its attention; auto: as memory asks"
    )
    kernels: Literal["auto", "liger", "none"] = key("auto", "norms, RoPE, SwiGLU; auto: liger on a GPU")
    compile: str | None = key(None, "torch.compile backend of the decoder layers (inductor); none: off")


@dataclass(frozen=True)
class LoraConfig:
    """Adapters, through peft; the rest is frozen"""

    rank: int = count(0, "rank of the adapters; 0 trains all weights", low=0)
    alpha: int = count(32, "scale of the adapters: they add alpha / rank times their product")
    targets: list[str] = key([], "names of the linear layers; empty: all but the head")
    dropout: float = key(0.0, "share of an adapter's inputs that is dropped in training", low=0, below=1)


@dataclass(frozen=True)
class EnvConfig:
    """The environment"""

    name: str = key(
        "toolbox", "toolbox, python, ftrl, bfcl, bfcl_memory, toolhop, or module:Class of one's own"
    )
    settings: dict[str, Any] = key({}, "its own settings, checked by it: --env.settings.NAME VALUE")


@dataclass(frozen=True)
class RolloutConfig:
    """Rollouts, always prompt-only, each drawn from a seed of its own"""

    num_generations: int = count(8, "rollouts per prompt and step (G)")
    temperature: float = key(1.0, "of sampling; greedy rollouts have no spread", above=0)
    max_turns: int = count(10, "assistant turns of a rollout")
    max_completion_length: int = count(512, "tokens after the prompt, tool responses included")
    max_turn_length: int = count(128, "tokens sampled in one turn")
    max_prompt_length: int = count(
        1024, "tokens of a prompt; with the trace in it where the trace is context"
    )
    batch_size: int = count(256, "rollouts sampled at once")
    engine: Literal["in_process", "http"] = key(
        "in_process", "what samples: this process, or servers over http"
    )
    kv_memory: float = key(
        0.3, "share of free memory for keys and values (in process); 4 GiB at most on a CPU", above=0, high=1
    )
    cuda_graphs: bool = key(True, "capture decoding steps (in process, on a GPU)")
    servers: list[str] = key([], "of engine http: [http://HOST:PORT, ...]")
    weights_dir: str | None = key(None, "shared folder that new weights go through; none: in the run folder")
    max_in_flight: int = count(64, "requests under way at once, per rank (http)")
    request_timeout: float = key(120.0, "seconds for one answer (http)", above=0)
    retry_timeout: float = key(
        600.0, "seconds that one request is tried for before the run stops (http)", above=0
    )
    probe_tolerance: float | None = key(
        None, "largest log-prob gap of a server with new weights; none: 1e-3, in half precision 0.5", above=0
    )
    mix_weights: bool = key(False, "rollouts under way may go on with new weights (http)")
    overlap: bool = key(False, "sample a step while the one before is trained, one update behind (http)")


@dataclass(frozen=True)
class TrainConfig:
    """The loop"""

    max_steps: int = count(160, "steps: prompts drawn, rolled out and trained on")
    prompts_per_step: int = count(8, "prompts per step")
    num_mini_batches: int = count(1, "updates that the prompts of a step are dealt to")
    num_iterations: int = count(1, "times that a step's rollouts are gone through")
    learning_rate: float = key(1e-6, "of AdamW; with adapters 1e-5 is usual", low=0, high=10)
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = key("constant", "after the warm-up")
    warmup_steps: int = count(0, "steps of linear warm-up", low=0)
    optim: Literal["adamw", "adamw_bf16", "adamw_8bit"] = key(
        "adamw", "states of AdamW: in the weights' dtype, in bfloat16, or in 8 bits (torchao)"
    )
    weight_decay: float = key(0.01, "of matrices; norms and biases do not decay", low=0, high=1)
    adam_beta1: float = key(0.9, "of AdamW", low=0, below=1)
    adam_beta2: float = key(0.999, "of AdamW", low=0, below=1)
    max_grad_norm: float = key(1.0, "norm that the gradient is clipped to", above=0)
    token_budget: int = count(16384, "packed tokens of one forward")
    packing: Literal["tree", "none"] = key("tree", "share prefixes, or lay every sequence out alone")
    prefix: Literal["auto", "stream", "recompute"] = key(
        "auto", "shared part of a tree over the budget: computed once, or in every pack; auto: the cheaper"
    )
    max_skipped_steps: int = count(10, "updates in a row that may be non-finite before the run stops")


@dataclass(frozen=True)
class EvalConfig:
    """Scores, prompt-only"""

    every: int = count(40, "steps between validation scores; 0: none before the end", low=0)
    validation_tasks: int = count(64, "tasks of a validation score")
    test_tasks: int = count(200, "held-out tasks of the final score")
    samples: int = count(1, "rollouts per task at temperature 1")
    score_test: bool = key(True, "score the held-out split at the end")
    score_base: bool = key(True, "score the model before training, too")
    gauge_every: int = count(20, "steps between gauges of both contexts; 0: none", low=0)
    transfer_every: int = count(
        0, "steps between measures of pact/context_transfer, 8 backward passes each; 0: none", low=0
    )


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints and the run folder"""

    every: int = count(50, "steps between checkpoints; 0: only at the end and at a stop", low=0)
    keep_last: int = count(2, "newest checkpoints that stay, beside the one with the best validation score")
    asynchronous: bool = key(True, "write them while training goes on")
    resume: bool = key(False, "go on from the newest (--resume)")
    overwrite: bool = key(False, "delete another run in the folder instead of moving it aside (--overwrite)")


@dataclass(frozen=True)
class DistributedConfig:
    """Several GPUs, under torchrun"""

    compute_dtype: Literal["bfloat16", "float32"] | None = key(
        None, "of weights and activations in the forward; none: model.dtype"
    )
    cpu_offload: bool = key(False, "keep master weights, gradients and optimizer in host memory")


@dataclass(frozen=True)
class RunConfig:
    """The run"""

    name: str = key("toolbox-pact", "its folder's name")
    dir: str = key("runs", "where its folder is made")
    seed: int = key(0, "of data order, draws and anchors", low=0, high=2**31)
    device: str = key("auto", "auto, cpu, or cuda")
    threads: int | None = count(None, "CPU threads; none: one for a model under 10M parameters, else all")
    report_to: list[str] = key([], "trackers beside metrics.jsonl and TensorBoard: wandb, trackio")
    project: str = key("pact_fast", "project of the trackers")
    group: str | None = key(None, "group of runs, of wandb")
    tags: list[str] = key([], "of wandb")
    peak_tflops: float | None = key(
        None, "of one device in the dtype of compute, for `mfu`; none: a known GPU's data sheet", above=0
    )


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


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and the way out."""


def config_parser() -> ArgumentParser:
    """Parser of every config key, for files and overrides."""
    parser = ArgumentParser(prog="pact-fast train CONFIG", exit_on_error=False)
    parser.add_class_arguments(Config, fail_untyped=False)
    return parser


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file and applies `--section.field value` overrides.

    Args:
        path: YAML file, or the name of a bundled one ("toolbox"); None takes the defaults.
        overrides: command line words such as ["--train.max_steps", "20"]. Names of TRL for the same key are
            taken, with a note; a list may be given as one word or with commas.

    Raises:
        ConfigError: the file is missing or no mapping, a key is unknown (a near one is named) or a value is
            of the wrong type or out of range; the message begins with the file or word it comes from.
    """
    source = str(path) if path is not None else "defaults"
    values = _own_names(_read_yaml(find_config(path)) if path is not None else {}, source)
    words = _own_words(overrides)
    _check_keys(values, source)
    preset, parser = _preset_of(values, words), config_parser()
    if preset not in PRESETS:
        near = _nearest(preset, PRESETS) or f"; there are {', '.join(PRESETS)}"
        blamed = "command line" if any(w.startswith("--preset") for w in words) else source
        raise ConfigError(f"{blamed}: preset={preset!r} is unknown{near}")
    parser.set_defaults({f"objective.{k}": v for k, v in PRESETS[preset].items()})
    if preset != values.get("preset", "pact") and isinstance(values.get("objective"), dict):
        # Another preset than the file was written for: what defines it is not the file's to change.
        kept = {k: v for k, v in values["objective"].items() if k not in PRESETS[preset]}
        values = {**values, "objective": kept}
    blamed = source
    try:
        # File first, then words: the command line wins.
        parsed: Namespace = parser.parse_object(values)
        blamed = "command line"
        parsed = parser.parse_args(words, namespace=parsed)
        config = parser.instantiate(parsed)
    except (ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(f"{blamed}: {_first_lines(error)}") from None
    result = Config(**{f.name: getattr(config, f.name) for f in dataclasses.fields(Config)})
    given = {word[2:].split("=")[0] for word in words if word.startswith("--")}
    in_file = {f"{s}.{k}" for s, part in values.items() if isinstance(part, dict) for k in part}
    if result.lora.rank and "train.learning_rate" not in given | in_file:
        result = dataclasses.replace(result, train=dataclasses.replace(result.train, learning_rate=1e-5))
    for name, value, want in _problems(result):
        blamed = "command line" if name in given else source if name in in_file else f"preset {preset}"
        raise ConfigError(f"{blamed}: {name}={value!r} cannot be used: give {want}")
    return result


def find_config(path: str | Path) -> Path:
    """The file, or the bundled config of that name; ConfigError where there is neither."""
    path = Path(path)
    if path.is_file():
        return path
    named = BUNDLED / f"{path.name.removesuffix('.yaml')}.yaml"
    if path.parent in (Path("."), Path("configs")) and named.is_file():
        return named
    raise ConfigError(f"config {str(path)!r} does not exist; bundled are {', '.join(bundled_configs())}")


def bundled_configs() -> list[str]:
    """Names of the configs that come with the package."""
    return sorted(p.stem for p in BUNDLED.glob("*.yaml") if not p.stem.endswith(("-plan", "table2")))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, found {type(values).__name__}")
    return values


def own_name(name: str) -> str:
    """The key that a name of TRL's, or a key's last part alone, stands for; else the name itself."""
    keys = all_keys()
    if "." in name or name in keys:
        return name
    if name in ALIASES:
        return ALIASES[name]
    fitting = [key for key in keys if key.rsplit(".", 1)[-1] == name]
    return fitting[0] if len(fitting) == 1 else name


def _own_names(values: dict[str, Any], source: str) -> dict[str, Any]:
    """A file's values with names of TRL's in their sections."""
    sections = {key.split(".")[0] for key in all_keys() if "." in key}
    out: dict[str, Any] = {k: v for k, v in values.items() if k in sections or own_name(str(k)) == k}
    for name, value in values.items():
        if name in out:
            continue
        section, leaf = own_name(str(name)).split(".")
        print(f"{source}: {name} is taken as {section}.{leaf}")
        out[section] = {**out.get(section, {}), leaf: value}
    return out


def _check_value(source: str, name: str, value: Any) -> None:
    if new := RENAMED_VALUES.get((name, str(value).lower())):
        raise ConfigError(f"{source}: {name}={value!r} was renamed to {new!r}")


def _own_words(words: Sequence[str]) -> list[str]:
    """Overrides with our own names, every list in brackets. ConfigError for an unknown name."""
    lists = {name for name, kind in _kinds().items() if kind.startswith("list")}
    known, out = all_keys(), []
    name = ""
    for word in words:
        if word.startswith("--"):
            given, equals, value = word[2:].partition("=")
            name = own_name(given)
            # env.settings.x reaches into a free mapping that the environment itself checks.
            if name not in known and not name.startswith("env.settings."):
                raise _unknown("command line", given, known)
            if name != given:
                print(f"command line: --{given} is taken as --{name}")
            _check_value("command line", name, value)
            out.append(f"--{name}={_listed(value) if name in lists else value}" if equals else f"--{name}")
        else:
            _check_value("command line", name, word)
            out.append(_listed(word) if name in lists else word)
    return out


def _listed(word: str) -> str:
    if word.strip().startswith("["):
        return word
    return "[" + ", ".join(repr(part.strip()) for part in word.split(",") if part.strip()) + "]"


def _kinds() -> dict[str, str]:
    return {key.dotted: key.kind for _, _, keys in described(Config) for key in keys}


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


def _nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?" where something near is known, else nothing."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    if not close:
        leaf = name.rsplit(".", 1)[-1]
        leaves = {key.rsplit(".", 1)[-1]: key for key in known}
        close = [leaves[near] for near in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.75)]
    return f"; did you mean {close[0]!r}?" if close else ""


def _unknown(source: str, name: str, known: Sequence[str]) -> ConfigError:
    if name in RENAMED_KEYS:
        return ConfigError(f"{source}: {name!r} was renamed to {RENAMED_KEYS[name]!r}")
    if name in DROPPED_KEYS:
        return ConfigError(f"{source}: {name!r} is no key any more: {DROPPED_KEYS[name]}")
    if name in NOT_THE_SAME:
        return ConfigError(f"{source}: {name!r} is no key here; give {NOT_THE_SAME[name]}")
    hint = _nearest(name, known) or "; `pact-fast train --help` lists all"
    return ConfigError(f"{source}: unknown key {name!r}{hint}")


def _check_keys(values: dict[str, Any], source: str) -> None:
    known = all_keys()
    sections = {k.split(".")[0] for k in known if "." in k}
    for name, value in values.items():
        if name in sections:
            if not isinstance(value, dict):
                raise ConfigError(f"{source}: {name} is a section, give it keys, not {value!r}")
            for leaf in value:
                if f"{name}.{leaf}" not in known:
                    raise _unknown(source, f"{name}.{leaf}", known)
                _check_value(source, f"{name}.{leaf}", value[leaf])
        elif name not in known:
            raise _unknown(source, str(name), [*known, *sections])


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


def _problems(config: Config) -> Iterator[tuple[str, object, str]]:
    """What cannot be used: key, its value, what to give."""
    for section in dataclasses.fields(Config):
        value = getattr(config, section.name)
        if dataclasses.is_dataclass(value) and (bad := out_of_bounds(value)) is not None:
            name, number, bounds = bad
            yield f"{section.name}.{name}", number, str(bounds)
    yield from _combinations(config)


def _combinations(config: Config) -> Iterator[tuple[str, object, str]]:
    """What is wrong with values that are fine one by one: key, its value, what to give."""
    o, t, r = config.objective, config.train, config.rollout
    for name, value, want in objective_problems(o):
        yield f"objective.{name}", value, want
    if r.overlap and o.importance_ratio_cap is None and o.ratio_denominator == "context":
        want = (
            "a cap (2, say) with rollout.overlap, whose rollouts are drawn with weights one step old; or "
            "objective.ratio_denominator=rollout, the ratio to the log-probs they were drawn with"
        )
        yield "objective.importance_ratio_cap", o.importance_ratio_cap, want
    if (r.engine == "http") != bool(r.servers) or not all(map(_is_url, r.servers)):
        yield "rollout.servers", r.servers, "[http://HOST:PORT, ...] with rollout.engine=http, and only then"
    has_rl, has_sft = o.rl_context != "none", o.sft_targets != "none" and o.sft_end > 0
    alone = r.num_generations == 1
    if has_rl and not has_sft and alone and o.distillation == "none":
        want = "2 or more: the advantage of a rollout alone in its group is 0, and there is no SFT term"
        yield "rollout.num_generations", r.num_generations, want
    if alone and o.shows_privileged and (o.privileged == ["peer"] or o.contrast == "peer"):
        yield "rollout.num_generations", r.num_generations, "2 or more: a rollout alone has no peer"
    if t.prefix == "stream" and o.diverges:
        want = "auto: where distributions are distilled, student and teacher rows meet in one forward"
        yield "train.prefix", t.prefix, want
    if t.warmup_steps >= t.max_steps and t.warmup_steps:
        yield "train.warmup_steps", t.warmup_steps, f"fewer than train.max_steps={t.max_steps}"
    if t.num_mini_batches > t.prompts_per_step:
        want = f"at most train.prompts_per_step={t.prompts_per_step}: an update needs a prompt"
        yield "train.num_mini_batches", t.num_mini_batches, want
    if not config.run.name.strip() or Path(config.run.name).name != config.run.name:
        yield "run.name", config.run.name, "a folder's name without slashes; run.dir says where it is"


def _is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))


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
