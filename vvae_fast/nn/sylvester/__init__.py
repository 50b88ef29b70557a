"""Flows with orthogonal matrices: Sylvester flows, Householder flows, and what they are made of."""
