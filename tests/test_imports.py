"""The layering of the packages, read from the sources' own imports, and the name clash with PyPI's
`kernels`."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Rooms along the token's journey, and top-level modules by their own names. Each may import itself and
# what stands after the colon; what is not listed here is no room.
ALLOWED = {
    "kernels": set(),
    "version": set(),
    "keys": set(),
    "files": set(),
    "metrics": {"files"},
    "distributed": {"tree"},
    "ops": {"kernels", "objective"},
    "tree": {"ops", "kernels"},
    "data": set(),
    "objective": {"data", "keys"},
    "config": {"objective", "keys"},
    "envs": {"data"},
    "rollout": {"envs", "data", "distributed", "config", "tree", "kernels"},
    "evaluation": {"rollout", "envs", "data", "distributed", "metrics", "files"},
    "train": {
        *("evaluation", "rollout", "envs", "objective", "data", "tree", "ops"),
        *("distributed", "metrics", "config", "files"),
    },
    "serve": {"rollout", "data", "config", "tree"},
    "cli": {"config", "version", "files"},
    "commands": {
        *("train", "serve", "evaluation", "rollout", "envs", "objective", "data", "tree", "ops", "cli"),
        *("distributed", "metrics", "config", "keys", "kernels", "version", "files"),
    },
    "__init__": {"ops", "tree", "objective", "train", "config", "version"},
    "__main__": {"cli"},
}
SOURCES = sorted((ROOT / "kernels").rglob("*.py")) + sorted(
    p for p in (ROOT / "pact_fast").rglob("*.py") if "kernels" not in p.parts
)


def imported_modules(path: Path) -> list[str]:
    modules = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            # `from pact_fast.x import y`: y may be a module, and then it is that one that is imported.
            modules += [n if _source_of(n) else str(node.module) for n in names]
    return modules


def _source_of(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def module_of(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = ["pact_fast", *parts] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_arrows_point_down_from_room_to_room(path):
    here = room(module_of(path))
    assert here in ALLOWED, f"{path}: no room {here!r}: name it in ALLOWED, with what it may import"
    for module in imported_modules(path):
        top = module.split(".")[0]
        assert top not in ("tests", "bench", "kernels"), f"{path} imports {module}"
        if top == "pact_fast" and room(module) != here:
            assert room(module) in ALLOWED[here], f"{module_of(path)} imports {module}"


def test_the_rooms_have_no_circle():
    left = {name: set(below) for name, below in ALLOWED.items()}
    while left:
        free = [name for name, below in left.items() if not below & left.keys()]
        assert free, f"circle among {sorted(left)}"
        for name in free:
            del left[name]


def test_the_modules_have_no_circle():
    """Imports at module level; those inside functions are there to be late."""
    imports = {}
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        late = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
        late |= {
            id(n)
            for f in ast.walk(tree)
            if isinstance(f, ast.If) and "TYPE_CHECKING" in ast.dump(f.test)
            for n in ast.walk(f)
        }
        found = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and id(node) not in late:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found |= {n if _source_of(n) else str(node.module) for n in names}
        imports[module_of(path)] = found
    left = {name: {m for m in found if m in imports and m != name} for name, found in imports.items()}
    while left:
        free = [name for name, below in left.items() if not below & left.keys()]
        assert free, f"circle among {sorted(left)}"
        for name in free:
            del left[name]


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda p: p.name)
def test_kernels_know_nothing_of_configs_transformers_or_fsdp(path):
    for module in imported_modules(path):
        assert not module.startswith(("transformers", "torch.distributed", "rich", "jsonargparse")), module


def test_the_folders_stay_small():
    beside = [p.name for p in (ROOT / "pact_fast").iterdir() if p.is_file()]
    assert len(beside) <= 12, beside
    long = {p.name: n for p in SOURCES if (n := len(p.read_text().splitlines())) > 500}
    assert not long, f"files past 500 lines: {long}"


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
