"""A sample conversation and small tokenizers for the tests of records and chat formats."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SAMPLE_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"{name} a person",
            "parameters": {
                "type": "object",
                "properties": {"name": {"type": "string"}},
                "required": ["name"],
            },
        },
    }
    for name in ("find", "age_of")
]
SAMPLE_PROMPT = [
    {"role": "system", "content": "Answer with the tools."},
    {"role": "user", "content": 'How old is the friend of "Mora Keld"?'},
]
SAMPLE_TRACE = [
    {
        "role": "assistant",
        "reasoning_content": 'I look up "Mora Keld". Then I ask twice! Wise?\nYes. It costs 3.5 calls.',
        "content": "",
        "tool_calls": [
            {"name": "find", "arguments": {"name": "Mora Keld"}},
            {"name": "age_of", "arguments": {"name": 'Ünal "U" O\'Neil', "deep": {"a": [1, 2.5, None]}}},
        ],
    },
    {"role": "tool", "name": "find", "content": '{"friend": "Tila Vosk"}'},
    {"role": "tool", "name": "age_of", "content": "no such person"},
    {
        "role": "assistant",
        "reasoning_content": "Now the friend.",
        "content": "One more look.",
        "tool_calls": [{"name": "age_of", "arguments": {"name": "Tila Vosk"}}],
    },
    {"role": "tool", "name": "age_of", "content": "41"},
    {"role": "assistant", "reasoning_content": "That is it.", "content": "41", "tool_calls": []},
]


def train_tokenizer(special: list[str], added: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on this file's text: small, offline, and with every kind of added token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    text = [str(SAMPLE_TOOLS), str(SAMPLE_PROMPT), str(SAMPLE_TRACE), "Mora Keld Tila Vosk. arguments\n\n"]
    bpe.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.add_tokens(added)
    tokenizer.eos_token = special[-1]
    return tokenizer


TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
