"""What a configuration key is: its default, one line on what it does, the numbers that it may hold, and the
names that it had before or has elsewhere.

`key(...)` stands where a dataclass field has its default. `--help`, docs/config.md and the error texts are
made from it, so that a key is described once. Below: names that keys and values had, or have elsewhere.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

RENAMED_KEYS = {  # old key: what it is called now
    "objective.reasoning_segments": "objective.reasoning_levels",
    "objective.engine_correction_cap": "objective.importance_ratio_cap",
    "env.train_file": "env.settings.train_path",
    "env.validation_file": "env.settings.validation_path",
    "env.test_file": "env.settings.test_path",
    "env.skip_bad_records": "env.settings.skip_bad_records",
}
DROPPED_KEYS = {  # old key: why there is none any more
    "rollout.per_sequence_seed": "every rollout is drawn from a seed of its own: remove it",
    "rollout.row_seeds": "every rollout is drawn from a seed of its own: remove it",
}
RENAMED_VALUES = {  # (key, old value as text): what it is called now
    ("rollout.engine", "hf"): "in_process",
    ("rollout.engine", "hf-batching"): "in_process",
    ("model.gradient_checkpointing", "true"): "full",
    ("model.gradient_checkpointing", "false"): "none",
}

# Names of TRL and transformers for the same thing; a key's own last part is taken without its section, too.
ALIASES = {
    "run_name": "run.name",
    "output_dir": "run.dir",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep_last",
    "eval_steps": "eval.every",
    "model_name_or_path": "model.path",
    "lora_r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target_modules": "lora.targets",
}
NOT_THE_SAME = {  # names that mean something else elsewhere: what to give instead
    "per_device_train_batch_size": "train.prompts_per_step (prompts, of all devices) and train.token_budget",
    "gradient_accumulation_steps": "train.token_budget: packs of a step add up by themselves",
    "num_train_epochs": "train.max_steps",
    "steps_per_generation": "train.num_mini_batches",
    "bf16": "model.dtype=bfloat16",
    "loss_type": "a preset, and objective.normalization",
}


@dataclass(frozen=True)
class Bounds:
    """The range of a number: inclusive `low` and `high`, exclusive `above` and `below`."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    def hold(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        parts = [
            f"at least {self.low:g}" if self.low is not None else "",
            f"above {self.above:g}" if self.above is not None else "",
            f"at most {self.high:g}" if self.high is not None else "",
            f"below {self.below:g}" if self.below is not None else "",
        ]
        return "a finite number " + " and ".join(part for part in parts if part)


def key(
    default: Any,
    what: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field. `what`: one line. The bounds hold for every number; None is let through."""
    metadata = {"what": what, "bounds": Bounds(low, high, above, below)}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def share(default: float | None, what: str) -> Any:
    """A key that holds a number in [0, 1]."""
    return key(default, what, low=0, high=1)


def count(default: int | None, what: str, *, low: int = 1) -> Any:
    """A key that holds a whole number of things."""
    return key(default, what, low=low)


@dataclass(frozen=True)
class Described:
    """A key for people: its section ("" at the top), name, type, default and what it is."""

    section: str
    name: str
    kind: str
    default: str
    what: str

    @property
    def dotted(self) -> str:
        return f"{self.section}.{self.name}" if self.section else self.name


def described(config: Any) -> Iterator[tuple[str, str, list[Described]]]:
    """Sections of a dataclass of dataclasses: name, title (the first line of its docstring), keys."""
    for section in dataclasses.fields(config):
        if not dataclasses.is_dataclass(section.default_factory):
            continue
        cls: Any = section.default_factory
        title = (cls.__doc__ or "").strip().splitlines()[0]
        keys = []
        for item in dataclasses.fields(cls):
            given = item.default if item.default is not dataclasses.MISSING else item.default_factory()  # type: ignore[misc]
            kind = str(item.type).replace("Literal", "").replace("'", "").replace('"', "")
            shown = "none" if given is None else str(given).lower() if isinstance(given, bool) else str(given)
            keys.append(Described(section.name, item.name, kind, shown, item.metadata["what"]))
        yield section.name, title, keys


def markdown(config: Any) -> str:
    """All keys as the tables of docs/config.md."""
    lines = []
    for section, title, keys in described(config):
        lines += [
            "",
            f"## {section}",
            "",
            title + ".",
            "",
            "| key | type | default | what |",
            "|---|---|---|---|",
        ]
        for item in keys:
            cells = (f"`{item.name}`", item.kind, f"`{item.default}`", item.what)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines).strip() + "\n"


def out_of_bounds(section: Any) -> tuple[str, Any, Bounds] | None:
    """Name, value and bounds of the first field of a dataclass whose number it may not hold."""
    for item in dataclasses.fields(section):
        value, bounds = getattr(section, item.name), item.metadata.get("bounds")
        if bounds is None or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not bounds.hold(value):
            return item.name, value, bounds
    return None
