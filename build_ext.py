"""Compiles edit_distance.c into an extension module next to it. `python build_ext.py`, or the first import does it.

cffi's API mode checks the declarations below against the C source while compiling, and its calls release the GIL. Each
build happens in a folder of its own and is moved into place in one step, so that the processes of a torchrun, all
importing for the first time, cannot damage each other's.
"""

import argparse
import importlib
import os
import sysconfig
import tempfile
from pathlib import Path

import cffi

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "edit_distance.c"
LIBRARY = HERE / f"_edit_distance{sysconfig.get_config_var('EXT_SUFFIX')}"  # one per Python version

DECLARATIONS = """
    int edit_scripts(int64_t pairs, const int32_t *noisy, const int64_t *noisy_fence, const int32_t *clean,
                     const int64_t *clean_fence, uint8_t *script, int64_t *script_fence);
    void edit_labels(int64_t pairs, const int32_t *clean, const int64_t *clean_fence, const uint8_t *script,
                     const int64_t *script_fence, int64_t del_id, int64_t eos_id, int64_t ignore_id,
                     int64_t *token_target, int64_t *insert_target);
"""


def build() -> None:
    """Compiles the library. Raises cffi's VerificationError or OSError when it cannot."""
    builder = cffi.FFI()
    builder.cdef(DECLARATIONS)
    builder.set_source("_edit_distance", SOURCE.read_text(), extra_compile_args=["-O2"], py_limited_api=False)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=HERE) as folder:
        os.replace(builder.compile(tmpdir=folder), LIBRARY)
    importlib.invalidate_caches()


def load():
    """The compiled module, built first when it is missing or older than its sources."""
    if not LIBRARY.exists() or LIBRARY.stat().st_mtime < max(SOURCE.stat().st_mtime, Path(__file__).stat().st_mtime):
        build()
    return importlib.import_module("_edit_distance")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    build()
