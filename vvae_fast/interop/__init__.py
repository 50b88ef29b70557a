"""Planar flows under the names of other packages: interop.normflows, interop.pyro and interop.pythae.

Each has the other package's layer, one fused layer for a run of them, and their state_dicts both ways. None of these
packages has to be installed to import them, but Pyro has to be for what only its own distributions can use.
"""
