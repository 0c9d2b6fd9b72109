"""Compiles edit_distance.c into an extension module next to it. `python build_ext.py`, or the first import does it.

cffi's API mode checks the declarations below against the C source while compiling, and its calls release the GIL.
Each build happens in a folder of its own and the finished library is moved into place in one step, so that the many
processes of a torchrun, all importing for the first time, cannot damage each other's.
"""

import importlib.util
import os
import sysconfig
import tempfile
from pathlib import Path

import cffi

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "edit_distance.c"
LIBRARY = HERE / f"_edit_distance{sysconfig.get_config_var('EXT_SUFFIX')}"  # one per Python version and platform

DECLARATIONS = """
    int edit_scripts(int64_t pairs, int64_t first, int64_t step, const int32_t *noisy, const int64_t *noisy_fence,
                     const int32_t *clean, const int64_t *clean_fence, uint8_t *script, int64_t *length);
    void edit_labels(int64_t pairs, int64_t first, int64_t step, const int64_t *noisy_fence, const int32_t *clean,
                     const int64_t *clean_fence, const uint8_t *script, const int64_t *length, int64_t del_id,
                     int64_t eos_id, int64_t ignore_id, int64_t *token_target, int64_t *insert_target);
"""


def build() -> Path:
    """Compiles the extension and returns its path. Raises cffi's VerificationError or OSError when it cannot."""
    builder = cffi.FFI()
    builder.cdef(DECLARATIONS)
    builder.set_source("_edit_distance", SOURCE.read_text(), extra_compile_args=["-O3"], py_limited_api=False)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=HERE) as folder:
        os.replace(builder.compile(tmpdir=folder), LIBRARY)
    return LIBRARY


def load():
    """The compiled module, built first when it is missing or older than its sources."""
    newest_source = max(SOURCE.stat().st_mtime, Path(__file__).stat().st_mtime)
    if not LIBRARY.exists() or LIBRARY.stat().st_mtime < newest_source:
        build()
    spec = importlib.util.spec_from_file_location("_edit_distance", LIBRARY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    print(build())
