"""Compressed copies of a matrix that say, cheaply, which of its rows give the largest products, one a file."""
