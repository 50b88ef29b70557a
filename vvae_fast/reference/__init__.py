"""The oracle: planar and Sylvester flows in plain PyTorch, with which every kernel is compared."""

from vvae_fast.reference.flow import constrain, planar_backward, planar_forward, planar_inverse, softplus, unconstrain
from vvae_fast.reference.sylvester import Layers, sylvester_backward, sylvester_forward, sylvester_inverse

__all__ = [
    "Layers",
    "constrain",
    "planar_backward",
    "planar_forward",
    "planar_inverse",
    "softplus",
    "sylvester_backward",
    "sylvester_forward",
    "sylvester_inverse",
    "unconstrain",
]
