"""On a CPU whose products of 8 bits are slow a site that would not win stays dense, and it is said why."""

import jax
import jax.numpy as jnp
import pytest
from checks import FORCE

import hire_xform as hx
from hire_xform.passes.plan import accelerators, machine
from hire_xform.passes.plan.cost import Running, dense_seconds
from hire_xform.passes.plan.machine import BUILT_IN, CPU_MEMORY
from hire_xform.tuning import keeping

V, D, M = 65_536, 1024, 4096


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def head(w, x):
    return jnp.argmax(x @ w, axis=-1)


def block(w, x):
    return jax.nn.relu(x @ w["up"]) @ w["down"]


HEAD = head, (struct(D, V), struct(1, D))
BLOCK = block, ({"up": struct(D, M), "down": struct(M, D)}, struct(1, D))


def config(rules=(), predictor=None, certify=False):
    vocab = hx.Vocab(candidates=256, predictor=predictor, certify=certify)
    return hx.Config(vocab=vocab, ffn=hx.Ffn(active=0.25, predictor=predictor, certify=certify), rules=rules)


def plan_of(program, *rules, **settings):
    fun, shapes = program
    return hx.sparsify(fun, config=config(rules, **settings)).trace(*shapes).plan


@pytest.fixture(params=["avx2", "other"])
def slow(request, monkeypatch):
    monkeypatch.setenv(keeping.VARIABLE, request.param)
    return BUILT_IN[request.param]


@pytest.mark.parametrize("program", [HEAD, BLOCK], ids=["head", "block"])
def test_with_vnni_it_is_rewritten(program, monkeypatch):
    monkeypatch.setenv(keeping.VARIABLE, "avx512_vnni")
    for certify in (False, True):
        assert len(plan_of(program, certify=certify).sites) == 1


@pytest.mark.parametrize("program", [HEAD, BLOCK], ids=["head", "block"])
def test_with_native_kernels_it_is_rewritten_whatever_the_instruction_set(program, monkeypatch):
    monkeypatch.setenv(keeping.VARIABLE, "native_avx2")
    for certify in (False, True):
        assert len(plan_of(program, certify=certify).sites) == 1


@pytest.mark.parametrize("program", [HEAD, BLOCK], ids=["head", "block"])
def test_without_it_stays_dense_and_says_why(program, slow):
    for certify in (False, True):
        plan = plan_of(program, certify=certify)
        assert not plan.sites
        for refusal in plan.refusals:
            assert "would not be faster on cpu" in refusal.reason
            assert f"on this CPU ({slow.name}) XLA's products of 8 bits run at 0.2 of the speed" in refusal.reason
            assert "force=True" in refusal.reason
        assert len(plan_of(program, *FORCE, certify=certify).sites) == 1


@pytest.mark.parametrize("program", [HEAD, BLOCK], ids=["head", "block"])
def test_a_predictor_of_fewer_bytes_wins_there_too(program, slow):
    for predictor in (hx.LowRank(0.25, bits=8), hx.LowRank(0.125, bits=8)):
        assert len(plan_of(program, predictor=predictor).sites) == 1
    # In 4 bits even fewer bytes are read, and taken apart more slowly than that saves.
    assert not plan_of(program, predictor=hx.Quantized(4)).sites


def test_what_is_too_small_on_any_cpu_is_not_put_down_to_this_one(slow):
    small = block, ({"up": struct(32, 64), "down": struct(64, 32)}, struct(1, 32))
    for refusal in plan_of(small).refusals:
        assert "would not be faster on cpu;" in refusal.reason


def test_other_platforms_are_planned_by_their_own_profiles(slow):
    """A slow CPU has no say in them; a site's small steps have, so that a small block stays dense on a fast GPU."""
    large = block, ({"up": struct(8 * D, 4 * M), "down": struct(4 * M, 8 * D)}, struct(1, 8 * D))
    for fun, shapes in (HEAD, large):
        for platform, fixed in (("gpu", 30e-6), ("tpu", 10e-6)):
            plan = hx.sparsify(fun, config=config()).trace(*shapes)._plan(config(), platform)
            (decision,) = plan.decisions
            site = decision.site
            assert site.sparse_bytes < site.dense_bytes
            running = Running(decision.match, decision.settings, plan.profile, 1)
            arrays = sum(nbytes for _, nbytes in running.predictor_arrays())
            # What of the rows is summed up, in a block, a GPU's kernels move half as often again.
            rows = running.rows_seconds(10) * plan.profile.memory
            assert rows == pytest.approx(10 if platform == "tpu" or fun is HEAD[0] else 12.5)
            read = (arrays + 100 + rows) / plan.profile.memory
            assert running.seconds(arrays + 100, [(1.0, 10, False)]) == pytest.approx(fixed + read, rel=1e-6)
    fun, shapes = BLOCK
    traced = hx.sparsify(fun, config=config()).trace(*shapes)
    assert len(traced._plan(config(), "tpu").sites) == 1
    assert not traced._plan(config(), "gpu").sites


def test_many_rows_of_a_head_cost_more_than_their_bytes():
    (decision,) = plan_of(HEAD).decisions
    settings = {certify: hx.Vocab(certify=certify, predictor=hx.Quantized(8)) for certify in (False, True)}

    def cost(rows, certify, share=1.0, dense=0.0):
        """In bytes that a dense product reads in that time."""
        ladders = [(share, rows, False), (dense, rows, True)]
        running = Running(decision.match, settings[certify], BUILT_IN["avx512_vnni"], 1)
        return running.seconds(0, ladders) * CPU_MEMORY

    row = D * 4
    few, many = (cost(n * row, False) - cost(0, False) for n in (256, 16_384))
    assert few == pytest.approx(1.5 * 256 * row)
    assert many > 6 * 16_384 * row
    assert cost(256 * row, True) - cost(0, True) == pytest.approx(2 * few)
    # A share of dense runs is added in full.
    assert cost(0, True, 0.5, 0.5) - cost(0, True) == pytest.approx(0.5 * D * V * 4)
    assert cost(0, True) > cost(0, False)


def test_a_certified_head_that_would_open_thousands_of_rows_stays_dense():
    fun, shapes = HEAD
    rule = hx.Rule("*", vocab=hx.Vocab(candidates=8192, predictor=hx.LowRank(0.25, bits=8), certify=True))
    plan = hx.sparsify(fun, config=hx.Config(rules=(rule,))).trace(*shapes).plan
    assert not plan.sites
    (refusal,) = plan.refusals
    assert "faster on cpu: rows chosen one by one cost 13 times what they cost in a dense product" in refusal.reason
    few = hx.Rule("*", vocab=hx.Vocab(candidates=256, predictor=hx.LowRank(0.25, bits=8), certify=True))
    assert len(hx.sparsify(fun, config=hx.Config(rules=(few,))).trace(*shapes).plan.sites) == 1


@pytest.mark.parametrize(
    ("fun", "shape", "tokens", "itemsize"),
    [
        (lambda w, x: jnp.argmax(x @ w, -1), (D, V), 1, 4),
        (lambda w, x: jnp.argmax(x @ w.T, -1), (V, D), 1, 2),
        (lambda w, x: jnp.argmax(x @ w.T, -1), (V, D), 2, 4),
        (lambda w, x: jnp.argmax(jnp.matmul(x, w.T, preferred_element_type=jnp.float32), -1), (V, D), 1, 2),
        (lambda w, x: jnp.argmax(jnp.matmul(x, w.T, preferred_element_type=jnp.float32), -1), (V, D), 2, 2),
        (lambda w, x: jnp.argmax(x.astype(jnp.float32) @ w.T.astype(jnp.float32), -1), (V, D), 1, 2),
        (lambda w, x: jnp.argmax(x.astype(jnp.float32) @ w.T.astype(jnp.float32), -1), (V, D), 2, 4),
    ],
)
def test_bfloat16_costs_what_xla_makes_of_it(fun, shape, tokens, itemsize):
    shapes = struct(*shape, dtype=jnp.bfloat16), struct(tokens, D, dtype=jnp.bfloat16)
    (decision,) = hx.sparsify(fun, config=config(FORCE)).trace(*shapes).plan.decisions

    def read(profile):
        return dense_seconds(decision.match, profile, tokens) * profile.memory

    assert read(BUILT_IN["avx512_vnni"]) == pytest.approx(itemsize * V * D)
    assert read(BUILT_IN["h100"]) == read(BUILT_IN["v5e"]) == pytest.approx(2 * V * D)
    assert decision.site.widened == (itemsize == 4)


def test_the_machine_is_what_the_variable_says_or_what_is_found(monkeypatch):
    monkeypatch.setenv(keeping.VARIABLE, "off")
    has = {"flags": frozenset({"avx2", "avx512_vnni"})}
    monkeypatch.setattr(machine, "_cpu_flags", lambda: has["flags"])
    sets = ["AVX2", "portable"]
    monkeypatch.setattr(machine.library, "instruction_sets", lambda: tuple(sets))
    assert keeping.profile_for("cpu") is BUILT_IN["native_avx2"]
    sets.insert(0, "AVX-512 VNNI")
    assert keeping.profile_for("cpu") is BUILT_IN["native_avx512_vnni"]
    sets.clear()
    for flags, xla, want in (
        ({"avx2", "avx512_vnni"}, "", "avx512_vnni"),
        ({"avx2", "avx512_vnni"}, "--xla_cpu_max_isa=AVX2", "avx2"),
        ({"avx2", "avx512_vnni"}, "--xla_cpu_max_isa=AVX512_BF16 --other", "avx512_vnni"),
        ({"avx2", "avx_vnni"}, "", "avx2"),
        (set(), "", "other"),
    ):
        machine.instruction_set.cache_clear()
        has["flags"] = frozenset(flags)
        monkeypatch.setenv("XLA_FLAGS", xla)
        assert keeping.profile_for("cpu") is BUILT_IN[want]
    machine.instruction_set.cache_clear()
    monkeypatch.setenv(keeping.VARIABLE, "sse9")
    with pytest.raises(
        ValueError, match=r"HIRE_TUNE='sse9': expected off, auto, .* or one of avx512_vnni, avx2, other"
    ):
        keeping.profile_for("cpu")


@pytest.mark.parametrize(
    ("platform", "kind", "want"),
    [
        ("gpu", "NVIDIA H100 80GB HBM3", "h100"),
        ("gpu", "NVIDIA H200", "h200"),
        ("tpu", "TPU v5 lite", "v5e"),
        ("tpu", "TPU v5p", "v5p"),
        ("tpu", "TPU v6 lite", "v6e"),
    ],
)
def test_accelerators_go_by_their_kind_and_are_modelled(platform, kind, want):
    profile = machine.of_device_kind(platform, kind)
    assert profile is BUILT_IN[want]
    assert (profile.platform, profile.source) == (platform, "modelled")
    unknown = machine.of_device_kind(platform, "something new")
    assert (unknown.platform, unknown.source) == (platform, "modelled")


def test_steps_cost_what_kernels_move_or_what_xla_does():
    ours, theirs = (accelerators.accelerator("", "gpu", 1e12, kernels) for kernels in (True, False))
    assert ours.kernels
    assert not theirs.kernels
    assert theirs.rows["dot 16 bits"].seconds(8, 4096) == pytest.approx(3.1 * ours.rows["dot 16 bits"].seconds(8, 4096))
    assert theirs.speed("int4") < ours.speed("int4") == 1
    rows = accelerators.accelerator("", "tpu", 1e12).rows["sum 16 bits"]
    assert rows.seconds(8, 4096) == 2 * rows.seconds(8, 4096, group=2)


def test_a_described_device_has_its_own_profile(monkeypatch):
    """Whatever was kept for this machine; but a profile that is named holds."""
    monkeypatch.delenv(keeping.VARIABLE, raising=False)
    assert keeping.profile_for("tpu", "TPU v5 lite") is BUILT_IN["v5e"]
    assert keeping.profile_for("gpu", "NVIDIA H200") is BUILT_IN["h200"]
    monkeypatch.setenv(keeping.VARIABLE, "a100")
    assert keeping.profile_for("gpu", "NVIDIA H200") is BUILT_IN["a100"]
    assert keeping.profile_for("tpu", "TPU v5 lite") is BUILT_IN["v5e"]


def test_what_this_cpu_says_of_itself_can_be_read():
    assert all(name == name.lower() and " " not in name for name in machine._cpu_flags())
