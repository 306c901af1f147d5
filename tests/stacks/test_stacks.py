"""The decode functions of stacks: all blocks and heads found, equal at full width, and the same tokens losslessly."""

import pytest
from checked import checked
from stack import STACKS, Stack, stacks_of, why_missing

pytestmark = pytest.mark.any_jax("a stack asks for a JAX of its own")


def collected():
    for name in STACKS:
        try:
            cases = stacks_of(name)
        except ImportError as error:
            yield pytest.param(None, id=name, marks=pytest.mark.skip(reason=why_missing(name, error)))
            continue
        yield from (pytest.param(case, id=repr(case)) for case in cases)


@pytest.mark.slow
@pytest.mark.parametrize("case", list(collected()))
def test_a_stacks_decode_function_is_found_whole_equal_and_lossless(case: Stack):
    found = checked(case)
    assert (found.ffn, found.vocab) == (case.ffn, case.vocab), found.why
    assert found.gap <= case.tolerance
    assert found.proved == case.proved
    assert found.same_tokens is not False
