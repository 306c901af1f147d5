"""Which leaves and packed forms are held, for programs that read some leaves as they are and some packed."""

from types import SimpleNamespace

import pytest

from hire_xform.passes.plan.decisions import Need, PackKey
from hire_xform.passes.plan.forms import ROWS, Norms
from hire_xform.passes.rewrite.holding import Holding, Reader, decide_holding
from hire_xform.passes.weights.recipe import Recipe, Root, Slice, Transpose

A, B = Root.of(0, 0), Root.of(0, 1)
AS_IT_IS, TURNED, CUT = (), (Transpose((1, 0)),), (Slice((0, 0), (4, 2), (1, 1)),)


def rows(steps, root=A, form=ROWS):
    return PackKey(Recipe(root, steps), form)


def reader(forms, *dense, unless_held=()):
    """A program that reads these forms, and these leaves as they are; some only where they are held anyway."""
    decisions = [SimpleNamespace(cyclic="", needs=[Need(key, ()) for key in forms])]

    def actions(has_leaf, has_form):
        return {"absent": [root for root in (A, B) if not has_leaf(root)]}

    def rewriter(found):
        # What is not there can't be asked for as it is.
        read = {*dense, *(root for root in unless_held if root not in found["absent"])}
        return SimpleNamespace(needed_inputs=lambda: [root in read for root in (A, B, None)])

    return Reader(actions, SimpleNamespace(decisions=decisions), [A, B, None], {A.kind: 0}, rewriter)


# The forms that are read, and what is read as it is; then leaves kept, keys held, and leaves made of them again.
CASES = {
    "nothing is rewritten": ([], [A, B], (0, 1), [], ()),
    "rows as the leaf has them": ([rows(AS_IT_IS)], [], (0,), [], ()),
    "rows laid out otherwise": ([rows(TURNED)], [], (), [rows(TURNED)], ((0, 0),)),
    "rows laid out otherwise, and the leaf": ([rows(TURNED)], [A], (), [rows(TURNED)], ((0, 0),)),
    "both ways": ([rows(TURNED), rows(AS_IT_IS)], [], (0,), [rows(TURNED)], ()),
    "a part, and the leaf": ([rows(CUT)], [A], (0,), [rows(CUT)], ()),
    "a part": ([rows(CUT)], [], (), [rows(CUT)], ()),
    "norms beside rows": ([rows(TURNED), rows(TURNED, form=Norms())], [B], (1,), None, ((0, 0),)),
    "norms alone": ([rows(TURNED, form=Norms())], [A], (0,), None, ()),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_held(name):
    forms, dense, kept, keys, restored = CASES[name]
    found = decide_holding([reader(forms, *dense)])
    assert set(found) == {0}
    assert found[0].kept == kept
    assert found[0].restored == restored
    assert found[0].keys == tuple(key.anywhere for key in (forms if keys is None else keys))


def test_a_leaf_that_is_held_anyway_is_read_where_it_is_used():
    # The first program needs the leaf, of which the packed part does not make it; the second then has it, too.
    one, other = reader([rows(CUT)], A), reader([rows(TURNED, B)], unless_held=[A])
    assert decide_holding([one, other])[0].kept == (0,)
    assert decide_holding([reader([rows(CUT)], unless_held=[A])])[0].kept == ()


def test_programs_of_the_same_weights_hold_what_any_of_them_reads():
    found = decide_holding([reader([rows(TURNED)]), reader([rows(TURNED, B)], B), reader([rows(TURNED)])])[0]
    assert found.keys == tuple(rows(TURNED, root).anywhere for root in (A, B))
    assert found == Holding((), found.keys, ((0, 0), (1, 1)))


def test_weights_that_are_passed_elsewhere_are_the_same():
    here = reader([rows(TURNED)])
    there = reader([rows(TURNED, Root.of(3, 0))])
    there = Reader(
        there.actions, there.plan, [Root.of(3, 0), Root.of(3, 1), None], {Root.of(3, 0).kind: 0}, there.rewriter
    )
    assert there.shared(Root.of(3, 1)) == B
    assert there.shared(Root("const", 2)) == Root("const", 2)
    assert decide_holding([here, there])[0].keys == (rows(TURNED).anywhere,)
