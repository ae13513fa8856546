"""`pact-fast bench`: runs bench/ of the repository; benchmarks are not in the installed package."""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType


def load() -> ModuleType:
    """Module main of the repository's package `bench`; FileNotFoundError without a repository."""
    folder = Path(__file__).resolve().parent.parent.parent / "bench"
    if not (folder / "main.py").exists():
        raise FileNotFoundError(
            f"{folder / 'main.py'} is missing: the benchmarks come with the repository, not with the "
            "installed package; clone it and install it with `pip install -e .`"
        )
    if getattr(sys.modules.get("bench"), "__file__", "") != str(folder / "__init__.py"):
        # By its file: the repository's root is not on sys.path here, and another `bench` may be.
        spec = importlib.util.spec_from_file_location(
            "bench", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        if spec is None or spec.loader is None:
            raise ImportError(f"cannot load {folder}")
        sys.modules["bench"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["bench"])
    return importlib.import_module("bench.main")


def main(argv: Sequence[str] | None = None) -> int:
    """pact-fast bench [COMMAND] [options]: the exit status, 1 where one of our ops failed its gate."""
    return load().main(list(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
