"""FTRL scores and rewards against a calculation of the test's own, and call matching against brute force."""

import ast
import collections
import itertools
import json
from dataclasses import replace

import pytest

from pact_fast.data.records import Record, load_records
from pact_fast.envs import make_env
from pact_fast.envs.python_tools import matches
from pact_fast.envs.sandbox.sandbox import Program, SandboxCall
from tests.helpers.environments import calls, own_ftrl_file, play, says, shared_file


@pytest.fixture(scope="module", params=["own", "published"])
def env(request, tmp_path_factory):
    """Tasks of our own in the published layout, and 120 of the published ones where their file is at hand."""
    if request.param == "own":
        path = own_ftrl_file(tmp_path_factory.mktemp("ftrl"))
    else:
        path = shared_file("data/ftrl_dev.parquet")
    env = make_env("ftrl", {"test_path": str(path)})
    yield env
    env.close()


def literal_candidates(source, schema):
    """Per required argument, the literals the source compares it with, else any literal of its type."""
    compared, literals = collections.defaultdict(list), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            values = [c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and c.value is not None]
            for name in ast.walk(node):
                if isinstance(name, ast.Name):
                    compared[name.id] += values
        if isinstance(node, ast.Constant) and isinstance(node.value, (str, int, float)):
            literals.append(node.value)
    kinds = {"string": str, "integer": int, "number": (int, float), "boolean": bool}
    for name in schema.get("required", []):
        spec = schema["properties"].get(name, {})
        kind = kinds.get(spec.get("type"), object)
        found = [v for v in [*spec.get("enum", []), *compared[name]] if isinstance(v, kind)]
        if len(found) < 2:
            found += [v for v in literals if isinstance(v, kind)]
        yield name, list(dict.fromkeys([True, False] if kind is bool else found))[:14]


def look_up(env, record):
    """Calls that give answers of the unsolved set, found by trying the literals that stand in the tools'
    sources."""
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in record.tools}
    found = []
    for tool, answers in record.env["unsolved_set"].items():
        source = record.env["codes"][tool]
        choices = [
            [(name, value) for value in values] for name, values in literal_candidates(source, schemas[tool])
        ]
        tries = [dict(pairs) for pairs in itertools.islice(itertools.product(*choices), 600)]
        program = Program(f"{source}\ndef probe(arguments):\n    return str({tool}(**arguments))")
        results = env.sandbox.run([SandboxCall(program, "probe", {"arguments": a}) for a in tries])
        for answer in answers:
            hit = next(
                (
                    a
                    for a, r in zip(tries, results, strict=True)
                    if r.kind == "ok" and matches(r.value, answer)
                ),
                None,
            )
            if hit is not None:
                found.append((tool, hit))
    return found


@pytest.fixture(scope="module")
def solutions(env):
    return [(record, look_up(env, record)) for record in env.records("test")]


def independent_text(record, name, arguments):
    """What a call gives, run here in a fresh namespace."""
    namespace = {}
    try:
        exec(record.env["codes"][name], namespace)
        value = namespace[name](**arguments)
    except Exception as error:
        return f"Error when calling {name}: {error}"
    return json.dumps(value, ensure_ascii=False) if type(value) in (dict, list) else str(value)


def independent_scores(record, made):
    """Solve-P, -R, -F1 of a list of readable calls, from the formulas; and how many answers each call
    solved."""
    left = {tool: list(answers) for tool, answers in record.env["unsolved_set"].items()}
    total = sum(map(len, left.values()))
    solved_by = []
    for name, arguments in made:
        text = independent_text(record, name, arguments).lower().replace(",", "")
        fitting = [
            a for a in left.get(name, []) if all(p.lower().replace(",", "") in text for p in a.split(", "))
        ]
        solved_by.append(bool(fitting))
        if fitting:
            left[name].remove(fitting[0])
    solved, count = sum(solved_by), len(made)
    scores = {
        "solve_p": solved / count if count else 1.0,
        "solve_r": solved / total,
        "solve_f1": 2 * solved / (count + total),
    }
    return scores, solved_by


def agents(record, found):
    """Scripted agents: name -> the calls of each turn."""
    wrong = [
        t["function"]["name"] for t in record.tools if t["function"]["name"] not in record.env["unsolved_set"]
    ]
    return {
        "look-up": [[call] for call in found],
        "all in one turn": [found] if found else [],
        "no call": [],
        "wrong tool": [[(tool, {})] for tool in wrong[:2]],
        "duplicates": [[call, call] for call in found],
        "malformed JSON": [["{broken"], *([call] for call in found)],
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the data set's own sources
def test_scores_and_turn_rewards_equal_the_formulas_for_every_scripted_agent(env, solutions):
    perfect = set()
    for record, found in solutions:
        for name, turns in agents(record, found).items():
            outcome, _, rewards = play(env, record, [*(calls(*turn) for turn in turns), says("unknown")])
            readable = [[call for call in turn if not isinstance(call, str)] for turn in turns]
            expected, solved_by = independent_scores(record, [call for turn in readable for call in turn])
            assert {k: outcome.scores[k] for k in expected} == pytest.approx(expected), (record.id, name)
            assert outcome.solved == (expected["solve_r"] == 1.0)
            flags = iter(solved_by)
            for turn, reward in zip(readable, rewards, strict=False):
                newly = sum(next(flags) for _ in turn)
                assert reward == pytest.approx(2 * newly / (len(turn) + 1) if turn else -0.3), (
                    record.id,
                    name,
                )
            if name == "look-up" and outcome.scores["solve_f1"] == 1.0:
                perfect.add(record.id)
    assert len(perfect) >= len(solutions) / 4  # the agent only tries literals


def test_categories_are_the_published_kinds_of_task(env):
    found = collections.Counter(record.env["category"] for record in env.records("test"))
    assert set(found) == {"single_hop", "multi_hop", "parallel_single_hop", "parallel_multi_hop"}
    assert len(set(found.values())) == 1


def test_a_perfect_look_up_scores_one_on_every_task(env):
    """The sources are replaced by tables of the answers, so that perfect calls are known for all tasks."""
    for record in env.records("test"):
        wanted = record.env["unsolved_set"]
        tables = {tool: f"def {tool}(i):\n    return {answers!r}[i]" for tool, answers in wanted.items()}
        known = replace(record, env=record.env | {"codes": record.env["codes"] | tables})
        made = [calls((tool, {"i": i})) for tool, answers in wanted.items() for i in range(len(answers))]
        outcome, _, rewards = play(env, known, [*made, says(f"It is {record.env['answer']}.")])
        assert outcome.scores == {"solve_p": 1.0, "solve_r": 1.0, "solve_f1": 1.0, "answer": 1.0}, record.id
        assert outcome.solved
        assert rewards == [1.0] * len(rewards)


def test_malformed_calls_are_answered_and_are_no_parsed_calls(env):
    record = env.records("test")[0]
    outcome, responses, _ = play(env, record, [calls("{"), calls("{"), calls("{"), says("x")])
    assert responses[0][0].startswith("Error: the call could not be read")
    assert len(responses) == 3  # the third in a row ends the episode
    assert outcome.calls == 0
    assert outcome.failure == "bad_arguments"


def test_the_closing_turn_is_rewarded_by_the_first_rule_that_fits(env, solutions):
    record, found = next(
        (r, f) for r, f in solutions if len(f) == sum(map(len, r.env["unsolved_set"].values()))
    )
    answer, left = record.env["answer"], sum(map(len, record.env["unsolved_set"].values()))
    solving = [calls(*found)]
    cases = [
        ([says("")], -0.5),
        ([says(f"<tool_call> {answer}")], -0.3),
        ([says(f"It is {answer}.")], 1 / (1 + left)),
        ([says("nothing")], 0.0),
        ([*solving, says("nothing")], 0.5),
        ([*solving, says(f"It is {answer}.")], 1.0),
    ]
    for turns, expected in cases:
        assert play(env, record, turns)[2][-1] == pytest.approx(expected), turns[-1].content


def test_outcomes_name_the_kind_of_failure(env, solutions):
    record, found = next((r, f) for r, f in solutions if f)
    assert play(env, record, [says("x")])[0].failure == "no_call"
    assert play(env, record, [calls(("nope", {})), says("x")])[0].failure == "unknown_tool"
    assert play(env, record, [calls((found[0][0], {"zz": 1})), says("x")])[0].failure == "bad_arguments"
    assert play(env, record, [calls(("nope", {}))], truncated="turn_limit")[0].failure == "turn_limit"


def two_tool_file(tmp_path, **extra):
    row = {
        "messages": [{"role": "user", "content": "What is twice the age of Ann?"}],
        "tools": json.dumps(
            [
                {
                    "type": "function",
                    "function": {"name": n, "description": d, "parameters": {"type": "object"}},
                }
                for n, d in (("age", "Gives the age of a person. And more."), ("twice", "Doubles a number."))
            ]
        ),
        "codes": json.dumps(
            {"age": "def age(name):\n    return {'age': 21}", "twice": "def twice(x):\n    return x * 2"}
        ),
        "unsolved_set": json.dumps({"age": ["21"], "twice": ["42"]}),
        "answer": "42",
    }
    path = tmp_path / "train.jsonl"
    rows = [row | {"id": f"t{i}"} | extra for i in range(3)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


TRUTH = [{"name": "age", "arguments": {"name": "Ann"}}, {"name": "twice", "arguments": {"x": 21}}]


def test_ground_truth_calls_become_a_trace_that_was_really_run(tmp_path):
    env = make_env("ftrl", {"train_path": two_tool_file(tmp_path, ground_truth=TRUTH), "validation_tasks": 1})
    train, validation = env.records("train"), env.records("validation")
    assert len(train) == 2
    assert len(validation) == 1
    assert not {r.id for r in train} & {r.id for r in validation}
    trace = train[0].expert_trace
    assert [m["content"] for m in trace if m["role"] == "tool"] == ['{"age": 21}', "42"]
    assert "Gives the age of a person." in trace[0]["reasoning_content"]
    assert "42" in trace[-1]["content"]
    env.close()


def test_records_loaded_elsewhere_can_be_played(tmp_path):
    path = two_tool_file(tmp_path, ground_truth=json.dumps(TRUTH))
    env = make_env("ftrl", {})
    for record in load_records(path, require_trace=False).records:
        outcome, *_ = play(env, record, [calls(("age", {"name": "Ann"})), says("21")])
        assert outcome.scores["solve_f1"] == pytest.approx(2 / 3)
        assert (
            play(env, record, [says("21")])[0].scores["solve_r"] == 0.0
        )  # a second time, from the same record
    env.close()


@pytest.mark.parametrize("name", ["ftrl", "python"])
@pytest.mark.parametrize("reward", ["call_matching", "call_matching_greedy"])
def test_call_matching_rewards_turns_and_uses_each_truth_once(tmp_path, reward, name):
    """1, then (0 + 1) / 2 as the first call is there a second time, then the answer: 1 + 0.5 + 1 = 2.5."""
    path = two_tool_file(tmp_path, ground_truth=json.dumps(TRUTH))
    env = make_env(name, {"train_path": path, "validation_tasks": 1, "reward": reward})
    record = env.records("train")[0]
    assert "<answer>" in record.prompt[-1]["content"]
    right = [("age", {"name": "Ann"}), ("twice", {"x": 21})]
    turns = [calls(right[0]), calls(right[0], right[1])]
    outcome, *_ = play(env, record, [*turns, says("<answer>42</answer>")])
    assert outcome.turn_rewards == pytest.approx((1.0, 0.5, 1.0))
    assert outcome.reward == pytest.approx(2.5)
    assert outcome.scores["call_match"] == pytest.approx(2 * 2 / (3 + 2))
    untagged, *_ = play(env, record, [*turns, says("It is 42.")])
    assert untagged.turn_rewards == pytest.approx((1.0, 0.5, 0.0))
    env.close()


def test_an_expert_trace_made_for_call_matching_tags_its_answer(tmp_path):
    path = two_tool_file(tmp_path, ground_truth=TRUTH)
    env = make_env("ftrl", {"train_path": path, "validation_tasks": 1, "reward": "call_matching"})
    assert env.records("train")[0].expert_trace[-1]["content"] == "<answer>42</answer>"
    env.close()


def test_what_a_file_lacks_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"train\.jsonl:1.*'t0'.*ground_truth: is missing"):
        make_env("ftrl", {"train_path": two_tool_file(tmp_path), "reward": "call_matching"}).records("train")
    with pytest.raises(ValueError, match=r"codes: no source for tool 'age'"):
        make_env("ftrl", {"train_path": two_tool_file(tmp_path, codes="{}")}).records("train")
    with pytest.raises(ValueError, match="validation_tasks: 32 of 3"):
        make_env("ftrl", {"train_path": two_tool_file(tmp_path)}).records("train")
    with pytest.raises(ValueError, match="test_path: is not set"):
        make_env("ftrl", {}).records("test")


def test_python_env_weighs_the_answer_and_the_sub_answers(tmp_path):
    env = make_env(
        "python", {"train_path": two_tool_file(tmp_path), "validation_tasks": 1, "answer_weight": 0.5}
    )
    record = env.records("train")[0]
    right = [calls(("age", {"name": "Ann"})), calls(("twice", {"x": 21}))]
    assert play(env, record, [*right, says("42")])[0].reward == pytest.approx(1.0)
    assert play(env, record, [*right, says("no")])[0].reward == pytest.approx(0.5)
    assert play(env, record, [says("42")])[0].reward == pytest.approx(0.5)
    cut = play(env, record, right, truncated="turn_limit")[0]
    assert (cut.solved, cut.failure) == (False, "turn_limit")
    env.close()
    bare = Record("x", ({"role": "user", "content": "q"},), (), (), {"codes": {}, "answer": "a"}, "mine:1")
    assert env._prepare(bare).env["unsolved_set"] is None
