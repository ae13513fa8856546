"""Environments and rewards of one's own, by name: `module:Class` or `module:function`.

The module is imported as Python would import it from the working folder, which need not be installed or on
PYTHONPATH. It runs in the trainer's own process with all its rights: unlike tools, it is trusted.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pact_fast.data.chat import AssistantTurn
from pact_fast.data.records import Record

ENV_METHODS = ("records", "start", "step", "finish", "close")


@dataclass(frozen=True)
class CallMade:
    """One call of an episode. arguments: None where they could not be read, which `error` then says;
    response: what the model was told."""

    name: str
    arguments: Mapping[str, Any] | None
    response: str
    error: str | None = None


@dataclass(frozen=True)
class RewardInput:
    """What a reward function is given: one finished episode.

    record: the task; its `env` holds the fields of the file. turns: the assistant turns in order, each with
    reasoning, content and tool_calls. calls: all calls with their responses. answer: content of the closing
    turn, "" where the episode was cut off, which `truncated` says ("turn_limit" or "length_limit"). scores:
    the environment's own. solved: whether the environment holds the task for solved.
    """

    record: Record
    turns: tuple[AssistantTurn, ...]
    calls: tuple[CallMade, ...]
    answer: str
    truncated: str | None
    scores: Mapping[str, float]
    solved: bool


# The reward, or the reward and whether the task is solved.
RewardFunction = Callable[[RewardInput], float | tuple[float, bool]]


def is_path(name: str) -> bool:
    return ":" in name


def load_object(path: str, where: str) -> Any:
    """What `path` ("module:name") stands for; the working folder is searched first.

    Raises ValueError that names `where`, the path and what is missing.
    """
    module_name, _, name = path.partition(":")
    if not name or not all(part.isidentifier() for part in (*module_name.split("."), *name.split("."))):
        raise ValueError(f"{where}: {path!r}: write module:Class or module:function, as in my_rewards:score")
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise ValueError(f"{where}: {path!r}: importing it failed: {error}") from error
        told = f"no module {error.name!r} in {folder} or on Python's path"
        raise ValueError(f"{where}: {path!r}: {told}") from error
    except Exception as error:
        told = f"importing it raised {type(error).__name__}: {error}"
        raise ValueError(f"{where}: {path!r}: {told}") from error
    finally:
        sys.path.remove(folder)
    if folder not in sys.path:
        sys.path.append(folder)  # for what the module imports later
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            file = getattr(module, "__file__", None) or "a module without a file"
            raise ValueError(f"{where}: {path!r}: {file} has no {name!r}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"{where}: {path!r}: is a {type(found).__name__}, not a class or function")
    return found


def load_env(path: str, build: Callable[[Any], Any], settings: Mapping[str, Any]) -> Any:
    """The environment that `path` makes: `build(cls)` of a class with `Settings`, else called with the
    settings as keywords.

    Raises ValueError for settings it does not take and for what lacks a method of `ToolEnv`.
    """
    make = load_object(path, "env.name")
    if inspect.isclass(make) and hasattr(make, "Settings"):
        env = build(make)
    else:
        try:
            inspect.signature(make).bind(**settings)
        except TypeError as error:
            raise ValueError(f"env.settings: {path!r} does not take these: {error}") from error
        env = make(**settings)
    lacking = [name for name in ENV_METHODS if not callable(getattr(env, name, None))]
    if lacking:
        raise ValueError(
            f"env.name: {path!r} gives a {type(env).__name__} without {', '.join(lacking)}: an environment "
            f"has {', '.join(ENV_METHODS)} (pact_fast.envs.ToolEnv)"
        )
    if not isinstance(getattr(env, "name", None), str):
        env.name = path
    return env


def load_reward(path: str, where: str) -> RewardFunction:
    """The reward function that `path` names; of a class, an instance made without arguments."""
    found = load_object(path, where)
    if inspect.isclass(found):
        try:
            found = found()
        except Exception as error:
            told = f"making it without arguments raised {type(error).__name__}: {error}"
            raise ValueError(f"{where}: {path!r}: {told}") from error
        if not callable(found):
            raise ValueError(f"{where}: {path!r}: its instances cannot be called: give it __call__(episode)")
    try:
        inspect.signature(found).bind(None)
    except TypeError as error:
        raise ValueError(f"{where}: {path!r}: must take one argument, the episode: {error}") from error
    except ValueError:  # builtins may tell no signature
        pass
    return found


def score(reward: RewardFunction, episode: RewardInput, where: str) -> tuple[float, bool]:
    """(reward, solved) that the function gives an episode.

    Raises ValueError naming `where` and the record where it raises or gives no finite number.
    """
    place = f"{where}: record {episode.record.id!r}"
    try:
        given: Any = reward(episode)
    except Exception as error:
        raise ValueError(f"{place}: raised {type(error).__name__}: {error}") from error
    value, solved = given, episode.solved
    if isinstance(given, tuple):
        if len(given) != 2 or given[1] not in (True, False):
            raise ValueError(f"{place}: gave {given!r:.80}; a pair is (reward, solved)")
        value, solved = given[0], bool(given[1])
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{place}: gave {value!r:.80}, not a finite number")
    return number, solved
