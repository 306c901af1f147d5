"""What has to be proved of a match, and the program's own equations replayed on intervals for it.

In: matches. Out: ``Chain`` (from logits to a reader), regions on intervals, reasons where there is no proof.
"""
