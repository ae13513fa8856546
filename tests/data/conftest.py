"""Tokenizers for the tests of records and chat formats."""

import pytest

from tests.helpers.conversations import TAGS, train_tokenizer


@pytest.fixture(scope="session")
def chatml_tokenizer():
    return train_tokenizer(["<|im_start|>", "<|im_end|>"], TAGS)


@pytest.fixture(scope="session")
def untagged_tokenizer():
    """ChatML markers, but the tool tags are plain text (SmolLM2 and its like)."""
    return train_tokenizer(["<|im_start|>", "<|im_end|>"], [])


@pytest.fixture(scope="session")
def llama_tokenizer():
    return train_tokenizer(["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], [])
