"""Calibrations as files and as text."""

import dataclasses
import struct

import models
import numpy as np
import pytest
from calibrated import arguments, plainly, with_predictor

import hire_xform as hx


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
    refused(content.replace(b'"version":"5"', b'"version":"2"'), "format version 2.*reads 5")
    refused(content.replace(b"hire_xform.calibration", b"another_xx.calibration"), "no calibration")
    refused(content.replace(b"criterion", b"critorion"), "damaged")
    length = struct.unpack("<Q", content[:8])[0]
    refused(content[: 8 + length // 2], "truncated")
    with pytest.raises(FileNotFoundError, match="no file at"):
        hx.Calibration.load(tmp_path / "none")
