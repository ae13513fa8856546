"""Models that come with the package."""

from pathlib import Path

__all__ = ["base_model_path"]


def base_model_path() -> Path:
    """Folder of the small base model for the toolbox environment (Qwen3 architecture, 312k parameters).

    `AutoModelForCausalLM.from_pretrained(path)` and `AutoTokenizer.from_pretrained(path)` load it;
    `python -m pact_fast.envs.toolbox.base_model.recipe --out DIR` makes it anew.
    """
    return Path(__file__).parent / "weights"
