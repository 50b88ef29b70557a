"""Decoder likelihoods p(x | z): the meaning of the decoder's outputs, in nats and always in log-space.

Every likelihood works on flat data: x is [*batch, P] and the decoder's outputs are params [*samples, *batch,
num_params * P], where leading sample dimensions share x. VAE flattens images for you.

log_prob does not check data: it runs at every training step, and a check would make it wait for the GPU. VAE calls
`check_batch` for the first batch that it trains on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vvae_fast.shapes import HALVES, check_size, full_precision, untraced
from vvae_fast.spec import as_float

LOG_TWO_PI = math.log(2.0 * math.pi)
# Operations in autograd's graph: those that return probabilities or their logarithms, and those that only move numbers.
SQUASHING = {
    f"{name}Backward0": name.lower() for name in ("Sigmoid", "Hardsigmoid", "LogSigmoid", "Softmax", "LogSoftmax")
}
SAME_VALUES = {
    *("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "SqueezeBackward0", "SqueezeBackward1"),
    *("UnsqueezeBackward0", "TransposeBackward0", "PermuteBackward0", "CloneBackward0", "ToCopyBackward0"),
    *("ExpandBackward0", "AliasBackward0", "SliceBackward0"),
}
_NO_REDUCTION = 0  # PyTorch's number for reduction="none"


class Likelihood:
    """A distribution over data dimensions that are independent given the decoder's outputs.

    Attributes:
        name: its name in `make_likelihood`.
        num_params: the number of decoder outputs for each data dimension.
        takes_logits: whether those outputs are logits, any real numbers; log_prob applies the sigmoid to them.
    """

    name: str
    num_params: int
    takes_logits: bool = False

    def log_prob(self, x: Tensor, params: Tensor) -> Tensor:
        """log p(x | params) summed over the data dimensions, in nats.

        Args:
            x: data, [*batch, P].
            params: the decoder's outputs, [*samples, *batch, num_params * P].

        Returns:
            [*samples, *batch], float32 for the half precisions.

        Raises:
            ValueError: if the shapes do not fit; the sample dimensions are the only broadcast.
        """
        self._check_shapes(x, params)
        return self._log_prob(full_precision(x), full_precision(params))

    def mean(self, params: Tensor) -> Tensor:
        """E[x], [*batch, P], for params [*batch, num_params * P]."""
        raise NotImplementedError

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One draw of x, [*batch, P], for params [*batch, num_params * P]."""
        raise NotImplementedError

    def check_data(self, x: Tensor) -> None:
        """Raise ValueError if x (any shape) holds a value of zero probability, by default NaN and inf."""
        if not x.isfinite().all():
            self._refuse(x, "finite numbers", "clean them")

    def check_batch(self, x: Tensor, params: Tensor) -> None:
        """Calls `check_data`, and raises ValueError if params, the decoder's outputs, do not fit the likelihood."""
        self.check_data(x)
        if self.takes_logits and (squashed := _squashed_by(params)):
            raise ValueError(
                f"decoder must give logits for the {self.name} likelihood, any real numbers, got the outputs of a "
                f"{squashed}; remove it from the decoder's end, log_prob applies a sigmoid itself"
            )

    def _log_prob(self, x: Tensor, params: Tensor) -> Tensor:
        raise NotImplementedError

    @untraced
    def _check_shapes(self, x: Tensor, params: Tensor) -> None:
        wanted = (*x.shape[:-1], self.num_params * x.shape[-1]) if x.ndim else ()
        if not wanted or params.ndim < x.ndim or params.shape[params.ndim - x.ndim :] != wanted:
            raise ValueError(
                f"params must be [*samples, {', '.join(map(str, wanted))}] for x of shape {tuple(x.shape)} "
                f"({self.name}: {self.num_params} a data dimension), got {tuple(params.shape)}"
            )

    def _refuse(self, x: Tensor, wanted: str, remedy: str) -> None:
        low, high = (f"{value:g}" for value in (x.min().item(), x.max().item()))
        came = f"values from {low} to {high}"
        if x.isnan().any():
            came, remedy = "NaN", "clean them"
        raise ValueError(f"x must hold {wanted} for the {self.name} likelihood, got {came}; {remedy}")


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """Bits, x in {0, 1}; the parameter is the logit. Values between 0 and 1 are accepted and give the cross-entropy."""

    name = "bernoulli"
    num_params = 1
    takes_logits = True

    def _log_prob(self, x: Tensor, params: Tensor) -> Tensor:
        return _cross_entropy(x, params).neg()

    def mean(self, params: Tensor) -> Tensor:
        return params.sigmoid()

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.bernoulli(params.sigmoid(), generator=generator)

    def check_data(self, x: Tensor) -> None:
        if not ((x >= 0) & (x <= 1)).all():
            remedy = "scale them to [0, 1], or choose likelihood=Binomial(n) for counts up to n, Gaussian() for others"
            self._refuse(x, "values in [0, 1]", remedy)


@dataclass(frozen=True)
class Binomial(Likelihood):
    """Counts, x in {0, ..., total_count}; the parameter is the logit of one trial.

    log_prob includes the log binomial coefficient, so it is the true log-probability of the counts.
    """

    total_count: int

    name = "binomial"
    num_params = 1
    takes_logits = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "total_count", check_size("total_count", self.total_count, 1))

    def _log_prob(self, x: Tensor, params: Tensor) -> Tensor:
        n, counts = self.total_count, x.double()  # in float32 the difference below is off by nats for large counts
        log_choose = math.lgamma(n + 1) - torch.lgamma(counts + 1) - torch.lgamma(n + 1 - counts)  # [*batch, P]
        return log_choose.sum(-1).to(params.dtype) - n * _cross_entropy(x / n, params)

    def mean(self, params: Tensor) -> Tensor:
        return self.total_count * params.sigmoid()

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        probability = params.sigmoid()
        return torch.binomial(torch.full_like(probability, self.total_count), probability, generator=generator)

    def check_data(self, x: Tensor) -> None:
        if not ((x >= 0) & (x <= self.total_count) & (x == x.round())).all():
            remedy = (
                "pass the counts themselves, not scaled, or choose likelihood=Binomial(n) with the n they can reach"
            )
            self._refuse(x, f"whole numbers in [0, {self.total_count}]", remedy)


@dataclass(frozen=True)
class Gaussian(Likelihood):
    """Real numbers. The decoder returns means and, with log_var=None, a log-variance for each data dimension.

    With log_var=None (Kingma & Welling 2014, appendix C.2) params hold all P means, then all P log-variances. The
    log-variances are at least MIN_LOG_VAR, because a data dimension that never varies has no finite maximum likelihood.
    With a number, log_var is that fixed log-variance, and params are the means.
    """

    log_var: float | None = None

    MIN_LOG_VAR = -14.0  # a standard deviation of 9e-4
    MAX_ABS_LOG_VAR = 80.0  # of a fixed one: beyond it, the exponential overflows float32
    name = "gaussian"

    def __post_init__(self) -> None:
        if self.log_var is None:
            return
        object.__setattr__(self, "log_var", as_float("log_var", self.log_var))
        if not abs(self.log_var) <= self.MAX_ABS_LOG_VAR:
            raise ValueError(f"log_var must be within +-{self.MAX_ABS_LOG_VAR:g}, got {self.log_var}")

    @property
    def num_params(self) -> int:  # type: ignore[override]  # the others' is an attribute of the class
        return 2 if self.log_var is None else 1

    def _log_prob(self, x: Tensor, params: Tensor) -> Tensor:
        mean, log_var = self._split(params)
        return -0.5 * ((x - mean).square() * _exp(-log_var) + log_var + LOG_TWO_PI).sum(-1)

    def mean(self, params: Tensor) -> Tensor:
        return self._split(params)[0]

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        mean, log_var = self._split(params)
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        return mean + _exp(0.5 * log_var) * noise

    def _split(self, params: Tensor) -> tuple[Tensor, Tensor | float]:
        if self.log_var is not None:
            return params, self.log_var
        mean, log_var = params.chunk(2, -1)
        return mean, log_var.clamp(min=self.MIN_LOG_VAR)


class Standardised(Likelihood, nn.Module):
    """A Gaussian of y = (x - shift) / scale. Log-densities, docs/math.md (50), means and draws are those of x.

    The decoder returns the parameters of y. Their size is the one that networks are initialised for, whatever the units
    of x are. shift and scale are buffers: a VAE's state_dict has them, and they move with it. In half precision they
    stay float32, since they are numbers of the data, not weights.

    Args:
        shift, scale: one for each data dimension, [P], or one for all, []. scale is positive.
        base: the Gaussian of y.

    Raises:
        ValueError: if the shapes differ or have more than one dimension, if scale is not positive, or a value is not
            finite.
        TypeError: if shift or scale is not a Tensor.
    """

    name = "gaussian"
    shift: Tensor
    scale: Tensor

    def __init__(self, shift: Tensor, scale: Tensor, base: Gaussian | None = None):
        super().__init__()
        for name, value in (("shift", shift), ("scale", scale)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}: pass torch.as_tensor({name})")
        if shift.shape != scale.shape or shift.ndim > 1:
            raise ValueError(f"shift and scale must both be [P] or [], got {tuple(shift.shape)}, {tuple(scale.shape)}")
        if not (scale > 0).all():
            raise ValueError("scale must be positive, got a value that is not; leave constant dimensions out")
        if not (shift.isfinite().all() and scale.isfinite().all()):
            raise ValueError("shift and scale must be finite, got NaN or inf; clean the data that they are taken of")
        self.base = Gaussian() if base is None else base
        self.register_buffer("shift", shift.clone())
        self.register_buffer("scale", scale.clone())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Standardised:
        """Moves and converts as every module does, but leaves the buffers in full precision."""

        def kept(t: Tensor) -> Tensor:
            moved = fn(t)
            return t.to(moved.device) if moved.dtype in HALVES else moved

        return super()._apply(kept, recurse)

    @property
    def num_params(self) -> int:  # type: ignore[override]  # as Gaussian's
        return self.base.num_params

    def mean(self, params: Tensor) -> Tensor:
        return self.shift + self.scale * self.base.mean(params)

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.shift + self.scale * self.base.sample(params, generator)

    def _log_prob(self, x: Tensor, params: Tensor) -> Tensor:
        log_volume = self.scale.log().expand(x.shape[-1:]).sum()
        return self.base.log_prob((x - self.shift) / self.scale, params) - log_volume


def _exp(x: Tensor | float) -> Tensor | float:
    return x.exp() if isinstance(x, Tensor) else math.exp(x)


def _squashed_by(params: Tensor) -> str | None:
    """The name of the sigmoid or softmax that made params [*, P], from the graph of their gradients."""
    node = params.grad_fn
    while node is not None and node.name() in SAME_VALUES:
        node = node.next_functions[0][0]
    return None if node is None else SQUASHING.get(node.name())


def _cross_entropy(probability: Tensor, logits: Tensor) -> Tensor:
    """[*samples, *batch]: -(p log sigmoid(l) + (1 - p) log sigmoid(-l)) summed over data; stable for every logit."""
    target = probability.expand(logits.shape)
    # torch.nn.functional's function compares the sizes again, and torch.jit.trace warns of that
    return torch.binary_cross_entropy_with_logits(logits, target, None, None, _NO_REDUCTION).sum(-1)


def make_likelihood(name: str | Likelihood, *, total_count: int | None = None) -> Likelihood:
    """The likelihood with a name: "bernoulli", "binomial" (needs total_count) or "gaussian" (learned log-variances).

    A Likelihood is returned as it is. Raises ValueError for another name, for a binomial without total_count, and for
    an unused total_count; TypeError for anything but a name or a Likelihood.
    """
    if isinstance(name, Likelihood):
        return name
    if not isinstance(name, str):
        raise TypeError(f"likelihood must be a name or a Likelihood, got {type(name).__name__}")
    if name == "binomial":
        if total_count is None:
            raise ValueError('likelihood "binomial" needs total_count: make_likelihood("binomial", total_count=n)')
        return Binomial(total_count)
    if total_count is not None:
        raise ValueError(f'total_count belongs to likelihood "binomial" alone, got {total_count} with "{name}"')
    if name == "bernoulli":
        return Bernoulli()
    if name == "gaussian":
        return Gaussian()
    raise ValueError(f'likelihood must be one of "bernoulli", "binomial", "gaussian", got "{name}"')
