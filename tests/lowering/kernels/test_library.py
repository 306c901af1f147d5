"""Which native library is loaded, and why none is: a wrong one would keep XLA from starting."""

import jax
import pytest

from hire_xform.lowering.kernels.cpu import library


@pytest.fixture
def headers(tmp_path, monkeypatch):
    """The headers of a jaxlib, with what a test writes into the one that says the version."""
    folder = tmp_path / "xla" / "ffi" / "api"
    folder.mkdir(parents=True)
    monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
    return folder / "c_api.h"


def says(major, minor):
    return f"#define XLA_FFI_API_MAJOR {major}\n#define XLA_FFI_API_MINOR {minor}\n"


def test_the_latest_that_this_jaxlib_takes_is_loaded(headers):
    built = {(0, 3): "a", (0, 4): "b", (0, 5): "c", (1, 0): "d"}
    for minor, want in ((3, "a"), (4, "b"), (5, "c"), (9, "c")):
        headers.write_text(says(0, minor))
        assert library._fitting(built) == want
    headers.write_text(says(1, 2))
    assert library._fitting(built) == "d"


@pytest.mark.parametrize("version", [(0, 5), (1, 0)])
def test_one_of_a_later_version_is_not(headers, version):
    headers.write_text(says(0, 4))
    built = "{}.{}".format(*version)
    want = f"they are built for version {built} of XLA's FFI, and this jaxlib has 0.4: install again"
    assert library._fitting({version: "a"}) == want


def test_a_jaxlib_that_does_not_say_its_version_gets_none(headers):
    assert library._fitting({(0, 1): "a"}).startswith("jaxlib does not say which version its FFI is")
    headers.write_text("#define XLA_FFI_API_MAJOR 0")
    assert library._fitting({(0, 1): "a"}).startswith("jaxlib does not say which version its FFI is")


def test_without_a_library_it_is_said_how_there_would_be_one(headers):
    assert library._fitting({}) == "they are not built, as an installation does where it finds a C++ compiler"


def test_what_is_loaded_here_is_of_a_version_that_this_jaxlib_takes():
    loaded = library.load()
    if isinstance(loaded, str):
        pytest.skip(loaded)
    assert loaded._name in {str(path) for path in library._built().values()}


def test_one_that_was_built_of_other_sources_is_not_used(monkeypatch):
    loaded = library.load()
    if isinstance(loaded, str):
        pytest.skip(loaded)
    assert loaded.hire_interface() == library.INTERFACE
    monkeypatch.setattr(library, "INTERFACE", library.INTERFACE + 1)
    # Nothing of it is registered with XLA: what is loaded already stays.
    told = library.load.__wrapped__()
    assert isinstance(told, str)
    assert told.endswith("was built of other sources than these: install again")
