"""Bounds on what predictors and floating point make of products, intervals, and what is proved with them."""
