"""Measures the machine, and keeps what was measured: the profiles that plans predict times from."""
