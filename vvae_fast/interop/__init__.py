"""Flows with the names of other packages: interop.normflows, pyro, pythae, sylvester_flows and zuko.

The first three have the other package's layers, one fused layer for a run of planar ones, and state_dicts both ways;
sylvester_flows reads checkpoints, and zuko has lazy transforms. They can be imported without these packages; only
Pyro's own distributions, its helpers for networks, and zuko's flows need them.
"""
