"""``topk_ffn``: a training function whose feed-forward blocks keep only their largest groups of units."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax

from hire_xform.call.calls import Abstract, abstract_call, call_leaves
from hire_xform.call.program import Program
from hire_xform.call.signature import Signature, Weights
from hire_xform.config import Config, Rule
from hire_xform.errors import HireWarning
from hire_xform.explain import explain_top_groups
from hire_xform.passes.kinds.top_groups import plan_top_groups
from hire_xform.passes.plan.decisions import Plan, Refusal
from hire_xform.passes.plan.settings import Ffn, refuse
from hire_xform.passes.rewrite.rewriter import Rewriter


def topk_ffn(
    fun: Callable | None = None,
    *,
    active: float | None = None,
    group_size: int | None = None,
    config: Config | None = None,
    weights_argnums: int | Sequence[int] | None = None,
    weights_argnames: str | Sequence[str] | None = None,
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
) -> Any:
    """Makes a training function train its model for the sparsity it will decode with.

    Every dense feed-forward block of the function keeps, for each token, the groups of hidden units that add most (sums
    of squares of activation times norm of the row of the second matrix) and takes all other units as zero. All units
    are computed, so the choice is exact and training is no faster. Gradients flow through the kept units only. Like
    ``jax.checkpoint`` it is not jitted, and works under ``jit``, ``grad``, ``vmap``, ``scan`` and ``remat``::

        loss = hx.topk_ffn(loss, active=0.125)
        value, gradients = jax.jit(jax.value_and_grad(loss))(params, batch)
        ...
        step = hx.sparsify(decode_step, config=hx.Config(ffn=hx.Ffn(active=0.125, group_size=8)))

    It goes around the loss, before ``grad``: in a function that takes derivatives itself the units are read by the
    backward pass as well, and such blocks stay dense. Whatever the activation (SiLU, GELU), units that are not kept are
    zero; ``hx.sparsify`` needs ``activations="any"`` for blocks that have no zeros of their own. Decode with the plain
    ``decode_step``, as above: then the groups that the predictor takes for the largest are computed, as many as were
    trained. Or sparsify ``hx.topk_ffn(decode_step, active=0.125)`` with ``config=hx.approximate()``: its top-k is seen
    as the model's own choice, so half as many groups again are computed and the largest of those kept, which errs less
    and reads more.

    Args:
      fun: the function, such as a loss of (params, batch); without it, a decorator is returned.
      active: the share of each block's groups that is kept, ``0 < active <= 1``; None is 0.125. With 1 nothing changes.
      group_size: neighbouring units that are kept together; None is 8.
      config: instead of the two, settings with exceptions by path, as for ``sparsify``: ``active`` and ``group_size``
        of its ``ffn`` and of its rules, and ``skip``. The rest of it is not read.
      weights_argnums, weights_argnames: the arguments that hold weights, as for ``sparsify``.
      static_argnums, static_argnames: arguments that are not traced, as for ``jax.jit``.

    Returns:
      A function of the same signature and results, with a ``trace`` that says what is done where.

    Raises:
      TypeError, ValueError: an argument is not usable; the message names it. When called: nothing in the function is
        a block, or a group size does not divide a block's units.

    Method: training with a top-k in the block, as HiRE (arXiv 2402.09360) and Lazy Neuron (arXiv 2210.06313) do.
    """
    if fun is None:
        return functools.partial(
            topk_ffn,
            active=active,
            group_size=group_size,
            config=config,
            weights_argnums=weights_argnums,
            weights_argnames=weights_argnames,
            static_argnums=static_argnums,
            static_argnames=static_argnames,
        )
    if not callable(fun):
        raise TypeError(f"topk_ffn: fun={fun!r}; expected a callable")
    if config is None:
        ffn = Ffn(active=_ACTIVE if active is None else active, group_size=_GROUP if group_size is None else group_size)
        config = Config(ffn=ffn)
    elif not isinstance(config, Config):
        raise TypeError(f"topk_ffn: config={config!r}; expected hx.Config(...) or None")
    elif active is not None or group_size is not None:
        given = "active" if active is not None else "group_size"
        raise TypeError(f"topk_ffn: config and {given} are both given; expected one, or {given} in the config's hx.Ffn")
    owners: list[Config | Rule] = [config, *config.rules]
    for owner in owners:
        if owner.ffn is not None and owner.ffn.active is None:
            refuse("topk_ffn: Ffn", "active", None, "the share of the groups to keep, a fraction, 0 < active <= 1")
    options = {"static_argnums": static_argnums, "static_argnames": static_argnames}
    return TopkFfn(fun, config, Weights(weights_argnums, weights_argnames), options)


_ACTIVE, _GROUP = 0.125, 8


class TopkFfn:
    """A training function with a top-k in its feed-forward blocks. Call it like the original."""

    def __init__(self, fun: Callable, config: Config, weights: Weights, options: dict[str, Any]):
        """Use :func:`topk_ffn`."""
        functools.update_wrapper(self, fun, updated=())
        self.signature = Signature.of(fun, weights, options)
        self.config = config
        self._told: set[str] = set()

    def __repr__(self) -> str:
        """Names the function."""
        fun = self.signature.fun
        return f"topk_ffn({getattr(fun, '__qualname__', None) or type(fun).__qualname__})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the function with the top-k in its blocks."""
        args, kwargs = self.signature.wrap_statics(args, kwargs)
        traced = self._traced(abstract_call(self.signature, args, kwargs))
        return traced.evaluate(call_leaves(self.signature, args, kwargs))

    def trace(self, *args: Any, **kwargs: Any) -> TracedTopk:
        """Traces for these arguments: arrays, or ``jax.ShapeDtypeStruct``; computes nothing.

        Raises:
          ValueError: there is no block, or a group size does not divide one's units.
          Whatever the function raises when traced.
        """
        args, kwargs = self.signature.wrap_statics(args, kwargs)
        return self._traced(abstract_call(self.signature, args, kwargs))

    def _traced(self, call: Abstract) -> TracedTopk:
        # Traced anew at every call, as the function itself would be: what it closes over may be a tracer.
        traced = TracedTopk(self.signature, self.config, call)
        if not traced.plan.sites:
            raise ValueError(f"{self!r}: no feed-forward block gets a top-k.\n{traced.explain()}")
        unmatched = self.config.unmatched(traced.rule_texts())
        if unmatched:
            rules = ", ".join(repr(rule.path_glob) for rule in unmatched)
            self._tell(f"{self!r}: rules that match nothing: {rules}. Paths there are: {', '.join(traced.rule_paths)}")
        for refusal in traced.plan.refusals:
            if refusal.kind == "ffn" and not self._skipped(refusal):
                self._tell(f"{self!r}: the block at {refusal.source} ({refusal.path}) stays dense: {refusal.reason}")
        return traced

    def _skipped(self, block: Refusal) -> bool:
        return self.config.choose("ffn", block.path, block.weights).settings is None

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            warnings.warn(message, HireWarning, stacklevel=4)


class TracedTopk(Program):
    """A training function traced for arguments of given shapes.

    Attributes:
      plan: ``plan.sites``, the blocks with a top-k; ``plan.refusals``, all other products with a weight.
      jaxpr: the original program.
    """

    loops_over_experts = False

    def __init__(self, signature: Signature, config: Config, call: Abstract):
        """Traces, detects and plans; see ``TopkFfn.trace``."""
        super().__init__(signature, call)
        self.plan: Plan
        self.plan, chosen = plan_top_groups(self._detection, config.choose, jax.default_backend(), self.name)
        self._rewriter = Rewriter(self._graph, {c.node: c for c in chosen})

    def explain(self) -> str:
        """Each block with a top-k as text: path, source line, groups kept; and each product without, and why."""
        return explain_top_groups(self.plan)

    def evaluate(self, leaves: Sequence[Any]) -> Any:
        """Runs the function with the top-k in its blocks.

        Args:
          leaves: the array leaves of the call, in order.

        Returns:
          The function's result.
        """
        results = self._rewriter.evaluate(leaves, lambda need: None)
        return jax.tree.unflatten(self.out_tree, results)
