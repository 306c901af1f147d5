"""Primitives of this library, one a file, and functions on ranks that they share; registrations stand at the bottom."""
