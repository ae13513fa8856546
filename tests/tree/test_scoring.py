"""Shared scoring equals scoring every sequence alone."""

import pytest
import torch

from pact_fast import Policy, context_logprobs, pack_tree, sequence_logprobs
from tests.helpers.trees import (
    assert_gradients_equal,
    one_by_one,
    pact_sequences,
    random_sequences,
    tiny_model,
    weighted_sum,
)


@pytest.mark.parametrize("token_budget", [10_000, 60])
def test_sequence_logprobs_equal_one_by_one(family, token_budget):
    model = tiny_model(family)
    sequences = [s for s in random_sequences(7) if s] + pact_sequences(7)
    got = sequence_logprobs(model, sequences, token_budget=token_budget)
    want = one_by_one(model, sequences)
    for sequence, a, b in zip(sequences, got, want, strict=True):
        assert a.dtype == torch.float32
        assert a.shape == (len(sequence) - 1,)
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert_gradients_equal(model, weighted_sum(got), weighted_sum(want))


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 7, 50])
def test_streaming_against_cached_keys_gives_the_same_numbers(family, chunk):
    model = tiny_model(family).double()  # so that only a wrong context can make a difference
    forwarded = []
    handle = model.model.embed_tokens.register_forward_hook(lambda _, __, out: forwarded.append(out.shape[1]))
    sequences = [s for s in random_sequences(7) if s] + pact_sequences(7)
    whole = sequence_logprobs(model, sequences)
    tokens = sum(forwarded)
    forwarded.clear()
    streamed = sequence_logprobs(model, sequences, token_budget=chunk)
    handle.remove()
    for a, b in zip(streamed, whole, strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=0)
    assert max(forwarded) == chunk
    assert sum(forwarded) == tokens  # nothing is computed twice


@torch.no_grad()
def test_streaming_a_sliding_window_gives_the_same_numbers():
    model = tiny_model("qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1)
    sequences = pact_sequences(7)
    for a, b in zip(
        sequence_logprobs(model, sequences, token_budget=13), one_by_one(model, sequences), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_temperature_divides_the_logits():
    model = tiny_model("qwen3").eval()
    ids = torch.tensor(pact_sequences(1)[0])
    with torch.no_grad():
        (got,) = sequence_logprobs(model, [ids], temperature=0.7)
        want = (model(ids[None]).logits[0, :-1] / 0.7).log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


@torch.no_grad()
def test_both_contexts_in_one_pass_equal_two_plain_passes(family):
    model = tiny_model(family)
    prompt, privileged = [5, 6, 7, 8], [5, 6, 7, 9, 10, 11]
    rollouts = [[1, 2, 3], [1, 2, 4, 5], [8], []]
    plain, conditioned = context_logprobs(Policy(model), prompt, torch.tensor(privileged), rollouts)
    for context, got in ((prompt, plain), (privileged, conditioned)):
        want = one_by_one(model, [context + y for y in rollouts])
        for y, a, b in zip(rollouts, got, want, strict=True):
            assert a.shape == (len(y),)
            torch.testing.assert_close(a, b[len(context) - 1 :], atol=1e-5, rtol=0)


def test_empty_inputs_are_refused():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"sequences\[1\] is empty"):
        sequence_logprobs(model, [[1, 2], []])
    with pytest.raises(ValueError, match="privileged_prompt is empty"):
        context_logprobs(model, [1], [], [[2]])
    assert sequence_logprobs(model, []) == []


@pytest.mark.parametrize(
    ("sequences", "problem"),
    [
        ([1, 2, 3], r"sequences\[0\] is 1, not a list.* given as \[ids\]"),
        (torch.tensor([1, 2, 3]), r"sequences\[0\] is tensor\(1\), not a list"),
        ([[1, 2], [[3]]], r"sequences\[1\] must be a flat list"),
        ([[1, 2.5]], r"sequences\[0\] must be a flat list"),
        ([[1, [2]]], r"sequences\[0\] must be a flat list"),
        (["ab"], r"sequences\[0\] must be a flat list"),
        ([[1, 2], [3, 10**6]], r"sequences\[1\]\[1\] = 1000000, but the model's vocabulary has \d+ tokens"),
        ([[1, -100]], r"sequences\[0\]\[1\] = -100"),
    ],
)
def test_what_is_no_list_of_a_models_tokens_is_named(sequences, problem):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=problem):
        sequence_logprobs(model, sequences)


def test_contexts_and_rollouts_that_are_no_tokens_are_named():
    model = tiny_model("llama")
    beyond = model.config.vocab_size
    for arguments, problem in (
        (([1, beyond], [1], [[2]]), rf"^prompt\[1\] = {beyond}, but the model's vocabulary"),
        (([1], [1, beyond], [[2]]), rf"privileged_prompt\[1\] = {beyond}"),
        (([1], [1], [[2], [3, beyond]]), rf"rollouts\[1\]\[1\] = {beyond}"),
        (([1], [1], [2, 3]), r"rollouts\[0\] is 2, not a list"),
        (([[1]], [1], [[2]]), "^prompt must be a flat list"),
        ((1, [1], [[2]]), "^prompt is 1, not a list"),
    ):
        with pytest.raises(ValueError, match=problem):
            context_logprobs(model, *arguments)


def test_a_pack_of_ones_own_is_checked_against_the_model():
    policy = Policy(tiny_model("llama"))
    pack = pack_tree([[1, 2], [1, policy.family.vocabulary]])
    with pytest.raises(ValueError, match=rf"sequences\[1\]\[1\] = {policy.family.vocabulary}"):
        policy.hidden(pack)
    with pytest.raises(ValueError, match=rf"sequences\[1\]\[1\] = {policy.family.vocabulary}"):
        next(policy.stream(pack, 2))
