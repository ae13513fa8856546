"""A training loop of your own: a token tree for the forward, one fused loss for its policy and SFT rows.

Nothing of the trainer is used. A tiny Qwen3 with random weights learns, for one prompt, from a group of
rollouts (rewarded for every even token) and from an expert's answer at the same time. All sequences of a step
share the prompt, so they are one tree: prompt once, forward once, loss once.

    python examples/own_loop.py
"""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from pact_fast import Policy, group_advantages, linear_pact_loss, pack_tree

STEPS, GROUP, LENGTH, VOCABULARY = 15, 8, 12, 64

torch.manual_seed(0)
model = Qwen3ForCausalLM(
    Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
)
policy = Policy(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
prompt = torch.randint(VOCABULARY, (40,))
expert = torch.arange(0, 2 * LENGTH, 2)  # what an expert would have answered: 0, 2, 4, ...


def sample() -> torch.Tensor:
    """[GROUP, LENGTH] tokens drawn after the prompt."""
    ids = prompt.repeat(GROUP, 1)
    with torch.no_grad():
        for _ in range(LENGTH):
            last = model(ids).logits[:, -1]
            ids = torch.cat([ids, torch.multinomial(last.softmax(-1), 1)], 1)
    return ids[:, len(prompt) :]


for step in range(STEPS):
    rollouts = sample()
    rewards = (rollouts % 2 == 0).float().mean(1)
    advantages = group_advantages(rewards, [0] * GROUP)

    # One tree of GROUP + 1 sequences. A row of the loss: a token, and where the token before it lies.
    answers = [*rollouts, expert]
    pack = pack_tree([torch.cat([prompt, answer]) for answer in answers])
    before = [index[len(prompt) - 1 : -1] for index in pack.token_index]
    sampled = torch.arange(GROUP + 1).repeat_interleave(LENGTH) < GROUP
    out = linear_pact_loss(
        policy.hidden(pack),  # [T, H], T about a third of what the sequences have one by one
        policy.head.weight,
        torch.cat(answers),
        row_index=torch.cat(before),
        policy_weight=sampled / sampled.sum(),  # the mean over the sampled tokens
        advantages=torch.cat([advantages, torch.zeros(1)]).repeat_interleave(LENGTH),
        sft_weight=0.1 * ~sampled / LENGTH,  # 0.1 times the mean over the expert's tokens
    )
    out.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 7 == 0:
        print(
            f"step {step:2}: {pack.num_tokens} packed tokens instead of {pack.num_sequence_tokens}, "
            f"even tokens {rewards.mean():.2f}, expert's log-prob {out.logprobs[~sampled].mean():.2f}"
        )
