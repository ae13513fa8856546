"""One call of an engine in a test, and the log-probs that the model itself gives to what was drawn."""

import torch


def logprobs_of(model, context, tokens, temperature=1.0):
    with torch.no_grad():
        logits = model(torch.tensor([list(context) + list(tokens)])).logits[0].float() / temperature
    logp = logits.log_softmax(-1)
    return [float(logp[len(context) + i - 1, t]) for i, t in enumerate(tokens)]


def generate(engine, prompts, limits, sessions=None, temperature=1.0, seed=0, stops=(5, 6)):
    return engine.generate(
        prompts,
        max_new_tokens=limits,
        temperature=temperature,
        stop_token_ids=stops,
        seed=seed,
        sessions=sessions,
    )
