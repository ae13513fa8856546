"""The examples of docs/ops.md run as they stand, and its adapters give what the code they replace gives."""

import re
import types
from pathlib import Path

import pytest
import torch

PAGE = (Path(__file__).resolve().parent.parent.parent / "docs" / "ops.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.S)


def namespace(containing):
    """What the example that contains this text defines."""
    (source,) = [example for example in EXAMPLES if containing in example]
    values = {}
    exec(compile(source, "docs/ops.md", "exec"), values)
    return values


@pytest.mark.parametrize("source", EXAMPLES, ids=range(len(EXAMPLES)))
def test_the_example_runs(source):
    exec(compile(source, "docs/ops.md", "exec"), {})


def test_the_trl_override_gives_the_models_own_logprobs():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, **heads))
    ids, keep = torch.randint(0, 64, (2, 9)), 5
    trainer = namespace("class FusedLogprobs")["FusedLogprobs"]()
    trainer.temperature = 0.7
    got, entropy, aux = trainer._get_per_token_logps_and_entropies(
        model, ids, torch.ones_like(ids), keep, compute_entropy=True
    )
    logp = (model(ids).logits[:, -keep - 1 : -1] / 0.7).log_softmax(-1)
    torch.testing.assert_close(got, logp.gather(2, ids[:, -keep:, None])[..., 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropy, -(logp.exp() * logp).sum(-1), rtol=1e-4, atol=1e-5)
    assert aux is None


def test_the_verl_style_loss_equals_its_definition():
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    v = types.SimpleNamespace(hidden=draw(3, 5, 8).requires_grad_(), weight=draw(31, 8).requires_grad_())
    v.responses, v.mask = torch.randint(0, 31, (3, 5), generator=g), draw(3, 5) > -0.5
    v.advantages = draw(3, 5)
    logp = (v.hidden @ v.weight.T).log_softmax(-1).gather(2, v.responses[..., None])[..., 0]
    old = (logp + 0.7 * draw(3, 5)).detach()
    ratio = (logp - old).exp()
    losses = torch.max(-v.advantages * ratio, -v.advantages * ratio.clip(0.8, 1.2))
    losses = torch.where(v.advantages < 0, torch.min(losses, -v.advantages * 3.0), losses)
    want = (losses * v.mask).sum() / v.mask.sum()
    loss, clip_fraction, ppo_kl = namespace("def policy_loss")["policy_loss"](
        v.hidden, v.weight, v.responses, old, v.advantages, v.mask
    )
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(ppo_kl, (old - logp)[v.mask].mean())
    assert 0 < clip_fraction < 1
    for got, exact in zip(
        torch.autograd.grad(loss, (v.hidden, v.weight)),
        torch.autograd.grad(want, (v.hidden, v.weight)),
        strict=True,
    ):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-6)
