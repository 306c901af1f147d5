"""Bounds on what floating point makes of products, intervals, and what is proved with them."""
