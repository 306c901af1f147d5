"""``plan_mesh`` against what is counted, compiled and drawn."""

import devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import FORCE
from collectives import collectives
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import hire_xform as hx
from hire_xform import cli
from hire_xform.lowering.primitives.da_top_k import da_top_k
from hire_xform.mesh_plan import da_top_k_recall

P = PartitionSpec
D, M, V, LAYERS = 32, 128, 256, 2
DEVICE = hx.Device(bandwidth=819e9, link=45e9, memory=16e9)


@pytest.fixture(scope="module")
def found():
    return devices.outcomes(__name__)


def shapes(**changed):
    given = {"inputs": D, "hidden": M, "vocab": V, "layers": LAYERS, "dtype": "float32", "other_bytes": 0}
    return hx.ModelShapes(**{**given, **changed})


def decode(w, x):
    for i in range(LAYERS):
        x = x + (x @ w["query"][i]) @ w["out"][i]
        hidden = jax.nn.relu(x @ w["gate"][i])
        x = x + (hidden * (x @ w["up"][i]) if "up" in w else hidden) @ w["down"][i]
    return jnp.argmax(x @ w["head"], axis=-1)


def placed(count, gated):
    rng = np.random.default_rng(0)
    last, first = P(None, None, "model"), P(None, "model", None)
    given = {"query": ((LAYERS, D, D), last), "out": ((LAYERS, D, D), first), "head": ((D, V), P(None, "model"))}
    given |= {"gate": ((LAYERS, D, M), last), "down": ((LAYERS, M, D), first)}
    given |= {"up": ((LAYERS, D, M), last)} if gated else {}
    mesh = jax.make_mesh((count,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])
    w = {
        name: jax.device_put(rng.normal(size=shape).astype(np.float32), NamedSharding(mesh, spec))
        for name, (shape, spec) in given.items()
    }
    return w, jax.device_put(np.ones((1, D), np.float32), NamedSharding(mesh, P()))


def check_bytes_are_those_of_the_plan_and_of_the_compiled_program():
    settings = {"vocab": hx.Vocab(candidates=32), "ffn": hx.Ffn(active=0.25)}
    for count in (2, 4, 8):
        for gated in (False, True):
            w, x = placed(count, gated)
            step = hx.sparsify(decode, config=hx.Config(**settings, rules=FORCE))
            sites = step.trace(w, x).plan.sites
            (row,) = hx.plan_mesh(shapes(gated=gated), DEVICE, count, **settings).rows
            blocks = [site for site in sites if site.kind == "ffn"]
            assert len(blocks) == LAYERS
            assert row.block == tuple(
                sum(getattr(s, f"{k}_bytes") for s in blocks) // count for k in ("dense", "sparse")
            )
            assert row.head == (sites[-1].dense_bytes // count, sites[-1].sparse_bytes // count)
            jitted, operands = step.program(w, x)
            sent = collectives(jitted.lower(*operands).compile())
            assert sum(c.sent for c in sent) == row.sent, (count, sent)
            assert sum(c.sent for c in collectives(jax.jit(decode).lower(w, x).compile())) == row.sent


@pytest.mark.parametrize("name", devices.checks(__name__))
def test_on_devices(found, name):
    assert not found[name], found[name]


@pytest.mark.parametrize(
    ("n", "wanted", "taken", "shards"),
    [(1024, 32, 32, 4), (1024, 32, 48, 8), (4096, 64, 64, 8), (512, 128, 64, 4), (256, 1, 8, 8), (240, 30, 10, 3)],
)
def test_recall_is_what_is_drawn(n, wanted, taken, shards):
    draws = 2000
    rng = np.random.default_rng(0)
    scores = np.stack([rng.permutation(n) for _ in range(draws)]).astype(np.float32)
    picked = np.asarray(da_top_k(jnp.asarray(scores), taken, shards)[0])
    drawn = (picked >= n - wanted).sum() / (wanted * draws)
    assert abs(drawn - da_top_k_recall(n, wanted, taken, shards)) < 0.005


def test_recall_at_the_edges():
    assert da_top_k_recall(1024, 32, 32, 1) == pytest.approx(1.0)
    assert da_top_k_recall(1024, 1024, 1024, 8) == pytest.approx(1.0)
    assert da_top_k_recall(131072, 32, 128, 8) > 1 - 1e-6
    assert da_top_k_recall(64, 64, 8, 8) == pytest.approx(8 / 64)
    with pytest.raises(ValueError, match="shards=3"):
        da_top_k_recall(64, 4, 4, 3)


def test_more_devices_read_less_each_and_stop_paying_somewhere():
    model = hx.ModelShapes(inputs=4096, hidden=14336, vocab=131072, layers=32, other_bytes=2_684_354_560)
    pairs = hx.Ffn(group_size=2)
    plan = hx.plan_mesh(model, DEVICE, [1, 2, 4, 8, 16], ffn=pairs)
    assert [row.devices for row in plan.rows] == [1, 2, 4, 8, 16]
    assert plan.rows[0].sent == 0
    assert all(row.total[1] < row.total[0] for row in plan.rows)
    speedups = [row.speedup for row in plan.rows]
    assert speedups == sorted(speedups, reverse=True)
    assert [row.fits for row in plan.rows] == [False, True, True, True, True]
    assert 16 <= plan.blocks_until < 4096
    beyond = hx.plan_mesh(model, DEVICE, 2 * plan.blocks_until, ffn=pairs).rows[0]
    within = hx.plan_mesh(model, DEVICE, plan.blocks_until, ffn=pairs).rows[0]
    assert beyond.speedup < within.speedup
    assert hx.plan_mesh(shapes(), DEVICE, 1).blocks_until == 0
    assert f"sparse blocks: faster on up to {plan.blocks_until} devices" in str(plan)
    # Of bfloat16 a TPU reads a single unit with its neighbour.
    single = hx.plan_mesh(model, DEVICE, [1])
    assert 1 <= single.blocks_until < plan.blocks_until
    assert single.rows[0].seconds[1] > plan.rows[0].seconds[1]


def test_a_device_goes_by_its_data_sheet(capsys):
    chip = hx.Device.named("v5e")
    assert (chip.platform, chip.bandwidth, chip.memory) == ("tpu", 819e9, 16e9)
    assert hx.Device.named("h100", memory=94e9).memory == 94e9
    with pytest.raises(ValueError, match=r"chip='abacus'\): expected one of a100, h100, h200, v4, v5e, v5p, v6e"):
        hx.Device.named("abacus")
    model = hx.ModelShapes(inputs=2048, hidden=8192, vocab=131072, layers=16)
    plans = {name: hx.plan_mesh(model, hx.Device.named(name), 1).rows[0] for name in ("v5e", "v6e", "h100", "h200")}
    assert plans["v5e"].seconds[0] > plans["v6e"].seconds[0] > plans["h100"].seconds[0] > plans["h200"].seconds[0]
    line = LINE[: LINE.index("--bandwidth")]
    assert cli.main(["plan-mesh", *line, "--chip", "v5p", "--devices", "1,4"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[0] == "1"
    assert cli.main(["plan-mesh", *line, "--link", "45", "--devices", "1"]) == 2
    assert "no --bandwidth, --memory; expected them, or --chip, one of a100, h100" in capsys.readouterr().err


def test_sums_of_rows_cost_what_the_kernels_move():
    """On a GPU half as much again, in a block; a head has none."""
    model = hx.ModelShapes(inputs=2048, hidden=8192, vocab=131072, layers=1, gated=False)
    gpu, tpu = (hx.Device(bandwidth=1e12, link=1e9, memory=1e12, latency=0, platform=p) for p in ("gpu", "tpu"))
    pairs = hx.Ffn(active=0.25, group_size=2, predictor=hx.Quantized(8))
    rows = [hx.plan_mesh(model, device, 1, ffn=pairs).rows[0] for device in (gpu, tpu)]
    exact = 0.25 * 8192 * 2 * 2048 * 2
    # 30 us a site on a GPU and 10 on a TPU, which reads the head's single rows twice.
    head = hx.Vocab().candidates_of(model.vocab) * model.inputs * 2
    difference = rows[0].seconds[1] - rows[1].seconds[1] - 2 * (30e-6 - 10e-6)
    assert difference == pytest.approx((0.25 * exact - head) / 1e12, rel=0.05)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shapes(inputs=0), "inputs=0"),
        (lambda: shapes(dtype="int8"), "dtype='int8'"),
        (lambda: shapes(other_bytes=-1), "other_bytes=-1"),
        (lambda: hx.Device(bandwidth=0, link=1.0, memory=1.0), "bandwidth=0"),
        (lambda: hx.Device(bandwidth=1.0, link=1.0, memory=1.0, platform="abacus"), "platform='abacus'"),
        (lambda: hx.plan_mesh(shapes(), DEVICE, 3), "devices=3"),
        (lambda: hx.plan_mesh(shapes(), DEVICE, 0), "devices=0"),
        (lambda: hx.plan_mesh(shapes(), DEVICE, 64, ffn=hx.Ffn(group_size=8)), "whole groups of 8"),
        (lambda: hx.plan_mesh(shapes(), DEVICE, 2, tokens=0), "tokens=0"),
        (lambda: hx.plan_mesh(shapes(), DEVICE, 2, wanted_units=2.0), "wanted_units=2.0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


LINE = [
    "--inputs",
    "4096",
    "--hidden",
    "14336",
    "--vocab",
    "131072",
    "--layers",
    "32",
    "--bandwidth",
    "819",
    "--link",
    "45",
    "--memory",
    "16",
]


def test_command_line(capsys):
    assert cli.main(["plan-mesh", *LINE, "--devices", "1,4,8", "--other", "2.7"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[1:4]] == ["1", "4", "8"]
    assert "too much" in out.splitlines()[1]
    assert cli.main(["plan-mesh", *LINE, "--devices", "3"]) == 2
    assert "expected a divisor of hidden=14336" in capsys.readouterr().err
    assert cli.main(["plan-mesh", *LINE, "--devices", "4", "--active", "2"]) == 2
    assert "active=2.0" in capsys.readouterr().err
