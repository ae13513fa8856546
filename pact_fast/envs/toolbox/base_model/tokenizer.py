"""The tokenizer of the small base model: byte-level BPE, trained offline on toolbox text.

A small model learns to copy a name if it always sees the same tokens for it, and sequence length decides the
speed on a CPU. Hence the pre-tokenizer: a two-syllable name is two tokens, digits are single, a run of JSON
punctuation (with the blanks inside it) is one piece, a word takes its leading blank.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pact_fast.data import formats
from pact_fast.data.records import Record

PIECES = "|".join(
    (
        r"[A-Z][aeiou](?=[a-z][aeiou](?![a-z]))",  # first syllable of a name
        r" ?[A-Za-z]+",
        r"\d",
        r"\n+",
        r" ?[^\sA-Za-z0-9]+(?: +[^\sA-Za-z0-9]+)*",  # punctuation and the blanks inside it
        r"\s",
        r".",
    )
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def train_tokenizer(texts: Iterable[str], vocab_size: int = 768) -> PreTrainedTokenizerFast:
    """Train on `texts`; same texts, same tokenizer. Ids 0-8 are the special tokens and the tags."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[*SPECIAL, *formats.TAGS],
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    spec = json.loads(bpe.to_str())
    for token in spec["added_tokens"]:  # tags are ordinary added tokens, as in Qwen3
        token["special"] = token["content"] in SPECIAL
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    tokenizer.chat_template = formats.BUNDLED["compact", formats.CHATML][1]
    return tokenizer


def record_texts(records: Iterable[Record]) -> Iterator[str]:
    """Everything that a conversation over a record writes, as pieces of text."""
    yield formats.DEFAULT_PRIVILEGED_TEMPLATE
    for record in records:
        yield from ("system\n", "user\n", "assistant\n", "Tools:\n", "\n\n")
        for tool in record.tools:
            function = tool["function"]
            arguments = ", ".join(function["parameters"]["properties"])
            yield f"{function['name']}({arguments}): {function['description']}"
        for message in (*record.prompt, *record.expert_trace):
            yield message["content"]
            yield message.get("reasoning_content") or ""
            for call in message.get("tool_calls") or []:
                yield json.dumps({"name": call["name"], "arguments": call["arguments"]})
