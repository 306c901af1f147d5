from __future__ import annotations

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import small

import hire_xform as hx
from hire_xform.dump.dump import FORMATS, SHOWS, dump
from hire_xform.dump.text import short_source
from hire_xform.observe import observe

GOLDENS = Path(__file__).parents[1] / "goldens"
FORCE = hx.Config(rules=(hx.Rule("*", force=True, vocab=hx.Vocab(candidates=16)),), ffn=hx.Ffn(active=0.25))
VOID = {"meta", "link", "br", "img", "input", "hr"}


@pytest.fixture(scope="module")
def traced():
    return hx.sparsify(small.decode_step, config=FORCE).trace(*small.inputs())


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch):
    monkeypatch.chdir(GOLDENS.parent.parent)


class Page(HTMLParser):
    """Checks that every tag is closed, and keeps what a test asks about."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.text = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [v for k, v in attrs if k == "id"]
        self.links += [v for k, v in attrs if k in ("href", "src")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("show", ["original", "diff"])
def test_text_is_as_recorded_on_every_jax_version(traced, show):
    got = dump(traced, name="small:decode_step", show=show)
    # What is spliced in changes with the lowering; that there are phases, and which, does not.
    got = re.sub(r"^(\+ \w+).*$", r"\1", got, flags=re.MULTILINE)
    got = re.sub(r"sparse: \d+ equations", "sparse: N equations", got)
    golden = GOLDENS / f"small_{show}.txt"
    if os.environ.get("HIRE_UPDATE_GOLDENS"):
        golden.write_text(got, encoding="utf-8")
    assert got == golden.read_text(encoding="utf-8")


def test_original_marks_the_equations_of_each_site_and_the_refused_ones(traced):
    lines = dump(traced, show="original").splitlines()
    for number, site in enumerate(traced.plan.sites, 1):
        marked = [line for line in lines if line.startswith(f">> {site.kind} {number} ")]
        assert sum("dot_general" in line for line in marked) == len(site.weights)
        assert any(f" {site.path}(" in line for line in marked)
    for refusal in traced.plan.refusals:
        assert any(line.startswith("   dense") and f" {refusal.path}(" in line for line in lines)


def test_sparse_marks_what_was_spliced_in_by_phase(traced):
    lines = dump(traced, show="sparse").splitlines()
    for number, site in enumerate(traced.plan.sites, 1):
        mine = [line for line in lines if line.startswith(f">> {site.kind} {number}")]
        for phase in ("predict", "select", "compute"):
            assert any(f"# {phase}" in line for line in mine), (site.kind, phase)
        assert any("da_top_k" in line for line in mine)


def test_json_has_the_plan_and_every_equation(traced):
    found = json.loads(dump(traced, name="f", format="json"))
    assert found["function"] == "f"
    assert found["plan"] == json.loads(traced.plan.to_json())
    before = {e["path"]: e for e in found["original"]["equations"]}
    assert len(before) == len(found["original"]["equations"])
    for number, site in enumerate(traced.plan.sites):
        assert before[site.path]["site"] == number
        assert before[site.path]["source"] == site.source
        assert any(e["site"] == number for e in found["sparse"]["equations"])
    for number, refusal in enumerate(traced.plan.refusals):
        assert before[refusal.path]["refusal"] == number
    result = before[next(site.path for site in traced.plan.sites if site.kind == "vocab")]
    assert result["primitive"] == "dot_general"
    assert [v["type"] for v in result["results"]] == [f"float32[1,{small.V}]"]


@pytest.mark.parametrize("show", SHOWS)
def test_json_and_pages_hold_what_is_shown_and_no_more(traced, show):
    found = json.loads(dump(traced, show=show, format="json"))
    assert ("original" in found, "sparse" in found) == (show != "sparse", show != "original")
    page = Page(dump(traced, show=show, format="html"))
    assert ("pane-b" in page.ids, "pane-a" in page.ids) == (show != "sparse", show != "original")
    assert {link[1:] for link in page.links} <= set(page.ids)


def test_page_is_well_formed_and_needs_nothing_outside_it(traced):
    text = dump(traced, name="small:decode_step", format="html")
    page = Page(text)
    assert "{{" not in text
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"https?:|url\(|@import|//[a-z]", text)
    assert page.links
    assert all(link.startswith("#") for link in page.links)


def test_page_links_each_site_and_refusal_to_its_equations(traced):
    page = Page(dump(traced, format="html"))
    for number in range(len(traced.plan.sites)):
        assert {f"a{number}", f"b{number}"} <= set(page.ids)
        assert sum(a.get("data-site") == str(number) for tag, a in page.tags if tag == "a") == 1
    assert {link[1:] for link in page.links} <= set(page.ids)
    for refusal in traced.plan.refusals:
        assert refusal.path in page.text
    assert sum("data-refusal" in attributes for _, attributes in page.tags) == len(traced.plan.refusals)


def test_page_escapes_names(traced):
    text = dump(traced, name="<script>alert('&')</script> {{panes}}", format="html")
    assert "<script>alert" not in text
    assert "w<in>" not in text
    assert "w&lt;in&gt;" in text
    joined = "".join(Page(text).text)
    assert "<script>alert('&')</script> {{panes}}" in joined
    assert "w<in>" in joined
    assert "w&out" in joined


@pytest.mark.parametrize("format", FORMATS)
def test_program_without_sites_is_shown_too(format):
    traced = hx.sparsify(lambda x: jnp.sin(x)).trace(jax.ShapeDtypeStruct((3,), jnp.float32))
    text = dump(traced, format=format)
    assert "sin" in text or format == "text"
    assert format != "text" or "no site is rewritten" in text


def test_loops_branches_and_closed_over_arrays_are_listed():
    table = np.arange(6.0, dtype=np.float32)

    def fun(x):
        x = jax.lax.while_loop(lambda s: s.sum() < 3, lambda s: s + jnp.asarray(table), x)
        return jax.lax.cond(x[0] > 0, jnp.sin, jnp.cos, x)

    text = dump(hx.sparsify(fun).trace(jax.ShapeDtypeStruct((6,), jnp.float32)), show="original")
    for part in ("while[0]/cond/lt[0](", "while[0]/add[0](", "cond[0]/branch[0]/cos[0](", "cond[0]/branch[1]/sin[0]("):
        assert part in text
    assert "float32[6]" in text


@pytest.mark.parametrize(("option", "value"), [("show", "both"), ("format", "yaml")])
def test_unknown_choices_are_refused_with_those_there_are(traced, option, value):
    with pytest.raises(ValueError, match=f"{option}='{value}'; expected one of"):
        dump(traced, **{option: value})


def test_sources_are_shortened_to_what_a_reader_can_open():
    here = os.getcwd()
    assert short_source(f"{here}/a/b.py:3:1 (f)") == "a/b.py:3:1 (f)"
    assert short_source("/x/lib/python3.11/site-packages/p/q.py:3:1 (f)") == "p/q.py:3:1 (f)"
    assert short_source("/elsewhere/b.py:3:1 (f)") == "/elsewhere/b.py:3:1 (f)"
    assert short_source("unknown") == "unknown"


def test_observe_returns_the_result_and_what_was_asked_for():
    inner = jax.jit(lambda x: jnp.sin(x) * 2)
    jaxpr = jax.make_jaxpr(lambda x: inner(x) + inner(jnp.cos(x)))(1.0)
    out, seen = observe(jaxpr, [1.0], lambda path, eqn: path.endswith("sin[0]"))
    np.testing.assert_allclose(out[0], 2 * np.sin(1) + 2 * np.sin(np.cos(1)), rtol=1e-6)
    np.testing.assert_allclose([operands[0] for operands, _ in seen], [1, np.cos(1)], rtol=1e-6)
    np.testing.assert_allclose([results[0] for _, results in seen], np.sin([1, np.cos(1)]), rtol=1e-6)
