"""What softmax and log-softmax leave out of a token's logits: the same for all entries, and no larger than they are."""

from __future__ import annotations

from jax.extend.core import primitives as prims

from hire_xform.passes.ir.axis_rules import moves_only
from hire_xform.passes.ir.graph import Operand, Value
from hire_xform.passes.ir.pointwise import known_number
from hire_xform.passes.prove.chains import keeps_values
from hire_xform.passes.prove.logits import Logits

ENDS = frozenset({prims.exp_p, prims.log_p})
# Each sum may double what is left out; this many keep its rounding below the margin.
_MAX_SUMS = 3
_MAX_STEPS = 64
_SUMS = frozenset({prims.add_p, prims.sub_p})
_CASTS = frozenset({prims.convert_element_type_p, prims.copy_p, prims.stop_gradient_p})
_COMMON = _SUMS | _CASTS | {prims.is_finite_p, prims.log_p, prims.max_p, prims.select_n_p}


def is_left_out(logits: Logits, operand: Operand, beside: Value, divisor: bool = False) -> bool:
    """True for what a softmax subtracts or divides by: the same for all entries of a token, and of known size.

    A divisor is a sum of exponentials, which is positive.
    """
    if not isinstance(operand, Value) or not logits.make_for_each_token(operand):
        return False
    dims = logits.fate.axes.get(beside, frozenset())
    if operand.shape and len(operand.shape) == len(beside.shape) and any(operand.shape[d] > 1 for d in dims):
        source = operand.node.inputs[0] if operand.node is not None and moves_only(operand.node) else None
        if not isinstance(source, Value) or source.shape[-1:] == operand.shape[-1:]:
            return False
    if beside.aval.dtype.name != "float32":
        return False
    return _LeftOut(logits, _source(logits, beside), divisor).holds(operand)


def _source(logits: Logits, value: Value) -> Value:
    """What a softmax or a part of one is taken of, from one of its entries."""
    for _ in range(_MAX_STEPS):
        node = value.node
        if node is None or value is logits.product.out:
            break
        left_out = node.primitive in (prims.sub_p, prims.div_p) and logits.make_for_each_token(node.inputs[1])
        if not left_out and node.primitive not in ENDS and not keeps_values(node):
            break
        source = node.inputs[0]
        if not isinstance(source, Value) or logits.width(source) != logits.width(value):
            break
        value = source
    return value


class _LeftOut:
    """Whether what is left out is of the size that a softmax's margin says, for a softmax of one value.

    It is made of largest entries and of sums of exponentials of that value, added up a few times; as a divisor it is
    one such sum, which is positive.
    """

    def __init__(self, logits: Logits, of: Value, divisor: bool, sums: int = 0):
        self.logits, self.of, self.divisor, self.sums = logits, of, divisor, sums
        self.seen: set[Value] = set()

    def holds(self, value: Value) -> bool:
        """Whether a value that the logits reach is such a one."""
        if value in self.seen or not self.logits.reach(value):
            return True
        self.seen.add(value)
        node = value.node
        if node is None or len(self.seen) > 32:
            return False
        p = node.primitive
        if p is prims.reduce_max_p:
            return not self.divisor and self._is_part(node.inputs[0])
        if p is prims.reduce_sum_p:
            exponent = _exponent_of(node.inputs[0])
            return exponent is not None and self._is_part(exponent)
        self.sums += p in _SUMS
        if (p not in (_CASTS if self.divisor else _COMMON) and not moves_only(node)) or self.sums > _MAX_SUMS:
            return False
        return all(self.holds(o) for o in node.inputs if isinstance(o, Value))

    def _is_part(self, value: Operand) -> bool:
        """Whether a value is what the softmax is taken of, or that less such a common part."""
        while isinstance(value, Value) and value is not self.of:
            node = value.node
            if node is None or not isinstance(node.inputs[0], Value):
                return False
            if node.primitive is prims.sub_p and self.logits.make_for_each_token(node.inputs[1]):
                common = _LeftOut(self.logits, self.of, False, self.sums)
                if not isinstance(node.inputs[1], Value) or not common.holds(node.inputs[1]):
                    return False
                self.sums = common.sums
            elif not keeps_values(node) or self.logits.width(node.inputs[0]) != self.logits.width(value):
                return False
            value = node.inputs[0]
        return value is self.of


def _exponent_of(operand: Operand) -> Operand | None:
    """What a value is the exponential of, or zero: nothing negative, and nothing larger."""
    while isinstance(operand, Value) and operand.node is not None:
        node = operand.node
        if node.primitive is prims.exp_p:
            return node.inputs[0]
        cases = [o for o in node.inputs[1:] if known_number(o) != 0.0] if node.primitive is prims.select_n_p else []
        if len(cases) != 1 and node.primitive not in _CASTS:
            return None
        operand = cases[0] if cases else node.inputs[0]
    return None
