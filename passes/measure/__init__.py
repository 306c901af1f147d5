"""The program evaluated densely with something beside it: statistics of every site, or what sizes would do to it."""
