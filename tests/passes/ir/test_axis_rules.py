"""Each axis rule against what JAX does to real arrays: which entries a result's entry hangs on, and where they go."""

import functools
import itertools
import math

import devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, find, given, settings
from hypothesis import strategies as st
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import primitives as prims
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hire_xform.passes.ir import compat
from hire_xform.passes.ir.axis_rules import Kind, registered
from hire_xform.passes.ir.links import How, forwards
from hire_xform.passes.weights.recipe import Convert, Cyclic, Reshape, Slice, Stack, Transpose

QUICK = settings(
    max_examples=12, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
UNTIL = settings(QUICK, max_examples=300, phases=[Phase.generate])
WEAK = {How.MIXED, How.ORDERED, How.PICKED, How.STORED, How.CONTRACTED, How.REDUCED, How.LOCATED}
COPIES = {How.SAME, How.CUT, How.PLACED, How.ORDERED, How.PICKED}
P = PartitionSpec


# --- what a rule says, and what is so ---


def flat(dims, shape, index):
    """Row-major place of some dimensions of an index, or of all indices of a shape."""
    place = 0
    for d in dims:
        place = place * shape[d] + index[d]
    return place


def permitted(links, before, after, entry):
    """The entries of a result, a mask of its shape, that may hang on one entry of an operand."""
    mask = np.ones(after, bool)
    for link in links:
        here, there = flat(link.before, before, entry), flat(link.after, after, np.indices(after))
        if link.how in (How.SAME, How.EACH, How.WRITTEN):
            mask &= there == here
        elif link.how is How.CUT:
            mask &= link.start + link.step * there == here
        elif link.how is How.PLACED and link.step:
            mask &= there == link.start + link.step * here
        elif link.how is How.STRETCHED:
            assert math.prod(before[d] for d in link.before) == 1
    return mask


def others(value):
    """What an entry is changed to: other numbers, or ids that are in range as well."""
    if value.dtype == bool:
        return [~value]
    if value.dtype.kind in "iu":
        return [value ^ 1, value + 1, value * 0]
    return [value * 0 + 0.3, value + 70.5, -value - 30.25]


def results_of(fun, operands):
    return [np.asarray(r) for r in jax.tree.leaves(fun(*operands))]


def differs(a, b):
    return ~((a == b) | ((a != a) & (b != b)))


def hangs_on(fun, operands, number, entry):
    """Masks of the results' entries that change with one entry of an operand."""
    base = results_of(fun, operands)
    found = [np.zeros(r.shape, bool) for r in base]
    for other in others(operands[number][entry]):
        changed = [np.array(o) for o in operands]
        changed[number][entry] = other
        for mask, a, b in zip(found, base, results_of(fun, changed), strict=True):
            mask |= differs(a, b)
    return found


def between(links, operand, result):
    return [link for link in links if (link.operand, link.result) == (operand, result)]


def see_dependence(fun, operands, links):
    """No entry hangs on one that the links do not let it hang on; how often any does."""
    count = 0
    for number, operand in enumerate(operands):
        for entry in np.ndindex(operand.shape):
            for r, mask in enumerate(hangs_on(fun, operands, number, entry)):
                own = between(links, number, r)
                count += mask.sum()
                if own:
                    assert not (mask & ~permitted(own, operand.shape, mask.shape, entry)).any(), own
    return count


def see_copies(fun, operands, links, moves):
    """Each entry is one of those that it may be, of those operands that are copied."""
    for r, result in enumerate(results_of(fun, operands)):
        copied = [i for i in range(len(operands)) if any(k.how in COPIES and k.after for k in between(links, i, r))]
        if not copied and not moves:
            continue
        may_be = [[] for _ in range(result.size)]
        for i, operand in enumerate(operands):
            if i not in copied and operand.shape and not moves:
                continue
            for entry in np.ndindex(operand.shape):
                for place in np.flatnonzero(permitted(between(links, i, r), operand.shape, result.shape, entry)):
                    may_be[place].append(operand[entry])
        for value, found in zip(result.reshape(-1), may_be, strict=True):
            assert value in found
            assert not moves or len(found) == 1


def see_order(fun, operands, links):
    """A reduction does not mind the order of what it reduces, nor does what orders them; what finds a place follows."""
    for link in links:
        size = math.prod(operands[link.operand].shape[d] for d in link.before)
        if link.how not in (How.REDUCED, How.LOCATED, How.ORDERED, How.CONTRACTED) or size < 2:
            continue
        alike = [k for k in links if k.how is link.how]
        (d,), turned = link.before, list(operands)
        if link.how is How.CONTRACTED:
            continue
        for other in alike if link.how is How.ORDERED else [link]:
            turned[other.operand] = np.roll(operands[other.operand], 1, d)
        before, after = results_of(fun, operands), results_of(fun, turned)
        if link.how is How.LOCATED:
            np.testing.assert_array_equal(after[0], (before[0] + 1) % size)
        else:
            np.testing.assert_allclose(after[link.result], before[link.result], rtol=1e-6)


def claims_less(primitive, fun, operands, how):
    """Whether some entry does hang on others than the one at its place, along axes of this kind."""
    eqn = equation_of(fun, operands)
    links = registered()[primitive].links(eqn) if eqn is not None and eqn.primitive is primitive else []
    for link in links:
        if link.how is not how:
            continue
        before = operands[link.operand].shape
        for entry in np.ndindex(before):
            mask = hangs_on(fun, operands, link.operand, entry)[link.result]
            there = flat(link.after, mask.shape, np.indices(mask.shape)) if link.after else 0
            if (mask & (there != flat(link.before, before, entry))).any():
                return True
    return False


def equation_of(fun, operands):
    """The one equation that a function is; none where JAX has left it out."""
    found, left = [], [jax.make_jaxpr(fun)(*operands)]
    while left:
        for eqn in compat.close(left.pop())[0].eqns:
            inner = [jaxpr for _, jaxpr in compat.sub_jaxprs(eqn)] if eqn.primitive not in registered() else []
            left += inner
            found += [] if inner else [eqn]
    return found[0] if len(found) == 1 else None


# --- examples of each primitive ---

SIZES = st.integers(1, 3)
SHAPES = st.lists(SIZES, min_size=1, max_size=3).map(tuple)


@st.composite
def numbers(draw, shape=None, kind="f"):
    """An array of distinct numbers; of truth values, or of whole numbers."""
    shape = draw(SHAPES) if shape is None else shape
    made = np.random.default_rng(draw(st.integers(0, 999))).permutation(math.prod(shape)).reshape(shape)
    return made % 2 == 0 if kind == "b" else (made + 1).astype(np.int32 if kind == "i" else np.float32)


def axis_of(draw, x):
    return draw(st.integers(0, x.ndim - 1))


@st.composite
def permutation(draw, rank):
    return tuple(draw(st.permutations(range(rank))))


@st.composite
def reshape(draw):
    sizes = draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=3))
    x = draw(numbers(tuple(sizes)))
    parts = draw(st.permutations([f for n in sizes for f in ((2, 2) if n == 4 else (n,))]))
    cuts = sorted(draw(st.sets(st.integers(0, len(parts)), max_size=2)))
    target = [math.prod(parts[a:b]) for a, b in itertools.pairwise([0, *cuts, len(parts)])]
    order = draw(st.none() | permutation(x.ndim))
    return lambda x: lax.reshape(x, target, order), [x]


@st.composite
def squeeze(draw):
    x = draw(numbers())
    dims = [d for d in range(x.ndim) if x.shape[d] == 1 and draw(st.booleans())]
    return lambda x: lax.squeeze(x, dims), [x]


@st.composite
def transpose(draw):
    x = draw(numbers())
    perm = draw(permutation(x.ndim))
    return lambda x: lax.transpose(x, perm), [x]


@st.composite
def broadcast(draw):
    x, target = draw(numbers()), draw(st.lists(SIZES, min_size=3, max_size=4))
    dims = sorted(draw(st.sets(st.integers(0, len(target) - 1), min_size=x.ndim, max_size=x.ndim)))
    for size, d in zip(x.shape, dims, strict=True):
        target[d] = target[d] if size == 1 else size
    return lambda x: lax.broadcast_in_dim(x, target, dims), [x]


@st.composite
def slices(draw):
    x = draw(numbers(tuple(draw(st.lists(st.integers(3, 5), min_size=1, max_size=2)))))
    start = [draw(st.integers(0, 1)) for _ in x.shape]
    limit = [draw(st.integers(s + 1, n)) for s, n in zip(start, x.shape, strict=True)]
    strides = [draw(st.integers(1, 3)) for _ in start]
    return lambda x: lax.slice(x, start, limit, None if set(strides) == {1} else strides), [x]


@st.composite
def split(draw):
    x = draw(numbers())
    axis = axis_of(draw, x)
    first = draw(st.integers(1, x.shape[axis]))
    sizes = [n for n in (first, x.shape[axis] - first) if n]
    return lambda x: lax.split(x, sizes, axis), [x]


@st.composite
def unstack(draw):
    x = draw(numbers())
    axis = axis_of(draw, x)
    return lambda x: jnp.unstack(x, axis=axis), [x]


@st.composite
def stack(draw):
    x = draw(numbers())
    axis = draw(st.integers(0, x.ndim))
    return lambda x, y: jnp.stack([x, y], axis), [x, 100 + x]


@st.composite
def concatenate(draw):
    x = draw(numbers())
    axis = axis_of(draw, x)
    y = draw(numbers(tuple(draw(SIZES) if d == axis else n for d, n in enumerate(x.shape))))
    return lambda x, y: lax.concatenate([x, y], axis), [x, 100 + y]


@st.composite
def pad(draw):
    x = draw(numbers())
    edges = st.tuples(st.integers(-1, 2), st.integers(0, 2), st.integers(0, 1))
    config = [draw(edges) if n > 1 else (0, 0, 0) for n in x.shape]
    return lambda x, y: lax.pad(x, y, config), [x, np.float32(-9.0)]


@st.composite
def rev(draw):
    x = draw(numbers())
    dims = [d for d in range(x.ndim) if draw(st.booleans())]
    return lambda x: lax.rev(x, dims), [x]


def reduction(op, start, kind="f"):
    @st.composite
    def case(draw):
        x = draw(numbers(kind=kind))
        axes = sorted(draw(st.sets(st.integers(0, x.ndim - 1), min_size=1)))
        return lambda x: lax.reduce(x, np.array(start, x.dtype), op, axes), [x]

    return case()


def along(fun):
    """A function of an array and one of its axes."""

    @st.composite
    def case(draw):
        x = draw(numbers())
        axis = axis_of(draw, x)
        return lambda x: fun(x, axis), [x]

    return case()


@st.composite
def sort(draw):
    x = draw(numbers())
    axis, keys = axis_of(draw, x), draw(st.integers(1, 2))
    return lambda x, y: lax.sort((x, y), dimension=axis, num_keys=keys), [x, 100 - x]


@st.composite
def top_k(draw, approx=False):
    x = draw(numbers())
    axis = axis_of(draw, x)
    k = draw(st.integers(1, x.shape[axis]))
    if approx:
        return lambda x: lax.approx_max_k(x, k, axis), [x]
    return lambda x: lax.top_k(x, k, axis=axis), [x]


@st.composite
def dot_general(draw):
    """Dimensions that are contracted, batched and free, those of each operand in an order of its own."""
    contract, batch, left, right = (draw(st.lists(SIZES, max_size=n)) for n in (2, 1, 2, 2))
    numbers_of, made = [[], []], []
    for free in (left, right):
        roles = [("c", i, n) for i, n in enumerate(contract)] + [("b", i, n) for i, n in enumerate(batch)]
        order = draw(st.permutations([*roles, *(("f", i, n) for i, n in enumerate(free))]))
        made.append(draw(numbers(tuple(n for _, _, n in order))))
        for dims, role in zip(numbers_of, "cb", strict=True):
            dims.append(
                [
                    next(d for d, (r, j, _) in enumerate(order) if (r, j) == (role, i))
                    for i in range(len({"c": contract, "b": batch}[role]))
                ]
            )
    return lambda x, y: lax.dot_general(x, y, tuple(numbers_of)), made


@st.composite
def windows(draw):
    """An operand whose dimensions are taken whole, in part, by one entry, or by one for each index; and the indices."""
    x = draw(numbers())
    roles = [draw(st.sampled_from("wpcb")) for _ in x.shape]
    assume({"p", "c"} & set(roles))
    size = [n if r == "w" else draw(st.integers(1, n)) if r == "p" else 1 for r, n in zip(roles, x.shape, strict=True)]
    mapped = draw(st.permutations([d for d, r in enumerate(roles) if r in "pc"]))
    batched = [d for d, r in enumerate(roles) if r == "b"]
    lead = draw(st.permutations([*batched, *(-n for n in draw(st.lists(SIZES, max_size=2)))]))
    shape = tuple(x.shape[n] if n >= 0 and n in batched else -n for n in lead)
    high = [x.shape[d] - size[d] + 1 for d in mapped]
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    indices = rng.integers(0, high, size=(*shape, len(mapped))).astype(np.int32)
    kept = [d for d, r in enumerate(roles) if r in "wp"]
    rank = len(kept) + len(shape)
    offset = (
        sorted(draw(st.sets(st.integers(0, max(rank - 1, 0)), min_size=len(kept), max_size=len(kept)))) if kept else []
    )
    collapsed = [d for d, r in enumerate(roles) if r == "c"]
    beside = [lead.index(d) for d in batched]
    return x, indices, size, tuple(offset), tuple(collapsed), tuple(mapped), tuple(batched), tuple(beside)


@st.composite
def gather(draw):
    x, indices, size, *dims = draw(windows())
    how = lax.GatherDimensionNumbers(*dims)
    return lambda x, i: lax.gather(x, i, how, size, mode="clip"), [x, indices]


def scatter(fun):
    @st.composite
    def case(draw):
        x, indices, size, offset, collapsed, mapped, batched, beside = draw(windows())
        how = lax.ScatterDimensionNumbers(offset, collapsed, mapped, batched, beside)
        lead, inner = iter(indices.shape[:-1]), iter(n for d, n in enumerate(size) if d not in (*collapsed, *batched))
        rank = indices.ndim - 1 + len(offset)
        y = draw(numbers(tuple(next(inner) if d in offset else next(lead) for d in range(rank))))
        return lambda x, i, y: fun(x, i, y, how, mode="clip"), [x, indices, 100 + y]

    return case()


@st.composite
def dynamic(draw, update=False):
    x = draw(numbers())
    size = [draw(st.integers(1, n)) for n in x.shape]
    starts = [np.int32(draw(st.integers(0, n - s))) for n, s in zip(x.shape, size, strict=True)]
    if update:
        return lambda x, y, *i: prims.dynamic_update_slice_p.bind(x, y, *i), [
            x,
            100 + draw(numbers(tuple(size))),
            *starts,
        ]
    return lambda x, *i: prims.dynamic_slice_p.bind(x, *i, slice_sizes=tuple(size)), [x, *starts]


@st.composite
def barrier(draw):
    return lambda x, y: lax.optimization_barrier((x, y)), [draw(numbers()), draw(numbers())]


OTHERS = {
    prims.reshape_p: reshape(),
    prims.squeeze_p: squeeze(),
    prims.transpose_p: transpose(),
    prims.broadcast_in_dim_p: broadcast(),
    prims.slice_p: slices(),
    compat.SPLIT: split(),
    compat.UNSTACK: unstack(),
    compat.STACK: stack(),
    prims.concatenate_p: concatenate(),
    prims.pad_p: pad(),
    prims.rev_p: rev(),
    prims.reduce_sum_p: reduction(lax.add, 0),
    prims.reduce_prod_p: reduction(lax.mul, 1),
    prims.reduce_max_p: reduction(lax.max, -np.inf),
    prims.reduce_min_p: reduction(lax.min, np.inf),
    prims.reduce_and_p: reduction(lax.bitwise_and, True, "b"),
    prims.reduce_or_p: reduction(lax.bitwise_or, False, "b"),
    prims.argmax_p: along(lambda x, axis: lax.argmax(x, axis, np.int32)),
    prims.argmin_p: along(lambda x, axis: lax.argmin(x, axis, np.int32)),
    prims.cumsum_p: along(lax.cumsum),
    prims.cumprod_p: along(lax.cumprod),
    prims.cummax_p: along(lax.cummax),
    prims.cummin_p: along(lambda x, axis: lax.cummin(x, axis, reverse=True)),
    prims.cumlogsumexp_p: along(lax.cumlogsumexp),
    prims.sort_p: sort(),
    prims.top_k_p: top_k(),
    prims.approx_top_k_p: top_k(approx=True),
    prims.dot_general_p: dot_general(),
    prims.gather_p: gather(),
    prims.scatter_p: scatter(lax.scatter),
    prims.scatter_add_p: scatter(lax.scatter_add),
    prims.scatter_mul_p: scatter(lax.scatter_mul),
    prims.scatter_min_p: scatter(lax.scatter_min),
    prims.scatter_max_p: scatter(lax.scatter_max),
    prims.dynamic_slice_p: dynamic(),
    prims.dynamic_update_slice_p: dynamic(update=True),
    compat.OPTIMIZATION_BARRIER: barrier(),
}
OTHERS = {p: case for p, case in OTHERS.items() if p is not None}


def links_in(primitive, fun, operands):
    eqn = equation_of(fun, operands)
    assume(eqn is not None and eqn.primitive is primitive)
    return registered()[primitive].links(eqn)


@pytest.mark.parametrize("primitive", OTHERS, ids=str)
def test_entries_go_where_the_rule_says(primitive):
    seen = set()

    @QUICK
    @given(OTHERS[primitive])
    def check(case):
        fun, operands = case
        links = links_in(primitive, fun, operands)
        kind = registered()[primitive].kind
        see_dependence(fun, operands, links)
        see_copies(fun, operands, links, kind in (Kind.MOVES, Kind.HANDED) and len(operands) == 1)
        see_order(fun, operands, links)
        for number, result in itertools.product(range(len(operands)), range(len(results_of(fun, operands)))):
            dims = [d for link in between(links, number, result) for d in link.before]
            assert len(dims) == len(set(dims))
        if kind is Kind.MOVES:
            assert {link.how for link in links} <= {How.SAME, How.CUT, How.STRETCHED}
        seen.update(link.how for link in links)

    check()
    assert seen
    # Nor does it say less than is so: of what is mixed, picked or added up, some hangs on others than the one there.
    for how in seen & WEAK:
        find(OTHERS[primitive], lambda case, how=how: claims_less(primitive, *case, how), settings=UNTIL)


# --- pointwise ---

UNARY = [
    *["abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "bessel_i0e", "bessel_i1e", "cbrt", "ceil", "cos"],
    *["cosh", "digamma", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "is_finite", "lgamma", "log"],
    *["log1p", "logistic", "neg", "round", "rsqrt", "sign", "sin", "sinh", "sqrt", "square", "tan", "tanh"],
]
BINARY = ["add", "atan2", "div", "ge", "gt", "le", "lt", "max", "min", "mul", "nextafter", "pow", "rem", "sub"]
INTEGER = ["and", "or", "xor", "shift_left", "shift_right_arithmetic", "shift_right_logical"]


def mesh(types):
    return jax.make_mesh((1,), ("d",), axis_types=(types,), devices=jax.devices()[:1])


def constrained(x):
    return lax.with_sharding_constraint(x, NamedSharding(mesh(AxisType.Auto), P("d")))


def resharded(x):
    return jax.sharding.reshard(x, NamedSharding(mesh(AxisType.Explicit), P("d")))


def varying(x):
    run = jax.shard_map(
        lambda x: lax.pcast(x, ("d",), to="varying"), mesh=mesh(AxisType.Auto), in_specs=P(), out_specs=P("d")
    )
    return run(x)


def bound(name):
    return getattr(lax, name, None) or getattr(prims, f"{name}_p").bind


X = np.asarray([[0.15, 0.4, 0.85], [0.6, 0.25, 0.7]], np.float32)
Y = X[:, ::-1] * 0.9 + 0.05
N = np.arange(6, dtype=np.int32).reshape(2, 3) + 1
ELEMENTWISE = {
    **{name: (bound(name), [X]) for name in UNARY},
    "acosh": (lax.acosh, [X + 1]),
    **{name: (bound(name), [X, Y]) for name in BINARY},
    **{name: (getattr(lax, f"bitwise_{name}", None) or bound(name), [N, N[::-1] % 3]) for name in INTEGER},
    "eq": (lax.eq, [N, N % 3]),
    "ne": (lax.ne, [N, N % 3]),
    "not": (lax.bitwise_not, [N]),
    "add_jaxvals": (lambda x, y: prims.add_jaxvals_p.bind(x, y), [X, Y]),
    "bitcast_convert_type": (lambda x: lax.bitcast_convert_type(x, np.int32), [X]),
    "clamp": (lambda a, x, b: lax.clamp(a, x, b), [np.float32(0.2), X, Y]),
    "convert_element_type": (lambda x: lax.convert_element_type(x, np.int32), [X * 9]),
    "copy": (lambda x: prims.copy_p.bind(x), [X]),
    "integer_pow": (lambda x: lax.integer_pow(x, 3), [X]),
    "name": (lambda x: checkpoint_name(x, "x"), [X]),
    "real": (lax.real, [X.astype(np.complex64)]),
    "reduce_precision": (lambda x: lax.reduce_precision(x, 5, 2), [X]),
    "select_n": (lambda c, x, y: lax.select_n(c, x, y), [X > 0.5, X, Y]),
    "sharding_constraint": (constrained, [X]),
    "stretched": (lambda x, y: prims.mul_p.bind(x, y), [X, Y[:, :1]]),
    "scalar": (lambda c, x, y: lax.select_n(c, x, y), [np.bool_(True), X, Y]),
    "reshard": (resharded, [X]),
    "pvary": (varying, [X]),
    **({"stop_gradient": (lambda x: prims.stop_gradient_p.bind(x), [X])} if hasattr(prims, "stop_gradient_p") else {}),
}
KNOWN_AS = {"stretched": prims.mul_p, "scalar": prims.select_n_p, "reshard": compat.RESHARD, "pvary": compat.PVARY}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_one_entry_changes_only_the_one_there(name):
    fun, operands = ELEMENTWISE[name]
    eqn = equation_of(fun, operands)
    assert eqn.primitive is KNOWN_AS.get(name, compat.public_primitive(f"{name}_p"))
    assert registered()[eqn.primitive].kind is Kind.POINTWISE
    links = registered()[eqn.primitive].links(eqn)
    assert {(k.operand, k.before) for k in links} == {(i, (d,)) for i, o in enumerate(operands) for d in range(o.ndim)}
    assert see_dependence(fun, operands, links) or name == "is_finite"


def test_each_rule_has_an_example():
    known = {KNOWN_AS.get(name, compat.public_primitive(f"{name}_p")) for name in ELEMENTWISE}
    assert {str(p) for p in set(registered()) - known - set(OTHERS)} == {"all_gather"}


# --- devices' parts, in a process that has several devices ---


def check_all_gather():
    def parts(x, axis, tiled):
        mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
        gathered = lambda x: lax.all_gather(x[0], "d", axis=axis, tiled=tiled)  # noqa: E731
        return jax.shard_map(gathered, mesh=mesh, in_specs=P("d"), out_specs=P(), check_vma=False)(x)

    for axis, tiled in itertools.product((0, 1), (False, True)):
        x = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
        run = jax.jit(functools.partial(parts, axis=axis, tiled=tiled))
        eqn = next(e for e in _equations(jax.make_jaxpr(run)(x)) if e.primitive is prims.all_gather_p)
        links = registered()[prims.all_gather_p].links(eqn)
        assert (How.PLACED in {k.how for k in links}) == tiled
        for entry in itertools.product((0, 3), (0, 1), (1,)):
            (mask,) = hangs_on(run, [x], 0, entry)
            assert mask.any()
            assert not (mask & ~permitted(links, x.shape[1:], mask.shape, entry[1:])).any()


def _equations(jaxpr):
    for eqn in compat.close(jaxpr)[0].eqns:
        yield eqn
        for _, inner in compat.sub_jaxprs(eqn):
            yield from _equations(inner)


def test_parts_of_several_devices():
    assert devices.outcomes(__name__) == {"check_all_gather": ""}


# --- the steps of a weight's recipe ---


@st.composite
def steps(draw):
    x = draw(numbers())
    (_, (y,)), perm = draw(reshape()), draw(permutation(x.ndim))
    start = tuple(draw(st.integers(0, n - 1)) for n in x.shape)
    limit = tuple(draw(st.integers(s + 1, n)) for s, n in zip(start, x.shape, strict=True))
    made = [
        (Transpose(perm), x),
        (Reshape((math.prod(y.shape[:2]), *y.shape[2:])), y),
        (Slice(start, limit, (1,) * x.ndim), x),
        (Convert(np.float16), x),
        (Cyclic(2), np.concatenate([x, 100 + x])),
    ]
    return draw(st.sampled_from(made))


@QUICK
@given(steps())
def test_a_step_moves_axes_as_it_says(case):
    step, x = case
    links, shape = step.axes(x.shape)
    assert see_dependence(step.apply, [x], links)
    assert results_of(step.apply, [x])[0].shape == shape


def test_what_follows_a_stack_moves_up():
    links, shape = Stack(4).axes((4, 2, 3))
    assert shape == (2, 3)
    assert [forwards(links, {d}) for d in range(3)] == [set(), {0}, {1}]
