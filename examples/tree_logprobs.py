"""Log-probs of many sequences that share prefixes, in one pass over a Hugging Face model.

`sequence_logprobs` scores a list of sequences, `context_logprobs` the same rollouts after two prompts: the
plain one and one that shows an expert trace. Here both are compared with one ordinary forward per sequence.

    python examples/tree_logprobs.py
"""

import time

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from pact_fast import context_logprobs, pack_tree, sequence_logprobs

torch.manual_seed(0)
model = Qwen3ForCausalLM(
    Qwen3Config(
        vocab_size=1000,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )
).eval()
prompt = torch.randint(1000, (400,))
trace = torch.randint(1000, (300,))
rollouts = [torch.randint(1000, (60,)) for _ in range(8)]
privileged = torch.cat([prompt, trace])


def one_by_one(sequence: torch.Tensor) -> torch.Tensor:
    logprobs = model(sequence[None]).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(1, sequence[1:, None])[:, 0]


sequences = [torch.cat([context, y]) for context in (prompt, privileged) for y in rollouts]
pack = pack_tree(sequences)
print(
    f"{len(sequences)} sequences: {pack.num_sequence_tokens} tokens one by one, {pack.num_tokens} as a tree"
)

with torch.no_grad():
    begin = time.perf_counter()
    want = [one_by_one(sequence) for sequence in sequences]
    between = time.perf_counter()
    got = sequence_logprobs(model, sequences)
    end = time.perf_counter()
    plain, conditioned = context_logprobs(model, prompt, privileged, rollouts)

gap = max(float((a - b).abs().max()) for a, b in zip(got, want, strict=True))
print(f"largest difference of a log-prob: {gap:.1e}")
print(f"one by one {between - begin:.2f} s, as a tree {end - between:.2f} s")
gain = (torch.cat(conditioned) - torch.cat(plain)).mean()
print(f"mean of log pi(y|x,h) - log pi(y|x) over {sum(map(len, rollouts))} tokens: {gain:+.4f} nats")
