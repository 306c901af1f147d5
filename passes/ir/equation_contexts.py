"""What is bound in an equation's place carries what the equation carried: name stack, user traceback and context."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend import source_info_util

from hire_xform.passes.ir import compat


@contextlib.contextmanager
def _kept_mesh(manager: Any, mesh: Any) -> Iterator[None]:
    with manager, jax.sharding.use_abstract_mesh(mesh):
        yield


def _within(manager: Any, elsewhere: bool) -> Any:
    """An equation's context, but for its mesh where that would lead out of a shard_map that stands around it now.

    So for an equation that is run ``elsewhere`` than it stands: in a subgraph, under the axes of that.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if manager is None or not (getattr(mesh, "manual_axes", ()) or (elsewhere and not mesh.empty)):
        return manager
    return _kept_mesh(manager, mesh)


class EquationContexts:
    """Makes what is bound carry an equation's name stack, user traceback and context (compute_on and such).

    Used as a context manager around a run of equations, with ``enter`` before each. Equations of one program mostly
    share one context, which is entered once for all of them: this is run for every equation there is. ``eqn.ctx`` and
    its ``manager`` are there on 0.10 to 0.12 and are looked up defensively.
    """

    __slots__ = ("_base", "_context", "_elsewhere", "_manager", "_user")

    def __init__(self, elsewhere: bool = False) -> None:
        self._base = source_info_util.current_name_stack()
        self._elsewhere = elsewhere
        self._user: Any = None
        self._context: Any = None
        self._manager: Any = None

    def enter(self, eqn: compat.Eqn) -> None:
        """From here on, what is bound belongs to ``eqn``."""
        if self._user is not None:
            self._user.__exit__(None, None, None)
            self._user = None
        context = getattr(eqn, "ctx", None)
        if context is not self._context:
            self._leave_context()
            self._manager = _within(getattr(context, "manager", None), self._elsewhere)
            if self._manager is not None:
                self._manager.__enter__()
            self._context = context
        info = eqn.source_info
        stack = self._base + info.name_stack if self._base.stack else info.name_stack
        self._user = source_info_util.user_context(info.traceback, name_stack=stack)
        self._user.__enter__()

    def _leave_context(self) -> None:
        if self._manager is not None:
            self._manager.__exit__(None, None, None)
        self._manager = self._context = None

    def __enter__(self) -> EquationContexts:
        """Nothing is entered yet."""
        return self

    def leave(self) -> None:
        """From here on, what is bound belongs to none of the equations."""
        self.__exit__(None, None, None)

    def __exit__(self, *error: Any) -> None:
        """Leaves the last equation's contexts; an error is told where in the user's program it arose."""
        user, self._user = self._user, None
        try:
            if user is not None:
                user.__exit__(*error)
        finally:
            self._leave_context()


@contextlib.contextmanager
def equation_context(eqn: compat.Eqn) -> Iterator[None]:
    """``EquationContexts`` around one equation, which is run elsewhere than it stands."""
    with EquationContexts(elsewhere=True) as contexts:
        contexts.enter(eqn)
        yield
