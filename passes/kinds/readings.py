"""What reads a projection's logits, as the subgraphs take it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import primitives as prims

from hire_xform.lowering.prove.goals import Goal
from hire_xform.lowering.prove.intervals import Interval
from hire_xform.lowering.prove.readings import Reading, goal_of, openness
from hire_xform.passes.ir.axis_rules import moves_only
from hire_xform.passes.ir.graph import Value
from hire_xform.passes.prove.chains import Chain, margin_of
from hire_xform.passes.prove.what_to_prove import Reads
from hire_xform.passes.rewrite.canonical import result_shape
from hire_xform.passes.weights.products import Product


def readings_of(
    product: Product, reads: Reads, goal: Goal, within: float | None = None, split: bool = False
) -> tuple[Reading, ...]:
    """What is to be proved of a projection: of the logits themselves where nothing reads them as a whole.

    Args:
      product: the projection.
      reads: what reads its logits.
      goal: what is to be proved of these where nothing says more.
      within: how far numbers that are made of all logits may be from the dense ones.
      split: whether logits and side inputs are one device's part of them.
    """
    found: list[Reading] = []
    at = 0
    for chain in reads.chains:
        sides = at, at + sum(isinstance(side, Value) for side in chain.sides)
        at = sides[1]
        own = goal_of(chain.reader.k) if goal is True else goal
        ordered = goal is True and chain.reader.k > 1
        if chain.plain:
            found.append(Reading(own, ordered))
            continue
        margin = margin_of if chain.softmax else None
        gathered = split and not chain.split
        between = functools.partial(_between, product, chain) if gathered or not split else chain.between
        mixed = sum(number == -1 for step in chain.steps for number in step.operands) > 1
        number = chain.reader.kind == "number"
        decides = not number and not chain.reader.has_places
        found.append(
            Reading(
                own,
                ordered,
                between,
                margin,
                sides,
                decides=decides,
                mixed=mixed or number,
                within=within if number else None,
                gathered=gathered,
            )
        )
    return tuple(dict.fromkeys(found)) or (Reading(goal),)


def _between(product: Product, chain: Chain, logits: Interval, sides: Sequence[Any]) -> Interval:
    return chain.between(logits.map(lambda end: result_shape(product, end)), sides)


def rank_of(product: Product, reads: Reads, split: bool = False) -> Callable[[Interval, Sequence[Any]], Any] | None:
    """What candidates are chosen by where something is added that differs along the vocabulary; else None.

    How far an entry can be above the largest lower bound, as it is read: the best of all readers decides. Of logits
    that are ``split``, above the largest of a device's own.
    """
    # A token that is picked at run time is not put back where it was: then logits decide.
    picked = any(step.node.primitive is prims.dynamic_slice_p for chain in reads.chains for step in chain.steps)
    if picked or all(chain.uniform for chain in reads.chains):
        return None
    readings = readings_of(product, reads, True, split=split)
    chained = [chain for chain in reads.chains if not chain.plain]
    # What is picked or drawn among ranks has no place among the logits: then their own bounds decide.

    def rank(logits: Interval, sides: Sequence[Any]) -> Any:
        shape = logits.low.shape
        proving = [reading for reading in readings if reading.between is not None]
        own = [(c, r) for c, r in zip(chained, proving, strict=True) if c.ranks and not r.gathered]
        found = openness([reading for _, reading in own], logits, sides)
        parts = [_back(product, chain, opened, shape) for (chain, _), opened in zip(own, found, strict=True)]
        if len(own) < len(reads.chains):
            parts.append(logits.high - jnp.max(logits.low, axis=1, keepdims=True))
        return functools.reduce(jnp.maximum, parts)

    return rank


def _back(product: Product, chain: Chain, opened: Any, shape: tuple[int, ...]) -> Any:
    """What is known of entries as they are read, ``[n, V']``, where their logits are, ``[T, V]``."""
    tokens, vocab = shape
    moved = product.weight_left or any(moves_only(step.node) for step in chain.steps)
    if not moved and opened.shape == shape:
        return opened
    numbers = result_shape(product, jnp.arange(tokens * vocab, dtype=jnp.int32).reshape(shape))
    at = chain.moved(numbers)
    empty = jnp.full(tokens * vocab, -jnp.inf, opened.dtype)
    return empty.at[at.reshape(-1)].max(opened.reshape(-1), mode="promise_in_bounds").reshape(shape)


def on_each_device(reads: Reads) -> Reads:
    """The same readers, as if they took the logits themselves where that takes the same entry."""
    chains = (
        dataclasses.replace(chain, steps=(), sides=(), ahead=(), softmax=False) if chain.keeps_order else chain
        for chain in reads.chains
    )
    return dataclasses.replace(reads, chains=tuple(chains))
