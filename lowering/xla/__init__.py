"""Spellings that XLA is fast at, and promotion of dtypes: plain functions of arrays."""
