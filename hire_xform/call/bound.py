"""A call with its static arguments fixed, as ``jax.jit`` lowers one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from hire_xform.call.leaves import is_array
from hire_xform.call.signature import Signature, Static


class Bound:
    """A function over what a lowered one is called with: the arguments of a call without those that are static.

    They are taken out here, by position and by name: ``jax.jit`` reads the function's signature for that, which a
    function of ``*args, **kwargs`` hides.

    Attributes:
      args, kwargs: the arguments that are left.
      donated: for ``jax.jit``, which of these are donated.
    """

    def __init__(self, fun: Callable, signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any]):
        """Takes a call apart, static arguments wrapped."""
        self._fun = fun
        self._fixed = {i: _bare(a) for i, a in enumerate(args) if _is_static(a)}
        self._named = {k: _bare(v) for k, v in kwargs.items() if _is_static(v)}
        left = [i for i in range(len(args)) if i not in self._fixed]
        self.args = tuple(args[i] for i in left)
        self.kwargs = {k: v for k, v in kwargs.items() if k not in self._named}
        donated = [n for n, i in enumerate(left) if signature.holds(signature.donated, i)]
        names = [k for k in self.kwargs if signature.holds(signature.donated, k)]
        self.donated: dict[str, Any] = {"donate_argnums": tuple(donated), "donate_argnames": tuple(names)}

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The function, with the static arguments in their places."""
        rest = iter(args)
        count = len(args) + len(self._fixed)
        whole = [self._fixed[i] if i in self._fixed else next(rest) for i in range(count)]
        return self._fun(*whole, **kwargs, **self._named)

    def jaxpr(self) -> Any:
        """The function's program, over the array leaves of these arguments in their order."""
        leaves, treedef = jax.tree.flatten((self.args, self.kwargs))
        arrays = [i for i, leaf in enumerate(leaves) if is_array(leaf)]

        def flat(*values: Any) -> Any:
            merged = list(leaves)
            for i, value in zip(arrays, values, strict=True):
                merged[i] = value
            args, kwargs = jax.tree.unflatten(treedef, merged)
            return self.run(*args, **kwargs)

        return jax.make_jaxpr(flat)(*[leaves[i] for i in arrays])


def _is_static(value: Any) -> bool:
    """True for an argument that is static: one that was stated to be, and one that is no array and holds none."""
    return isinstance(value, Static) or (jax.tree_util.all_leaves([value]) and not is_array(value))


def _bare(value: Any) -> Any:
    return value.value if isinstance(value, Static) else value
