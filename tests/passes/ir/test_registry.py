"""What is registered from outside, and taken away again in any order."""

from hire_xform.passes.ir.registry import enter


def test_what_was_there_is_put_back():
    table = {"a": 1}
    remove = enter(table, "a", 2)
    assert table == {"a": 2}
    remove()
    assert table == {"a": 1}
    remove()
    assert table == {"a": 1}


def test_what_is_new_is_taken_away():
    table = {}
    enter(table, "a", 1)()
    assert table == {}


def test_what_another_has_replaced_stays():
    table = {}
    first, second = enter(table, "a", object()), enter(table, "a", object())
    kept = table["a"]
    first()
    assert table == {"a": kept}
    second()
    assert len(table) == 1
