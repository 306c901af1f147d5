"""``HIRE_DUMP``: what each stage made, in files of their own."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from goldens import small

import hire_xform as hx

FORCE = hx.Config(rules=(hx.Rule("*", force=True, vocab=hx.Vocab(candidates=16)),), ffn=hx.Ffn(active=0.25))
STAGES = ["1-graph", "2-weights", "3-matches", "4-plan", "5-packed", "6-program"]


def trace(config=FORCE):
    return hx.sparsify(small.decode_step, config=config).trace(*small.inputs())


def files(folder: Path) -> dict[str, str]:
    return {path.name.removesuffix(".txt"): path.read_text(encoding="utf-8") for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HIRE_DUMP", str(tmp_path / "new" / "dumps"))
    return tmp_path / "new" / "dumps"


def test_each_stage_has_a_file_and_a_time(folder):
    traced = trace()
    found = files(folder / "0000-decode_step")
    assert sorted(found) == [*STAGES, "times"]
    times = [line.split() for line in found["times"].splitlines()]
    assert [name for name, *_ in times] == ["trace", "graph", "weights", "matches", "plan", "packed", "program"]
    assert all(float(took) >= 0 and unit == "ms" for _, took, unit in times)
    for product in traced._detection.products:
        assert product.path in found["1-graph"]
        assert f"  {product.path}  " in found["2-weights"]
    assert "params['layers']['w<in>']:float32[2,16,64]" in found["2-weights"]
    assert "scope scan[0]/ (scan, 2 times)" in found["1-graph"]
    for match in traced._detection.matches:
        assert f" {match.node.path}: " in found["3-matches"]
    for refusal in traced.plan.refusals:
        assert f"rejected {refusal.path}: " in found["3-matches"]
    assert found["4-plan"].startswith("2 sites rewritten")
    (layout,) = traced.layouts(traced._holdings)
    kept, forms = len(layout.kept), len(layout.keys)
    assert found["5-packed"].startswith(f"argument 0: {kept} plain arrays, {forms} packed forms\n")
    assert len(found["5-packed"].splitlines()) == 1 + kept + forms
    assert "Quantized(bits=8) of params['embed']: int8[96,16], float32[96]" in found["5-packed"]
    assert found["6-program"].startswith("decode_step on cpu: 2 sites rewritten")
    assert "da_top_k" in found["6-program"]


def test_files_say_nothing_that_changes_from_run_to_run(folder):
    trace()
    trace()
    first, second = (files(folder / f"000{i}-decode_step") for i in range(2))
    for stage in STAGES:
        assert first[stage] == second[stage]
        assert not re.search(r" at 0x[0-9a-f]+", first[stage])


def test_numbers_go_on_and_no_file_is_replaced(folder):
    (folder / "0006-mine").mkdir(parents=True)
    (folder / "0006-mine" / "1-graph.txt").write_text("mine")
    (folder / "notes.txt").write_text("notes")
    trace()
    trace()
    assert sorted(p.name for p in folder.iterdir()) == [
        "0006-mine",
        "0007-decode_step",
        "0008-decode_step",
        "notes.txt",
    ]
    assert (folder / "0006-mine" / "1-graph.txt").read_text() == "mine"
    assert (folder / "notes.txt").read_text() == "notes"


def test_every_program_of_a_step_has_its_own(folder):
    step = hx.sparsify(lambda w, x: jnp.tanh(x @ w), config=FORCE)
    w = jnp.ones((8, 64))
    jax.block_until_ready([step(w, jnp.ones((n, 8))) for n in (1, 2, 1)])
    assert sorted(p.name for p in folder.iterdir()) == ["0000-lambda", "0001-lambda"]


def test_a_program_without_sites_is_dumped_too(folder):
    trace(hx.Config(ffn=None, vocab=None))
    found = files(folder / "0000-decode_step")
    assert found["4-plan"].startswith("No site is rewritten")
    assert sorted(found) == [*STAGES, "times"]


@pytest.mark.filterwarnings("ignore:calibrate")
def test_what_is_measured_for_a_calibration_has_no_program_of_its_own(folder):
    params, *data = small.inputs()
    concrete = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), (params, *data))
    hx.calibrate(small.decode_step, [concrete])
    found = [sorted(files(path)) for path in sorted(folder.iterdir())]
    assert [*STAGES[:4], "times"] in found


@pytest.mark.parametrize("place", ["a file", "under a file"])
def test_a_folder_that_can_t_be_made_is_said_with_the_variable(tmp_path, monkeypatch, place):
    (tmp_path / "file").write_text("mine")
    given = tmp_path / "file" if place == "a file" else tmp_path / "file" / "dumps"
    monkeypatch.setenv("HIRE_DUMP", str(given))
    with pytest.raises(ValueError, match=r"HIRE_DUMP='.*file.*expected a folder that is there or can be made"):
        trace()
    assert (tmp_path / "file").read_text() == "mine"


def test_an_empty_variable_dumps_nothing(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HIRE_DUMP", "")
    trace()
    assert not list(tmp_path.iterdir())
