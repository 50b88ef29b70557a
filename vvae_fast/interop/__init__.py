"""Planar flows with the names of other packages: interop.normflows, interop.pyro and interop.pythae.

Each has the other package's layer, one fused layer for a run of such layers, and state_dicts both ways. They can be
imported without these packages; only Pyro's own distributions, and `conditional_planar`, need Pyro.
"""
