"""What is to be proved of all that reads a projection's logits, or what candidates are chosen by where nothing is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jax.extend.core import primitives as prims

from hire_xform.passes.ir.graph import Operand, Value
from hire_xform.passes.match.readers import Reader, others_of
from hire_xform.passes.prove.chain_tracing import Filtered, chain_of
from hire_xform.passes.prove.chains import Chain


@dataclass(frozen=True, eq=False, repr=False)
class Reads:
    """What is proved, and by what candidates are chosen, of one vocabulary projection.

    Attributes:
      chains: what each reader takes; of those that are proved, or, where nothing is, that candidates are chosen by.
      proved: what is proved, for reports.
      unproved: what is not, and reads logits that may be predicted.
    """

    chains: tuple[Chain, ...] = ()
    proved: tuple[str, ...] = ()
    unproved: tuple[str, ...] = ()

    @property
    def most(self) -> int:
        """The largest k of what is read."""
        return max((c.reader.k for c in self.chains), default=1)

    @property
    def sides(self) -> list[tuple[Chain, Operand]]:
        """The side inputs of all chains, in order."""
        return [(c, side) for c in self.chains for side in c.sides if isinstance(side, Value)]


NOTHING_READ = Reads()


def reads_of(match: Any, settings: Any, split: bool) -> Reads | str:
    """What reads the logits of a match, as far as its settings ask; a reason where that can't be proved.

    Args:
      match: a ``VocabMatch``.
      settings: its settings, ``certify`` decided.
      split: whether its rows are over several devices, of which each knows its own logits only.
    """
    product, fate = match.product, match.fate
    found = [(reader, chain_of(product, fate, reader)) for reader in match.readers]
    if settings.fill == "-inf" and (why := _spoiled(found)) is not None:
        return why
    if not settings.certify:
        return _ranked(found, split)
    chains: dict[tuple[Value, int], Chain] = {}
    proved: list[str] = []
    unproved: list[str] = []
    for reader, chain in found:
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
        if split and not chain.plain and not (chain.uniform and reader.slope > 0):
            return f"what {reader.where} reads is not its logits alone, which is proved on one device only"
        chains.setdefault((chain.value, reader.k), chain)
        proved.append(_told(reader))
    unproved += [f"what {how} reads of predicted logits" for how in others_of(fate, match.readers)]
    return Reads(tuple(chains.values()), tuple(dict.fromkeys(proved)), tuple(dict.fromkeys(unproved)))


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
    if reader.kind == "returned":
        return "the arg max of what is returned"
    return f"the arg max ({reader.where})"


def _ranked(found: list[tuple[Reader, Any]], split: bool) -> Reads:
    """Where nothing is proved: what candidates have to be chosen by."""
    followed = [chain for reader, chain in found if isinstance(chain, Chain) and reader.kind != "softmax"]
    own = {chain.value: chain for chain in followed if not chain.uniform}
    return Reads(() if split else tuple(own.values()))
