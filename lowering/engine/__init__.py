"""Predict, (bound,) select, compute, (prove, fall back): the subgraphs that stand where a dense product stood."""
