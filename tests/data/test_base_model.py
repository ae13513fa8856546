"""The shipped base model, its tokenizer and the recipe that makes both."""

import itertools
import json
from collections import defaultdict
from contextlib import closing

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from pact_fast.data.chat import ChatFormat, Component
from pact_fast.envs.base import make_env
from pact_fast.envs.toolbox import base_records
from pact_fast.envs.toolbox.base_model import base_model_path
from pact_fast.envs.toolbox.base_model.induction import write_induction_circuit
from pact_fast.envs.toolbox.base_model.recipe import (
    Recipe,
    batch_loss,
    batches,
    conversation,
    make_base,
    model_config,
)
from pact_fast.rollout import InProcessEngine, RolloutLimits, collect_rollouts


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(base_model_path())


@pytest.fixture(scope="module")
def chat(tokenizer):
    return ChatFormat.for_tokenizer(tokenizer)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(base_model_path(), dtype=torch.float32).eval()


def test_shipped_files_stay_below_two_megabytes():
    assert sum(path.stat().st_size for path in base_model_path().iterdir()) < 2_000_000


def test_model_loads_as_qwen3_with_every_token_of_the_tokenizer(model, tokenizer):
    assert model.config.model_type == "qwen3"
    assert model.config.vocab_size == len(tokenizer)
    assert 200_000 < sum(p.numel() for p in model.parameters()) < 800_000


def test_tokenizer_gives_a_name_the_same_two_tokens_everywhere(tokenizer):
    world = base_records(3, seed=5)[0].env["world"]
    for name in world["person"]:
        first, second = tokenizer(name, add_special_tokens=False)["input_ids"]
        for text in (
            f'Find "{name}".',
            f'{{"name": "{name}", "x": 1}}',
            f'"{name}"',
            f'("{name}", "{name}")',
        ):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            pairs = list(itertools.pairwise(ids))
            assert pairs.count((first, second)) == text.count(name)


def test_tokenizer_keeps_any_text(tokenizer):
    text = 'Ünïcode, tabs\tand  blanks;\r\n\n{"a": [1, -2.5e3]} <not a tag> 2026-11-22 日本'
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("difficulty", [1, 3])
def test_toolbox_conversations_decode_to_the_template_and_stay_short(chat, difficulty):
    env = make_env("toolbox", {"difficulty": difficulty})
    records = env.records("train")
    env.close()
    for record in records[:20]:
        prompt, trace = chat.prompt(record.prompt, record.tools), chat.trace(record.expert_trace)
        text = chat.tokenizer.apply_chat_template(
            [*record.prompt, *record.expert_trace], tools=list(record.tools), tokenize=False
        )
        assert chat.decode((prompt + trace).ids) + "\n" == text
        assert len(prompt) <= 350
        assert len(trace) <= 600
        calls = sum(len(m.get("tool_calls", ())) for m in record.expert_trace)
        inside = [i for i, c in zip(trace.ids, trace.components, strict=True) if c == Component.TOOL_CALL]
        assert chat.decode(inside).count('"arguments": ') == calls


def test_model_copies_a_name_into_its_call(model, chat):
    """Greedy on spelled-out steps: the format and the copied name are what the base is for."""
    records = [r for r in base_records(200, seed=77) if r.env["kind"] == "procedure"][:12]
    assert len(records) == 12
    copied = 0
    for record in records:
        prompt = torch.tensor([chat.prompt(record.prompt, record.tools).ids])
        out = model.generate(
            prompt, max_new_tokens=64, do_sample=False, eos_token_id=list(chat.stop_token_ids), pad_token_id=0
        )
        turn = chat.parse(out[0, prompt.shape[1] :].tolist(), complete=True)
        wanted = record.expert_trace[0]["tool_calls"][0]
        copied += [(c.name, c.arguments) for c in turn.tool_calls] == [(wanted["name"], wanted["arguments"])]
    assert copied >= 11, f"{copied} of {len(records)}"


def test_batch_loss_with_a_shared_beginning_equals_one_row_at_a_time(model, chat):
    rows = [conversation(chat, record) for record in base_records(5, seed=3)]
    total = count = 0.0
    for row in rows:
        wanted = torch.tensor([c in (1, 2, 3, 5, 6) for c in row.components[1:]])
        logits = model(torch.tensor([row.ids])).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(row.ids[1:]), reduction="none")
        total, count = total + losses[wanted].sum(), count + wanted.sum()
    torch.testing.assert_close(batch_loss(model, rows), total / count, rtol=1e-4, atol=1e-5)


def test_a_shown_reference_is_another_trace_of_the_same_task(chat):
    """Text to go by, not text to repeat: a base that parrots it would score every other way as unlikely."""
    records = [r for r in base_records(600, seed=4) if r.env["reference"]]
    assert 50 < len(records) < 130
    assert sum(list(r.expert_trace) != r.env["reference"] for r in records) > len(records) / 2
    record = records[0]
    assert chat.render_trace(record.env["reference"]) in chat.decode(conversation(chat, record).ids)


def test_the_base_is_shown_no_question_of_several_steps_worked_off():
    records = base_records(600, seed=4)
    assert {"chain", "hasty"} <= {record.env["kind"] for record in records}
    for record in records:
        calls = sum(len(m.get("tool_calls", ())) for m in record.expert_trace)
        if record.env["kind"] == "chain" and record.env["reference"] is None:
            assert record.env["hops"] == 1
        elif record.env["kind"] == "hasty":
            assert record.env["hops"] > 1 == calls


def test_the_base_can_do_the_parts_and_stops_after_the_first_step(chat, model):
    """Greedy, as in docs/base.csv: steps named, steps spelled out, a reference to go by, one step alone."""
    records = base_records(300, seed=77)
    shown = [chat.render_trace(r.env["reference"]) if r.env["reference"] else None for r in records]
    prompts = [chat.prompt(r.prompt, r.tools, privileged=s) for r, s in zip(records, shown, strict=True)]
    limits = RolloutLimits(max_turns=6, max_completion_length=384, max_turn_length=64)
    with closing(make_env("toolbox", {})) as env:
        rollouts = collect_rollouts(
            InProcessEngine(model),
            env,
            chat,
            records,
            num_generations=1,
            limits=limits,
            prompts=prompts,
            temperature=0,
        )
    solved = defaultdict(list)
    for rollout in rollouts:
        kind = "reference" if rollout.record.env["reference"] else rollout.record.env["kind"]
        solved[kind].append(rollout.outcome.solved)
    share = {kind: sum(values) / len(values) for kind, values in solved.items()}
    assert share["plan"] > 0.7
    assert share["procedure"] > 0.9
    assert share["reference"] > 0.7
    assert share["hasty"] > 0.9


def test_induction_circuit_copies_before_any_training(chat):
    """A name seen once: given its first syllable again, the second stands out among all tokens."""
    torch.manual_seed(0)
    untrained = Qwen3ForCausalLM(model_config(Recipe(), chat.tokenizer)).eval()
    world = base_records(1, seed=9)[0].env["world"]
    names = [*world["person"], *world["place"]]
    text = "The names are " + " and ".join(f'"{name}"' for name in names) + ". "

    def ranks():
        found = []
        for name in names:
            first, second = chat.tokenizer(name, add_special_tokens=False)["input_ids"]
            ids = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
            logits = untrained(torch.tensor([[*ids, first]])).logits[0, -1]
            found.append(int((logits > logits[second]).sum()))
        return sorted(found)

    at_random = ranks()
    write_induction_circuit(untrained)
    assert ranks()[len(names) // 2] < 30 < at_random[len(names) // 2]


def test_batches_pass_over_every_row_once(chat):
    recipe = Recipe(batch_rows=4)
    rows = [conversation(chat, record) for record in base_records(22, seed=3)]
    seen = [id(row) for batch in batches(rows, recipe) for row in batch]
    assert sorted(seen) == sorted(id(row) for row in rows)


def test_recipe_is_repeatable_and_writes_a_loadable_model(tmp_path):
    recipe = Recipe(steps=2, batch_rows=4, layers=2, heads=1, kv_heads=1, intermediate=16)
    for name in ("one", "two"):
        make_base(recipe, tmp_path / name)
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "two"))
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert json.loads((tmp_path / "one/tokenizer.json").read_text()) == json.loads(
        (base_model_path() / "tokenizer.json").read_text()
    )
