"""The oracle: planar flows in plain PyTorch, with which every kernel is compared."""

from vvae_fast.reference.flow import constrain, planar_backward, planar_forward, planar_inverse, softplus

__all__ = ["constrain", "planar_backward", "planar_forward", "planar_inverse", "softplus"]
