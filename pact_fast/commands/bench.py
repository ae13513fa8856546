"""`pact-fast bench`: runs bench/main.py of the repository; benchmarks are not in the installed package."""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType


def load() -> ModuleType:
    """bench/main.py as a module; FileNotFoundError where there is no repository beside the package."""
    script = Path(__file__).resolve().parent.parent.parent / "bench" / "main.py"
    if not script.exists():
        raise FileNotFoundError(
            f"{script} is missing: the benchmarks come with the repository, not with the installed package; "
            "clone it and install it with `pip install -e .`"
        )
    spec = importlib.util.spec_from_file_location("pact_fast_bench_main", script)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {script}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(argv: Sequence[str] | None = None) -> int:
    """pact-fast bench [options]: exit status 0, or 1 where one of our ops failed its correctness gate."""
    return load().main(list(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
