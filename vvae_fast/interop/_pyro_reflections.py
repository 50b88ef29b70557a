"""Pyro's Householder and Sylvester transforms."""

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vvae_fast import shapes
from vvae_fast.distributions import CachedTransform
from vvae_fast.functional import planar_flow
from vvae_fast.interop._pyro_bases import AsModule, ConditionalBase, Conditioned, check_callable, dense, sizes
from vvae_fast.nn.sylvester.orthonormal import orthonormal, reflectors
from vvae_fast.nn.sylvester.triangles import Triangles, triangles
from vvae_fast.sylvester import sylvester_flow, sylvester_flow_inverse

_OUTPUTS = "u_unnormed of size D"


class _Reflections(CachedTransform):
    """K reflections, as linear planar steps with u = -w of length sqrt 2: `_params()` is u_unnormed [*params, K, D]."""

    volume_preserving = True
    _own_dims = (2,)

    def __init__(self, cache_size: int = 1) -> None:
        super().__init__({"activation": "linear", "constraint": "none"}, cache_size)

    def u(self) -> Tensor:
        """The reflections' normals [*params, K, D], of length 1."""
        return reflectors(self._params()[0]) / math.sqrt(2)

    def _run(self, x: Tensor, params: tuple[Tensor, ...], inverse: bool) -> tuple[Tensor, Tensor]:
        w = reflectors(params[0])
        w = w.flip(-2) if inverse else w
        y, _ = planar_flow(x, -w, w, torch.zeros_like(w[..., 0]), **self.options)
        return y, x.new_zeros(x.shape[:-1])


class _WithReflections(AsModule):
    """A transform with the parameter u_unnormed [K, D], for pyro.module."""

    input_dim: int
    u_unnormed: nn.Parameter

    def _make_reflections(self, input_dim: int, count_transforms: int) -> None:
        self.input_dim = shapes.check_size("input_dim", input_dim, 1)
        count_transforms = _check_count(count_transforms, self.input_dim)
        self.u_unnormed = nn.Parameter(torch.empty(count_transforms, self.input_dim))

    def reset_parameters(self) -> None:
        """Draws u_unnormed uniformly between +-1 / sqrt(D)."""
        bound = 1 / math.sqrt(self.input_dim)
        nn.init.uniform_(self.u_unnormed, -bound, bound)

    def extra_repr(self) -> str:
        return f"input_dim={self.input_dim}, count_transforms={len(self.u_unnormed)}"


class Householder(_Reflections, _WithReflections):
    """Pyro's `Householder(input_dim, count_transforms=1)`: u_unnormed [K, D], its state_dict.

    K reflections of x [*batch, D], fused. log_abs_det_jacobian is 0. A vector of zeros reflects nothing; Pyro's gives
    NaN. Warns where K exceeds D, as Pyro does. Raises TypeError or ValueError if input_dim or count_transforms is not a
    size of at least 1.
    """

    def __init__(self, input_dim: int, count_transforms: int = 1, *, cache_size: int = 1) -> None:
        super().__init__(cache_size)
        self._make_reflections(input_dim, count_transforms)
        self.reset_parameters()

    def _params(self) -> tuple[Tensor, ...]:
        return (self.u_unnormed,)

    def _sources(self) -> tuple[Tensor, ...]:
        return (self.u_unnormed,)


class ConditionedHouseholder(_Reflections, Conditioned):
    """K reflections whose vectors a function computes at every call, like Pyro's.

    Args:
        nn: maps context to u_unnormed [*params, D], or for K > 1 to K of them. The cache sees a change of a module's
            parameters, buffers and mode. For any other callable nothing is cached, and every log_prob inverts.
        context: a tensor.
        count_transforms: K.
    """

    def __init__(
        self,
        nn: Callable[[Tensor], Tensor | Sequence[Tensor]],
        context: Tensor,
        count_transforms: int = 1,
        cache_size: int = 1,
    ) -> None:
        super().__init__(cache_size)
        check_callable(nn, _OUTPUTS)
        self.nn, self.context = nn, context
        self.count_transforms = shapes.check_size("count_transforms", count_transforms, 1)

    def _params(self) -> tuple[Tensor, ...]:
        given = self.nn(self.context)
        vectors = [given] if self.count_transforms == 1 and isinstance(given, Tensor) else given
        if (
            not isinstance(vectors, (tuple, list))
            or len(vectors) != self.count_transforms
            or not all(isinstance(v, Tensor) and v.shape == vectors[0].shape for v in vectors)
        ):
            raise ValueError(f"nn must give {self.count_transforms} {_OUTPUTS}, got {sizes(given)}")
        return (torch.stack(tuple(vectors), -2),)


class ConditionalHouseholder(ConditionalBase):
    """Pyro's `ConditionalHouseholder(input_dim, nn, count_transforms=1)`: nn maps a context [*params, C] to u_unnormed
    [*params, D], or for K = count_transforms > 1 to K of them.

    `conditional.condition(context)` is a transform. If Pyro is installed, it is one of Pyro's
    `ConditionalTransformModule`s, so that `ConditionalTransformedDistribution` takes it.
    """

    def __init__(
        self, input_dim: int, nn: Callable[[Tensor], Tensor | Sequence[Tensor]], count_transforms: int = 1
    ) -> None:
        super().__init__()
        check_callable(nn, _OUTPUTS)
        self.nn = nn
        self.input_dim = shapes.check_size("input_dim", input_dim, 1)
        self.count_transforms = _check_count(count_transforms, self.input_dim)

    domain = CachedTransform.domain
    codomain = CachedTransform.codomain
    bijective = True

    def condition(self, context: Tensor) -> ConditionedHouseholder:
        """The transform for this context; it raises errors of nn's outputs when it is called."""
        return ConditionedHouseholder(self.nn, context, self.count_transforms)


class Sylvester(_WithReflections):
    """Pyro's `Sylvester(input_dim, count_transforms=1)`: u_unnormed [K, D], R_dense, S_dense [D, D], R_diag, S_diag and
    b [D], its state_dict, its values, and the log-determinant of these values.

    Pyro computes y = x + R^T Q^T tanh(Q S^T x + b), whose matrices are transposed against the paper's, and which has
    not the log-determinant that it returns. Here log_abs_det_jacobian is the log|det| of that map: of a D x D matrix
    for each row, since nothing in it is triangular. It has no inverse that is guaranteed: the log_prob of its own
    samples comes from the cache, and that of any other point raises NotImplementedError.

    paper=True is the layer of the paper with the same parameters, y = x + Q R tanh(S Q^T x + b): fused, with an
    inverse, and other values than Pyro's.

    Warns where K exceeds D, as Pyro does. Raises TypeError or ValueError if input_dim or count_transforms is not a size
    of at least 1.
    """

    _own_dims = (3,)

    def __init__(self, input_dim: int, count_transforms: int = 1, *, paper: bool = False, cache_size: int = 1) -> None:
        super().__init__({"paper": bool(paper)}, cache_size)
        self._make_reflections(input_dim, count_transforms)
        dim = self.input_dim
        self.R_dense = nn.Parameter(torch.empty(dim, dim))
        self.S_dense = nn.Parameter(torch.empty(dim, dim))
        self.R_diag = nn.Parameter(torch.empty(dim))
        self.S_diag = nn.Parameter(torch.empty(dim))
        self.b = nn.Parameter(torch.empty(dim))
        self.register_buffer("triangular_mask", torch.ones(dim, dim).triu(1))  # in Pyro's state_dict
        self.reset_parameters()
        self.reset_parameters2()

    def reset_parameters2(self) -> None:
        """Draws the triangular matrices and b uniformly between +-0.01."""
        for parameter in (self.b, self.R_diag, self.S_diag, self.R_dense, self.S_dense):
            nn.init.uniform_(parameter, -0.01, 0.01)

    def R(self) -> Tensor:
        """R [D, D], upper triangular, with tanh R_diag on its diagonal."""
        return self._triangles().r

    def S(self) -> Tensor:
        """S [D, D], upper triangular, with tanh S_diag on its diagonal."""
        return self._triangles().r_tilde

    def Q(self, x: Tensor | None = None) -> Tensor:
        """Q [D, D], the product of the reflections; x is Pyro's argument, and not needed."""
        return orthonormal(self.u_unnormed, self.input_dim)

    def _triangles(self) -> Triangles:
        mixed = self.R_dense.triu(1) + self.S_dense.triu(1).mT + torch.diag(self.R_diag)
        return triangles(mixed, self.S_diag)

    def _params(self) -> tuple[Tensor, ...]:
        return (self.Q()[None],)

    def _sources(self) -> tuple[Tensor, ...]:
        return self.u_unnormed, self.R_dense, self.S_dense, self.R_diag, self.S_diag, self.b

    def _why_not_bijective(self) -> Exception | None:
        if self.options["paper"]:
            return None
        return ValueError("Pyro's Sylvester, with its transposed matrices, guarantees no inverse: paper=True has one")

    def _run(self, x: Tensor, params: tuple[Tensor, ...], inverse: bool) -> tuple[Tensor, Tensor]:
        (q,), (r, s, one_plus) = params, self._triangles()
        if self.options["paper"]:
            flow = sylvester_flow_inverse if inverse else sylvester_flow
            return flow(x, q, r[None], s[None], self.b[None], s=one_plus[None])
        from_x, to_y = s @ q[0].mT, q[0] @ r  # of rows: x from_x is Q S^T x
        h = torch.tanh(x @ from_x + self.b)
        # det(I + to_y^T diag(h') from_x^T) = det(I + diag(h') from_x^T to_y^T)
        jacobian = (1 - h.square())[..., None] * (to_y @ from_x).mT + torch.eye(len(s), dtype=x.dtype, device=x.device)
        return x + h @ to_y, torch.linalg.slogdet(jacobian).logabsdet

    def extra_repr(self) -> str:
        return super().extra_repr() + (", paper=True" if self.options["paper"] else "")


def householder(input_dim: int, count_transforms: int | None = None) -> Householder:
    """Pyro's helper: `Householder` of input_dim // 2 + 1 reflections by default."""
    return Householder(input_dim, input_dim // 2 + 1 if count_transforms is None else count_transforms)


def conditional_householder(
    input_dim: int, context_dim: int, hidden_dims: Sequence[int] | None = None, count_transforms: int = 1
) -> ConditionalHouseholder:
    """Pyro's helper: `ConditionalHouseholder` of Pyro's DenseNN, which maps a context [*params, context_dim].

    hidden_dims are the sizes of its hidden layers, by default two of 10 input_dim. Raises TypeError or ValueError if a
    size is not an integer of at least 1, ImportError if Pyro is not installed.
    """
    count = shapes.check_size("count_transforms", count_transforms, 1)
    net = dense(input_dim, context_dim, hidden_dims, [input_dim] * count)
    return ConditionalHouseholder(input_dim, net, count_transforms)


def sylvester(input_dim: int, count_transforms: int | None = None) -> Sylvester:
    """Pyro's helper: `Sylvester` of input_dim // 2 + 1 reflections by default."""
    return Sylvester(input_dim, input_dim // 2 + 1 if count_transforms is None else count_transforms)


def _check_count(count: int, dim: int) -> int:
    """K, with Pyro's warning."""
    count = shapes.check_size("count_transforms", count, 1)
    if count > dim:
        warnings.warn(
            f"count_transforms should be at most D = {dim}, got {count}: more reflections reach no other map",
            stacklevel=4,
        )
    return count
