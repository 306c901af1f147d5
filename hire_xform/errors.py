"""Warnings and errors a user may meet."""


class HireWarning(UserWarning):
    """Something works as documented, but not as fast, or with logits not as close, as it could be."""


class TracedWeightsError(TypeError):
    """Plain weights arrived as tracers: packing them inside the trace would read every weight at every call."""


class PackedMismatchError(ValueError):
    """A ``Packed`` does not hold what this call reads, or was made for another argument."""
