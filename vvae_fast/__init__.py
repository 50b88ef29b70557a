"""Planar and Sylvester normalizing flows as one fused operation, and a VAE that uses them."""

from vvae_fast._version import __version__
from vvae_fast.backends import info, use_backend
from vvae_fast.functional import planar_flow, planar_flow_inverse
from vvae_fast.nn.gaps import inference_gaps
from vvae_fast.nn.planar import AmortizedPlanarFlow, PlanarFlow
from vvae_fast.nn.sylvester.flows import AmortizedSylvesterFlow, SylvesterFlow
from vvae_fast.nn.sylvester.householder import AmortizedHouseholderFlow, HouseholderFlow
from vvae_fast.nn.vae import VAE
from vvae_fast.sylvester import sylvester_flow, sylvester_flow_inverse

__all__ = [
    "VAE",
    "AmortizedHouseholderFlow",
    "AmortizedPlanarFlow",
    "AmortizedSylvesterFlow",
    "HouseholderFlow",
    "PlanarFlow",
    "SylvesterFlow",
    "__version__",
    "inference_gaps",
    "info",
    "planar_flow",
    "planar_flow_inverse",
    "sylvester_flow",
    "sylvester_flow_inverse",
    "use_backend",
]
