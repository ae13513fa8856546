"""`pact-fast doctor`: what this machine has, and what each lack costs. Changes nothing, downloads nothing.

Exit status 0 where training can run (torch and transformers are there and recent enough), else 1.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import operator
import os
import platform
import re
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table

Status = Literal["ok", "missing", "error"]
NATIVE = Path(__file__).parent.parent / "_native"

# (distribution, what its absence costs); EXTRAS says how it is installed.
OPTIONAL = (
    ("triton", "Triton kernels: on CUDA the ops need impl='torch', several times slower and more memory"),
    (
        "liger-kernel",
        "fused norms, RoPE and SwiGLU (model.kernels), and a peer in `pact-fast bench`",
    ),
    ("peft", "LoRA training"),
    (
        "flash-attn-4",
        "tree attention at twice the speed on sm_90 and sm_100",
    ),
    ("torchao", "8-bit AdamW"),
    ("bfcl-eval", "the `bfcl` environment"),
    ("wandb", "logging to Weights & Biases"),
    ("trackio", "logging to trackio"),
)
EXTRAS = {
    "triton": "pip install 'pact-fast[triton]'",
    "liger-kernel": "pip install liger-kernel",
    "peft": "pip install 'pact-fast[lora]'",
    "flash-attn-4": "pip install 'pact-fast[fa4]'",
    "torchao": "pip install 'pact-fast[adamw8bit]'",
    "bfcl-eval": "pip install --no-deps bfcl-eval==2026.3.23 && pip install 'pact-fast[bfcl]'",
    "wandb": "pip install 'pact-fast[wandb]'",
    "trackio": "pip install 'pact-fast[trackio]'",
}
REQUIRED = (
    "torch",
    "transformers",
    "numpy",
    "scipy",
    "safetensors",
    "tensorboard",
    "matplotlib",
    "pyarrow",
    "jsonargparse",
)


@dataclass(frozen=True)
class Finding:
    """One line of the report. `cost` says what a missing or broken part means for the user."""

    area: str
    name: str
    status: Status
    detail: str
    cost: str = ""


def examine() -> list[Finding]:
    """Looks at machine, packages and compiled parts; a part that cannot be examined is an error line."""
    findings = [
        Finding("machine", "python", "ok", f"{platform.python_version()} ({sys.executable})"),
        Finding("machine", "cpu", "ok", _cpu()),
        Finding("machine", "memory", "ok", _memory()),
    ]
    findings += [_package(name, "required", "training cannot run: `make setup`") for name in REQUIRED]
    findings += _guard("devices", _devices)
    findings += [_package(name, "optional", cost) for name, cost in OPTIONAL]
    findings += _guard("compiled", _native_parts)
    findings += _guard("sandbox", _sandbox)
    return findings


def usable(findings: Sequence[Finding]) -> bool:
    return not any(f.area == "required" and f.status != "ok" for f in findings)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "pact-fast doctor", description="What this machine has, what each lack costs."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    arguments = parser.parse_args(argv)
    findings = examine()
    good = usable(findings)
    if arguments.json:
        print(json.dumps({"usable": good, "findings": [asdict(f) for f in findings]}, indent=1))
        return 0 if good else 1
    console = Console()
    table = Table(box=box.SIMPLE_HEAD, title="pact-fast doctor")
    for column in ("", "part", "found", "what its lack costs"):
        table.add_column(column, overflow="fold")
    marks = {"ok": "[green]ok[/]", "missing": "[yellow]-[/]", "error": "[red]error[/]"}
    for finding in findings:
        cost = "" if finding.status == "ok" else finding.cost
        table.add_row(marks[finding.status], finding.name, finding.detail, cost)
    console.print(table)
    console.print("training can run here" if good else "[red]training cannot run here: `make setup`[/]")
    return 0 if good else 1


SANDBOX_COSTS = {
    "namespaces": "tools see the network device and other processes, and read the environment of this user's",
    "root": "tools can read the files that you can read (docs/environments.md)",
    "limits": "a tool can take all memory",
    "capabilities": "a tool run by root keeps root's rights",
    "seccomp": "tools can start processes and open sockets",
}


def _sandbox() -> list[Finding]:
    """Which walls stand round tool code on this machine."""
    from pact_fast.envs.sandbox.sandbox import WALLS, Sandbox

    with Sandbox() as sandbox:
        open_walls = [name for name in WALLS if sandbox.protections[name] is not True]
        refused = Finding(
            "sandbox",
            "sandbox: untrusted tools",
            "missing" if open_walls else "ok",
            f"refused: {', '.join(open_walls)} missing" if open_walls else "run, each call by itself",
            "envs python, ftrl and toolhop need --env.settings.sandbox weak, at your own risk",
        )
        return [
            refused,
            *_walls(sandbox.protections),
        ]


def _walls(protections: Mapping[str, Any]) -> list[Finding]:
    return [
        Finding(
            "sandbox",
            f"sandbox: {name}",
            "ok" if holds is True else "missing",
            "holds" if holds is True else str(holds),
            SANDBOX_COSTS[name],
        )
        for name, holds in protections.items()
    ]


def _package(name: str, area: str, cost: str) -> Finding:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        install = EXTRAS.get(name, f"pip install {name}")
        return Finding(area, name, "missing", "not installed", f"{cost}; {install}")
    floor = _floors().get(name)
    if floor and _numbers(version) < _numbers(floor):
        return Finding(area, name, "error", f"{version}, older than {floor}", f"needs {name}>={floor}")
    return Finding(area, name, "ok", version)


def _floors() -> dict[str, str]:
    """Lowest versions, from the installed package's own metadata (pyproject.toml in a bare checkout)."""
    try:
        requirements = importlib.metadata.requires("pact-fast") or []
    except importlib.metadata.PackageNotFoundError:
        project = Path(__file__).parent.parent.parent / "pyproject.toml"
        if not project.exists():
            return {}
        table = tomllib.loads(project.read_text())["project"]
        requirements = [
            *table["dependencies"],
            *functools.reduce(operator.iadd, table["optional-dependencies"].values(), []),
        ]
    found = (re.match(r"([A-Za-z0-9_.-]+)\s*>=\s*([0-9.]+)", requirement) for requirement in requirements)
    return {match[1]: match[2] for match in found if match}


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def _devices() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or "without CUDA"
        cost = "kernels run in plain PyTorch on the CPU; Triton only in its interpreter, for tests"
        return [Finding("devices", "cuda", "missing", f"no CUDA device (torch built {built})", cost)]
    findings = []
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        detail = f"{p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}"
        old = (p.major, p.minor) < (8, 0)
        findings.append(
            Finding(
                "devices", f"cuda:{index}", "error" if old else "ok", detail, "kernels need sm_80 or newer"
            )
        )
    return findings


def _native_parts() -> list[Finding]:
    """The libraries that setup.py builds; each is loaded to see that it really works on this machine."""
    import ctypes

    parts = {"tree_pack": "trees are packed in NumPy, slower"}
    found = {path.name.split(".")[0].removeprefix("lib"): path for path in NATIVE.glob("*.so")}
    findings = []
    for name, cost in parts.items():
        path = next((p for stem, p in found.items() if name in stem), None)
        if path is None:
            findings.append(Finding("compiled", name, "missing", "not built", cost))
            continue
        try:
            ctypes.CDLL(str(path))
            findings.append(Finding("compiled", name, "ok", str(path)))
        except OSError as error:
            findings.append(
                Finding("compiled", name, "error", str(error), f"{cost}; build it again: pip install -e .")
            )
    return findings


def _guard(area: str, look: Callable[[], list[Finding]]) -> list[Finding]:
    """A look that fails is a finding: the doctor must come through on the very machines that are broken."""
    try:
        return look()
    except Exception as error:
        name = look.__name__.strip("_")
        return [Finding(area, name, "error", f"{type(error).__name__}: {error}", "could not be examined")]


def _cpu() -> str:
    usable_cores: Any = (
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    return f"{len(usable_cores)} usable cores, {platform.machine()}"


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    except (ValueError, OSError):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
