"""docs/models.md has a line for every model there is a test of, with the numbers that the test asserts."""

import re
from pathlib import Path

import pytest
from case import FRAMEWORKS, cases_of
from extras import why_missing

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def lines():
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 9 and cells[0] in FRAMEWORKS:
            yield cells


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_page_has_every_model_of_a_framework(framework):
    try:
        cases = cases_of(framework)
    except ImportError as error:
        pytest.skip(why_missing(FRAMEWORKS[framework][1], error))
    written = [cells for cells in lines() if cells[0] == framework]
    assert [(c[1], c[2]) for c in written] == [(c.model, c.nesting) for c in cases]
    for cells, case in zip(written, cases, strict=True):
        found = [int(n) for c in cells[3:5] for n in re.findall(r"\d+", c)]
        assert (found[1], found[3]) == (case.ffn, case.vocab)
        assert found[0] + found[2] == case.ffn + case.vocab - len(case.missed)
        assert sum(int(n) for n in re.findall(r"(\d+): \(", cells[5])) == case.refusals
        assert cells[6] != "DIFFERENT"
        assert float(cells[6]) < 0.05
