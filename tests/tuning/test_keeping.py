"""Which profile plans are made for: named ones, files, and what is kept in the user's cache folder."""

import dataclasses
import json
import logging
import os
import warnings

import jax
import jax.numpy as jnp
import pytest
from absl import logging as absl_logging

import hire_xform as hx
from hire_xform.passes.plan.machine import BUILT_IN
from hire_xform.passes.plan.profile import Profile
from hire_xform.tuning import keeping, measuring

V, D = 65_536, 1024
SHAPES = jax.ShapeDtypeStruct((D, V), jnp.float32), jax.ShapeDtypeStruct((1, D), jnp.float32)
CONFIG = hx.approximate()


def head(w, x):
    return jnp.argmax(x @ w, axis=-1)


def plan_here():
    return hx.sparsify(head, config=CONFIG).trace(*SHAPES).plan


def with_int8(share, **changed):
    """A profile whose products of 8 bits read at a share of the speed of dense ones, as though it were measured."""
    base = BUILT_IN["avx2"]
    scores = dict.fromkeys(base.scores, ((1, 1 / (share * base.memory)),))
    return dataclasses.replace(base, name="a test", source="measured", scores=scores, **changed)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty cache folder, and nothing that is remembered of another."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(keeping.VARIABLE)
    yield tmp_path / "hire_xform"
    for known in (keeping._kept, keeping._named, keeping._measured_once):
        known.cache_clear()


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_a_profile_is_the_same_after_a_file(name, tmp_path):
    path = tmp_path / "profile.json"
    keeping.keep(BUILT_IN[name], path)
    profile, key = keeping.read(path)
    assert profile == BUILT_IN[name]
    assert key == keeping.key_of(profile.platform)


def test_what_is_kept_is_what_plans_are_made_for(folder):
    assert keeping.kept("cpu") is None
    for share, sites in ((0.1, 0), (0.9, 1)):
        profile = with_int8(share)
        path = keeping.keep(profile)
        assert path.parent == folder
        assert keeping.profile_for("cpu") == profile
        plan = plan_here()
        assert len(plan.sites) == sites
        assert plan.profile == profile
        assert json.loads(plan.to_json())["profile"] == {"name": "a test", "source": "measured"}
        assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize(("source", "sites"), [("measured", 0), ("built in", 1)])
def test_what_is_measured_has_to_be_faster_by_a_margin(source, sites):
    free = {"fixed": 0.0, "choosing": 0.0}
    profile = dataclasses.replace(with_int8(1.0 / 3.75, **free), source=source)
    keeping.keep(profile)
    # 8 bits take 0.94 of the time of f32, and the candidates' rows half a hundredth.
    assert len(plan_here().sites) == sites


def test_off_and_names_and_files_stand_before_what_is_kept(monkeypatch, tmp_path):
    keeping.keep(with_int8(0.9))
    monkeypatch.setenv(keeping.VARIABLE, "avx2")
    assert not plan_here().sites
    monkeypatch.setenv(keeping.VARIABLE, "off")
    assert keeping.profile_for("cpu").source == "built in"
    mine = tmp_path / "mine.json"
    keeping.keep(with_int8(0.01), mine)
    monkeypatch.setenv(keeping.VARIABLE, str(mine))
    assert keeping.profile_for("cpu") == with_int8(0.01)
    # A CPU's profile says nothing of a TPU.
    assert keeping.profile_for("tpu").platform == "tpu"


def test_processes_that_run_one_program_plan_alike(monkeypatch, tmp_path):
    keeping.keep(with_int8(0.9))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert keeping.profile_for("cpu").source == "built in"
    # Unless they are given one.
    keeping.keep(with_int8(0.9), tmp_path / "mine.json")
    monkeypatch.setenv(keeping.VARIABLE, str(tmp_path / "mine.json"))
    assert keeping.profile_for("cpu").source == "measured"


@pytest.mark.parametrize("change", ["cores", "jax", "library", "xla_flags", "device"])
def test_a_profile_of_another_machine_is_left_aside(change, monkeypatch, folder):
    keeping.keep(with_int8(0.9))
    other = {**keeping.key_of("cpu"), change: "another"}
    monkeypatch.setattr(keeping, "key_of", lambda platform: other)
    assert keeping.kept("cpu") is None
    assert keeping.profile_for("cpu").source == "built in"
    # Its content counts, too: a file that was copied there is of another machine.
    (path,) = folder.iterdir()
    path.rename(keeping.path_of("cpu"))
    keeping._kept.cache_clear()
    with pytest.warns(hx.HireWarning, match=r"is of another machine, .* `hire-xform tune` makes it anew"):
        assert keeping.kept("cpu") is None


def broken(change):
    content = {"format": keeping.FORMAT, "key": keeping.key_of("cpu"), "profile": with_int8(0.9).to_dict()}
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "it is no JSON"),
        ("[]", r"it has format \[\]; expected"),
        (lambda c: c.update(format=0), "it has format 0; expected"),
        (lambda c: c.pop("key"), "it does not say of what machine"),
        (lambda c: c["profile"].pop("fixed"), "a profile with fields"),
        (lambda c: c["profile"].update(fixed=-1.0), r"fixed=-1\.0; expected a finite number"),
        (lambda c: c["profile"].update(fixed="fast"), "fixed='fast'; expected"),
        (lambda c: c["profile"]["scores"].pop("int8"), "a table of"),
        (lambda c: c["profile"]["scores"].update(int8=[[1, 0.0]]), "expected a positive finite number"),
        (lambda c: c["profile"]["scores"].update(int8=[[2, 1.0], [1, 1.0]]), "expected ascending numbers"),
        (lambda c: c["profile"]["rows"]["dot f32"].pop("points"), "tables are not of numbers"),
        (lambda c: c["profile"].update(platform="abacus"), "platform='abacus'; expected one of cpu, gpu, tpu"),
    ],
)
def test_a_broken_file_is_left_aside_with_one_warning(text, why, folder, monkeypatch):
    path = keeping.keep(with_int8(0.9))
    path.write_text(text if isinstance(text, str) else broken(text))
    keeping._kept.cache_clear()
    with pytest.warns(hx.HireWarning, match=why):
        assert plan_here().profile.source == "built in"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plan_here().profile.source == "built in"
    # A file that the user names is not passed over.
    monkeypatch.setenv(keeping.VARIABLE, str(path))
    with pytest.raises(ValueError, match=f"HIRE_TUNE=.*{why}"):
        keeping.profile_for("cpu")


def test_a_folder_that_can_not_be_written_is_told_of_and_stops_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(hx.HireWarning, match=r"can't be kept in .*: Not a directory.*HIRE_TUNE=FILE"):
        assert keeping.keep(with_int8(0.9)) is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert keeping.profile_for("cpu").source == "built in"
    with pytest.raises(OSError, match="Not a directory"):
        keeping.keep(with_int8(0.9), tmp_path / "file" / "profile.json")


def test_auto_measures_once_where_none_is_kept_and_says_so(monkeypatch, caplog, folder):
    calls = []

    def measured(platform):
        calls.append(platform)
        return with_int8(0.9)

    monkeypatch.setenv(keeping.VARIABLE, "auto")
    monkeypatch.setattr(measuring, "measure", measured)
    absl_logging.set_verbosity(absl_logging.INFO)
    with caplog.at_level(logging.INFO, logger="absl"):
        for _ in range(2):
            assert len(plan_here().sites) == 1
    assert calls == ["cpu"]
    (line,) = [r.getMessage() for r in caplog.records if "measured this machine" in r.getMessage()]
    assert str(folder) in line
    assert len(list(folder.iterdir())) == 1


def test_auto_where_measuring_fails_plans_cautiously(monkeypatch):
    def fails(platform):
        raise RuntimeError("no room")

    monkeypatch.setenv(keeping.VARIABLE, "auto")
    monkeypatch.setattr(measuring, "measure", fails)
    assert plan_here().profile.source == "built in"


def test_only_flags_of_xla_that_change_code_are_in_the_key(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/tmp/x --xla_gpu_autotune_level=0")
    plain = keeping.key_of("cpu")
    assert plain["xla_flags"] == []
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=AVX2 --xla_force_host_platform_device_count=8")
    assert keeping.key_of("cpu")["xla_flags"] == ["--xla_cpu_max_isa=AVX2"]
    assert plain["cores"] == len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else True


def test_explain_says_which_profile_and_what_would_be_better():
    step = hx.sparsify(head, config=hx.approximate(rules=[hx.Rule("*", force=True)]))
    text = step.trace(*SHAPES).explain()
    assert ", built in; `hire-xform tune` measures this machine" in text
    keeping.keep(with_int8(0.5, fixed=0.0, choosing=0.0))
    text = step.trace(jax.ShapeDtypeStruct((D, 2 * V), jnp.float32), SHAPES[1]).explain()
    assert "the profile a test, measured\n" in text
    assert "hire-xform tune" not in text
    # Twice the time of a quarter of the bytes, and 256 rows at 1.5 times theirs.
    site = step.trace(jax.ShapeDtypeStruct((D, 2 * V), jnp.float32), SHAPES[1]).plan.sites[0]
    assert site.dense_seconds == pytest.approx(2 * V * D * 4 / 30e9)
    scales = 2 * V * 4
    assert site.sparse_seconds * 30e9 == pytest.approx(2 * V * D * 2 + scales + 1.5 * 256 * D * 4)
    assert f"{site.dense_seconds * 1e3:.2f} ms predicted dense" in text


def test_a_profile_says_what_it_is_not():
    with pytest.raises(ValueError, match="expected"):
        Profile.from_dict(3)
