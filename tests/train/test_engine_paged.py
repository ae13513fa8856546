"""Decoding against pages, the GPU's form: on a CPU the same steps run through the kernels' references."""

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from pact_fast.envs.toolbox.base_model import base_model_path
from pact_fast.kernels.decode import ops
from pact_fast.rollout import InProcessEngine, RolloutError
from pact_fast.rollout.in_process.paged import bucket_of, segments_of
from tests.helpers.generation import generate, logprobs_of
from tests.train.test_engine import SHAPE

WIDE = SHAPE | {"initializer_range": 0.4, "pad_token_id": 0}
LAYERS = ["sliding_attention", "full_attention"]
FAMILIES = {
    "llama": LlamaConfig(**WIDE, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**WIDE),
    "qwen3": Qwen3Config(**WIDE, tie_word_embeddings=True),
    "mistral": MistralConfig(**WIDE, sliding_window=8),
    "gemma3": Gemma3TextConfig(**WIDE, sliding_window=8, layer_types=LAYERS, final_logit_softcapping=5.0),
    "olmo2": Olmo2Config(**WIDE),
    "phi3": Phi3Config(**WIDE, sliding_window=None, rope_parameters={
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
    "granite": GraniteConfig(**WIDE, residual_multiplier=0.7, logits_scaling=3.0, embedding_multiplier=2.0,
                             attention_multiplier=0.3),
    "smollm3": SmolLM3Config(**WIDE, no_rope_layers=[1, 0]),
    "qwen3_moe": Qwen3MoeConfig(**WIDE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24),
}  # fmt: skip


def model_of(name, dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES[name], dtype=dtype).eval()


PROMPTS = [[7 + i % 40 for i in range(36)] + [9 + i // 3] * 3 for i in range(6)] + [[8, 9], [30] * 20]


@pytest.mark.parametrize("paged", [False, True], ids=["dense", "paged"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_its_models_logprobs_over_turns(name, paged):
    model = model_of(name)
    engine = InProcessEngine(model, paged=paged)
    contexts = [list(p) for p in PROMPTS]
    for turn in range(2):
        out = generate(engine, contexts, [5 + i for i in range(8)], sessions=range(8), seed=turn, stops=())
        for i, row in enumerate(out):
            assert row.logprobs == pytest.approx(logprobs_of(model, contexts[i], row.token_ids), abs=1e-4)
            contexts[i] += [*row.token_ids, 11, 12, 13]


def test_greedy_tokens_are_generates_own():
    model = model_of("qwen3")
    for paged in (False, True):
        out = generate(InProcessEngine(model, paged=paged), PROMPTS, [20] * 8, temperature=0.0, stops=())
        for prompt, row in zip(PROMPTS, out, strict=True):
            want = model.generate(
                torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            assert row.token_ids == want[0, len(prompt) :].tolist()


def test_dense_and_paged_draw_the_same_tokens():
    model = model_of("qwen3", torch.float64)
    draws = [
        [g.token_ids for g in generate(InProcessEngine(model, paged=paged), PROMPTS, [30] * 8, seed=3)]
        for paged in (False, True)
    ]
    assert draws[0] == draws[1]


def test_half_precision_stays_within_its_bound():
    """bf16 against the same weights in bf16 through transformers: both round every activation, to 2^-8 of
    itself. 0.25 is twice what these shapes show; weights of this spread make logits of about 10."""
    model = model_of("qwen3", torch.bfloat16)
    out = generate(InProcessEngine(model), PROMPTS, [20] * 8, stops=())
    gaps = []
    for prompt, row in zip(PROMPTS, out, strict=True):
        want = logprobs_of(model, prompt, row.token_ids)
        gaps += [abs(a - b) for a, b in zip(row.logprobs, want, strict=True)]
    assert max(gaps) < 0.25
    assert sum(gaps) / len(gaps) < 0.03


class Launches(TorchDispatchMode):
    """Every operation of a step: its name, what its tensors look like, and where the fixed ones lie."""

    def __init__(self, slate):
        super().__init__()
        fixed = {k: t for k, t in vars(slate).items() if isinstance(t, torch.Tensor) and k != "slots"}
        self.fixed = {t.data_ptr() for t in fixed.values()}
        self.list, self.running = [], False

    def __enter__(self):
        self.running = True
        return super().__enter__()

    def __exit__(self, *error):
        self.running = False
        return super().__exit__(*error)

    def add(self, name, args):
        flat = [a for a in args if isinstance(a, torch.Tensor)]
        at = [t.data_ptr() if t.data_ptr() in self.fixed else None for t in flat]
        self.list.append((name, [(tuple(t.shape), t.stride(), t.dtype) for t in flat], at))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.add(str(func), [*args, *(kwargs or {}).values()])
        return func(*args, **(kwargs or {}))


def test_steps_launch_the_same_list_over_the_same_buffers(monkeypatch):
    """What a graph needs: nothing of a step may depend on values that the host knows, or move."""
    engine = InProcessEngine(model_of("qwen3"), paged=True)
    seen = []

    def record(slate):
        seen.append((slate, Launches(slate)))
        return seen[-1][1]

    def one_launch(name, function):  # a kernel: what its reference does inside is its own affair
        def call(*args, **kwargs):
            if not seen or not seen[-1][1].running:
                return function(*args, **kwargs)
            seen[-1][1].add(name, [*args, *kwargs.values()])
            with torch.utils._python_dispatch._disable_current_modes():
                return function(*args, **kwargs)

        return call

    for name in ops.__all__:
        monkeypatch.setattr(ops, name, one_launch(name, getattr(ops, name)))
    engine.prepare()
    engine.scheduler.slates.record = record
    generate(engine, PROMPTS, [9, 4, 9, 9, 9, 9, 9, 9], stops=())
    slates = {id(slate) for slate, _ in seen}
    assert len(slates) == 1
    assert len(seen) >= 8
    for _, launches in seen:
        assert launches.list == seen[0][1].list
    assert sum(name in ops.__all__ for name, _, _ in seen[0][1].list) == 2 * 2 + 1  # of two layers
    assert any(any(at) for _, _, at in seen[0][1].list)
    again = len(seen)
    generate(engine, [p[:-1] for p in PROMPTS], [6] * 8, stops=())  # other rows, another trie, the same slate
    assert {id(slate) for slate, _ in seen} == slates
    assert all(launches.list == seen[0][1].list for _, launches in seen[again:])


def test_a_step_that_cannot_be_launched_says_what_to_do():
    engine = InProcessEngine(model_of("qwen3"), paged=True)
    engine.prepare()

    def broken(slate):
        raise RuntimeError("ptxas died")

    engine.scheduler.slates.record = broken
    with pytest.raises(RolloutError, match=r"ptxas died.*rollout.cuda_graphs=false"):
        generate(engine, PROMPTS, [4] * 8)
    assert engine.scheduler.table.held == 0
    assert not engine.scheduler.busy


def test_segments_are_the_runs_that_rows_share():
    pages = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 6], [7, 8], [7, 8], [9], []]
    segments, paths, depths = segments_of(pages)
    runs = [[page for s in path for page in segments[s]] for path in paths]
    assert runs == [[1, 2, 3], [1, 2, 3], [1, 2], [7, 8], [7, 8], [], []]
    assert depths == [3, 3, 2, 2, 2, 0, 0]
    assert sorted(map(tuple, segments)) == [(1, 2), (3,), (7, 8)]
    assert [bucket_of(n) for n in (1, 2, 3, 5, 8, 9, 64, 65)] == [1, 2, 4, 8, 8, 16, 64, 72]


def test_a_family_that_is_not_known_is_refused_by_name_with_what_to_do():

    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(ValueError, match=r"'gpt2'.*families.py.*rollout.engine=http"):
        InProcessEngine(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=61)))


QWEN3_TOKENIZER = Path(__file__).parent.parent.parent / ".cache" / "tokenizer-qwen3"


@pytest.mark.parametrize("paged", [False, True], ids=["dense", "paged"])
@pytest.mark.parametrize("tokenizer", ["qwen3", "toolbox-base"])
def test_greedy_is_generates_own_on_real_tokenizers(tokenizer, paged):
    if tokenizer == "qwen3":
        if not QWEN3_TOKENIZER.is_dir():
            pytest.skip("the Qwen3 tokenizer cannot be fetched here: python scripts/qwen3_tokenizer.py")
        words = AutoTokenizer.from_pretrained(QWEN3_TOKENIZER)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            Qwen3Config(**WIDE | {"vocab_size": len(words), "tie_word_embeddings": True}), dtype=torch.float32
        ).eval()
    else:
        words = AutoTokenizer.from_pretrained(base_model_path())
        model = AutoModelForCausalLM.from_pretrained(base_model_path(), dtype=torch.float32).eval()
    talks = [[{"role": "user", "content": f"What is the area code of town {i}?"}] for i in range(3)]
    prompts = [words.apply_chat_template(talk, add_generation_prompt=True)["input_ids"] for talk in talks]
    prompts = [list(prompt) for prompt in prompts for _ in range(2)]
    stop = words.eos_token_id
    out = generate(InProcessEngine(model, paged=paged), prompts, [24] * 6, temperature=0.0, stops=(stop,))
    for prompt, row in zip(prompts, out, strict=True):
        want = model.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=stop, pad_token_id=0
        )
        assert row.token_ids == want[0, len(prompt) :].tolist()
