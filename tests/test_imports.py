"""The layering of the packages, read from the sources' own imports, and the name clash with PyPI's
`kernels`."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Each area may import itself and what stands after the colon.
ALLOWED = {
    "kernels": {"kernels"},
    "ops": {"kernels", "ops"},
}
FORBIDDEN_EVERYWHERE = ("tests", "bench")


def imported_modules(path: Path) -> list[str]:
    modules = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            modules += [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
    return modules


def area(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda p: p.name)
def test_kernels_know_nothing_of_configs_transformers_or_fsdp(path):
    for module in imported_modules(path):
        assert not module.startswith(("transformers", "torch.distributed", "rich", "jsonargparse")), module
        if module.startswith("pact_fast."):
            assert area(module) == "kernels", f"{path.name} imports {module}"


def test_ops_imports_only_kernels():
    for module in imported_modules(ROOT / "pact_fast" / "ops.py"):
        if module.startswith("pact_fast."):
            assert area(module) in ALLOWED["ops"], module


@pytest.mark.parametrize(
    "path",
    sorted(p for p in (ROOT / "pact_fast").rglob("*.py") if "kernels" not in p.parts),
    ids=lambda p: p.name,
)
def test_nothing_imports_tests_or_bench(path):
    for module in imported_modules(path):
        assert module.split(".")[0] not in (*FORBIDDEN_EVERYWHERE, "kernels"), f"{path} imports {module}"


@pytest.mark.parametrize("name", ["packing", "policy", "scoring", "objective", "ops"])
def test_lower_layers_do_not_import_the_trainer(name):
    for module in imported_modules(ROOT / "pact_fast" / f"{name}.py"):
        assert area(module) not in ("trainer", "cli", "config"), module


def test_a_transformers_model_loads_with_the_root_on_sys_path():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = (
        "from transformers import Qwen3Config, Qwen3ForCausalLM;"
        "Qwen3ForCausalLM(Qwen3Config(vocab_size=32,hidden_size=16,intermediate_size=16,num_hidden_layers=1,"
        "num_attention_heads=1,num_key_value_heads=1,head_dim=16))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_every_public_name_can_be_imported_from_the_top():
    import pact_fast

    for name in pact_fast.__all__:
        assert getattr(pact_fast, name) is not None
    assert {"Trainer", "anchor_mask", "group_advantages", "pack_tree", "tree_attention"} <= set(
        pact_fast.__all__
    )
