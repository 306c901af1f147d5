"""Evaluates the program under a trace, equation by equation, with the subgraphs where the sites were.

In: a graph, a plan, packed forms. Out: a traceable function. What is put into a program is an ``Action``; the subgraphs
of sites are those of their kinds.
"""
