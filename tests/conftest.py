"""Fixtures that tests of several rooms share. What they import stands in tests/helpers/."""

import pytest


@pytest.fixture(params=["qwen3", "llama"])
def family(request):
    """A model family that `tests.helpers.trees.tiny_model` makes."""
    return request.param
