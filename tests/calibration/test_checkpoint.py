"""``hx.calibrate(checkpoint=...)``: a calibration that was interrupted goes on, and ends as if it had not been."""

import dataclasses

import numpy as np
import pytest
from calibrated import FORCED, D, block, block_params, normal
from safetensors import safe_open

import hire_xform as hx
from hire_xform.calibrating import checkpoint
from hire_xform.calibrating.collecting import Collected

pytestmark = pytest.mark.any_jax("files, and what is added up by NumPy")

PARAMS = block_params()
BATCHES = [(PARAMS, normal(s, 6 + s % 2, D)) for s in range(5)]
LOW = [hx.LowRank(3), hx.Quantized(4)]


class Breaking(list):
    """Batches that are interrupted once, after so many of them, in the so manieth pass."""

    def __init__(self, values, passes, after, kind=KeyboardInterrupt):
        super().__init__(values)
        self.passes, self.after, self.kind = passes, after, kind

    def __iter__(self):
        self.passes -= 1
        for number, batch in enumerate(super().__iter__()):
            if self.passes == 0 and number == self.after:
                raise self.kind
            yield batch


def calibrated(batches=BATCHES, path=None, **options):
    given = {"predictors": LOW, "config": FORCED, "checkpoint": path, **options}
    return hx.calibrate(block, batches, **given)


def assert_equal(one, other):
    assert list(one.sites) == list(other.sites)
    assert (one.batches, one.target) == (other.batches, other.target)
    for a, b in zip(one.sites.values(), other.sites.values(), strict=True):
        for field in dataclasses.fields(a):
            left, right = getattr(a, field.name), getattr(b, field.name)
            if field.name == "curves":
                # The last bits of an eigenvector hang on where in memory a matrix lies.
                for x, y in zip(left.values(), right.values(), strict=True):
                    np.testing.assert_array_equal(x.wanted, y.wanted)
                    np.testing.assert_allclose(0 if x.kl is None else x.kl, 0 if y.kl is None else y.kl, rtol=1e-3)
                continue
            if isinstance(left, (list, tuple)):
                for x, y in zip(left, right, strict=True):
                    np.testing.assert_array_equal(x, y)
            else:
                np.testing.assert_array_equal(left, right)


def sums(path):
    """What a checkpoint holds, as bytes by name."""
    with safe_open(str(path), framework="numpy") as file:
        return {name: file.get_tensor(name).tobytes() for name in file.keys()}, file.metadata()["checksum"]  # noqa: SIM118


@pytest.fixture(scope="module")
def whole():
    return calibrated()


@pytest.fixture
def added(monkeypatch):
    """The numbers of the batches that are added up."""
    numbers, original = [], Collected.add

    def add(self, found, number):
        numbers.append(number)
        original(self, found, number)

    monkeypatch.setattr(Collected, "add", add)
    return numbers


@pytest.mark.parametrize(("passes", "after"), [(1, 3), (2, 0), (2, 4)])
def test_it_goes_on_where_it_was_interrupted_and_ends_alike(whole, tmp_path, added, passes, after):
    path = tmp_path / "kept"
    with pytest.raises(KeyboardInterrupt):
        calibrated(Breaking(BATCHES, passes, after), path)
    assert added == [*range(5 if passes == 2 else after), *range(after if passes == 2 else 0)]
    assert path.is_file()
    added.clear()
    assert_equal(calibrated(path=path), whole)
    done = [*range(5 if passes == 2 else after), *range(after if passes == 2 else 0)]
    assert len(added) + len(done) == 10
    assert not list(tmp_path.iterdir())


def test_it_is_interrupted_twice_and_by_other_errors(whole, tmp_path):
    path = tmp_path / "kept"
    for passes, after, kind in ((1, 2, MemoryError), (2, 3, KeyboardInterrupt)):
        with pytest.raises(kind):
            calibrated(Breaking(BATCHES, passes, after, kind), path)
    assert_equal(calibrated(path=path), whole)


def test_another_target_goes_on_too(tmp_path):
    path = tmp_path / "kept"
    with pytest.raises(KeyboardInterrupt):
        calibrated(Breaking(BATCHES, 2, 4), path)
    assert_equal(calibrated(path=path, recall=0.5), calibrated(recall=0.5))


def test_it_is_written_in_time_and_not_at_every_batch(tmp_path, monkeypatch):
    path, clock, sizes = tmp_path / "kept", [0.0], []
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: clock[0])

    def watched():
        for number, batch in enumerate(BATCHES):
            sizes.append((number, path.is_file()))
            clock[0] += 40.0
            yield batch

    calibrated(watched(), path, predictors=[hx.Quantized(4)])
    # After 80 and 160 seconds of what takes 40 each.
    assert sizes == [(0, False), (1, False), (2, True), (3, True), (4, True)]
    assert not path.exists()


def test_one_of_something_else_is_refused_and_stays(tmp_path):
    path = tmp_path / "kept"
    with pytest.raises(KeyboardInterrupt):
        calibrated(Breaking(BATCHES, 2, 2), path)
    content, held = path.read_bytes(), sums(path)
    other = {**PARAMS, "head": PARAMS["head"] + 1}
    cases = [
        ({"predictors": [hx.LowRank(4)]}, r"its predictors is \[LowRank\(rank=3.*expected \[LowRank\(rank=4"),
        ({"config": hx.Config(ffn=None, rules=FORCED.rules)}, "another calibration: its config"),
        ({"regroup": False}, "its regroup is True; expected False"),
        ({"batches": BATCHES[:2]}, "there are 2 batches, where .*kept was measured on 5 or more"),
        ({"batches": BATCHES[1:]}, "batch 0, or its weights, is not what .*kept was measured on"),
        ({"batches": [(other, x) for _, x in BATCHES]}, "batch 0, or its weights"),
    ]
    for options, match in cases:
        with pytest.raises(ValueError, match=match):
            calibrated(path=path, **options)
        assert sums(path) == held
    with pytest.raises(ValueError, match="its function is block; expected"):
        hx.calibrate(lambda p, x: block(p, x), BATCHES, predictors=LOW, config=FORCED, checkpoint=path)
    for damaged in (content[:-5], b"", content.replace(b'"version":"1"', b'"version":"9"')):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="no checkpoint of a calibration, or is damaged"):
            calibrated(path=path)
    with pytest.raises(ValueError, match="checkpoint=''; expected the name of a file"):
        calibrated(path="")
