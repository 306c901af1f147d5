"""Which version of XLA's FFI headers are of."""

import jax
import pytest

from hire_xform.lowering.kernels.cpu.ffi_version import ffi_version

BOTH = "#define XLA_FFI_API_MAJOR 0\n#define XLA_FFI_API_MINOR 12\n"


@pytest.mark.parametrize(
    ("text", "want"),
    [(BOTH, (0, 12)), ("", None), ("#define XLA_FFI_API_MAJOR 0\n", None), ("// XLA_FFI_API_MAJOR MINOR 3\n", None)],
)
def test_what_headers_say(tmp_path, text, want):
    header = tmp_path / "xla" / "ffi" / "api" / "c_api.h"
    header.parent.mkdir(parents=True)
    header.write_text(text)
    assert ffi_version(tmp_path) == want


def test_headers_that_are_missing(tmp_path):
    assert ffi_version(tmp_path) is None


def test_those_of_the_installed_jaxlib():
    from pathlib import Path

    version = ffi_version(Path(jax.ffi.include_dir()))
    assert version is not None
    assert version >= (0, 1)
