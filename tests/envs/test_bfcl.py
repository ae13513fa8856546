"""BFCL multi-turn: every ground truth, and ways to spoil it, scored as the official checker scores them."""

import json
import random

import pytest

from pact_fast.data.records import parse_record
from pact_fast.envs import make_env
from pact_fast.envs.bfcl.env import BfclEpisode, json_schema, read_jsonl
from tests.helpers.environments import calls, says

pytest.importorskip("bfcl_eval", reason="pip install --no-deps bfcl-eval==2026.3.23 mpmath")
ALL = ["base", "miss_func", "miss_param", "long_context"]


@pytest.fixture(scope="module")
def env():
    env = make_env("bfcl", {"protocol": "benchmark", "categories": ALL})
    yield env
    env.close()


@pytest.fixture(scope="module")
def records(env):
    return env.records("test")


def by_turn(record):
    """The ground truth as one assistant message per user turn."""
    return [[list(turn)] if turn else [] for turn in record.env["ground_truth"]]


def spoiled(record, how):
    """The ground truth with its last call dropped, two neighbours swapped, or one argument corrupted."""
    rng = random.Random(f"{record.id}/{how}")
    turns = [list(turn) for turn in record.env["ground_truth"]]
    if how == "dropped":
        next(turn for turn in reversed(turns) if turn).pop()
    elif how == "swapped":
        pairs = [(t, i) for t, turn in enumerate(turns) for i in range(len(turn) - 1)]
        if pairs:
            t, i = rng.choice(pairs)
            turns[t][i], turns[t][i + 1] = turns[t][i + 1], turns[t][i]
    else:
        places = [(t, i, k) for t, turn in enumerate(turns) for i, c in enumerate(turn) for k in c[2]]
        t, i, key = rng.choice(places)
        name, positional, named = turns[t][i]
        value = named[key]
        wrong = (
            value + "x" if isinstance(value, str) else value + 1 if isinstance(value, (int, float)) else []
        )
        turns[t][i] = (name, positional, named | {key: wrong})
    return [[turn] if turn else [] for turn in turns]


def official_verdict(record, turns):
    """(valid, error type) of bfcl_eval's own runner and checker, on calls written as it wants them: as
    text."""
    from bfcl_eval.eval_checker.multi_turn_eval import multi_turn_utils
    from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker import multi_turn_checker

    def text(call):
        return f"{call[0]}({', '.join(f'{k}={v!r}' for k, v in call[2].items())})"

    task = record.env["task"]
    entry = {"id": record.id} | {key: task[key] for key in ("initial_config", "involved_classes")}
    written = [[[text(call) for call in step] for step in turn] for turn in turns]
    truth = [[text(call) for call in turn] for turn in record.env["ground_truth"]]
    before = set(vars(multi_turn_utils))
    verdict = multi_turn_checker(written, truth, entry, record.env["category"], "checked")
    for name in set(vars(multi_turn_utils)) - before:
        delattr(multi_turn_utils, name)
    return verdict["valid"], verdict.get("error_type")


def test_every_ground_truth_replayed_as_json_calls_is_valid(env, records):
    """Through start, step and finish, all 800 rows together, as the rollout loop does it."""
    assert len(records) == 800
    episodes = env.start(records)
    scripts = [
        [turn for made in record.env["ground_truth"] for turn in ([made] if made else []) + [None]]
        for record in records
    ]
    row_state = list(range(len(records)))
    seen = {i: [] for i in row_state}
    while row_state:
        turns = [scripts[i].pop(0) for i in row_state]
        said = [
            says("done") if t is None else calls(*((c[0], json.loads(json.dumps(c[2]))) for c in t))
            for t in turns
        ]
        results = env.step([episodes[i] for i in row_state], said)
        for i, result in zip(row_state, results, strict=True):
            seen[i] += [result.user_message] if result.user_message is not None else []
            assert result.done == (not scripts[i])
        row_state = [i for i in row_state if scripts[i]]
    outcomes = env.finish(episodes, [None] * len(records))
    for record, outcome in zip(records, outcomes, strict=True):
        assert outcome.solved, record.id
        assert outcome.reward == outcome.scores["turns"] == 1.0
        assert seen[records.index(record)] == record.env["requests"][1:]


@pytest.mark.parametrize("how", ["kept", "dropped", "swapped", "corrupted"])
def test_scores_equal_the_official_checker_on_all_800(env, records, how):
    variants = [by_turn(r) if how == "kept" else spoiled(r, how) for r in records]
    episodes = [BfclEpisode(r, done=True, turns=turns) for r, turns in zip(records, variants, strict=True)]
    outcomes = env.finish(episodes, [None] * len(episodes))
    lowered = 0
    for record, turns, episode, outcome in zip(records, variants, episodes, outcomes, strict=True):
        expected = official_verdict(record, turns)
        assert (outcome.solved, episode.verdict["error"]) == expected, record.id
        assert outcome.scores["accuracy"] == float(expected[0])
        assert (outcome.reward == 1.0) == expected[0]
        lowered += not expected[0]
    assert {
        "kept": lowered == 0,
        "dropped": lowered > 700,
        "swapped": lowered > 200,
        "corrupted": lowered > 600,
    }[how], lowered


def test_records_pass_the_record_checks_and_traces_tell_the_ground_truth(records):
    without = [record.id for record in records if not record.expert_trace]
    assert without == ["multi_turn_miss_func_49"]  # uses `tail` before it is handed over
    for record in records:
        if record.id in without:
            continue
        raw = {"id": record.id, "prompt": list(record.prompt), "tools": list(record.tools), "env": {}}
        parse_record(raw | {"expert_trace": list(record.expert_trace)}, file="bfcl", line=1)
        made = [(c["name"], c["arguments"]) for m in record.expert_trace for c in m.get("tool_calls", ())]
        assert made == [(c[0], c[2]) for turn in record.env["ground_truth"] for c in turn]
        users = [m["content"] for m in record.expert_trace if m["role"] == "user"]
        assert users == record.env["requests"][1:]
        assert all(
            m["content"] for m in record.expert_trace if m["role"] == "assistant" and not m.get("tool_calls")
        )


def test_schemas_are_json_schema_and_held_back_functions_come_later(env, records):
    allowed = {"object", "string", "number", "integer", "boolean", "array", "null"}

    def check(spec):
        assert spec.get("type", "object") in allowed
        for sub in [*spec.get("properties", {}).values(), *([spec["items"]] if "items" in spec else [])]:
            check(sub)

    sources = {
        row["id"]: row
        for category in ALL
        for row in read_jsonl(env.folder / "data" / f"BFCL_v4_multi_turn_{category}.json")
    }
    for record in records:
        offered = {tool["function"]["name"] for tool in record.tools}
        for tool in record.tools:
            check(tool["function"]["parameters"])
        source = sources[record.id]
        assert not offered & set(source.get("excluded_function", []))
        for turn, names in source.get("missed_function", {}).items():
            assert not offered & set(names)
            assert {t["function"]["name"] for t in record.env["more_tools"][turn]} == set(names)
            assert all(f'"name": "{name}"' in record.env["requests"][int(turn)] for name in names)
    nested = {
        "type": "dict",
        "properties": {"type": {"type": "float"}, "x": {"type": "tuple", "items": {"type": "any"}}},
    }
    assert json_schema(nested) == {
        "type": "object",
        "properties": {"type": {"type": "number"}, "x": {"type": "array", "items": {}}},
    }


def test_rollouts_of_one_task_share_no_state(env, records):
    record = next(r for r in records if r.id == "multi_turn_base_0")
    episodes = env.start([record, record])
    made = env.step(episodes, [calls(("cd", {"folder": "document"})), calls(("ls", {}))])
    assert json.loads(made[0].tool_responses[0]) == {"current_working_directory": "document"}
    again = env.step(episodes, [calls(("pwd", {}), ("ls", {})), calls(("pwd", {}))])
    assert again[0].tool_responses[0] != again[1].tool_responses[0]
    assert "final_report.pdf" in again[0].tool_responses[1]


@pytest.fixture(scope="module")
def in_house():
    env = make_env("bfcl", {"categories": ["base"], "workers": 1})
    yield env
    env.close()


def test_the_benchmark_protocol_ends_a_task_as_the_official_run_does(env, records):
    """The rules of bfcl_eval.model_handler.base_handler.inference_multi_turn_FC, one by one."""
    from bfcl_eval.constants.default_prompts import (
        DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_FC,
        MAXIMUM_STEP_LIMIT,
    )

    record = next(r for r in records if len(r.env["requests"]) > 2 and "base" in r.id)
    # No number of bad calls ends a task; the limit is on messages with calls in one user turn, and one more
    # ends it.
    (episode,) = env.start([record])
    done = [env.step([episode], [calls(("nope", {}))])[0].done for _ in range(MAXIMUM_STEP_LIMIT + 1)]
    assert done == [False] * MAXIMUM_STEP_LIMIT + [True]
    outcome = env.finish([episode], [None])[0]
    assert (outcome.solved, episode.verdict["error"]) == (False, "multi_turn:empty_turn_model_response") or (
        not outcome.solved
    )
    # The count begins anew with every user turn.
    (episode,) = env.start([record])
    for _ in range(2):
        for _ in range(MAXIMUM_STEP_LIMIT):
            assert not env.step([episode], [calls(("nope", {}))])[0].done
        assert env.step([episode], [says("done")])[0].user_message is not None
    # Nothing readable ends the user turn; what is readable beside it is run, and it alone is answered.
    (episode,) = env.start([record])
    reply = env.step([episode], [calls("{", "[")])[0]
    assert (reply.tool_responses, reply.user_message) == ((), record.env["requests"][1])
    mixed = env.step([episode], [calls("{", ("nope", {}))])[0]
    assert mixed.tool_responses == ("Error during execution: name 'nope' is not defined",)
    assert env.max_turns >= (MAXIMUM_STEP_LIMIT + 1) * len(record.env["requests"])
    # Functions come in its words.
    handed = [r for r in records if r.env["more_tools"]]
    assert handed
    for r in handed:
        for turn, tools in r.env["more_tools"].items():
            text = r.env["requests"][int(turn)]
            assert text.endswith(f"\n{DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_FC}")
            assert all(tool["function"]["name"] in text for tool in tools)


def test_a_task_cut_in_its_last_turn_is_scored_as_the_official_run_scores_it(env, records):
    """Forced to quit in the last user turn, a task has as many turns as the truth and is checked like any
    other."""
    record = next(r for r in records if r.id.startswith("multi_turn_base"))
    (episode,) = env.start([record])
    truth = record.env["ground_truth"]
    for number, turn in enumerate(truth):
        if turn:
            env.step([episode], [calls(*[(name, arguments) for name, _, arguments in turn])])
        if number < len(truth) - 1:
            env.step([episode], [says("done")])
    while not env.step([episode], [calls(("nope", {}))])[0].done:
        pass
    assert env.finish([episode], [None])[0].solved


def test_bad_calls_get_messages_and_hanging_ones_an_error(in_house, records):
    env = in_house
    record = next(r for r in records if "MathAPI" in r.env["task"]["involved_classes"])
    episodes = env.start([record])
    bad = env.step(episodes, [calls("{", ("nope", {}), ("add", {"a": 1}), ("add", {"a": 1, "b": 2}))])[0]
    texts = bad.tool_responses
    assert "could not be read" in texts[0]
    assert texts[1] == "Error during execution: name 'nope' is not defined"
    assert "missing 1 required positional argument: 'b'" in texts[2]
    assert json.loads(texts[3]) == {"result": 3}
    outcome = env.finish(episodes, ["turn_limit"])[0]
    assert (outcome.solved, outcome.failure, outcome.calls) == (False, "turn_limit", 4)
    quick = make_env("bfcl", {"time_limit": 1.0, "workers": 1})
    quick.sandbox.run([])
    slow = quick.start([record])
    quick.step(slow, [calls(("add", {"a": 1, "b": 2}))])
    hung = quick.step(
        slow, [calls(("power", {"base": 3.5, "exponent": 10**12}), ("power", {"base": 7, "exponent": 10**9}))]
    )
    assert "Error" in hung[0].tool_responses[1]
    after = quick.step(slow, [calls(("add", {"a": 2, "b": 2}))])[0]
    assert json.loads(after.tool_responses[0]) == {"result": 4}
    quick.close()


def test_unknown_tools_in_a_row_end_the_episode(in_house, records):
    env = in_house
    episodes = env.start(records[:1])
    results = [env.step(episodes, [calls(("nope", {}))])[0].done for _ in range(3)]
    assert results == [False, False, True]
    assert env.finish(episodes, [None])[0].failure == "unknown_tool"


def test_the_in_house_split_is_disjoint_in_task_numbers_over_all_categories():
    env = make_env("bfcl", {"categories": ["base", "miss_func"]})
    numbers = {s: {r.id.rsplit("_", 1)[1] for r in env.records(s)} for s in ("train", "validation", "test")}
    assert [len(numbers[s]) for s in numbers] == [120, 30, 50]
    assert len(set.union(*numbers.values())) == 200
    assert len(env.records("test")) == 100
    env.close()


def test_short_descriptions_keep_what_the_tool_does():
    env = make_env("bfcl", {"short_descriptions": True})
    described = {t["function"]["name"]: t["function"]["description"] for t in env.records("test")[0].tools}
    assert all(text and "Tool description" not in text for text in described.values())
    env.close()


def test_what_cannot_run_here_says_why():
    with pytest.raises(ValueError, match="needs a search engine on the network"):
        make_env("bfcl", {"categories": ["web_search"]})
    with pytest.raises(ValueError, match=r"memory_kv: is an environment of its own.*bfcl_memory"):
        make_env("bfcl", {"categories": ["memory_kv"]})
    with pytest.raises(ValueError, match="memory_vector: needs an embedding model"):
        make_env("bfcl", {"categories": ["memory_vector"]})
    with pytest.raises(ValueError, match="one of base, miss_func"):
        make_env("bfcl", {"categories": ["simple"]})
    with pytest.raises(ValueError, match="has test tasks only"):
        make_env("bfcl", {"protocol": "benchmark"}).records("train")
