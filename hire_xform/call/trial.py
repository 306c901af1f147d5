"""The first calls of a step are a trial: a site that does worse in them than it should is told of, or left dense.

Calls that are no part of an outer trace run a program that also counts what its sites' marks say. The counts of the
first calls are kept where they are, and read once there are enough: no call waits for its own.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from hire_xform.call.counting import count_last
from hire_xform.errors import HireWarning
from hire_xform.passes.ir import compat
from hire_xform.passes.ir.debugging import debugging
from hire_xform.passes.ir.trace_context import as_usual
from hire_xform.passes.plan.decisions import PackKey, Site
from hire_xform.passes.plan.settings import Choice

if TYPE_CHECKING:
    from hire_xform.api import Sparsified
    from hire_xform.call.stages import Traced

# Calls that are counted.
FIRST_CALLS = 32
# Of its executions a certified site may run this share dense: above it, it is slower than the dense product alone.
FALLBACK_SHARE = 0.25
# And in this share of them an approximate block may be too small for the units that its predictor calls non-zero.
SHORT_SHARE = 0.05

# Sites that are left dense, by kind and path, and why.
Reasons = Mapping[tuple[str, str], str]


@dataclass(frozen=True)
class LeavingDense:
    """A ``Config``, but for the sites that failed their trial."""

    config: Any
    reasons: Reasons

    def choose(self, kind: str, path: str, *more: Any) -> Choice:
        """The settings of a site of a kind at a path, with weights of these names."""
        reason = self.reasons.get((kind, path))
        return (
            self.config.choose(kind, path, *more)
            if reason is None
            else Choice(settings=None, reason=reason, final=True)
        )

    def __getattr__(self, name: str) -> Any:
        """All else is the config's."""
        return getattr(self.config, name)


class Trial:
    """The trial of the sites of one traced program; stands in the results of its calls beside their counts."""

    def __init__(self, traced: Traced):
        """None of its calls were made yet."""
        self._traced = traced
        self._sites: tuple[Site, ...] = ()
        self._counts: list[Any] = []
        self._lock = threading.Lock()
        self._done = False

    def counted(self, body: Callable[..., Any], operands: Sequence[Any]) -> tuple[Any, dict[Trial, jax.Array]]:
        """Evaluates ``body``, under a trace.

        Returns:
          What it returns; and, where sites of it are on trial, how often each was executed, and how often of these its
          mark was the last one, in turn: int32 ``[2 sites]``.
        """
        marked = [decision.site for decision in self._traced.plan.decisions if decision.marks]
        watched = {site.path: site for site in marked if not _is_kept(site)}
        if not watched or jax.config.jax_disable_jit:  # type: ignore[attr-defined]
            return body(*operands), {}
        program, shape = jax.make_jaxpr(body, return_shape=True)(*operands)
        try:
            results, counts = count_last(program, jax.tree.leaves(operands), watched)
        except Exception as error:  # marks stand where counts can't be added up: no call fails for that
            if debugging() and not isinstance(error, NotImplementedError):
                raise
            return body(*operands), {}
        self._sites = tuple(site for path, site in watched.items() if path in counts)
        whole = jax.tree.unflatten(jax.tree.structure(shape), results)
        if not self._sites:
            return whole, {}
        return whole, {self: jnp.stack([count for site in self._sites for count in counts[site.path]])}

    def note(self, owner: Sparsified, counts: Any) -> None:
        """Takes the counts of one call; those of the first calls, once they are all there, decide."""
        if self._done or compat.is_tracer(counts):
            return
        with self._lock:
            if self._done:
                return
            if len(self._counts) < FIRST_CALLS:
                self._counts.append(counts)
                return
            self._done, kept, self._counts = True, self._counts, []
        # By now another call has been made, so these are there or will be soon. Always at this call: where several
        # processes run one program, all have to change it at once.
        totals = _total(kept)
        if totals is not None:
            self._judge(owner, totals)

    def _judge(self, owner: Sparsified, totals: np.ndarray) -> None:
        failed: dict[tuple[str, str], str] = {}
        short: list[str] = []
        for site, (executed, last) in zip(self._sites, totals.reshape(-1, 2).tolist(), strict=True):
            if site.settings.certify and last > FALLBACK_SHARE * executed:
                failed[site.kind, site.path] = (
                    f"its proofs failed for {last} of its first {executed} executions, which is slower than dense; "
                    "expected a calibration for inputs like these, hx.calibrate(...), or "
                    f"hx.Rule({site.path!r}, force=True) to keep it"
                )
            elif not site.settings.certify and last > SHORT_SHARE * executed:
                short.append(f"{site.path} ({site.source}), {last} of its first {executed} executions")
        if failed and owner.leave_dense(failed, self._keys_of(failed)):
            sites = "; ".join(
                f"{s.path} ({s.source}): {failed[k]}" for s in self._sites if (k := (s.kind, s.path)) in failed
            )
            _warn(f"{owner!r} leaves dense from now on what is slower than dense. {sites}. All results were right")
        if short:
            _warn(
                f"{owner!r}: blocks are too small for the hidden units that their predictors call non-zero, and leave "
                f"some out: {'; '.join(short)}. Raise active, hx.Ffn(active=...), choose it by hx.calibrate(...), or "
                "take the lossless default, hx.lossless()"
            )

    def _keys_of(self, failed: Reasons) -> list[PackKey]:
        """Packed forms that no site reads but these."""
        read: dict[bool, set[PackKey]] = {True: set(), False: set()}
        for decision in self._traced.plan.decisions:
            read[(decision.site.kind, decision.site.path) in failed].update(n.key for n in decision.needs)
        return list(read[True] - read[False])


def _is_kept(site: Site) -> bool:
    """A certified site that a rule asks for, whatever it costs."""
    return bool(site.settings.certify) and site.forced


def _total(counts: Sequence[Any]) -> np.ndarray | None:
    """The sum of some counts; None where a call failed, or this process does not have them."""
    try:
        with as_usual():
            return np.asarray(sum(np.asarray(one, np.int64) for one in counts))
    except Exception:  # whatever a computation raised, or a backend says of arrays that are elsewhere
        return None


def _warn(message: str) -> None:
    warnings.warn(message, HireWarning, stacklevel=7)
