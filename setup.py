"""Build of the optional native parts (plain C ABI, loaded through ctypes). Metadata lives in pyproject.toml.

    csrc/tree_pack.cpp   -> pact_fast/_native/libtree_pack.so      a C++17 compiler: $CXX, c++, g++, clang++
    csrc/logits_rows.cu* -> pact_fast/_native/liblogits_rows.so    nvcc: $CUDA_HOME, /usr/local/cuda, PATH

No compiler: that part is left out and the Python forms are used. PACT_FAST_CUDA=1 makes a missing nvcc an
error, PACT_FAST_CUDA=0 leaves the CUDA part out.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CUDA_TARGETS = (("compute_80", "sm_80"), ("compute_90a", "sm_90a"), ("compute_100", "sm_100"))


def host_compiler() -> str | None:
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def cuda_compiler() -> str | None:
    asked = os.environ.get("PACT_FAST_CUDA", "")
    if asked not in ("", "0", "1"):
        raise SystemExit(f"PACT_FAST_CUDA must be 0 or 1, got {asked!r}")
    if asked == "0":
        return None
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = next((path for home in homes if home and (path := shutil.which("nvcc", path=f"{home}/bin"))), None)
    nvcc = nvcc or shutil.which("nvcc")
    if nvcc is None and asked == "1":
        raise SystemExit(
            "PACT_FAST_CUDA=1 but no nvcc was found: set CUDA_HOME to a CUDA toolkit, put nvcc on the PATH, "
            "or unset PACT_FAST_CUDA to build without the CUDA part"
        )
    return nvcc


def host_command(compiler: str, source: Path, output: Path) -> list[str]:
    return [compiler, "-O3", "-std=c++17", "-shared", "-fPIC", str(source), "-o", str(output)]


def cuda_command(nvcc: str, source: Path, output: Path) -> list[str]:
    known = subprocess.run(
        [nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True
    ).stdout.split()
    targets = [(arch, code) for arch, code in CUDA_TARGETS if code.rstrip("a") in known]
    flags = [flag for arch, code in targets for flag in ("-gencode", f"arch={arch},code={code}")]
    common = ["-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", "-cudart", "static"]
    return [nvcc, *common, *flags, str(source), "-o", str(output)]


class BuildNative(build_ext):
    """Each extension is one source compiled to one shared library without a Python module in it."""

    def copy_extensions_to_source(self) -> None:
        (ROOT / "pact_fast" / "_native").mkdir(exist_ok=True)
        super().copy_extensions_to_source()

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        source, output = ROOT / ext.sources[0], Path(self.get_ext_fullpath(ext.name))
        cuda = source.suffix == ".cu"
        compiler = cuda_compiler() if cuda else host_compiler()
        if not source.exists() or compiler is None:
            print(f"pact_fast: {source.name} left out ({'no compiler' if source.exists() else 'no source'})")
            return
        output.parent.mkdir(parents=True, exist_ok=True)
        command = (cuda_command if cuda else host_command)(compiler, source, output)
        if subprocess.run(command, check=False).returncode == 0:
            return
        if cuda and os.environ.get("PACT_FAST_CUDA") != "1":
            print(
                f"pact_fast: WARNING: nvcc failed, {source.name} left out: {' '.join(command)}",
                file=sys.stderr,
            )
            return
        raise RuntimeError(f"compiling {source.name} failed: {' '.join(command)}")


setup(
    ext_modules=[
        Extension("pact_fast._native.libtree_pack", ["csrc/tree_pack.cpp"], optional=True),
        Extension(
            "pact_fast._native.liblogits_rows",
            ["csrc/logits_rows.cu"],
            depends=["csrc/logits_rows.cuh"],
            optional=True,
        ),
    ],
    cmdclass={"build_ext": BuildNative},
)
