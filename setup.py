"""Builds csrc/ into `vllm_flashmla_backend/flash_mla/_kernels.so`; all else is in pyproject.toml.

The library needs neither torch nor Python to build or to load: it is bound with Apache TVM FFI,
so one `py3-none-linux_x86_64` wheel serves every Python and every torch. Objects, their keys and
what the compiler said about them stay in build/kernels/, so that a second build compiles only
what changed. Without nvcc the package installs without kernels and says so.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
OBJECTS = ROOT / "build" / "kernels"
LIBRARY = "vllm_flashmla_backend.flash_mla._kernels"

OLDEST_CUDA = (12, 4)  # the oldest whose headers have all that csrc uses
TVM_FFI = "0.1.10"  # the oldest runtime we support, and what vLLM 0.26 pins; newer ones load its libraries
PROCESSES = 2  # compilers at once: each needs about 1 GB

NVCC_FLAGS = [
    "-std=c++20",
    "-O3",
    "-lineinfo",  # lets profilers and compute-sanitizer name source lines, at no cost in speed
    "--expt-relaxed-constexpr",
    "-gencode=arch=compute_90a,code=sm_90a",  # wgmma and setmaxnreg exist on sm_90a alone
    "-Xptxas=-v",  # registers, shared memory and spills of each kernel: tests/test_build.py reads them
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Werror",
]


class NoCompiler(Exception):
    """No usable nvcc; the message says what was looked for."""


def nvcc_candidates() -> list[Path]:
    """Where nvcc may be, best first; CUDA_HOME, where set, is a choice that nothing else overrides."""
    if home := os.environ.get("CUDA_HOME"):
        return [Path(home) / "bin" / "nvcc"]
    found = [Path(on_path)] if (on_path := shutil.which("nvcc")) else []
    # sysconfig, not sys.path: an isolated build still sees the environment it installs into.
    site_packages = Path(sysconfig.get_path("purelib"))
    return [*found, Path("/usr/local/cuda/bin/nvcc"), *sorted(site_packages.glob("nvidia/*/bin/nvcc"))]


def find_nvcc() -> Path:
    """The CUDA compiler, by the name its toolkit lies next to."""
    nvcc = next((path for path in nvcc_candidates() if path.is_file()), None)
    if nvcc is None:
        raise NoCompiler(f"no nvcc in {', '.join(str(path.parent) for path in nvcc_candidates())}")
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    if release is None or tuple(map(int, release.groups())) < OLDEST_CUDA:
        version = release.group(0) if release else "of unknown release"
        raise NoCompiler(f"{nvcc} is {version}")
    return nvcc


def tvm_ffi_paths() -> tuple[list[str], str]:
    """Include directories and library directory of apache-tvm-ffi, which must be the pinned release."""
    try:
        import tvm_ffi
        from tvm_ffi import libinfo
    except ImportError:
        raise SystemExit(f"building the GPU kernels needs: pip install apache-tvm-ffi=={TVM_FFI}") from None
    if tvm_ffi.__version__ != TVM_FFI:
        raise SystemExit(
            f"the GPU kernels are built against apache-tvm-ffi {TVM_FFI}, and {tvm_ffi.__version__} is "
            "installed here: build with `pip install .`, which fetches the right one for the build alone"
        )
    includes = {libinfo.find_include_path(), libinfo.find_dlpack_include_path()}
    return sorted(includes), str(Path(libinfo.find_libtvm_ffi()).parent)


def run(command: list[str | Path]) -> str:
    """Run a compiler; its output, or the end of the build with that output."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}")
    return done.stdout


def key_of(source: Path, nvcc: Path) -> str:
    """A digest of everything the object of `source` depends on: it, all headers, flags, compilers."""
    digest = hashlib.sha256(repr((NVCC_FLAGS, TVM_FFI)).encode())
    digest.update(run([nvcc, "--version"]).encode())
    for path in [source, *sorted(CSRC.rglob("*.h")), *sorted(CSRC.rglob("*.cuh"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def compile_source(source: Path, nvcc: Path, includes: list[str]) -> Path:
    """Compile one .cu file, unless its object in build/kernels/ has the same key."""
    name = "_".join(source.relative_to(CSRC).with_suffix("").parts)
    out, key_file = OBJECTS / f"{name}.o", OBJECTS / f"{name}.key"
    key = key_of(source, nvcc)
    if out.exists() and key_file.exists() and key_file.read_text() == key:
        return out
    print(f"nvcc {source.relative_to(ROOT)}", flush=True)
    system = [flag for path in includes for flag in ("-isystem", path)]
    said = run([nvcc, *NVCC_FLAGS, f"-I{CSRC}", *system, "-c", source, "-o", out])
    (OBJECTS / f"{name}.log").write_text(said)
    key_file.write_text(key)  # last, so that an interrupted compile counts for nothing
    return out


class BuildKernels(build_ext):
    """`build_ext`, with nvcc as the compiler of the one library."""

    def get_ext_filename(self, ext_name: str) -> str:
        return f"{ext_name.replace('.', os.sep)}.so"  # no Python ABI in the name: it holds no Python

    def build_extension(self, ext: Extension) -> None:
        nvcc = find_nvcc()
        includes, lib_dir = tvm_ffi_paths()
        OBJECTS.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(PROCESSES) as pool:
            jobs = [pool.submit(compile_source, ROOT / source, nvcc, includes) for source in ext.sources]
            objects = [job.result() for job in jobs]
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        # libtvm_ffi.so is named but not searched for: importing tvm_ffi loads it before our library.
        # -z defs makes every other missing symbol an error here, not at a user's first call.
        # The pip packages keep cudart in lib/, where nvcc itself looks in lib64/ only.
        search = [f"-L{lib_dir}", f"-L{nvcc.resolve().parents[1]}/lib"]
        link = ["-shared", "-cudart=static", "-Xlinker=-z,defs,--exclude-libs,ALL"]
        run([nvcc, *link, *objects, *search, "-ltvm_ffi", "-o", library])


class Wheel(bdist_wheel):
    """A wheel for any Python; for this platform where it holds the library."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


def kernels() -> list[Extension]:
    """The library, or nothing where it cannot be built."""
    try:
        find_nvcc()
    except NoCompiler as reason:
        if not {"egg_info", "dist_info"} & set(sys.argv):  # say it once, not in every step of pip's
            print(
                f"vllm-flashmla-backend: GPU kernels not built ({reason}); to get them, install CUDA 12.4 or "
                "newer, or the pip packages of the extra [nvcc], and install this package again",
                file=sys.stderr,
            )
        return []
    sources = sorted(str(path.relative_to(ROOT)) for path in CSRC.rglob("*.cu"))
    return [Extension(LIBRARY, sources)]


setup(ext_modules=kernels(), cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel})
