"""Kernels for CPUs in C++, called through XLA's FFI on XLA's threads; instruction sets are chosen at run time."""
