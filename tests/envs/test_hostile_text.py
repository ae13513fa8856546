"""From a model's text to the tokens of the tools' answer: whatever either writes, a rollout ends, and only
it.

The whole path is the real one: tokenizer, loop, parser, sandbox, chat format. The model alone is replaced, by
texts: those of hostile_turns.json, where every text that ever broke something is kept, and what hypothesis
finds.
"""

import json
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pact_fast.data.chat import ChatFormat
from pact_fast.data.formats import HERMES, LLAMA
from pact_fast.data.parsing import parse_turn
from pact_fast.data.reading import MAX_DEPTH, check_bounds, clean_value, read_json
from pact_fast.data.records import Record
from pact_fast.envs.base import FAILURE_KINDS, make_env
from pact_fast.envs.toolbox.base_model import base_model_path
from pact_fast.rollout import RolloutLimits
from pact_fast.rollout.engine import Generation
from pact_fast.rollout.loop import collect_rollouts

CORPUS = {
    name: "".join(text * count for text, count in parts)
    for name, parts in json.loads(Path(__file__).with_name("hostile_turns.json").read_text()).items()
}
ECHO = "def echo(**arguments):\n    return arguments"
WILD = """
def wild(what):
    import json
    if what == "deep":
        json.dumps = lambda value, **_: "[" * 300_000
    if what == "number":
        json.dumps = lambda value, **_: "9" * 5000
    if what == "str":
        global str
        str = lambda value: 5
        return None
    if what == "raise":
        raise ValueError("\\ud800")
    texts = {"half": "\\ud83d", "special": "<|im_end|><|im_start|>user", "long": "x y" * 300_000}
    return texts.get(what, [1])
"""
SOURCES = {"echo": ECHO, "wild": WILD}


def record(name, number=0):
    schemas = tuple(
        {"type": "function", "function": {"name": tool, "description": "", "parameters": {"type": "object"}}}
        for tool in SOURCES
    )
    env = {"codes": dict(SOURCES), "answer": "none", "unsolved_set": {"echo": ["none"]}}
    prompt = ({"role": "user", "content": "Call a tool."},)
    return Record(f"{name}/{number}", prompt, schemas, (), env, "hostile")


class Writer:
    """The engine's side of the loop, for texts: row i writes texts[i] in every turn."""

    def __init__(self, texts):
        self.ids = texts

    def prepare(self):
        pass

    def reset(self):
        pass

    def generate(self, prompts, *, max_new_tokens, sessions, **_):
        return [Generation(self.ids[i], [0.0] * len(self.ids[i]), "stop") for i in sessions]


@pytest.fixture(scope="module")
def chat():
    return ChatFormat.for_tokenizer(AutoTokenizer.from_pretrained(base_model_path()), "auto")


@pytest.fixture(scope="module")
def env():
    env = make_env("python", {"workers": 1, "time_limit": 10.0})
    yield env
    env.close()


def play(chat, env, texts, turns=2):
    stop = next(iter(chat.stop_token_ids))
    ids = [[*chat.tokenizer(t, add_special_tokens=False).input_ids, stop] for t in texts]
    records = [record("hostile", i) for i in range(len(texts))]
    limits = RolloutLimits(max_turns=turns, max_completion_length=10**8, max_turn_length=10**8)
    return collect_rollouts(Writer(ids), env, chat, records, num_generations=1, limits=limits)


@pytest.mark.timeout(240)
def test_the_saved_corpus_ends_no_run_and_each_text_alone(chat, env):
    started = time.monotonic()
    rollouts = play(chat, env, list(CORPUS.values()))
    for name, rollout in zip(CORPUS, rollouts, strict=True):
        assert rollout.outcome.failure in FAILURE_KINDS, name
        # The parser and the sandbox deal with every one of these: the last resort of the loop is not needed.
        assert rollout.outcome.failure != "unreadable", name
        json.dumps([rollout.record.id, rollout.token_ids]).encode()
        chat.decode(rollout.token_ids).encode()
    assert time.monotonic() - started < 120


@pytest.mark.parametrize("syntax", [HERMES, LLAMA], ids=["hermes", "llama"])
@pytest.mark.parametrize("name", CORPUS)
def test_the_parser_reads_every_text_of_the_corpus_quickly(name, syntax):
    for text in (CORPUS[name], CORPUS[name].replace("<tool_call>", "").replace("</tool_call>", "")):
        started = time.process_time()
        check(parse_turn(text, syntax, complete=True))
        assert time.process_time() - started < 3


def check(turn):
    for call in turn.tool_calls:
        assert (call.arguments is None) == (call.error is not None)
        call.name.encode()
        if call.arguments is not None:
            check_bounds(call.arguments)
            assert all(type(key) is str for key in call.arguments)
            json.dumps(call.arguments, ensure_ascii=False).encode()


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(10**4290, 10**4310)
    | st.floats()
    | st.text(st.characters(), max_size=8)
    | st.sampled_from(["\ud800", "\udc80", "<|im_end|>", "</tool_call>", "\x00", "'", '"', "\\u", "\\ud8"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def written(value, style):
    """As JSON, or as the Python literal that models write instead."""
    try:
        return json.dumps(value) if style == "json" else repr(value)
    except ValueError:  # digits past what Python writes
        return "9" * 4400


@st.composite
def hostile_texts(draw):
    name = draw(st.sampled_from(["echo", "wild", "", "render_result", "\\ud800", "e'\"cho"]))
    value = draw(values)
    body = written(value, draw(st.sampled_from(["json", "python"])))
    key = draw(st.sampled_from(["arguments", "parameters", "x"]))
    if draw(st.booleans()):
        body = written({"what": "x", "x": body}, "json")
    call = draw(
        st.sampled_from(
            [
                f'{{"name": "{name}", "{key}": {body}}}',
                f"{{'name': '{name}', '{key}': {body}}}",
                f'{{"function": {{"name": "{name}", "{key}": {body}}}}}',
                f'[{{"name": "{name}", "{key}": {body}}}, {body}]',
                body,
            ]
        )
    )
    cut = draw(st.integers(0, len(call)))
    call = draw(
        st.sampled_from([call, call[:cut], call + call[cut:], "[" * draw(st.integers(0, 120)) + call])
    )
    return draw(
        st.sampled_from(
            [
                f"<tool_call>\n{call}\n</tool_call>",
                f"<tool_call>{call}",
                f"<think>{call}",
                call,
                f"```\n{call}\n```",
            ]
        )
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(hostile_texts() | st.text())
def test_no_text_breaks_the_parser(text):
    for syntax in (HERMES, LLAMA):
        for complete in (True, False):
            check(parse_turn(text.encode(errors="replace").decode(), syntax, complete=complete))


@pytest.mark.timeout(240)
@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(texts=st.lists(hostile_texts(), min_size=6, max_size=6))
def test_no_text_breaks_the_path_from_model_to_tokens(chat, env, texts):
    rollouts = play(chat, env, [text.encode(errors="replace").decode() for text in texts], turns=1)
    assert all(r.outcome.failure in FAILURE_KINDS and r.outcome.failure != "unreadable" for r in rollouts)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(values)
def test_what_is_read_is_what_was_written_less_halves(value):
    try:
        text = json.dumps(value)
    except ValueError:
        return
    try:
        found = clean_value(read_json(text))
    except ValueError:
        return
    json.dumps(found, ensure_ascii=False).encode()
    halves = any(0xD800 <= ord(c) <= 0xDFFF for c in json.dumps(value, ensure_ascii=False))
    assert halves or repr(found) == repr(json.loads(text))


def test_depth_is_counted_outside_of_strings():
    read_json(json.dumps(["[" * 1000]))
    read_json("[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1))
    with pytest.raises(ValueError, match="too deep"):
        read_json("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2))


@pytest.mark.parametrize("where", ["parse", "tool_results"])
def test_an_exception_in_the_loop_ends_one_rollout_and_is_counted(chat, env, monkeypatch, where):
    good = '<tool_call>{"name": "echo", "arguments": {"x": 1}}</tool_call>'
    bad = '<tool_call>{"name": "echo", "arguments": {"x": "broken"}}</tool_call>'
    real = getattr(ChatFormat, where)

    def failing(self, given, *rest, **options):
        text = self.decode(given) if where == "parse" else str(given)
        if "broken" in text:
            raise KeyError("broken")
        return real(self, given, *rest, **options)

    monkeypatch.setattr(ChatFormat, where, failing)
    rollouts = play(chat, env, [good, bad, good])
    assert [r.outcome.failure == "unreadable" for r in rollouts] == [False, True, False]
    assert [len(r.turn_rewards) for r in rollouts] == [2, 1, 2]


def test_an_exception_in_an_environment_ends_one_rollout_and_is_counted(chat, env, monkeypatch):
    real = type(env)._solve

    def failing(self, episode, tool, text):
        if "broken" in text:
            raise KeyError("broken")
        return real(self, episode, tool, text)

    monkeypatch.setattr(type(env), "_solve", failing)
    call = '<tool_call>{{"name": "echo", "arguments": {{"x": "{}"}}}}</tool_call>'
    texts = [call.format(x) for x in ("fine", "broken", "fine")]
    rollouts = play(chat, env, texts)
    assert [r.outcome.failure == "unreadable" for r in rollouts] == [False, True, False]
    assert all("fine" in chat.decode(rollouts[i].token_ids[60:]) for i in (0, 2))
