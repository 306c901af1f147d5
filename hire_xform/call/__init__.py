"""From a call to the jitted program: its arguments taken apart, stages, weights packed and remembered, entries."""
