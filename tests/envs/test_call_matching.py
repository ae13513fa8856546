"""Hard assignment of calls to reference calls, with numbers worked out by hand."""

import pytest

from pact_fast.data.records import Record
from pact_fast.envs.base import make_env
from pact_fast.envs.call_matching import (
    answer_f1,
    match_calls,
    match_turns,
    reference_calls,
    similarity,
    tagged_answer,
)
from pact_fast.objective import turn_advantages
from tests.helpers.environments import calls, play, says

F = ("f", {"a": 1, "b": 2, "c": 3})
G = ("g", {})


@pytest.mark.parametrize(
    ("call", "reference", "want"),
    [
        (F, F, 1.0),  # (1 + 1 + 3) / 5
        (("f", {"a": 1, "b": 9, "c": 9}), F, 0.6),  # (1 + 1 + 1) / 5
        (("f", {"a": 1, "b": 2, "c": 3, "d": 4}), F, 0.95),  # J = 3/4: (1 + 0.75 + 3) / 5
        (("f", {"a": 1}), F, (1 + 1 / 3 + 1) / 5),
        (("F", F[1]), F, 1.0),  # the case of the name does not count
        (("g", F[1]), F, 0.0),
        (G, G, 1.0),  # (1 + 1 + 0) / 2
        (("g", {"x": 1}), G, 0.5),  # (1 + 0 + 0) / 2
        (("f", {"a": "1", "b": 2, "c": 3}), F, 0.8),  # "1" is not 1
    ],
)
def test_similarity_is_name_overlap_and_equal_values(call, reference, want):
    assert similarity(call, reference) == pytest.approx(want)


def test_the_assignment_is_the_best_of_all_and_greedy_takes_the_best_pair_first():
    """r1 = {a, b, c, d}, r2 = {a}. The whole call: 1 with r1, (1 + 1/4 + 1) / 3 = 0.75 with r2; the one
    without a: (1 + 3/4 + 3) / 6 = 0.79 with r1, 1/3 with r2. Best 0.75 + 0.79, greedy 1 + 0.33."""
    r1, r2 = ("f", {"a": 1, "b": 2, "c": 3, "d": 4}), ("f", {"a": 1})
    made = [r1, ("f", {"b": 2, "c": 3, "d": 4})]
    assert match_calls(made, [r1, r2]) == [(0, 1, 0.75), (1, 0, pytest.approx(4.75 / 6))]
    assert match_calls(made, [r1, r2], greedy=True) == [(0, 0, 1.0), (1, 1, pytest.approx(1 / 3))]
    assert match_calls([], [r1]) == match_calls(made, []) == []
    assert match_calls([G], [r1]) == []


def test_all_calls_of_a_rollout_are_matched_at_once():
    """Turn by turn, the first call (0.6) would take the reference that the second fits exactly."""
    made = [[("f", {"a": 1, "b": 9, "c": 9})], [F]]
    assert match_turns(made, [F]).turn_rewards == (0.0, 1.0)
    assert match_turns(made, [F], penalty=0.25).turn_rewards == (-0.25, 1.0)


def test_a_turn_is_the_mean_over_its_calls_and_a_reference_is_used_once():
    """G and a second F: (1 + 0) / 2. An unreadable call counts: (0.6 + 0) / 2. No call: 0."""
    matched = match_turns([[F], [G, F], []], [F, G])
    assert matched.turn_rewards == (1.0, 0.5, 0.0)
    assert matched.total == 2.0
    assert match_turns([[("f", {"a": 1, "b": 9, "c": 9}), ("", {})]], [F]).turn_rewards == (
        pytest.approx(0.3),
    )


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ("The red Fox!", 2 * 2 / (3 + 3)),  # {the, red, fox} and {red, fox, runs}
        ("runs, red-fox", 1.0),
        ("red red red", 2 * 1 / (1 + 3)),  # sets: a word counts once
        ("", 0.0),
        (None, 0.0),
    ],
)
def test_answers_are_compared_by_their_sets_of_words(given, want):
    assert answer_f1(given, "Red fox runs.") == pytest.approx(want)


def test_an_answer_without_its_tag_is_none():
    assert tagged_answer("It is 42.") is None
    assert tagged_answer("<answer>no</answer> or\n<answer>\n42 km\n</answer>") == "\n42 km\n"


def test_advantages_are_the_trajectorys_and_the_turns_added():
    """R = 2 and 1: mean 1.5, deviation 0.7071, A = +-0.7071. Turn 1 returns, gamma 0.9: 1 + 0.9 = 1.9 and
    1, again
    +-0.7071. Turn 2 is reached by one rollout alone: its part is 0, not its raw return 1."""
    first, second = turn_advantages([[1.0, 1.0], [1.0]], [2.0, 1.0], ["p", "p"])
    assert first.tolist() == pytest.approx([2**0.5, 2**-0.5], abs=1e-5)
    assert second.tolist() == pytest.approx([-(2**0.5)], abs=1e-5)


def test_an_environment_gives_the_sum_of_its_turns_and_each_of_them():
    """Toolbox, a task of two steps: one right call, a turn of a wrong name and the right second call, the
    right answer:
    1 + (0 + 1) / 2 + 1 = 2.5."""
    env = make_env("toolbox", {"reward": "call_matching", "train_hops": [0, 1, 0], "train_tasks": 3})
    record = env.records("train")[0]
    way = reference_calls(record)
    assert len(way) == 2
    answer = says(f'It is "{record.env["answers"][0]}".')
    outcome, *_ = play(env, record, [calls(way[0]), calls(("nope", {}), way[1]), answer])
    assert outcome.turn_rewards == (1.0, 0.5, 1.0)
    assert outcome.reward == 2.5
    assert outcome.solved
    cut, *_ = play(env, record, [calls(way[0])], truncated="turn_limit")
    assert (cut.turn_rewards, cut.reward) == ((1.0,), 1.0)
    env.close()


@pytest.mark.parametrize("key", ["arguments", "parameters"])
@pytest.mark.parametrize("nested", [False, True])
def test_reference_calls_stand_under_either_key(key, nested):
    call = {"name": "f", key: '{"a": 1}' if nested else {"a": 1}}
    assert reference_calls(record([{"function": call} if nested else call])) == [("f", {"a": 1})]
    assert reference_calls(record(None)) is None


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        ("{", r"mine:1: record 'one': ground_truth: is text but not JSON"),
        (5, r"ground_truth: must be a list of calls, got int"),
        ([{"arguments": {}}], r"ground_truth\[0\]: must be a call with name and arguments"),
        ([{"name": "f", "parameters": [1]}], r"ground_truth\[0\]\.parameters: must be an object"),
        ([{"name": "h", "arguments": {}}], r"ground_truth\[0\]\.name: no tool named 'h'"),
    ],
)
def test_bad_reference_calls_name_record_and_field(truth, message):
    with pytest.raises(ValueError, match=message):
        reference_calls(record(truth))


def record(truth):
    tools = ({"type": "function", "function": {"name": "f", "description": "", "parameters": {}}},)
    prompt = ({"role": "user", "content": "q"},)
    return Record("one", prompt, tools, (), {"ground_truth": truth} if truth is not None else {}, "mine:1")
