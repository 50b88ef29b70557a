"""pythae's planar flow, and one fused layer for a run of them; if pythae is installed, with its base and output."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vvae_fast import shapes
from vvae_fast.functional import planar_flow
from vvae_fast.interop import _runs
from vvae_fast.spec import FlowSpec

_LOG_DET_EPS = 1e-4  # pythae's log(|det| + 1e-4)
_ACTIVATIONS = ("linear", "tanh", "elu")  # pythae's
_LAYERS = _runs.LayerList("net", "VAE_LinNF")


class _StandIn(OrderedDict[str, Any]):
    """In place of pythae's ModelOutput, without pythae: the same access by name, by attribute and by position."""

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def to_tuple(self) -> tuple[Any, ...]:
        """The values in their order."""
        return tuple(self.values())


class _WithoutPythae(nn.Module):
    """In place of pythae's BaseNF, without pythae: it cannot save or load, as the files hold pythae's classes."""

    def save(self, dir_path: str) -> None:
        raise ImportError("pythae must be installed to save a layer in its format: pip install pythae")

    @classmethod
    def load_from_folder(cls, dir_path: str) -> "PlanarFlow":
        raise ImportError("pythae must be installed to load a layer of its format: pip install pythae")


try:
    from pythae.models.base.base_utils import ModelOutput as _Output
    from pythae.models.normalizing_flows import BaseNF as _Base
    from pythae.models.normalizing_flows import PlanarFlowConfig as PlanarFlowConfig
except ImportError:
    _Output, _Base = _StandIn, _WithoutPythae


class _NoInputDim(AttributeError, ValueError):
    """pythae's error for a configuration without input_dim, and this package's."""


class PlanarStack(_runs.Stack):
    """K of pythae's planar steps as one layer: w, u [K, D] and b [K], no constraint on u.

    `stack(x)` flattens x [B, *input_dim] and returns an output with `.out` [B, D] and `.log_abs_det_jac` [B] in nats,
    the sum of log(|det| + 1e-4) over the steps. For a batch of one it is [1]; pythae returns a tensor without
    dimensions. There is no inverse: pythae has none, and its steps do not guarantee one.

    log_det_eps is pythae's 1e-4; 0.0 gives the exact log|det|.

    Raises TypeError or ValueError if dim or num_steps, both at least 1, is not a size, if activation is not "linear",
    "tanh" or "elu", or if log_det_eps is not a number of at least 0.
    """

    def __init__(
        self, dim: int, num_steps: int, activation: str = "tanh", *, log_det_eps: float = _LOG_DET_EPS
    ) -> None:
        nn.Module.__init__(self)  # not pythae's, which takes a configuration
        dim, num_steps = shapes.check_size("dim", dim, 1), shapes.check_size("num_steps", num_steps, 1)
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation must be one of {_ACTIVATIONS}, got {activation!r}")
        FlowSpec("none", activation, log_det_eps=log_det_eps).checked()
        self.input_dim, self.activation, self.log_det_eps = dim, activation, log_det_eps
        self.w = nn.Parameter(torch.empty(num_steps, dim))
        self.u = nn.Parameter(torch.empty(num_steps, dim))
        self.b = nn.Parameter(torch.empty(num_steps))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws w, u and b from N(0, 1)."""
        for parameter in (self.w, self.u, self.b):
            nn.init.normal_(parameter)

    def forward(self, x: Tensor, **kwargs: object) -> Any:
        """An output with out [B, D] and log_abs_det_jac [B] for x [B, *input_dim]; errors as in `planar_flow`."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
        if x.dim() < 2 or math.prod(x.shape[1:]) != self.input_dim:
            raise ValueError(f"x must be [B, *input_dim] with {self.input_dim} numbers a row, got {tuple(x.shape)}")
        out, log_det = planar_flow(
            x.reshape(len(x), self.input_dim),
            self.u,
            self.w,
            self.b,
            activation=self.activation,
            constraint="none",
            log_det_eps=self.log_det_eps,
        )
        return _Output(out=out, log_abs_det_jac=log_det)

    def inverse(self, y: Tensor, **kwargs: object) -> Any:
        """Raises NotImplementedError, like pythae's."""
        raise NotImplementedError("pythae's planar steps have no constraint on u, so that no inverse is guaranteed")

    def update(self) -> None:
        """Does nothing; pythae's trainer calls it after every epoch."""

    def extra_repr(self) -> str:
        return f"input_dim={self.input_dim}, num_steps={self.num_steps}, activation={self.activation!r}"


class PlanarFlow(PlanarStack, _Base):
    """pythae's `PlanarFlow(config)`: w, u [1, D] and b [1], its state_dict, its output, and its files.

    If pythae is installed, it is a BaseNF, which `NFModel` and pythae's trainers take. `save(folder)` writes the same
    files as pythae. `PlanarFlow.load_from_folder(folder)` and pythae's `AutoModel` read the files of both.

    Args:
        model_config: pythae's PlanarFlowConfig, or anything with `input_dim`, a tuple or an int, and `activation`.

    Raises an AttributeError that is also a ValueError if input_dim is None, TypeError if it is not a shape, and the
    errors of PlanarStack; ImportError when it is saved or loaded without pythae.
    """

    def __init__(self, model_config: Any) -> None:
        size = model_config.input_dim
        if size is None:
            raise _NoInputDim("model_config.input_dim must be the shape of a data point, got None: set it")
        if isinstance(size, str) or not (isinstance(size, Sequence) or hasattr(size, "__index__")):
            raise TypeError(f"model_config.input_dim must be a shape or an int, got {type(size).__name__}")
        sizes = size if isinstance(size, Sequence) else (size,)
        sizes = [shapes.check_size("model_config.input_dim, an int or a shape of them,", n, 1) for n in sizes]
        super().__init__(math.prod(sizes), 1, model_config.activation)
        self.reset_parameters()  # a second time, like pythae, so that the same seed gives the same layer
        self.model_config, self.model_name = model_config, "PlanarFlow"

    def save(self, dir_path: str) -> None:
        """Writes pythae's model.pt, model_config.json and environment.json into a folder, made if missing.

        Raises TypeError if model_config is not one of pythae's.
        """
        if _Base is not _WithoutPythae and not hasattr(self.model_config, "save_json"):
            got = type(self.model_config).__name__
            raise TypeError(
                f"model_config must be pythae's PlanarFlowConfig to be saved, got {got}: make the layer with it"
            )
        super().save(dir_path)


def from_pythae(model: nn.Module, *, log_det_eps: float = _LOG_DET_EPS) -> nn.Module:
    """Replaces, in place, each run of planar layers in `model.net` by one fused layer, and returns the model.

    For VAE_LinNF. A run is consecutive layers, pythae's own `PlanarFlow` or this module's, with the same activation,
    size, dtype, device and requires_grad. Layers of a subclass, with hooks or with shared parameters stay. The
    parameters are new, with the values of the old ones: make the optimizer afterwards. A warning says where there was
    nothing to fuse, and what was found.

    log_det_eps=0.0 in place of pythae's 1e-4 gives the exact log|det|, which differs by at most 1e-4 / |det| nats a
    step, and is infinite where a determinant is 0.

    Raises TypeError if model has no ModuleList `net`, TypeError or ValueError if log_det_eps is not a number of at
    least 0.
    """
    _LAYERS.of(model)
    FlowSpec("none", log_det_eps=log_det_eps).checked()
    _LAYERS.fuse(model, _facts, lambda layer, act, _: PlanarStack(layer.u.shape[1], 1, act, log_det_eps=log_det_eps))
    return model


def to_pythae_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state_dict that a model had before `from_pythae`: `net.{k}.w`, `.u` and `.b`."""
    return _LAYERS.unfused_state_dict(model)


def load_pythae_state_dict(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Loads a state_dict from before `from_pythae` into the fused model.

    Raises ValueError if a step is missing, RuntimeError as load_state_dict does.
    """
    _LAYERS.load_unfused_state_dict(model, state_dict)


def _facts(layer: _runs.Layer) -> tuple[str, float] | None:
    """The activation of a planar layer and its epsilon; stacks with another epsilon stay as they are. None for any
    other layer."""
    if type(layer) in (PlanarFlow, PlanarStack):
        return layer.activation, layer.log_det_eps
    theirs = _runs.is_class(layer, "pythae.models.normalizing_flows.planar_flow.planar_flow_model", "PlanarFlow")
    return (layer.model_config.activation, _LOG_DET_EPS) if theirs else None
