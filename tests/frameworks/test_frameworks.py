"""Models of every framework, unedited: all blocks found, equal at full width, as few functions as before."""

import pytest
from case import FRAMEWORKS, Case, cases_of
from extras import why_missing
from measure import measure


def collected():
    for framework, (_, extra) in FRAMEWORKS.items():
        try:
            cases = cases_of(framework)
        except ImportError as error:
            why = why_missing(extra, error)
            yield pytest.param(None, id=framework.replace(" ", "_"), marks=pytest.mark.skip(reason=why))
            continue
        yield from (pytest.param(case, id=repr(case)) for case in cases)


@pytest.mark.slow
@pytest.mark.parametrize("case", list(collected()))
def test_an_unedited_model_is_found_whole_and_equal_at_full_width(case: Case):
    row = measure(case)
    assert len(row.case.missed) <= row.case.ffn + row.case.vocab
    assert row.ffn + row.vocab == case.ffn + case.vocab - len(case.missed), row.reasons
    assert (row.ffn <= case.ffn, row.vocab <= case.vocab) == (True, True), row.reasons
    assert row.reasons.total() == case.refusals, row.reasons
    assert row.same_rest
    assert row.gap < case.tolerance
    # Sites that are rewritten alike share their functions: a few for each kind of site, however deep the model.
    assert row.sparse_functions <= row.dense_functions + 40
