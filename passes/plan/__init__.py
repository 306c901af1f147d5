"""What is done with each match, by settings, measurements, bytes and the machine: ``Plan``, of sites and refusals.

In: a detection and settings. Out: ``Decision`` and the packed forms (``PackKey``, ``Need``) it reads. Computes nothing.
"""
