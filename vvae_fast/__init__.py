"""Planar normalizing flows as one fused operation, and a VAE that uses them."""

from vvae_fast._version import __version__
from vvae_fast.backends import info, use_backend
from vvae_fast.functional import planar_flow, planar_flow_inverse
from vvae_fast.nn.gaps import inference_gaps
from vvae_fast.nn.planar import AmortizedPlanarFlow, PlanarFlow
from vvae_fast.nn.vae import VAE

__all__ = [
    "VAE",
    "AmortizedPlanarFlow",
    "PlanarFlow",
    "__version__",
    "inference_gaps",
    "info",
    "planar_flow",
    "planar_flow_inverse",
    "use_backend",
]
