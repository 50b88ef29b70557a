"""Checkpoints of sylvester-flows, the code of van den Berg et al. 2018 (riannevdberg/sylvester-flows), as flows here.

Its VAEs have a linear layer for each kind of parameter: amor_d, amor_diag1, amor_diag2, amor_q and amor_b, and the
planar one amor_u, amor_w and amor_b. Their rows, in another order, are one head.
"""

from typing import Any

import torch
from torch import Tensor

from vvae_fast.interop._runs import check_state_dict
from vvae_fast.nn.base import unautocast
from vvae_fast.nn.planar import AmortizedPlanarFlow
from vvae_fast.nn.sylvester.flows import AmortizedSylvesterFlow
from vvae_fast.shapes import full_precision

KINDS = ("planar", "orthogonal", "householder", "triangular")
_STEPS = 100  # of the iteration, at most
_QUADRATIC = 0.01  # a defect from which on a step squares it; where one does not, what is left is rounding


class BjorckSylvesterFlow(AmortizedSylvesterFlow):
    """An `AmortizedSylvesterFlow` with sylvester-flows' orthogonal Q: Bjorck's iteration on the D x M matrices that the
    head gives, in place of M reflections.

    Q <- Q (3 I - Q^T Q) / 2 starts from a matrix of Frobenius norm 1 and ends, for all samples at once, where
    |Q^T Q - I| is at most 1e-6, or 1e-5 for M = D. So Q is orthonormal to that tolerance alone, log_det and the inverse
    are off by about as much, and a sample's Q depends in its last digits on the others in its batch.
    """

    def __init__(self, dim: int, num_layers: int, num_units: int | None, context_dim: int, **options: Any) -> None:
        super().__init__(dim, num_layers, num_units, context_dim, kind="orthogonal", **options)

    def _q_of(self, v: Tensor) -> Tensor:
        with unautocast(v):
            return _bjorck(full_precision(v).mT, 1e-5 if self.num_units == self.dim else 1e-6)


def _bjorck(q: Tensor, tolerance: float) -> Tensor:
    """Nearly orthonormal columns [*, D, M] from any."""
    q = q / torch.linalg.matrix_norm(q, keepdim=True)
    identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    last = float("inf")
    for _ in range(_STEPS):
        q = q + q @ (identity - q.mT @ q) / 2
        with torch.no_grad():
            norms = torch.linalg.matrix_norm(q.mT @ q - identity)
            defect = norms.max().item() if norms.numel() else 0.0
        if defect <= tolerance or last <= defect < _QUADRATIC:
            break
        last = defect
    return q


def from_sylvester_flows(
    state_dict: dict[str, Tensor], kind: str, *, backend: str | None = None
) -> AmortizedSylvesterFlow | AmortizedPlanarFlow:
    """The flow (z, h) -> (z_L, log_det) of a VAE of sylvester-flows, from the state_dict of the VAE.

    h [*params, 256] is the output of its encoder `q_z_nn`, flattened. All entries but amor_* are ignored.

    kind: "planar" gives an `AmortizedPlanarFlow`; "householder" and "triangular" an `AmortizedSylvesterFlow` of that
    kind; "orthogonal" a `BjorckSylvesterFlow`. It must be given: the state_dicts of O with M = D and H look alike.

    Raises TypeError if state_dict is not one, ValueError for an unknown kind, and if entries are missing or do not fit.
    """
    check_state_dict(state_dict)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    names = _layers(kind)
    missing = [f"{name}.{end}" for name in names for end in ("weight", "bias") if f"{name}.{end}" not in state_dict]
    if missing:
        raise ValueError(f"state_dict must have {', '.join(missing)} for kind={kind!r}, got none: name its own kind")
    rows = {name: _rows(state_dict, name) for name in names}
    counts = {name: len(t) for name, t in rows.items()}
    flow, head = _planar(rows, backend) if kind == "planar" else _sylvester(rows, kind, backend)
    if "q_z_mean.bias" in state_dict and len(state_dict["q_z_mean.bias"]) != flow.dim:
        dim = len(state_dict["q_z_mean.bias"])
        raise ValueError(f"state_dict must be of kind={kind!r} with D = {dim}, got {counts}: name its own kind")
    with torch.no_grad():
        flow.head.weight.copy_(head[:, :-1])
        flow.head.bias.copy_(head[:, -1])
    return flow


def to_sylvester_flows_state_dict(flow: AmortizedSylvesterFlow | AmortizedPlanarFlow) -> dict[str, Tensor]:
    """The amor_* entries of the VAE of sylvester-flows that has this flow, as copies, with zeros where it reads none.

    Load them with strict=False. Raises TypeError for any other flow than `from_sylvester_flows` gives.
    """
    bjorck = isinstance(flow, BjorckSylvesterFlow)
    if isinstance(flow, AmortizedPlanarFlow):
        fits = flow.activation == "tanh" and flow.constraint == "softplus"
    else:
        fits = isinstance(flow, AmortizedSylvesterFlow) and flow.activation == "tanh"
        fits = fits and (bjorck or (flow.kind != "orthogonal" and flow.num_units == flow.dim))
    if not fits or flow.rank is not None or flow.normalise:
        raise TypeError(
            "flow must be one that from_sylvester_flows gives (tanh; softplus for planar steps; M = D for kind="
            f"'householder'; no rank; no normalise), got {flow!r}: sylvester-flows has no other"
        )
    rows = torch.cat([flow.head.weight, flow.head.bias[:, None]], 1).detach()
    if isinstance(flow, AmortizedPlanarFlow):
        sizes = [flow.num_steps * flow.dim, flow.num_steps * flow.dim, flow.num_steps]
        parts = dict(zip(_layers("planar"), rows.split(sizes), strict=True))
    else:
        layers, units = flow.num_layers, flow.num_units
        v, mixed, y, b = rows.split(flow._lengths())
        mixed = mixed.unflatten(0, (layers, units, units))
        off_diagonal = 1 - torch.eye(units, dtype=rows.dtype, device=rows.device)[..., None]
        parts = {
            "amor_d": (mixed * off_diagonal).movedim(0, 2).flatten(0, 2),
            "amor_diag1.0": mixed.diagonal(dim1=1, dim2=2).permute(2, 0, 1).flatten(0, 1),
            "amor_diag2.0": _swapped(y, layers),
            "amor_b": _swapped(b, layers),
        }
        if flow.num_reflections:
            v = v.unflatten(0, (layers, flow.num_reflections, flow.dim))
            parts["amor_q"] = _turned(v, bjorck).flatten(0, 2)
    return {
        f"{name}.{end}": (part[:, -1] if end == "bias" else part[:, :-1]).clone()
        for name, part in parts.items()
        for end in ("weight", "bias")
    }


def _layers(kind: str) -> tuple[str, ...]:
    """The linear layers of a VAE, by their names in its state_dict."""
    if kind == "planar":
        return "amor_u", "amor_w", "amor_b"
    both = ("amor_d", "amor_diag1.0", "amor_diag2.0", "amor_b")
    return both if kind == "triangular" else (*both, "amor_q")


def _rows(state_dict: dict[str, Tensor], name: str) -> Tensor:
    """Weight and bias of a linear layer, [outputs, F + 1]."""
    weight, bias = state_dict[f"{name}.weight"], state_dict[f"{name}.bias"]
    for end, t in (("weight", weight), ("bias", bias)):
        if not isinstance(t, Tensor):
            raise TypeError(f"state_dict's {name}.{end} must be a torch.Tensor, got {type(t).__name__}")
    if weight.dim() != 2 or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"state_dict's {name}.weight must be [outputs, F] and its bias [outputs], got {tuple(weight.shape)} and "
            f"{tuple(bias.shape)}"
        )
    return torch.cat([weight, bias[:, None]], 1).detach()


def _planar(rows: dict[str, Tensor], backend: str | None) -> tuple[AmortizedPlanarFlow, Tensor]:
    """The flow, and the rows of its head."""
    u, w, b = (rows[name] for name in _layers("planar"))
    steps = len(b)
    if steps < 1 or len(u) % steps or len(u) != len(w) or not len(u):
        raise ValueError(
            f"amor_u, amor_w and amor_b must have K D, K D and K outputs, got {len(u)}, {len(w)} and {steps}"
        )
    flow = AmortizedPlanarFlow(len(u) // steps, steps, u.shape[1] - 1, backend=backend)
    return flow.to(u.device, u.dtype), torch.cat([u, w, b])


def _sylvester(rows: dict[str, Tensor], kind: str, backend: str | None) -> tuple[AmortizedSylvesterFlow, Tensor]:
    """The flow, and the rows of its head."""
    d, x, y, b = (rows[name] for name in _layers("triangular"))
    units = len(d) // max(len(x), 1)
    layers = len(x) // max(units, 1)
    if not layers or (len(d), len(x)) != (layers * units * units, layers * units) or not len(x) == len(y) == len(b):
        raise ValueError(
            "amor_d must have M M L outputs, amor_diag1, amor_diag2 and amor_b M L, got "
            f"{len(d)}, {len(x)}, {len(y)} and {len(b)}"
        )
    # All but q have the layers last.
    mixed = d.unflatten(0, (units, units, layers)).movedim(2, 0).clone()  # [L, M, M, F + 1]
    mixed.diagonal(dim1=1, dim2=2).copy_(x.unflatten(0, (units, layers)).permute(1, 2, 0))
    head = [mixed.flatten(0, 2), _swapped(y, units), _swapped(b, units)]
    context = d.shape[1] - 1
    if kind == "triangular":
        flow = AmortizedSylvesterFlow(units, layers, None, context, kind=kind, backend=backend)
        return flow.to(d.device, d.dtype), torch.cat(head)
    q, orthogonal = rows["amor_q"], kind == "orthogonal"
    each = layers * units  # numbers of q for a row of a D x M matrix, or for a reflection
    if not len(q) or len(q) % each or (orthogonal and len(q) // each < units):
        wanted = f"L D M with D >= M = {units}" if orthogonal else f"L H D with D = {units}"
        raise ValueError(f"amor_q must have {wanted} and L = {layers} outputs, got {len(q)}: is the kind {kind!r}?")
    other = len(q) // each
    if orthogonal:
        flow = BjorckSylvesterFlow(other, layers, units, context, backend=backend)
    else:
        flow = AmortizedSylvesterFlow(units, layers, None, context, kind=kind, num_reflections=other, backend=backend)
    v = _turned(q.unflatten(0, (layers, other, units)), orthogonal)
    return flow.to(d.device, d.dtype), torch.cat([v.flatten(0, 2), *head])


def _swapped(rows: Tensor, first: int) -> Tensor:
    """[M L, F + 1] to [L M, F + 1] with first = M, and back with first = L."""
    return rows.unflatten(0, (first, -1)).transpose(0, 1).flatten(0, 1)


def _turned(q: Tensor, orthogonal: bool) -> Tensor:
    """[L, D, M, F + 1] to [L, M, D, F + 1] and back; reflections [L, H, D, F + 1] in reverse order."""
    return q.transpose(1, 2) if orthogonal else q.flip(1)
