"""What a sample of the tokens is enough for is measured on one: which, and what of it is said of all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calibrated import FORCED, PLAIN, D, V, block, block_params, normal, of_kind
from checks import named

import hire_xform as hx
from hire_xform.calibrating import measuring
from hire_xform.lowering.measure.statistics import Sample
from hire_xform.passes.match.kinds import kind_named

pytestmark = pytest.mark.any_jax("which tokens are taken is our own arithmetic")


@pytest.fixture
def few_are_enough(monkeypatch):
    for name in ("ffn", "vocab"):
        monkeypatch.setattr(type(kind_named(name)), "tokens_enough", 10)


def test_samples_of_many_batches_meet_every_position():
    every, tokens, met = 8, 64, np.zeros(64, int)
    for number in range(80):
        (first,) = np.asarray(measuring._first_ranked(measuring.FirstRanked(every, (1,)), number))
        assert 0 <= first < every
        at = np.asarray(Sample(every, jnp.int32(first)).of(jnp.arange(tokens)))
        assert len(set(at)) == len(at) == tokens // every
        met[at] += 1
    assert met.min() >= 9
    assert met.max() <= 11
    assert list(Sample(8, jnp.int32(5)).of(jnp.arange(3))) == [2]


def test_units_and_divergences_are_of_a_sample_and_arg_maxes_of_all(few_are_enough):
    params = block_params()
    xs = [normal(s, 20, D) for s in range(2)]
    given = {"predictors": [PLAIN], "config": FORCED}
    found = hx.calibrate(block, [(params, x) for x in xs], **given)
    # 40 tokens, 10 of which are enough: every fourth, from the first in one batch and from the third in the other.
    some = [x[first::4][:5] for x, first in zip(xs, (0, 2), strict=True)]
    alone = hx.calibrate(block, [(params, x) for x in some], **given)
    everything = hx.calibrate(block, [(params, jnp.concatenate(xs))], **given, fitted=found)
    ffn, of_some, of_all = (of_kind(c, "ffn") for c in (found, alone, everything))
    np.testing.assert_array_equal(ffn.curve().wanted, of_some.curve().wanted)
    np.testing.assert_allclose(ffn.curve().wanted_energy, of_some.curve().wanted_energy, rtol=1e-5)
    np.testing.assert_array_equal(ffn.fired, of_all.fired)
    assert ffn.curve().wanted.sum() < of_all.curve().wanted.sum()
    head, of_some, of_all = (of_kind(c, "vocab") for c in (found, alone, everything))
    assert head.tokens == 40
    np.testing.assert_array_equal(head.curve().wanted, of_all.curve().wanted)
    for k in (1, 4, V - 1):
        assert float(head.kl_at(k)) == pytest.approx(float(of_some.kl_at(k)), rel=1e-4, abs=1e-7)


def test_certified_sites_take_all_tokens(few_are_enough):
    params, x = block_params(), normal(0, 40, D)
    found = hx.calibrate(
        block, [(params, x)], predictors=[PLAIN], config=hx.lossless(rules=named(hx.Vocab(certify=True)))
    )
    assert all(int(site.curve().wanted.sum()) == 40 for site in found.sites.values())


def test_layers_of_a_loop_and_gates_have_samples_too(few_are_enough):
    rng = np.random.default_rng(0)
    weights = {n: rng.normal(size=(3, *s)) * 0.3 for n, s in {"g": (D, 24), "u": (D, 24), "d": (24, D)}.items()}
    weights = {n: jnp.asarray(a, jnp.float32) for n, a in weights.items()}

    def layers(p, x, sides):
        def layer(x, w):
            return x + ((jax.nn.relu(x @ w["g"]) * (x @ w["u"])) * sides) @ w["d"], None

        return jax.lax.scan(layer, x, p)[0]

    def calibrated(x, sides):
        return hx.calibrate(
            layers, [(weights, x, sides)], predictors=[PLAIN], config=hx.Config(vocab=None, rules=FORCED.rules)
        )

    # A side input of each token goes along with it.
    x, sides = normal(0, 40, D), normal(1, 40, 1)
    site, alone = (of_kind(c, "ffn") for c in (calibrated(x, sides), calibrated(x[::4], sides[::4])))
    np.testing.assert_array_equal(site.curve().wanted, alone.curve().wanted)
    assert site.tokens.tolist() == [40] * 3


def test_both_halves_run_one_program_and_heads_that_nothing_reads_are_left_out(monkeypatch):
    made, original = [], measuring.program

    def program(*args, **options):
        made.append(original(*args, **options))
        return made[-1]

    monkeypatch.setattr(measuring, "program", program)
    params = {**block_params(), "head": normal(3, D, 77)}
    batches = [(params, normal(s, 6, D)) for s in range(4)]
    hx.calibrate(block, batches, predictors=[hx.LowRank(3)], config=FORCED)
    assert len(made) == 2


def test_each_phase_is_shown_by_its_name(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    params = block_params()
    hx.calibrate(block, [(params, normal(s, 3, D)) for s in range(2)], predictors=[hx.LowRank(3)], progress=True)
    said = capsys.readouterr().err
    for phase in ("calibrating: inputs", "calibrating: fitting", "calibrating: predictors"):
        assert phase in said


def test_predictors_of_a_head_are_measured_one_after_the_other(monkeypatch):
    """More of them take little more memory: scores of all tokens by each would be as large as the model."""
    made, program = [], measuring.program

    def watched(*args, **options):
        def run(*operands):
            compiled = inner.lower(*operands).compile()
            made.append(compiled.memory_analysis().temp_size_in_bytes)
            return compiled(*operands)

        inner = program(*args, **options)
        return run

    monkeypatch.setattr(measuring, "program", watched)
    w, x = normal(0, 4096, D), normal(1, 64, D)

    def most(*predictors):
        made.clear()
        options = {"config": FORCED, "head_kl": None, "progress": False}
        hx.calibrate(lambda w, x: x @ w.T, [(w, x)], predictors=predictors, **options)
        return max(made)

    one = most(hx.LowRank(0.5, bits=8))
    several = most(*(hx.LowRank(rank, bits=8) for rank in (0.3, 0.4, 0.5)))
    assert several < 1.5 * one
