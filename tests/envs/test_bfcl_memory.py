"""BFCL's key-value memory: the official answer rule and class, and the way from conversation to question."""

import json

import pytest

from pact_fast.envs import make_env
from pact_fast.envs.bfcl.memory import ENTRIES, ENTRY_LENGTH, SCENARIOS
from pact_fast.envs.replay import replay_traces
from tests.helpers.environments import calls, play, says

pytest.importorskip("bfcl_eval", reason="pip install --no-deps bfcl-eval==2026.3.23 mpmath")


@pytest.fixture(scope="module")
def verbatim():
    settings = {"memory": "verbatim", "train_scenarios": list(SCENARIOS), "workers": 1}
    env = make_env("bfcl_memory", settings | {"validation_scenarios": [], "test_scenarios": []})
    yield env
    env.close()


def test_every_question_is_there_and_its_expert_trace_answers_it_by_the_official_rule(verbatim):
    records = verbatim.records("train")
    assert len(records) == len({r.id for r in records}) == 155
    replays = replay_traces(verbatim, records)
    assert all(replay.outcome.solved for replay in replays)
    assert not any(replay.differences for replay in replays)
    held = 0
    for record in records:
        archival = record.env["memory"]["archival"]
        assert len(archival) <= ENTRIES
        assert max(map(len, archival.values())) <= ENTRY_LENGTH
        key = record.expert_trace[2]["tool_calls"][0]["arguments"]["key"]
        held += any(answer.lower() in archival[key].lower() for answer in record.env["answers"])
    assert held > 100, held  # others are told in other words than the answers (eight o'clock, not 08:00 AM)


def test_answers_are_judged_by_the_last_message_as_the_package_judges_them(verbatim):
    from bfcl_eval.eval_checker.agentic_eval.agentic_checker import agentic_checker

    said = ["nothing", "{0}", "It is {0}.", "x{0}x", "*{0}*", "{{'answer': '{0}'}}"]
    for record in verbatim.records("train")[::5]:
        for text in said:
            text = text.format(record.env["answers"][-1])
            outcome, *_ = play(verbatim, record, [calls(("core_memory_list_keys", {})), says(text)])
            assert outcome.solved == agentic_checker(text, record.env["answers"])["valid"], (record.id, text)
            assert outcome.reward == outcome.scores["accuracy"] == float(outcome.solved)
    cut, *_ = play(verbatim, record, [calls(("core_memory_list_keys", {}))], truncated="turn_limit")
    assert (cut.solved, cut.failure) == (False, "turn_limit")
    assert play(verbatim, record, [says("?")])[0].failure == "no_call"


def test_calls_answer_as_the_packages_own_class_does(verbatim):
    """The real class, imported here as the worker imports it, made the same calls."""
    from pact_fast.envs.bfcl import worker as bfcl_worker

    record = verbatim.records("train")[0]
    made = [
        ("core_memory_add", {"key": "first_name", "value": "Ann"}),
        ("core_memory_add", {"key": "Not A Key", "value": "x"}),
        ("core_memory_replace", {"key": "first_name", "value": "v" * 301}),
        ("archival_memory_key_search", {"query": "orders and delivery", "k": 3}),
        ("archival_memory_remove", {"key": "none_such"}),
        ("core_memory_retrieve_all", {}),
        ("core_memory_key_search", {"query": "name", "wrong": 1}),
    ]
    direct = bfcl_worker.memory_backend(record.env["memory"])
    expected = [bfcl_worker.execute(bfcl_worker.methods({"kv": direct}), (n, [], a)) for n, a in made]
    outcome, responses, _ = play(verbatim, record, [calls(*made[:4]), calls(*made[4:]), says("Ann")])
    assert [*responses[0], *responses[1]] == [text for _, text in expected]
    assert json.loads(responses[1][1]) == {"first_name": "Ann"}
    assert len(json.loads(responses[0][3])["ranked_results"]) == 3
    assert outcome.calls == 7
    _, responses, _ = play(verbatim, record, [calls(("core_memory_retrieve_all", {})), says("x")])
    assert responses[0] == ("{}",)  # episodes share nothing
    unknown = [calls(("nope", {}))] * 3
    assert play(verbatim, record, unknown)[0].failure == "unknown_tool"


def test_the_model_fills_its_memory_in_conversations_and_is_then_asked(tmp_path):
    """As published: each conversation starts from what the one before left, the questions from the last."""
    settings = {"scenarios": ["notetaker", "healthcare"], "workers": 1}
    env = make_env("bfcl_memory", settings)
    with pytest.raises(ValueError, match="0 of notetaker were held"):
        env.records("test")
    with pytest.raises(ValueError, match="test tasks only"):
        env.records("train")

    def hold(record):
        letter = "abcde"[int(record.id[-1])]
        turns = []
        for i in range(len(record.env["requests"])):
            turns += [calls(("core_memory_add", {"key": f"{letter}_{i}", "value": "v"})), says("noted")]
        return play(env, record, turns)

    waves = []
    for wave in env.preparations(tmp_path):
        waves.append([record.id for record in wave])
        for record in wave:
            assert record.prompt[0]["role"] == "system"
            told = record.prompt[0]["content"]
            assert ("There is no content in the core memory" in told) == (len(waves) == 1)
            hold(record)
        if len(waves) == 2:
            break  # interrupted after the second wave was held, before it was saved
    assert waves[0][0] == "memory_kv_prereq_32-notetaker-0"
    assert json.loads((tmp_path / "memory.json").read_text())["notetaker"]["conversations"] == 1
    env.close()

    env = make_env("bfcl_memory", settings)
    rest = []
    for wave in env.preparations(tmp_path):
        rest.append([record.id for record in wave])
        for record in wave:
            hold(record)
    assert rest[0] == waves[1]  # what was not saved is held again
    assert len(rest) == 4
    records = env.records("test")
    assert [len([r for r in records if r.env["category"] == name]) for name in settings["scenarios"]] == [
        25,
        25,
    ]
    saved = json.loads((tmp_path / "memory.json").read_text())
    assert len(saved["notetaker"]["core"]) == 7  # the backend's limit: later entries were refused
    assert all(f'"{key}"' in records[0].prompt[0]["content"] for key in saved["notetaker"]["core"])
    assert list(env.preparations(tmp_path)) == []
    env.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory": "vector"}, "one of model, verbatim"),
        ({"scenarios": ["custmer"]}, "one of customer"),
        ({"train_scenarios": ["healthcare"]}, "stands in two splits"),
    ],
)
def test_settings_that_cannot_be_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        make_env("bfcl_memory", settings)
