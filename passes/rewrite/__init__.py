"""Evaluates the program under a trace, equation by equation, with the subgraphs where the sites were.

In: a graph, a plan, packed forms. Out: a traceable function. The only room that puts ``lowering`` into a program.
"""
