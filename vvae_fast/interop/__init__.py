"""Flows with the names of other packages: interop.normflows, interop.pyro, interop.pythae and interop.sylvester_flows.

The first three have the other package's layers, one fused layer for a run of planar ones, and state_dicts both ways.
They can be imported without these packages; only Pyro's own distributions and its helpers for networks need Pyro. The
last reads checkpoints.
"""
