"""The functional interface of Sylvester flows: `sylvester_flow` and `sylvester_flow_inverse`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vvae_fast import backends, reference, shapes
from vvae_fast.backends.sylvester import OPERATORS
from vvae_fast.spec import ACTIVATIONS, DEFAULT_SLOPE, FlowSpec


def sylvester_flow(
    z: Tensor,
    q: Tensor | None,
    r: Tensor,
    r_tilde: Tensor,
    b: Tensor,
    *,
    s: Tensor | None = None,
    activation: str = "tanh",
    slope: float = DEFAULT_SLOPE,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """L Sylvester layers z <- z + Q R h(R~ Q^T z + b) and the sum of their log-determinants, in one fused pass.

    van den Berg et al. 2018, equations 13 to 15. A layer of M units is M planar steps that do not see each other,
    docs/math.md (57).

    Args:
        z: [*batch, D], any number of leading dimensions, or none.
        q: [L, D, M], shared by all samples, or [*params, L, D, M], amortized, where *params are the trailing dimensions
            of *batch. Each Q has orthonormal columns, which is not checked: without, log_det and the inverse are wrong.
            None is the triangular kind: M = D, Q is the identity, and every second layer takes z in reverse order.
        r, r_tilde: [*params, L, M, M], upper triangular: what lies below the diagonal is not read.
        b: [*params, L, M].
        s: [*params, L, M], 1 + R_ii R~_ii where the caller knows it better than as that sum, which cancels near -1. The
            gradient of the log-determinants by R_ii R~_ii goes to s.
        activation, slope: those of `planar_flow`.
        backend: "cpp", "triton", "reference" or None for `use_backend`'s, the environment's or the default: "cpp" on
            the CPU, and on a GPU "triton", or matrix products of PyTorch where M x D is beyond its kernels. "cuda" has
            no kernels of Sylvester flows. Not measured on a GPU.

    Returns:
        z_L [*batch, D] in z's dtype, and log_det [*batch] = log|det dz_L/dz| in nats, float32 for the half precisions.

    Raises:
        TypeError: an argument is not a floating tensor or not a number, or dtypes differ outside torch.autocast.
        ValueError: shapes, devices, names or numbers do not fit; the message says which and what was expected.
        RuntimeError: the requested backend cannot run this problem; the message has the reasons.
    """
    spec = FlowSpec("none", activation, slope).checked()
    return _flow(z, _Params(q, r, r_tilde, None, None, b, s), spec, backend, inverse=False)


def sylvester_flow_inverse(
    z: Tensor,
    q: Tensor | None,
    r: Tensor,
    r_tilde: Tensor,
    b: Tensor,
    *,
    s: Tensor | None = None,
    activation: str = "tanh",
    slope: float = DEFAULT_SLOPE,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The z_0 [*batch, D] that `sylvester_flow` maps to z, and the log_det [*batch] of the inverse map, in nats.

    Arguments and errors are those of `sylvester_flow`. There is an inverse wherever R_ii R~_ii > -1 for every unit; a
    row with another unit gets NaN. leaky_relu with a slope above 1 raises ValueError.
    """
    spec = FlowSpec("softplus", activation, slope).checked(inverse=True)
    return _flow(z, _Params(q, r, r_tilde, None, None, b, s), spec, backend, inverse=True)


def packed_sylvester_flow(
    z: Tensor,
    q: Tensor | None,
    mixed: Tensor,
    d: Tensor,
    d_tilde: Tensor,
    b: Tensor,
    *,
    s: Tensor | None = None,
    activation: str = "tanh",
    slope: float = DEFAULT_SLOPE,
    backend: str | None = None,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """`sylvester_flow`, or its inverse, for parameters as a head computes them: mixed [*params, L, M, M] has R above
    its diagonal and R~, transposed, below it; their diagonals d and d_tilde [*params, L, M] are apart, and mixed's own
    is not read. Nothing is copied. Results and errors are those of `sylvester_flow`."""
    spec = FlowSpec("softplus" if inverse else "none", activation, slope).checked(inverse)
    return _flow(z, _Params(q, mixed, None, d, d_tilde, b, s), spec, backend, inverse)


class _Params(NamedTuple):
    """q or, in the kernels' layout, its columns in rows; r and r_tilde, with their diagonals where d and d_tilde are
    None; without r_tilde, R~ transposed below the diagonal of r."""

    q: Tensor | None
    r: Tensor
    r_tilde: Tensor | None
    d: Tensor | None
    d_tilde: Tensor | None
    b: Tensor
    s: Tensor | None

    def diagonals(self) -> tuple[Tensor, Tensor]:
        """R_ii and R~_ii [*params, L, M]."""
        if self.d is not None and self.d_tilde is not None:
            return self.d, self.d_tilde
        assert self.r_tilde is not None  # `_check` has seen to it
        return _diagonal(self.r), _diagonal(self.r_tilde)

    def whole(self) -> reference.Layers:
        """As the reference takes them."""
        r, r_tilde = self.r, self.r.mT if self.r_tilde is None else self.r_tilde
        d, d_tilde = self.diagonals()
        if self.d is not None:
            r, r_tilde = r.triu(1) + torch.diag_embed(d), r_tilde.triu(1) + torch.diag_embed(d_tilde)
        c = d * d_tilde  # [*params, L, M]
        return reference.Layers(self.q, r, r_tilde, self.b, c, 1 + c if self.s is None else self.s)

    def apart(self) -> tuple[Any, ...]:
        """The arguments of the operators, with the diagonals apart."""
        d, d_tilde = self.diagonals()
        return self.q, self.r, self.r_tilde, d, d_tilde, self.b, 1 + d * d_tilde if self.s is None else self.s


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1)


class _Function(torch.autograd.Function):
    """The operators of a backend, saving the tensors and p, or the inverse's a, [L, rows, M] only."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, inverse: bool, spec: tuple[int, float], z: Tensor, *params: Any
    ) -> tuple[Tensor, Tensor]:
        operators = OPERATORS[backend]
        operator = operators.sylvester_inverse if inverse else operators.sylvester_forward
        z_out, log_det, saved = operator(z, *_Params(*params).apart(), *spec, True)
        ctx.save_for_backward(z, *params, saved)
        ctx.backend, ctx.inverse, ctx.spec = backend, inverse, spec
        ctx.set_materialize_grads(False)
        return z_out, log_det

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor | None, grad_log_det: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_z is None and grad_log_det is None:
            return (None,) * len(ctx.needs_input_grad)
        z, *tensors, saved = ctx.saved_tensors
        params = _Params(*tensors)
        grad_z = torch.zeros_like(z) if grad_z is None else grad_z
        grad_log_det = z.new_zeros(z.shape[0]) if grad_log_det is None else grad_log_det
        if torch.is_grad_enabled():  # create_graph=True
            return None, None, None, *_plain_backward(grad_z, grad_log_det, z, params, ctx.spec, ctx.inverse)
        apart, operators = params.apart(), OPERATORS[ctx.backend]
        operator = operators.sylvester_inverse_backward if ctx.inverse else operators.sylvester_backward
        dz, dq, dr, dr_tilde, dd, dd_tilde, db, ds = operator(grad_z, grad_log_det, z, *apart, saved, *ctx.spec)
        if params.s is None:  # 1 + d d_tilde
            dd, dd_tilde = dd + ds * apart[4], dd_tilde + ds * apart[3]
        if params.d is None:
            _diagonal(dr).copy_(dd)
            _diagonal(dr_tilde).copy_(dd_tilde)
        gradients = dq, dr, dr_tilde, dd, dd_tilde, db, ds
        return None, None, None, dz, *(None if t is None else x for t, x in zip(params, gradients, strict=True))


def _plain_backward(
    grad_z: Tensor, grad_log_det: Tensor, z: Tensor, params: _Params, spec: tuple[int, float], inverse: bool
) -> list[Tensor | None]:
    """The gradients of z and the parameters, differentiable."""
    # Aliases: where one argument was computed from another, its gradient must not run on into that one.
    inputs: list[Any] = [
        t if t is None else t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in (z, *params)
    ]
    flow = reference.sylvester_inverse if inverse else reference.sylvester_forward
    out = flow(inputs[0], _Params(*inputs[1:]).whole(), ACTIVATIONS[spec[0]], spec[1])
    given = [t for t in inputs if t is not None]
    found = iter(
        torch.autograd.grad(
            out[:2], given, (grad_z, grad_log_det), create_graph=True, allow_unused=True, materialize_grads=True
        )
    )
    return [None if t is None else next(found) for t in inputs]


def _flow(z: Tensor, params: _Params, spec: FlowSpec, backend: str | None, inverse: bool) -> tuple[Tensor, Tensor]:
    dtype = _check(z, params)
    chosen, z_dtype = backends.select_sylvester(z, params.r.shape[-1], dtype, backend), z.dtype
    converted: list[Any] = [None if t is None else t.to(dtype) for t in params]
    z, params = z.to(dtype), _Params(*converted)
    if params.q is not None:
        params = params._replace(q=params.q.mT)
    if chosen.is_plain:
        flow = reference.sylvester_inverse if inverse else reference.sylvester_forward
        z_out, log_det, *_ = flow(z, params.whole(), spec.activation, spec.slope)
        given = tuple(t for t in (z, *params) if t is not None)
        z_out, log_det = backends.as_functions_of(given, z_out, log_det)
    else:
        z_out, log_det = _run(chosen.name, z, params, (ACTIVATIONS.index(spec.activation), spec.slope), inverse)
    return z_out.to(z_dtype), log_det


def _run(backend: str, z: Tensor, params: _Params, spec: tuple[int, float], inverse: bool) -> tuple[Tensor, Tensor]:
    """By a backend's operators, which take rows [R, D] and sets [P, L, ...]."""
    rows = z.reshape(-1, z.shape[-1]).contiguous()
    amortized = params.r.dim() > 3
    of_sets: list[Any] = [
        t if t is None else t.flatten(0, t.dim() - own - 1) if amortized else t[None]
        for t, own in zip(params, (3, 3, 3, 2, 2, 2, 2), strict=True)
    ]
    sets = _Params(*of_sets)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (z, *params)):
        z_out, log_det = _Function.apply(backend, inverse, spec, rows, *sets)
    else:
        operators = OPERATORS[backend]
        operator = operators.sylvester_inverse if inverse else operators.sylvester_forward
        z_out, log_det, _ = operator(rows, *sets.apart(), *spec, False)
    return z_out.view(z.shape), log_det.view(z.shape[:-1])


@shapes.untraced
def _check(z: Tensor, params: _Params) -> torch.dtype:
    """The dtype of computation. Raises TypeError or ValueError where the tensors do not fit."""
    r, named = params.r, params._asdict()
    matrix, required = ("r", ("r_tilde", "b")) if params.d is None else ("mixed", ("d", "d_tilde", "b"))
    optional = {name: named[name] for name in ("q", "s") if named[name] is not None}
    tensors = {"z": z, matrix: r, **{name: named[name] for name in required}, **optional}
    shapes.check_tensors(**tensors)
    if z.dim() < 1 or z.shape[-1] < 1:
        raise ValueError(f"z must have shape [*batch, D] with D >= 1, got {tuple(z.shape)}")
    dim, batch = z.shape[-1], z.shape[:-1]
    if r.dim() < 3 or r.shape[-1] != r.shape[-2] or not 1 <= r.shape[-1] <= dim:
        raise ValueError(
            f"{matrix} must have shape [L, M, M] or [*batch, L, M, M] with 1 <= M <= D = {dim}, got {tuple(r.shape)}"
        )
    *sets, layers, units, _ = r.shape
    if params.q is None and units != dim:
        raise ValueError(f"{matrix} must be [*params, L, D, D] with D = {dim} where q is None, got {tuple(r.shape)}")
    vector = (*sets, layers, units)
    wanted = {
        "q": (*sets, layers, dim, units),
        "r_tilde": tuple(r.shape),
        **dict.fromkeys(("d", "d_tilde", "b", "s"), vector),
    }
    for name, shape in wanted.items():
        if name in tensors and tensors[name].shape != shape:
            raise ValueError(f"{name} must have shape {shape} to fit {matrix} and z, got {tuple(tensors[name].shape)}")
    if not shapes.is_trailing(torch.Size(sets), batch):
        raise ValueError(
            f"{matrix}'s batch dimensions must equal the trailing batch dimensions of z, {tuple(batch)}, got "
            f"{tuple(sets)}: nothing else is broadcast (for parameters shared by all samples pass {matrix} [L, M, M])"
        )
    return shapes.common_dtype(**tensors)
