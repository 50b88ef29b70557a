"""What a flow computes, as one value: made from the arguments of a call, checked once, and passed to the backend."""

import math
import numbers
from typing import Any, NamedTuple

import torch

CONSTRAINTS = ("softplus", "none", "log_softplus")  # in the order of csrc/planar/spec.h, as the activations are
ACTIVATIONS = ("tanh", "leaky_relu", "elu", "sigmoid", "linear")
DEFAULT_SLOPE = 0.2
LARGEST = torch.finfo(torch.float32).max  # of a spec's numbers: beyond, they are infinite in float32


class FlowSpec(NamedTuple):
    """The constraint of u, the activation h, leaky_relu's slope below 0, and the eps inside the logarithm of the
    determinant."""

    constraint: str = "softplus"
    activation: str = "tanh"
    slope: float = DEFAULT_SLOPE
    log_det_eps: float = 0.0

    def arguments(self, inverse: bool = False) -> tuple[int | float, ...]:
        """The spec as arguments of operators; those of the inverse have no eps."""
        numbers = CONSTRAINTS.index(self.constraint), ACTIVATIONS.index(self.activation), self.slope, self.log_det_eps
        return numbers[:3] if inverse else numbers

    @classmethod
    def of_arguments(cls, constraint: int, activation: int, slope: float, log_det_eps: float = 0.0) -> "FlowSpec":
        """The spec from the numbers that operators take. Raises ValueError for a number without a name."""
        for name, number, names in (("constraint", constraint, CONSTRAINTS), ("activation", activation, ACTIVATIONS)):
            if not 0 <= number < len(names):
                raise ValueError(f"{name} must be in [0, {len(names) - 1}], got {number}: {names}")
        return cls(CONSTRAINTS[constraint], ACTIVATIONS[activation], slope, log_det_eps)

    def options(self) -> dict[str, Any]:
        """The keyword arguments that `planar_flow` and its inverse share."""
        return {"activation": self.activation, "slope": self.slope, "constraint": self.constraint}

    def checked(self, inverse: bool = False) -> "FlowSpec":
        """The spec with Python's own floats, the only ones that operators take.

        Raises ValueError for an unknown name, TypeError or ValueError if a number is not one or out of range, and
        ValueError if an `inverse` is not guaranteed.
        """
        constraint, activation, slope, log_det_eps = self
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
        if constraint not in CONSTRAINTS:
            raise ValueError(f"constraint must be one of {CONSTRAINTS}, got {constraint!r}")
        slope, log_det_eps = as_float("slope", slope), as_float("log_det_eps", log_det_eps)
        if activation == "leaky_relu" and not 0 < slope <= LARGEST:
            raise ValueError(f"slope must be finite and above 0, got {slope}: at 0 a step loses what lies below it")
        if log_det_eps != 0.0 and not 0 <= log_det_eps <= LARGEST:
            raise ValueError(f"log_det_eps must be finite and at least 0, got {log_det_eps}: 0.0 is exact")
        spec = FlowSpec(constraint, activation, slope, log_det_eps)
        if inverse:
            spec.check_invertible()
        return spec

    def check_invertible(self) -> None:
        """Raises ValueError, with the reason, if a step may have no inverse."""
        if self.constraint == "none":
            raise ValueError(
                'constraint must be "softplus" or "log_softplus" to invert, got "none": w . u <= -1 has no inverse'
            )
        if self.activation == "leaky_relu" and self.slope > 1:
            raise ValueError(
                f"slope must be at most 1 to invert leaky_relu, got {self.slope}: the constraint keeps w . u_hat above "
                "-1, and 1 + (w . u_hat) slope can still be negative (flowjax accepts such a slope)"
            )


DEFAULT = FlowSpec()


def as_float(name: str, value: object) -> float:
    """A real number, Python's or numpy's, as a float. Raises TypeError for anything else, such as a tensor, which would
    get no gradient."""
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        return -math.inf if value < 0 else math.inf
