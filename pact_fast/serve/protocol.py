"""What a completion request may ask, and what an answer holds: vLLM's names and forms for token ids."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pact_fast.serve.thread import Job

# Of vLLM's fields: those that do nothing here may be sent with the value that does nothing there.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logprobs": (0,),
    "return_token_ids": (True,),
    "return_tokens_as_token_ids": (True,),
    "skip_special_tokens": (False,),
    "stream": (False,),
    "echo": (False,),
    "stop": ([],),
    "min_tokens": (0,),
}
FIELDS = {"model", "prompt", "n", "max_tokens", "temperature", "seed", "stop_token_ids", "cache_salt"}
FIELDS |= {"ignore_eos", *NEUTRAL}
SEEDS = 2**63
MAX_COPIES = 1024  # n
MAX_TOKENS = 2**24  # prompts and completions of all rows of a request
MIN_TEMPERATURE = 1e-5  # above 0, which is greedy: smaller ones divide logits to infinity
SHOWN = 80  # characters of a value that a message repeats


class BadRequest(ValueError):
    """A request that cannot be served as it is; the message names the field, its value and the way out."""


def shown(value: Any) -> str:
    """A value as a message repeats it: never at the length that a client sent."""
    text = repr(value) if not isinstance(value, str | list) else repr(value[:SHOWN])
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def jobs_of(
    body: Mapping[str, Any],
    *,
    model: str,
    vocabulary: int,
    max_model_len: int,
    eos: Sequence[int],
    max_rows: int,
) -> list[Job]:
    """The rows a request asks for, prompts major, n per prompt; none is made before all limits are kept.

    max_rows: more can never be in line here, so that a request for more is wrong, not early. Raises
    BadRequest.
    """
    for name, value in body.items():
        if name not in FIELDS:
            raise BadRequest(f"field {shown(name)} is not supported; there are {', '.join(sorted(FIELDS))}")
        if name in NEUTRAL and value is not None and value not in NEUTRAL[name]:
            raise BadRequest(f"{name}={shown(value)} is not supported: send {NEUTRAL[name][0]!r} or nothing")
    if body.get("model", model) != model:
        raise BadRequest(f"model={shown(body['model'])} is not served here; this is {model!r}")
    number = _Reader(body)
    max_tokens = number.integer("max_tokens", 16, 1, max_model_len)
    temperature = number.real("temperature", 1.0, 0.0, 1e6)
    if 0 < temperature < MIN_TEMPERATURE:
        raise BadRequest(f"temperature={temperature!r}: send 0 (greedy) or at least {MIN_TEMPERATURE:g}")
    seed = number.integer("seed", secrets.randbelow(SEEDS), 0, SEEDS - 1)
    copies = number.integer("n", 1, 1, MAX_COPIES)
    prompts = _prompts(body)
    if len(prompts) * copies > max_rows:
        raise BadRequest(
            f"{len(prompts)} prompts and n={copies} are {len(prompts) * copies:,} rows; at most {max_rows:,} "
            "fit in line: send fewer at a time"
        )
    tokens = copies * sum(len(prompt) + max_tokens for prompt in prompts)
    if tokens > MAX_TOKENS:
        raise BadRequest(
            f"{len(prompts)} prompts, n={copies} and max_tokens={max_tokens} are up to {tokens:,} tokens; "
            f"at most {MAX_TOKENS:,} fit in a request: send fewer prompts at a time"
        )
    stops = body.get("stop_token_ids") or []
    _check_ids("stop_token_ids", stops, vocabulary)
    if not body.get("ignore_eos", False):
        stops = [*stops, *eos]
    for prompt in prompts:
        if not prompt:
            raise BadRequest("prompt is empty: the first token needs one before it")
        _check_ids("prompt", prompt, vocabulary)
        if len(prompt) + max_tokens > max_model_len:
            raise BadRequest(
                f"prompt of {len(prompt)} tokens and max_tokens={max_tokens} exceed max_model_len="
                f"{max_model_len}"
            )
    stop_ids, salt = frozenset(stops), str(body.get("cache_salt") or "")
    return [
        Job(list(prompt), max_tokens, temperature, (seed + copy) % SEEDS, stop_ids, salt=salt)
        for prompt in prompts
        for copy in range(copies)
    ]


def answer_of(
    jobs: Sequence[Job], *, model: str, request_id: str, created: int, decode: Callable[[list[int]], str]
) -> dict[str, Any]:
    """The body of a completion. Beyond vLLM's: `weight_versions`, those of the first and the last token."""
    choices = []
    for index, job in enumerate(jobs):
        choices.append(
            {
                "index": index,
                "text": decode(job.token_ids),
                "finish_reason": job.finish_reason,
                "stop_reason": job.token_ids[-1] if job.finish_reason == "stop" else None,
                "token_ids": job.token_ids,
                "prompt_token_ids": job.prompt,
                "logprobs": {
                    "tokens": [f"token_id:{token}" for token in job.token_ids],
                    "token_logprobs": job.logprobs,
                },
                "weight_versions": list(job.versions or ()),
            }
        )
    prompt_tokens, tokens = sum(len(j.prompt) for j in jobs), sum(len(j.token_ids) for j in jobs)
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": tokens}
    return {
        "id": request_id,
        "object": "text_completion",
        "created": created,
        "model": model,
        "choices": choices,
        "usage": usage | {"total_tokens": prompt_tokens + tokens},
    }


def _prompts(body: Mapping[str, Any]) -> list[list[int]]:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and all(isinstance(p, list) for p in prompt):
        return prompt
    if isinstance(prompt, list):
        return [prompt]
    raise BadRequest(
        f"prompt={shown(prompt)}: send token ids, a list of integers or a list of such lists; text is "
        "never tokenised here"
    )


def _check_ids(name: str, ids: Any, vocabulary: int) -> None:
    if not isinstance(ids, list):
        raise BadRequest(f"{name}={shown(ids)}: send a list of token ids")
    for token in ids:
        if type(token) is not int or not 0 <= token < vocabulary:
            raise BadRequest(
                f"{name} holds {shown(token)}: token ids are integers from 0 to {vocabulary - 1}"
            )


class _Reader:
    """Numbers of a request, with their ranges."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self.body = body

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        value = self.body.get(name)
        if value is None:
            return default
        if type(value) is not int or not low <= value <= high:
            raise BadRequest(f"{name}={shown(value)}: send an integer from {low} to {high}")
        return value

    def real(self, name: str, default: float, low: float, high: float) -> float:
        value = self.body.get(name)
        if value is None:
            return default
        if type(value) not in (int, float) or not low <= value <= high:
            raise BadRequest(f"{name}={shown(value)}: send a number from {low:g} to {high:g}")
        return value
