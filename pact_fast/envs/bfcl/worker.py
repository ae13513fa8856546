"""Runs BFCL calls and the official checkers in a sandbox worker; the worker runs this file's source.

Instances are made anew for every request and the rollout's earlier calls are made again on them, so that no
state is shared between rollouts and a replaced worker changes nothing. Nothing is ever evaluated as text: a
call is a method's name and its arguments. A task is {"initial_config", "involved_classes", "long_context"};
a call is [name, positional arguments, named arguments]. A memory (of the memory tasks) is {"core":
{key: text}, "archival": {key: text}}; it comes with each request and goes back changed.
"""

import copy
import importlib
import inspect
import json
import os
import sys
import types

REFUSED = ("kill", "exit", "quit", "remove", "unlink", "popen", "Popen", "run")  # as the official runner


def instances(task):
    """Class name -> fresh instance with the task's scenario loaded."""
    from bfcl_eval.constants.executable_backend_config import CLASS_FILE_PATH_MAPPING, STATELESS_CLASSES

    made = {}
    for name in task["involved_classes"]:
        instance = getattr(importlib.import_module(CLASS_FILE_PATH_MAPPING[name]), name)()
        if name not in STATELESS_CLASSES:
            config = copy.deepcopy(task["initial_config"].get(name, {}))
            instance._load_scenario(config, long_context=task["long_context"])
        made[name] = instance
    return made


PUBLIC: dict = {}  # class -> names of its public methods: what the official runner, too, offers


def methods(made):
    found = {}
    for instance in made.values():
        cls = type(instance)
        if cls not in PUBLIC:
            members = inspect.getmembers(instance, predicate=inspect.ismethod)
            PUBLIC[cls] = [name for name, _ in members if not name.startswith("_")]
        found.update((name, getattr(instance, name)) for name in PUBLIC[cls])
    return found


def execute(available, call):
    """(kind, text): what the official runner gives for this call; kind as in FAILURE_KINDS, or "ok"."""
    name, positional, named = call
    if name in REFUSED:
        return "unknown_tool", f"Error during execution: Function call {name} is not allowed."
    if name not in available:
        return "unknown_tool", f"Error during execution: name '{name}' is not defined"
    try:
        value = available[name](*positional, **named)
    except Exception as error:
        kind = "bad_arguments" if not takes(available[name], positional, named) else "tool_error"
        return kind, f"Error during execution: {error}"
    if isinstance(value, dict):
        kind = "tool_error" if "error" in value else "ok"
        try:
            return kind, json.dumps(value)
        except TypeError:
            return kind, str(value)
    return "ok", str(value)


def takes(method, positional, named):
    try:
        inspect.signature(method).bind(*positional, **named)
    except TypeError:
        return False
    return True


def run_calls(task, earlier, calls):
    """(kind, text) of each of `calls`, made after the calls of `earlier`."""
    available = methods(instances(task))
    for call in earlier:
        execute(available, call)
    return [execute(available, call) for call in calls]


def score(task, turns, truth):
    """{"passed": user turns passed before the first failure, "valid": bool, "error": type or None}.

    turns: per user turn the calls of each assistant message; truth: per user turn the ground-truth calls.
    After each turn with a ground truth the official state and response checkers compare the two sides.
    """
    from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker import response_checker, state_checker

    model, reference = instances(task), instances(task)
    model_methods, reference_methods = methods(model), methods(reference)
    responses = []
    for index, expected in enumerate(truth):
        if index >= len(turns):
            return {"passed": index, "valid": False, "error": "multi_turn:force_terminated"}
        steps = turns[index]
        responses += [execute(model_methods, call)[1] for step in steps for call in step]
        wanted = [execute(reference_methods, call)[1] for call in expected]
        if not expected:
            continue
        if not any(steps):
            return {"passed": index, "valid": False, "error": "multi_turn:empty_turn_model_response"}
        for verdict in (state_checker(model, reference), response_checker(responses, wanted, index)):
            if not verdict["valid"]:
                return {"passed": index, "valid": False, "error": verdict["error_type"]}
    return {"passed": len(truth), "valid": True, "error": None}


def memory_backend(memory):
    """The package's own class with `memory` in it; its snapshot files are not used."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the key search imports NumPy
    if "bfcl_eval.utils" not in sys.modules:
        # The real one makes folders beside the package when imported, and serves the snapshot files alone.
        utils = types.ModuleType("bfcl_eval.utils")
        for name in ("get_directory_structure_by_id", "is_first_memory_prereq_entry", "is_memory_prereq"):
            setattr(utils, name, None)
        sys.modules["bfcl_eval.utils"] = utils
    from bfcl_eval.eval_checker.multi_turn_eval.func_source_code.memory_kv import MemoryAPI_kv

    instance = MemoryAPI_kv()
    instance.core_memory = dict(memory["core"])
    instance.archival_memory = dict(memory["archival"])
    return instance


def run_memory_calls(memory, calls):
    """{"results": [(kind, text) of each call], "memory": what they leave}."""
    instance = memory_backend(memory)
    available = methods({"MemoryAPI_kv": instance})
    results = [execute(available, call) for call in calls]
    left = {"core": instance.core_memory, "archival": instance.archival_memory}
    return {"results": results, "memory": left}


def core_memory_text(memory):
    """What the system prompt shows of the core memory."""
    return memory_backend(memory)._dump_core_memory_to_context()
