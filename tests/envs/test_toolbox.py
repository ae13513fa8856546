"""The toolbox: its worlds, its expert, its tools' messages, its reward."""

import json
from dataclasses import asdict, replace

import pytest
from scipy.stats import binom

from pact_fast.data.chat import AssistantTurn, ToolCall
from pact_fast.data.records import parse_record
from pact_fast.envs import make_env
from pact_fast.envs.toolbox import BaseMix, ToolboxEnv, ToolboxSettings, base_records, tools

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def env():
    env = ToolboxEnv(ToolboxSettings())
    yield env
    env.close()


def turns_of(record):
    """The trace's assistant messages as a model would have emitted them."""
    for message in record.expert_trace:
        if message["role"] == "assistant":
            calls = tuple(
                ToolCall(c["name"], c["arguments"], None, "") for c in message.get("tool_calls", ())
            )
            yield AssistantTurn(message["reasoning_content"], message["content"], calls, "", True)


def play(env, record, turns):
    """Runs one episode to its end; the outcome, the responses and the turn rewards."""
    episodes = env.start([record])
    responses, rewards = [], []
    for turn in turns:
        result = env.step(episodes, [turn])[0]
        responses += result.tool_responses
        rewards.append(result.reward)
        if result.done:
            break
    return env.finish(episodes, [None])[0], responses, rewards


def call_turn(*calls):
    return AssistantTurn("", "", tuple(ToolCall(n, a, None, "") for n, a in calls), "", True)


def answer_turn(text):
    return AssistantTurn("", text, (), "", True)


@pytest.mark.parametrize("difficulty", [1, 2, 3])
def test_no_world_occurs_twice_over_all_splits_and_the_base(difficulty):
    env = ToolboxEnv(ToolboxSettings(difficulty=difficulty, train_tasks=300))
    records = [r for split in SPLITS for r in env.records(split)]
    records += base_records(2000, mix=BaseMix(difficulty=difficulty))
    assert len({json.dumps(r.env["world"], sort_keys=True) for r in records}) == len(records)
    assert len({r.id for r in records}) == len(records)


def test_records_are_a_pure_function_of_the_settings():
    first = [asdict(r) for r in ToolboxEnv(ToolboxSettings(seed=3)).records("validation")]
    again = [asdict(r) for r in ToolboxEnv(ToolboxSettings(seed=3)).records("validation")]
    other = [asdict(r) for r in ToolboxEnv(ToolboxSettings(seed=4)).records("validation")]
    assert json.dumps(first) == json.dumps(again) != json.dumps(other)
    assert [asdict(r) for r in base_records(20)] == [asdict(r) for r in base_records(30)[:20]]


@pytest.mark.parametrize("difficulty", [1, 2, 3])
def test_every_record_passes_the_record_checks_and_stays_short(difficulty):
    env = ToolboxEnv(ToolboxSettings(difficulty=difficulty, train_tasks=200))
    for record in [
        *env.records("train"),
        *env.records("test"),
        *base_records(200, mix=BaseMix(difficulty=difficulty)),
    ]:
        raw = {"id": record.id, "prompt": list(record.prompt), "tools": list(record.tools), "env": record.env}
        parse_record(raw | {"expert_trace": list(record.expert_trace)}, file="toolbox", line=1)
        assert len(record.prompt[-1]["content"]) <= 120
        assert len(json.dumps(list(record.tools), separators=(",", ":"))) <= (
            1200 if difficulty == 1 else 1400
        )
        for message in record.expert_trace:
            assert len(message.get("reasoning_content", "")) <= 160
            assert message["role"] != "tool" or len(message["content"]) <= 80


def test_the_default_prompt_offers_six_tools_with_distractors(env):
    for record in env.records("train"):
        names = [tool["function"]["name"] for tool in record.tools]
        assert len(names) == 6
        assert {"weather", "news"} <= set(names)


@pytest.mark.parametrize(("success", "detour"), [(0.6, 0.5), (1.0, 0.0), (0.3, 0.9), (0.0, 0.0)])
def test_expert_rates_are_realised(success, detour):
    n = 400
    settings = ToolboxSettings(train_tasks=n, success_rate=success, detour_rate=detour)
    experts = [r.env["expert"] for r in ToolboxEnv(settings).records("train")]
    for rate, count in (
        (success, sum(e["solves"] for e in experts)),
        (detour, sum(e["detours"] > 0 for e in experts)),
    ):
        low, high = binom.ppf(0.0005, n, rate), binom.ppf(0.9995, n, rate)
        assert low <= count <= high


@pytest.mark.parametrize("difficulty", [1, 2, 3])
def test_traces_replayed_through_the_workers_give_what_they_recorded(difficulty):
    env = ToolboxEnv(ToolboxSettings(difficulty=difficulty, train_tasks=60))
    for record in env.records("train"):
        outcome, responses, _ = play(env, record, turns_of(record))
        assert responses == [m["content"] for m in record.expert_trace if m["role"] == "tool"]
        assert outcome.solved == record.env["expert"]["solves"]
        assert outcome.calls == record.env["expert"]["calls"]
    env.close()


@pytest.mark.parametrize("difficulty", [1, 2, 3])
def test_a_perfect_expert_solves_every_task_with_the_full_reward(difficulty):
    settings = ToolboxSettings(difficulty=difficulty, train_tasks=80, success_rate=1.0, detour_rate=0.0)
    env = ToolboxEnv(settings)
    for record in env.records("train"):
        outcome, _, rewards = play(env, record, turns_of(record))
        assert outcome.solved
        assert outcome.reward == pytest.approx(1.0)
        assert rewards == pytest.approx([1.0] * len(rewards))
    env.close()


def test_a_detour_costs_reward_and_a_failed_trace_more():
    base = ToolboxSettings(train_tasks=40, success_rate=1.0, detour_rate=1.0)
    env = ToolboxEnv(base)
    for record in env.records("train"):
        outcome, *_ = play(env, record, turns_of(record))
        assert outcome.solved
        assert 0.5 < outcome.reward < 1.0
    failed = ToolboxEnv(replace(base, success_rate=0.0, detour_rate=0.0))
    for record in failed.records("train"):
        outcome, *_ = play(failed, record, turns_of(record))
        assert not outcome.solved
        assert outcome.failure is not None
        assert outcome.reward < 0.8
    env.close()
    failed.close()


def test_two_part_tasks_may_be_solved_in_either_order():
    env = ToolboxEnv(
        ToolboxSettings(two_part_share=1.0, success_rate=1.0, detour_rate=0.0, train_hops=(1.0, 0.0, 0.0))
    )
    orders = set()
    for record in env.records("train"):
        turns = list(turns_of(record))
        orders.add(turns[0].tool_calls[0].arguments["name"] == record.env["starts"][0])
        first, second = record.env["answers"]
        swapped = [turns[1], turns[0], answer_turn(f'"{second}" and "{first}".')]
        together = [
            call_turn(*((t.tool_calls[0].name, t.tool_calls[0].arguments) for t in turns[:2])),
            turns[-1],
        ]
        for variant in (turns, swapped, together):
            outcome, *_ = play(env, record, variant)
            assert outcome.solved
            assert outcome.reward == pytest.approx(1.0)
    assert orders == {True, False}  # the expert itself uses both
    env.close()


def test_partial_credit_rises_with_every_solved_step():
    settings = ToolboxSettings(train_hops=(0, 0, 1.0), two_part_share=0.0, success_rate=1.0, detour_rate=0.0)
    env = ToolboxEnv(settings)
    record = env.records("train")[0]
    turns = list(turns_of(record))
    rewards = [play(env, record, [*turns[:n], answer_turn('"Nobody"')])[0].reward for n in range(4)]
    assert rewards == sorted(rewards)
    assert rewards[0] == 0.0
    assert rewards[3] < 1.0 == pytest.approx(play(env, record, turns)[0].reward)
    env.close()


def test_a_list_of_guesses_is_not_an_answer_and_no_format_is_negative(env):
    record = env.records("test")[0]
    everyone = " ".join(f'"{name}"' for kind in tools.LOOKUPS for name in record.env["world"][kind])
    assert not play(env, record, [answer_turn(everyone)])[0].solved
    silent, *_ = play(env, record, [answer_turn("I do not know")])
    assert silent.reward == env.settings.no_format_reward < 0
    assert silent.failure == "no_call"


def test_a_repeated_call_solves_nothing_more(env):
    record = env.records("train")[0]
    first = next(turns_of(record))
    outcome, *_ = play(env, record, [first, first, first, answer_turn('"Nobody"')])
    assert outcome.scores["solve_r"] <= 1 / len(record.env["steps"])


def test_bad_calls_are_answered_by_messages_that_say_what_would_be_right(env):
    record = env.records("train")[0]
    world = record.env["world"]
    person, place = next(iter(world["person"])), next(iter(world["place"]))
    cases = [
        (("person", {"name": place, "field": "home"}), "tool_error", "Use place."),
        (("person", {"name": "Xx", "field": "home"}), "tool_error", 'no person "Xx"'),
        (("person", {"name": person, "field": "mayor"}), "tool_error", "friend, boss, home, employer"),
        (("person", {"name": person}), "bad_arguments", "field is missing"),
        (("person", {"name": person, "field": "home", "x": 1}), "bad_arguments", "takes name, field"),
        (("person", {"name": [], "field": "home"}), "bad_arguments", "must be text"),
        (("persn", {"name": person}), "unknown_tool", "Tools: person, place"),
        (("search", {"field": "shoe", "value": "x"}), "tool_error", "shoe"),
        (("weather", {"place": person}), "tool_error", "place"),
    ]
    for (name, arguments), kind, fragment in cases:
        outcome, responses, _ = play(env, record, [call_turn((name, arguments)), answer_turn("x")])
        assert responses[0].startswith("Error: ")
        assert fragment in responses[0]
        assert outcome.failure == kind
    assert play(env, record, [answer_turn('"x"')])[0].failure == "no_call"


def test_arithmetic_units_and_dates():
    world = {"person": {}, "place": {}, "company": {}}
    cases = [
        ("calculator", {"a": "7", "op": "*", "b": "6"}, '"42"'),
        ("calculator", {"a": 1, "op": "/", "b": 8}, '"0.1"'),
        ("calculator", {"a": "1", "op": "/", "b": "0"}, "Error: division by zero."),
        ("calculator", {"a": "1", "op": "^", "b": "0"}, 'Error: op must be +, -, * or /, not "^".'),
        ("calculator", {"a": "nan", "op": "+", "b": "0"}, 'Error: "nan" is too large.'),
        ("convert", {"value": "10", "unit": "km", "to": "mi"}, '"6.2"'),
        ("convert", {"value": "ten", "unit": "km", "to": "mi"}, 'Error: "ten" is not a number.'),
        ("days_between", {"start": "2000-03-01", "end": "2000-02-28"}, '"2"'),
        ("days_between", {"start": "x", "end": "2000-02-28"}, 'Error: "x" is not a date like 1990-04-21.'),
    ]
    for name, arguments, expected in cases:
        assert tools.call(world, name, arguments)[1] == expected


def test_malformed_calls_get_an_error_and_end_the_episode_after_the_limit(env):
    broken = AssistantTurn("", "", (ToolCall("", None, "arguments are not JSON", "{"),), "", True)
    episodes = env.start(env.records("train")[:1])
    done = [env.step(episodes, [broken])[0] for _ in range(3)]
    assert [r.done for r in done] == [False, False, True]
    assert "not JSON" in done[0].tool_responses[0]
    assert env.finish(episodes, [None])[0].failure == "bad_arguments"


def test_held_out_tasks_use_other_words_and_more_hops_than_training():
    env = ToolboxEnv(ToolboxSettings(train_tasks=200, shift=1.0, train_hops=(0.45, 0.45, 0.1)))
    train, test = env.records("train"), env.records("test")
    words = {
        word for r in train for word in r.prompt[-1]["content"].replace("?", "").replace(".", "").split()
    }
    assert all(r.env["wording"] == "held_out" for r in test)
    assert all(not set(r.prompt[-1]["content"].replace(".", "").split()) <= words for r in test)
    mean = [sum(r.env["hops"] for r in split) / len(split) for split in (train, test)]
    assert mean[0] < mean[1]
    assert all(r.env["wording"] == "train" for r in ToolboxEnv(ToolboxSettings(shift=0.0)).records("test"))


def test_unknown_and_mistyped_settings_name_the_key_and_the_nearest():
    with pytest.raises(ValueError, match=r"env\.toolbox\.sucess_rate.*'success_rate'"):
        make_env("toolbox", {"sucess_rate": 0.5})
    with pytest.raises(ValueError, match=r"env\.toolbox\.train_tasks: expected int, got '48'"):
        make_env("toolbox", {"train_tasks": "48"})
    with pytest.raises(ValueError, match=r"train_hops: needs 3 values"):
        make_env("toolbox", {"train_hops": [1.0]})
    with pytest.raises(ValueError, match=r"shift: a share"):
        make_env("toolbox", {"shift": 1.5})
    with pytest.raises(ValueError, match=r"did you mean 'toolbox'"):
        make_env("tolbox")
    assert make_env("toolbox", {"train_hops": [1, 0, 0]}).settings.train_hops == (1.0, 0.0, 0.0)
