"""What is to be proved of all that reads a projection's logits, or what candidates are chosen by where nothing is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jax.extend.core import primitives as prims

from hire_xform.passes.ir.graph import Node, Operand, Value
from hire_xform.passes.match.readers import Reader, others_of
from hire_xform.passes.prove.chain_tracing import Filtered, chain_of
from hire_xform.passes.prove.chains import Chain
from hire_xform.passes.prove.numbers import numbers_of
from hire_xform.passes.prove.searches import is_search
from hire_xform.passes.prove.whole_tracing import draws_of, ends_in, whole_chain_of


@dataclass(frozen=True, eq=False, repr=False)
class Reads:
    """What is proved, and by what candidates are chosen, of one vocabulary projection.

    Attributes:
      chains: what each reader takes; of those that are proved, or, where nothing is, that candidates are chosen by.
      proved: what is proved, for reports.
      unproved: what is not, and reads logits that may be predicted.
      filters: the largest k of a top-k that only what is drawn from it sees.
    """

    chains: tuple[Chain, ...] = ()
    proved: tuple[str, ...] = ()
    unproved: tuple[str, ...] = ()
    filters: int = 1

    @property
    def most(self) -> int:
        """The largest k of what is read."""
        return max((c.reader.k for c in self.chains), default=1)

    @property
    def sides(self) -> list[tuple[Chain, Operand]]:
        """The side inputs of all chains, in order."""
        return [(c, side) for c in self.chains for side in c.sides if isinstance(side, Value)]


NOTHING_READ = Reads()


def reads_of(match: Any, settings: Any, split: bool, placed: bool = False, together: bool = False) -> Reads | str:
    """What reads the logits of a match, as far as its settings ask; a reason where that can't be proved.

    Args:
      match: a ``VocabMatch``.
      settings: its settings, ``certify`` decided.
      split: whether its rows are over several devices, of which each knows its own logits only.
      placed: whether it is ours to say what these devices are given beside their logits.
      together: whether each of them has all tokens, so that what is known of all logits can be brought together.
    """
    product, fate = match.product, match.fate
    found = [(reader, chain_of(product, fate, reader)) for reader in match.readers]
    if settings.fill == "-inf" and (why := _spoiled(found)) is not None:
        return why
    if not settings.certify:
        return _ranked(found, split)
    whole = settings.certify is True and settings.fill == "predicted"
    taken = ""
    if split and whole:
        # Only where it takes that: what keeps the order of logits is proved with a few bytes a token.
        taken = _taken_as_a_whole(match, found)
        whole = bool(together and (taken or settings.logprobs is not None))
        # In a shard_map of the user's own, each device's arg max of its own logits is what is asked to be proved.
        if taken and placed and not whole:
            return f"what {taken} is proved on one device, or on several, each of which has all tokens"
    drawn = _drawn_across(match) if split and not whole else []
    if taken and not whole:
        drawn.append(f"what {taken} by what each device knows of its own logits")
    if settings.logprobs is not None and not whole:
        return "logprobs= is proved of logits that one device has all of, or several, each of which has all tokens"
    if whole:
        found, drawn = _followed(match, found)
        found, missed = _with_numbers(match, found, settings.logprobs)
        if isinstance(missed, str):
            return missed
        drawn += missed
    decided = _decided(found)
    unseen = {r.node: whole and r.node is not None and ends_in(r.node, decided) for r, _ in found}
    picks: set[Node | None] = {r.node for r, chain in found if isinstance(chain, Chain) and r.kind == "picked"}
    chains: dict[tuple[Value, int, bool], Chain] = {}
    proved: list[str] = []
    unproved: list[str] = []
    filters = 1
    for reader, chain in found:
        if unseen[reader.node] and reader.kind not in _DECIDED:
            filters = max(filters, reader.k if 4 * reader.k <= product.width else 1)
            continue
        if reader.kind in ("arg max", "arg min") and whole and reader.node is not None and ends_in(reader.node, picks):
            continue
        if reader.kind == "softmax":
            unproved.append(f"the probabilities of the softmax ({reader.where}): those of predicted logits are close")
            continue
        if isinstance(chain, Filtered):
            unproved.append(f"{reader.where}, behind {chain}")
            continue
        if isinstance(chain, str):
            return (
                f"it can't be proved what {reader.where} takes of its logits: {chain}; allow what is not proved with "
                "hx.approximate(), candidates=, or a calibration"
            )
        apart = chain.keeps_order or (placed and chain.split and settings.certify is True)
        if split and not apart and not whole:
            return f"what {reader.where} reads is not its logits alone, which is proved on one device only"
        chains.setdefault((chain.value, reader.k, reader.inverted), chain)
        proved.append(_told(reader))
    unproved += drawn

    def hidden(node: Node) -> bool:
        return whole and (node in decided or ends_in(node, decided))

    unproved += [f"what {how} reads of predicted logits" for how in others_of(fate, [r for r, _ in found], hidden)]
    return Reads(tuple(chains.values()), tuple(dict.fromkeys(proved)), tuple(dict.fromkeys(unproved)), filters)


def _taken_as_a_whole(match: Any, found: Followed) -> str:
    """What an arg max takes behind a filter, or something decides by numbers made of all logits; empty for nothing."""
    for reader, chain in found:
        if reader.kind == "arg max" and isinstance(chain, str):
            return f"{reader.where} takes, behind {chain}," if isinstance(chain, Filtered) else f"{reader.where} takes"
    numbers = numbers_of(match.product, match.fate, _decided(found))
    decided = (f"{reader.where} decides" for reader in numbers if reader.kind == "decision")
    return next(decided, "")


def _drawn_across(match: Any) -> list[str]:
    """What is drawn among the largest of several devices: of a proved set, by logits that round in their own way."""
    drawn = draws_of(match.product, match.fate, match.readers)
    return [f"what {r.where} takes of the largest, which are proved as a set" for r in drawn if r.kind == "picked"]


# Readers, with the way to each, or why it is not followed.
Followed = list[tuple[Reader, Chain | str]]
_LOOPS = "loops and branches are not followed; draw with jax.random.categorical, which is proved"
_DECIDED = ("arg max", "arg min", "picked", "number", "decision")


def _decided(found: Followed) -> set[Node | None]:
    """The equations whose results are proved."""
    return {reader.node for reader, chain in found if isinstance(chain, Chain) and reader.kind in _DECIDED}


def _followed(match: Any, found: Followed) -> tuple[Followed, list[str]]:
    """The same readers and those behind filters, with what is taken as a whole followed, and of what is not, why."""
    product, fate = match.product, match.fate
    followed: Followed = []
    for reader, chain in found:
        whole: Chain | str = chain
        if isinstance(chain, str) and reader.kind == "arg max":
            whole = whole_chain_of(product, fate, reader)
            if isinstance(whole, str):
                whole = Filtered(f"{chain}: {whole}") if isinstance(chain, Filtered) else chain
        followed.append((reader, whole))
    missed = []
    for reader in draws_of(product, fate, match.readers):
        whole = whole_chain_of(product, fate, reader)
        if isinstance(whole, str):
            missed.append(f"what {reader.where} takes: {whole}")
        else:
            followed.append((reader, whole))
    return followed, missed


def _with_numbers(match: Any, found: Followed, within: float | None) -> tuple[Followed, list[str] | str]:
    """The same readers, with what is decided by numbers, and, where these are asked for, the numbers that are seen.

    Returns:
      Readers, with the way to each; and of decisions that are not followed, why. Why nothing may be done, where that is
      so of a number that is asked for.
    """
    product, fate = match.product, match.fate
    followed, missed = list(found), []
    # What decides about a number alone is replayed with it.
    for reader in sorted(numbers_of(product, fate, _decided(found)), key=lambda reader: reader.kind != "number"):
        assert reader.node is not None
        if (reader.kind == "number" and within is None) or ends_in(reader.node, _decided(followed)):
            continue
        chain = whole_chain_of(product, fate, reader)
        if not isinstance(chain, str):
            followed.append((reader, chain))
        elif reader.kind == "number":
            return found, (
                f"it can't be proved how far {reader.where} is from that of the dense logits: {chain}; leave out "
                "logprobs= to have it of predicted logits, which are close"
            )
        else:
            why = _LOOPS if reader.node.children else chain
            missed.append(f"what {reader.where} decides: {why}")
    return followed, missed


def _spoiled(found: list[tuple[Reader, Chain | str]]) -> str | None:
    """Why minus infinity can't stand for the other logits; None where it can.

    It has to stay below all others, and to become no NaN: what is read rises with the logits, and no factor that
    differs along the vocabulary, which may be zero, is on the way.
    """
    for reader, chain in found:
        why = ""
        if reader.slope <= 0 and not isinstance(chain, Filtered):
            why = chain if isinstance(chain, str) else "what it reads does not rise with the logits"
        elif not isinstance(chain, str) and any(
            s.node.primitive in (prims.mul_p, prims.div_p) and s.differs for s in chain.steps
        ):
            why = "it is multiplied by what differs along the vocabulary"
        if why:
            return f'fill="-inf" would change what {reader.where} takes: {why}; use fill="predicted"'
    return None


def _told(reader: Reader) -> str:
    if reader.k > 1:
        return f"the {reader.k:,} largest ({reader.where})"
    if reader.kind == "picked":
        return f"what is drawn ({reader.where})"
    if reader.kind == "number":
        return f"the number that is seen, within its bound ({reader.where})"
    if reader.kind == "decision" and reader.node is not None and is_search(reader.node):
        return f"the place that is found (the search at {reader.node.source})"
    if reader.kind == "decision":
        return f"what is decided ({reader.where})"
    if reader.kind == "returned":
        return "the arg max of what is returned"
    return f"the arg max ({reader.where})"


def _ranked(found: list[tuple[Reader, Any]], split: bool) -> Reads:
    """Where nothing is proved: what candidates have to be chosen by."""
    followed = [chain for reader, chain in found if isinstance(chain, Chain) and reader.kind != "softmax"]
    own = {chain.value: chain for chain in followed if not chain.uniform}
    return Reads(() if split else tuple(own.values()))
