"""Deep models: functions are shared, and work grows with depth no faster than the model does."""

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from checks import kinds, narrow

import hire_xform as hx
from hire_xform.passes.ir import compat


def deep(depth, one_layer=models.layer, seed=0):
    """An unrolled model of ``depth`` layers and its arguments as shapes."""
    params = models.list_params(seed=seed)
    params = {**params, "layers": params["layers"][:1] * depth}
    cache = models.make_cache(1)
    cache = {name: jnp.repeat(cache[name][:1], depth, 0) for name in ("k", "v")} | {"pos": cache["pos"]}

    def step(params, cache, tokens, shift):
        return models.unrolled(params, cache, tokens, shift, one_layer)

    shapes = (params, cache, jnp.zeros(1, jnp.int32), jnp.zeros(models.D))
    return step, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), shapes)


def functions(text) -> int:
    return len(re.findall(r"func\.func", text))


def equations(jaxpr) -> int:
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    total = 0
    for eqn in inner.eqns:
        total += 1
        for value in eqn.params.values():
            for sub in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(sub, "eqns") or hasattr(sub, "jaxpr"):
                    total += equations(sub)
    return total


@pytest.mark.slow
def test_48_layers_share_the_functions_of_their_subgraphs():
    step, shapes = deep(48)
    traced = hx.sparsify(step, config=narrow()).trace(*shapes)
    assert kinds(traced.plan) == ["ffn"] * 48 + ["vocab"]
    dense, sparse = functions(jax.jit(step).lower(*shapes).as_text()), functions(traced.lower().as_text())
    small = functions(hx.sparsify(deep(2)[0], config=narrow()).trace(*deep(2)[1]).lower().as_text())
    assert sparse <= dense + 30
    assert sparse <= small + 2


def test_a_jitted_layer_called_24_times_stays_one_function():
    step, shapes = deep(24, jax.jit(models.layer))
    traced = hx.sparsify(step, config=narrow()).trace(*shapes)
    assert kinds(traced.plan) == ["ffn"] * 24 + ["vocab"]
    text = traced.lower().as_text()
    assert len(re.findall(r"func\.func private @layer\w*\(", text)) == 1
    assert functions(text) <= functions(jax.jit(step).lower(*shapes).as_text()) + 30


def test_a_layer_whose_jit_asks_for_it_is_inlined():
    sparse = []
    for inline in (True, False):
        step, shapes = deep(2, jax.jit(models.layer, inline=inline))
        traced = hx.sparsify(step, config=narrow()).trace(*shapes)
        assert kinds(traced.plan) == ["ffn"] * 2 + ["vocab"]
        sparse.append(traced.lower().as_text())
    assert [len(re.findall(r"func\.func private @layer\w*\(", text)) for text in sparse] == [0, 1]


def test_what_a_jit_says_to_xla_of_inlining_is_kept():
    asked = getattr(jax, "Inline", None)  # up to 0.10 there is nothing to say
    inline = False if asked is None else asked.XLA_LATE
    step, shapes = deep(2, jax.jit(models.layer, inline=inline))
    jaxpr = hx.sparsify(step, config=narrow()).trace(*shapes).sparse_jaxpr
    said = [e.params["inline"] for e in jaxpr.eqns if e.params.get("name") == "layer"]
    assert said == [inline] * 2


def test_a_plain_relu_model_is_planned_and_lowered_without_compiling_anything():
    step, shapes = deep(3)
    compiled = []

    def heard(event, duration, **_):
        compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(heard)
    jax.clear_caches()
    hx.sparsify(step, config=narrow()).trace(*shapes).lower()
    assert any("trace" in event for event in compiled)
    assert not any("backend_compile" in event for event in compiled)
    jax.jit(lambda x: x + 1)(jnp.zeros(3)).block_until_ready()
    assert any("backend_compile" in event for event in compiled)


def test_equations_grow_in_step_with_depth():
    counts = []
    for depth in (3, 6, 12):
        step, shapes = deep(depth)
        counts.append(equations(hx.sparsify(step, config=narrow()).trace(*shapes).sparse_jaxpr))
    first, second = counts[1] - counts[0], counts[2] - counts[1]
    assert second == 2 * first


def test_a_packed_deep_model_holds_as_many_bytes_for_each_layer():
    sizes = []
    for depth in (2, 4, 6):
        step, shapes = deep(depth)
        params = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes[0])
        sizes.append(hx.sparsify(step, config=narrow()).trace(*shapes).pack(params).nbytes)
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0]
    plain = sum(int(np.prod(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(deep(6)[1][0]))
    assert sizes[2] < 1.5 * plain


def own_calls(run) -> int:
    """Calls of this library's functions, generators and comprehensions while ``run`` runs."""
    own = [str(Path(module.__file__).parent) for module in (hx, hx.passes, hx.lowering)]
    files: dict[str, bool] = {}
    count = 0

    def called(frame, event, argument):
        nonlocal count
        if event == "call":
            name = frame.f_code.co_filename
            if name not in files:
                files[name] = any(name.startswith(folder) for folder in own)
            count += files[name]

    before = sys.getprofile()
    sys.setprofile(called)
    try:
        run()
    finally:
        sys.setprofile(before)
    return count


def test_python_grows_in_step_with_depth_and_is_little_for_an_equation(monkeypatch):
    """From plain function to lowered program; the first layer is the dear one, since the others share what it makes."""
    monkeypatch.setenv("HIRE_DEBUG", "0")  # verifying takes Python, too
    counts, sizes = [], []
    for depth in (4, 8, 16):
        step, shapes = deep(depth)
        sizes.append(equations(jax.make_jaxpr(step)(*shapes)))
        counts.append(
            own_calls(lambda step=step, shapes=shapes: hx.sparsify(step, config=narrow()).trace(*shapes).lower())
        )
    more, most = counts[1] - counts[0], counts[2] - counts[1]
    assert most <= 2.05 * more
    # JAX 0.9 stacks by a concatenate of as many operands, which is looked at from each of them.
    each = 73 if compat.STACK is None else 70
    assert most <= each * (sizes[2] - sizes[1]), (counts, sizes)
