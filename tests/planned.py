"""A tiny model of two like blocks and a head, planned: for unit tests of what comes after."""

import jax.numpy as jnp
import numpy as np
from laid_out import laid_out

from hire_xform.passes.match.detect import detect
from hire_xform.passes.pack.make import pack_array
from hire_xform.passes.plan.machine import built_in_for
from hire_xform.passes.plan.make import make_plan
from hire_xform.passes.plan.settings import Choice, Ffn, Vocab
from hire_xform.passes.rewrite.environment import PackedView

D, M, V = 4, 24, 32
RNG = np.random.default_rng(0)
SHAPES = {"down": (M, D), "head": (D, V), "narrow": (D, D), "up": (D, M), "up2": (D, M)}
W = {name: jnp.asarray(RNG.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}
X = jnp.asarray(RNG.normal(size=(2, D)), jnp.float32)
NAMES = sorted(SHAPES)


def block(w, x, up="up"):
    return jnp.maximum(x @ w[up], 0) @ w["down"]


def model(w, x):
    x = x + block(w, x) + block(w, x, "up2")
    return jnp.argmax((x @ w["narrow"]) @ w["head"], -1)


def stated(kind, path, names=(), force=True):
    own = Ffn(active=0.5, certify=False) if kind == "ffn" else Vocab(candidates=4, certify=False)
    return Choice(settings=own if kind in ("ffn", "vocab") else None, force=force, reason="not asked for")


def planned(choose=stated, fun=model):
    """The program laid out, and its plan."""
    found = laid_out(fun, W, X)
    detection = detect(found.graph, found.provenance)
    return found, make_plan(detection, choose, built_in_for("cpu"), lambda root: NAMES[root.index])


def views(decision, args):
    """The packed forms of a site, where the program is called with these arrays."""
    return {need: PackedView(pack_array(need.key, args[need.key.recipe.root.index])) for need in decision.needs}
