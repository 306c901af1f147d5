"""Runs a function dense and sparse on the user's own arguments, and says what that gives."""
