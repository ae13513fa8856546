"""pact-fast chat on the bundled model, its input from a pipe: messages, tasks, and the tools that answer."""

import io
import re

import pytest
from rich.console import Console

from pact_fast.cli import main
from pact_fast.commands.chat import Conversation
from pact_fast.data.chat import ChatFormat, Component
from pact_fast.data.colours import LOOKS
from pact_fast.envs.base import make_env
from pact_fast.evaluation.evaluate import transcript
from pact_fast.rollout import RolloutLimits, collect_rollouts, local_engine
from pact_fast.train.build import device_of, load_pretrained


@pytest.fixture(scope="module")
def parts():
    model, tokenizer = load_pretrained("toolbox-base", "float32")
    env = make_env("toolbox", {})
    yield local_engine(model, device_of("cpu")), env, ChatFormat.for_tokenizer(tokenizer)
    env.close()


def talk(parts, **limits):
    out = io.StringIO()
    console = Console(file=out, highlight=False, soft_wrap=True, force_terminal=limits.pop("colours", False))
    context = limits.pop("context", 2048)
    limits = RolloutLimits(limits.pop("turns", 10), context, limits.pop("length", 128), context)
    return Conversation(*parts, limits, console, temperature=0.0, seed=0), out


def test_messages_tasks_and_commands_from_a_pipe(monkeypatch, capsys):
    lines = [
        "What is the weather?",
        "",
        "/what",
        "/tools",
        "/task 1",
        "/task x",
        "/task 200",
        "/quit",
        "never",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert main(["chat", "toolbox-base", "--threads", "1"]) == 0
    shown = capsys.readouterr().out
    assert "200 tasks; tools: " in shown
    assert "no command /what" in shown
    assert 'tool: {"name": ' in shown
    assert len(re.findall("takes a number from 0 to 199", shown)) == 2
    before, _, after = shown.partition("user: ")
    assert "reasoning: " in before  # the answer to the message
    for piece in ("tool_call: {", "tool_response: ", "answer: ", "; reward "):
        assert piece in after


def test_a_task_is_played_and_scored_as_in_an_evaluation(parts):
    _, env, chat = parts
    record = env.records("test")[0]
    conversation, out = talk(parts)
    conversation.solve(record)
    (rollout,) = collect_rollouts(
        *parts, [record], num_generations=1, limits=RolloutLimits(10, 512, 128), temperature=0.0
    )
    assert conversation.ids == rollout.prompt.ids + rollout.token_ids
    shown = out.getvalue()
    for piece in transcript(rollout, chat):
        if piece["component"] in ("reasoning", "tool_call", "answer"):
            assert f"{piece['component']}: {piece['text']}" in shown
    assert f"reward {rollout.outcome.reward:.3f}, calls {rollout.outcome.calls}" in shown


def test_a_message_after_a_cut_turn_follows_a_closed_one(parts):
    _, env, chat = parts
    conversation, out = talk(parts, length=5)
    conversation.begin(env.records("test")[0])
    conversation.say("Hello?")
    assert "cut off after 5 tokens" in out.getvalue()
    closed = len(conversation.ids)
    assert conversation.ids[-1] in chat.stop_token_ids
    conversation.say("And now?")
    assert "And now?" in chat.decode(conversation.ids[closed:])
    conversation.undo()
    assert len(conversation.ids) == closed


def test_limits_of_turns_and_context_are_told(parts):
    record = parts[1].records("test")[0]
    conversation, out = talk(parts, turns=1)
    conversation.solve(record)
    assert "cut off after 1 turns" in out.getvalue()
    assert "not solved: turn_limit" in out.getvalue()
    conversation, out = talk(parts, context=20)
    conversation.solve(record)
    assert "the context of 20 tokens is full" in out.getvalue()
    assert "not solved: length_limit" in out.getvalue()


def test_every_piece_has_the_colour_of_its_component(parts):
    conversation, out = talk(parts, colours=True)
    for component, look in LOOKS.items():
        conversation.show(component, "x")
        own = io.StringIO()
        Console(file=own, force_terminal=True).print("x", style=f"not bold {look.terminal}")
        assert own.getvalue().strip() in out.getvalue(), Component(component)
        out.seek(0)
        out.truncate()


def test_a_task_that_is_not_there_is_an_error_before_the_model_loads(capsys):
    assert main(["chat", "/no/model", "--task", "200"]) == 2
    assert "--task 200: the split has 200 tasks" in capsys.readouterr().err
