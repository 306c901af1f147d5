"""Calibrations as files and as text."""

import copy
import dataclasses
import json
import random
import struct
import sys
import threading

import models
import numpy as np
import pytest
from calibrated import arguments, plainly, with_predictor
from safetensors import safe_open
from safetensors.numpy import save

import hire_xform as hx
from hire_xform.calibration.calibration_file import checksum

pytestmark = pytest.mark.any_jax("files and their checks")


@pytest.fixture(scope="module")
def made():
    params = models.stacked_params()
    config = with_predictor(hx.Projected(0.5, bits=8))
    return plainly(models.scanned, [(params, *arguments())], recall=0.9, config=config)


def test_a_saved_calibration_is_the_same_when_loaded(made, tmp_path):
    path = tmp_path / "model.calibration"
    made.save(path)
    loaded = hx.Calibration.load(path)
    assert (loaded.target, loaded.batches, list(loaded.sites)) == (made.target, made.batches, list(made.sites))
    for one, other in zip(made.sites.values(), loaded.sites.values(), strict=True):
        for field in dataclasses.fields(one):
            a, b = getattr(one, field.name), getattr(other, field.name)
            assert type(a) is type(b), field.name
            if field.name == "curves":
                assert list(a) == list(b)
                a = tuple(v for c in a.values() for v in (c.wanted, c.wanted_energy, c.kl, c.predictor_bytes))
                b = tuple(v for c in b.values() for v in (c.wanted, c.wanted_energy, c.kl, c.predictor_bytes))
            for x, y in zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]:
                np.testing.assert_array_equal(x, y)
        assert one.inputs == other.inputs
    assert str(loaded) == str(made)
    assert [p.name for p in tmp_path.iterdir()] == ["model.calibration"]


def test_repr_is_short_and_the_table_has_a_line_for_each_layer(made):
    assert repr(made) == "Calibration(2 sites, recall 0.9, 3 tokens)"
    lines = made.table().splitlines()
    assert len(lines) == 1 + models.L + 1
    assert lines[0].split()[:5] == ["site", "kind", "layer", "tokens", "size"]


def test_files_that_can_not_be_used_are_refused_with_the_reason(made, tmp_path):
    path = tmp_path / "c"
    made.save(path)
    content = path.read_bytes()

    def refused(data, match):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=match):
            hx.Calibration.load(path)

    refused(content[:-7], "truncated")
    refused(content[:3], "truncated")
    refused(b"", "truncated")
    refused(content.replace(b'"version":"6"', b'"version":"5"'), "format version 5.*reads 6")
    assert b'"format":"hire_xform.calibration"' in content  # as in files that were saved before
    refused(content.replace(b"hire_xform.calibration", b"another_xx.calibration"), "no calibration")
    refused(content.replace(b"criterion", b"critorion"), "damaged")
    length = struct.unpack("<Q", content[:8])[0]
    refused(content[: 8 + length // 2], "truncated")
    with pytest.raises(FileNotFoundError, match="no file at"):
        hx.Calibration.load(tmp_path / "none")


@pytest.fixture
def content(made, tmp_path):
    made.save(tmp_path / "clean")
    return (tmp_path / "clean").read_bytes()


def loads_or_is_damaged(path, data):
    """What a file with this content loads as; None where it is refused in the right words."""
    path.write_bytes(data)
    try:
        return hx.Calibration.load(path)
    except ValueError as error:
        said = str(error)
    assert "damaged" in said
    assert str(path) in said
    return None


def test_whatever_bits_flip_or_are_missing_it_loads_equal_or_is_damaged(content, tmp_path):
    rng, loaded = random.Random(0), 0
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for number in range(400):
        data = bytearray(content)
        # Most of the file is arrays, most of what can go wrong is in its header.
        at = rng.randrange(header if number % 2 else len(data))
        if number % 10 == 0:
            del data[at:]
        elif number % 10 == 1:
            data[at : at + rng.randrange(1, 40)] = rng.randbytes(rng.randrange(40))
        else:
            data[at] ^= 1 << rng.randrange(8)
        got = loads_or_is_damaged(tmp_path / "c", bytes(data))
        if got is not None:
            loaded += 1
            got.save(tmp_path / "again")
            assert (tmp_path / "again").read_bytes() == content
    assert loaded < 40


def parts(content, path):
    path.write_bytes(content)
    with safe_open(str(path), framework="numpy") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def signed(header, told, arrays):
    """A file that says what it says on purpose: its checksum is right."""
    header = {**header, "calibration": told if isinstance(told, str) else json.dumps(told)}
    return save(arrays, metadata={**header, "checksum": checksum(header, arrays)})


def places(told, path=()):
    """Every place of a JSON value, as the keys that lead there."""
    yield path
    inner = told.items() if isinstance(told, dict) else enumerate(told) if isinstance(told, list) else ()
    for key, value in inner:
        yield from places(value, (*path, key))


def test_a_file_that_says_something_else_is_of_use_or_damaged(content, tmp_path):
    header, arrays = parts(content, tmp_path / "p")
    told = json.loads(header["calibration"])
    rng, values = random.Random(0), (None, 0, -1, 3, 2**70, 0.5, 1e400, float("nan"), "", "x", [], {}, [[]], True)
    for where in [p for p in places(told) if p]:
        for value in rng.sample(values, 4):
            other = copy.deepcopy(told)
            inner = other
            for key in where[:-1]:
                inner = inner[key]
            inner[where[-1]] = value
            got = loads_or_is_damaged(tmp_path / "c", signed(header, other, arrays))
            if got is not None:
                assert got.table()
                assert all(site.chosen_for(0.9) for site in got.sites.values())
    for text in ("", "{", "[" * 100_000, "[]", "null", "1" * 5000):
        assert loads_or_is_damaged(tmp_path / "c", signed(header, text, arrays)) is None


def test_arrays_that_are_not_what_they_should_be_are_damaged(content, tmp_path):
    header, arrays = parts(content, tmp_path / "p")
    told = json.loads(header["calibration"])
    assert loads_or_is_damaged(tmp_path / "c", signed(header, told, arrays)) is not None
    block = next(i for i, site in enumerate(told["sites"]) if site["kind"] == "ffn")
    order = np.tile(np.arange(models.M, dtype=np.int32), (models.L, 1))
    touched = np.full((models.L, 2), 0.5)
    twice, outside = order.copy(), order.copy()
    twice[1, 3], outside[0, 0] = 4, models.M
    for name in ("order", "often"):
        given = {**arrays, f"{block}/touched": touched}
        assert loads_or_is_damaged(tmp_path / "c", signed(header, told, {**given, f"{block}/{name}": order}))
        for wrong in (twice, outside, -order, order.astype(np.float32), order[:1]):
            data = signed(header, told, {**given, f"{block}/{name}": wrong})
            assert loads_or_is_damaged(tmp_path / "c", data) is None
    for name, array in arrays.items():
        assert loads_or_is_damaged(tmp_path / "c", signed(header, told, {**arrays, name: array[None]})) is None
        assert (
            loads_or_is_damaged(tmp_path / "c", signed(header, told, {**arrays, name: np.asarray(array != 0)})) is None
        )
    for wrong in (0, -1, models.M + 1):
        data = signed(header, told, {**arrays, f"{block}/sizes": np.full(models.L, wrong)})
        assert loads_or_is_damaged(tmp_path / "c", data) is None


def test_saves_at_once_leave_one_of_them_whole(made, tmp_path):
    path, errors, done = tmp_path / "c", [], threading.Event()

    def guarded(work):
        try:
            work()
        except Exception as error:
            errors.append(error)

    def saves():
        for _ in range(15):
            made.save(path)

    def loads():
        while not done.is_set():
            assert hx.Calibration.load(path).target == made.target

    made.save(path)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        writers = [threading.Thread(target=guarded, args=(saves,)) for _ in range(4)]
        reader = threading.Thread(target=guarded, args=(loads,))
        for thread in (*writers, reader):
            thread.start()
        for thread in writers:
            thread.join()
        done.set()
        reader.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_link_where_another_save_would_have_written_is_not_followed(made, tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "c.partial").symlink_to(tmp_path / "mine")
    made.save(tmp_path / "c")
    assert (tmp_path / "mine").read_text() == "mine"
    assert hx.Calibration.load(tmp_path / "c").target == made.target


def test_a_save_that_fails_leaves_what_was_there(made, tmp_path, monkeypatch):
    path = tmp_path / "c"
    path.write_text("old")
    path.chmod(0o640)

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", full)
        with pytest.raises(OSError, match="No space"):
            made.save(path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    with pytest.raises(ValueError, match="path=''; expected the name of a file"):
        made.save("")
    with pytest.raises(IsADirectoryError):
        made.save(tmp_path)
    made.save(path)
    assert path.stat().st_mode & 0o777 == 0o640
