"""Compiles edit_distance.c into an extension module next to it. `python build_ext.py`, or the first import does it.

cffi's API mode checks the declarations below against the C source while compiling, and its calls release the GIL. The
library is built for the widest vectors of this machine and says so in its name, so machines that share a folder do not
run each other's. Each build happens in a folder of its own and is moved into place in one step, so that the processes
of a torchrun, all importing for the first time, cannot damage each other's either.
"""

import importlib.util
import os
import platform
import sysconfig
import tempfile
from pathlib import Path

import cffi

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "edit_distance.c"

DECLARATIONS = """
    int edit_scripts(int64_t pairs, int64_t first, int64_t step, const int32_t *noisy, const int64_t *noisy_fence,
                     const int32_t *clean, const int64_t *clean_fence, uint8_t *script, int64_t *length);
    void edit_labels(int64_t pairs, int64_t first, int64_t step, const int64_t *noisy_fence, const int32_t *clean,
                     const int64_t *clean_fence, const uint8_t *script, const int64_t *length, int64_t del_id,
                     int64_t eos_id, int64_t ignore_id, int64_t *token_target, int64_t *insert_target);
"""


def widest_vectors() -> str:
    """One of "avx512f", "avx2" and "base"; the last is what every machine of the architecture has."""
    cpuinfo = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not cpuinfo.exists():
        return "base"
    flags = cpuinfo.read_text().split()
    return next((name for name in ("avx512f", "avx2") if name in flags), "base")


def library(vectors: str) -> Path:
    """Where the library is: one per kind of machine and Python version."""
    return HERE / f"_edit_distance.{vectors}{sysconfig.get_config_var('EXT_SUFFIX')}"


def build(vectors: str) -> Path:
    """Compiles the library and returns its path. Raises cffi's VerificationError or OSError when it cannot."""
    builder = cffi.FFI()
    builder.cdef(DECLARATIONS)
    flags = ["-O3"] if vectors == "base" else ["-O3", f"-m{vectors}"]
    builder.set_source("_edit_distance", SOURCE.read_text(), extra_compile_args=flags, py_limited_api=False)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=HERE) as folder:
        os.replace(builder.compile(tmpdir=folder), library(vectors))
    return library(vectors)


def load(vectors: str | None = None):
    """The compiled module, built first when it is missing or older than its sources."""
    vectors = vectors or widest_vectors()
    path = library(vectors)
    newest_source = max(SOURCE.stat().st_mtime, Path(__file__).stat().st_mtime)
    if not path.exists() or path.stat().st_mtime < newest_source:
        build(vectors)
    spec = importlib.util.spec_from_file_location("_edit_distance", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    print(build(widest_vectors()))
