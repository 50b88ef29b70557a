"""Planar flows fitted to 2-D energies: the command `density`."""
