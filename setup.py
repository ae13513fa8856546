"""Build of the optional native part (plain C ABI, loaded through ctypes). Metadata lives in pyproject.toml.

    csrc/tree_pack.cpp   -> pact_fast/_native/libtree_pack.so      a C++17 compiler: $CXX, c++, g++, clang++

No compiler: it is left out and the Python form is used.
"""

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


def host_compiler() -> str | None:
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


class BuildNative(build_ext):
    """Each extension is one source compiled to one shared library without a Python module in it."""

    def copy_extensions_to_source(self) -> None:
        (ROOT / "pact_fast" / "_native").mkdir(exist_ok=True)
        super().copy_extensions_to_source()

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        source, output = ROOT / ext.sources[0], Path(self.get_ext_fullpath(ext.name))
        compiler = host_compiler()
        if not source.exists() or compiler is None:
            print(f"pact_fast: {source.name} left out ({'no compiler' if source.exists() else 'no source'})")
            return
        output.parent.mkdir(parents=True, exist_ok=True)
        command = [compiler, "-O3", "-std=c++17", "-shared", "-fPIC", str(source), "-o", str(output)]
        if subprocess.run(command, check=False).returncode:
            raise RuntimeError(f"compiling {source.name} failed: {' '.join(command)}")


setup(
    ext_modules=[Extension("pact_fast._native.libtree_pack", ["csrc/tree_pack.cpp"], optional=True)],
    cmdclass={"build_ext": BuildNative},
)
