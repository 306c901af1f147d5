"""Training with the top-k in the block: which feed-forward blocks get it, and the equation that has it.

The program stays dense. Only the contracting product of each block is changed: its activation has all but the largest
groups of units set to zero first.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from hire_xform.lowering.engine.top_groups import keep_top_groups
from hire_xform.passes.ir import compat
from hire_xform.passes.ir.each_device import under_automatic_axes
from hire_xform.passes.ir.graph import Node, Operand
from hire_xform.passes.match.matches import Detection, FfnMatch, names_of
from hire_xform.passes.plan.decisions import Plan, Refusal, Site
from hire_xform.passes.plan.settings import ChooseSettings, Ffn
from hire_xform.passes.rewrite.action import Action, Context
from hire_xform.passes.weights.recipe import Root


@dataclass(frozen=True, eq=False, repr=False)
class TopGroups(Action):
    """A block whose contracting product sees the largest groups of units only.

    Attributes:
      match: the block.
      active: groups kept for each token.
      group_size: units in a group.
    """

    match: FfnMatch
    active: int
    group_size: int

    @property
    def node(self) -> Node:
        """The equation that is changed."""
        return self.match.node

    @property
    def key(self) -> Hashable:
        """Of its equation and the groups."""
        return "top groups", self.active, self.group_size

    @property
    def operands(self) -> Sequence[Operand]:
        """Those of the equation."""
        return self.node.inputs

    def emit(self, context: Context) -> Sequence[Any]:
        """The contracting product of a block, of its largest groups of units."""
        down = self.match.down
        hidden, weight = context.read(down.x), context.read(down.weight)
        contracted = sorted(range(len(down.x_contract)), key=lambda i: down.x_contract[i])
        order = (*down.x_free, *(down.x_contract[i] for i in contracted))

        def largest(hidden: Any, weight: Any) -> Any:
            rows = jnp.transpose(weight, (*(down.w_contract[i] for i in contracted), *down.w_free))
            rows = rows.reshape(self.match.units, -1).astype(jnp.float32)
            flat = jnp.transpose(hidden, order).reshape(down.tokens, self.match.units)
            norms = jnp.sqrt(jnp.sum(jnp.square(rows), axis=1))
            kept = keep_top_groups(flat, norms, active=self.active, group_size=self.group_size)
            kept = kept.reshape([hidden.shape[d] for d in order])
            return jnp.transpose(kept, sorted(range(len(order)), key=order.__getitem__))

        lies = jax.typeof(hidden).sharding
        kept = under_automatic_axes(largest, lies.mesh, lies.spec)(hidden, weight)
        return compat.bind(down.node.eqn, [weight, kept] if down.weight_left else [kept, weight])


def plan_top_groups(
    detection: Detection,
    choose_settings: ChooseSettings,
    platform: str,
    name_of: Callable[[Root], str],
) -> tuple[Plan, list[TopGroups]]:
    """Which blocks get a top-k, as a plan whose sites read what they read dense, and what is done at each.

    Args:
      detection: what was found.
      choose_settings: for a kind, a path and names of weights, the user's settings.
      platform: for the plan.
      name_of: the name of a weight.

    Raises:
      ValueError: a block's units are not divided by its group size.
    """
    chosen: list[TopGroups] = []
    sites: list[Site] = []
    refusals: list[tuple[Node, Refusal]] = []
    for match in detection.matches:
        names = tuple(name_of(p.origin.recipe.root) for p in match.products)
        size = sum(p.nbytes for p in match.products) * match.node.scope.iterations
        path, source = match.node.path, match.node.source
        if not isinstance(match, FfnMatch):
            reason = "a vocabulary projection; a top-k of units is for feed-forward blocks"
            refusals.append((match.node, Refusal(path, source, reason, "vocab", size, names)))
            continue
        choice = choose_settings("ffn", path, names_of(match, name_of))
        settings = choice.settings
        why = choice.reason if settings is None else _unsuited(match)
        if why is not None:
            refusals.append((match.node, Refusal(path, source, why, "ffn", size, names)))
            continue
        assert isinstance(settings, Ffn)
        if match.units % settings.group_size:
            raise ValueError(
                f"topk_ffn: group_size={settings.group_size} does not divide the {match.units} hidden units of the "
                f"block at {source} ({path}); expected a divisor"
            )
        active = settings.groups_of(match.units, None)
        chosen.append(TopGroups(match, active, settings.group_size))
        sites.append(
            Site(
                kind="ffn",
                path=path,
                source=source,
                tokens=match.tokens,
                dense_bytes=size,
                sparse_bytes=size,
                settings=settings,
                weights=names,
                inputs=match.region.ups[0].product.contracted,
                units=match.units,
                computed=active * settings.group_size,
                shared=False,
                activation=match.region.activation,
            )
        )
    for rejection in detection.rejections:
        node, read = rejection.node, rejection.weights_read
        size, weights = sum(read.values()), tuple(name_of(root) for root in read)
        refusals.append((node, Refusal(node.path, node.source, rejection.reason, "", size, weights)))
    refusals.sort(key=lambda pair: detection.order[pair[0]])
    return Plan(tuple(sites), tuple(r for _, r in refusals), platform), chosen


def _unsuited(match: FfnMatch) -> str | None:
    """Why a block gets no top-k whatever the settings."""
    if match.region.own is not None:
        return f"the model chooses units of it itself ({match.region.own.name})"
    node: Node | None = match.node
    while node is not None:
        if any(frame.kind == "custom" for frame in node.frame.ancestors()):
            return (
                "it stands inside a custom_jvp or custom_vjp, whose own derivative would be that of the dense block; "
                "transform the function inside it"
            )
        if node.scope.kind == "shard_map":
            return "it stands inside a shard_map; transform the function inside it, or let jit do the sharding"
        node = node.scope.node
    return None
