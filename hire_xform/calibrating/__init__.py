"""Runs a function on real inputs, measures every site, and chooses predictors and sizes: a ``Calibration``."""
