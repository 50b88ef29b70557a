"""The other packages with planar flows, with the case's parameters copied into their modules.

Each runs its K modules in its own Python loop, with its own constraint on u.
"""

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.flow.contestants import Contestant, Prepared, Unavailable


@contextlib.contextmanager
def _importing(package: str) -> Iterator[None]:
    """Imports a peer quietly: its output and its warnings do not concern this package."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except ImportError as error:
        raise Unavailable(f"missing: {error} (pip install {package})") from error


def _shared(inputs: list[Tensor], package: str) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """z [B, D], and u [D], w [D], b [] of each step."""
    z, u, w, b = inputs
    if u.dim() > 2:
        raise Unavailable(f"not run: {package} has no amortized parameters")
    return z, list(zip(u.detach(), w.detach(), b.detach(), strict=True))


def _stack(grads: tuple[Tensor, ...], like: list[Tensor]) -> tuple[Tensor, ...]:
    """dz and the stacked du, dw, db of K steps, whose leaves come as (u, w, b) after z."""
    dz, *steps = grads
    dim = like[3].dim() - 1  # the dimension of the steps
    stacked = (
        torch.stack([g.reshape(t.select(dim, 0).shape) for g in steps[i::3]], dim) for i, t in enumerate(like[1:])
    )
    return dz, *stacked


def _prepared(z: Tensor, steps: list[list[Tensor]], run: Callable[[Tensor], tuple[Tensor, Tensor]], inputs) -> Prepared:
    leaves = [z, *(t for step in steps for t in step)]
    return Prepared(lambda: run(z), leaves, lambda grads: _stack(grads, inputs))


def _fill(module: nn.Module, **values: Tensor) -> nn.Module:
    """The module with its parameters set, in the dtype and on the device of the values."""
    for name, value in values.items():
        parameter = getattr(module, name)
        setattr(module, name, nn.Parameter(value.reshape(parameter.shape).clone()))
    return module


def _normflows(inputs: list[Tensor]) -> Prepared:
    with _importing("normflows"):
        from normflows.flows import Planar
    z, steps = _shared(inputs, "normflows")
    flows = [_fill(Planar((z.shape[-1],)), u=u, w=w, b=b) for u, w, b in steps]

    def run(z: Tensor) -> tuple[Tensor, Tensor]:
        log_det = z.new_zeros(len(z))
        for flow in flows:
            z, step = flow(z)
            log_det = log_det + step
        return z, log_det

    return _prepared(z, [[f.u, f.w, f.b] for f in flows], run, inputs)


def _pyro(inputs: list[Tensor]) -> Prepared:
    with _importing("pyro-ppl"):
        from pyro.distributions.transforms.planar import ConditionedPlanar, Planar
    z, u, w, b = inputs
    if u.dim() > 2:  # as ConditionalPlanar does with its network's outputs (bias, u, w) for a context
        columns = (u, w, b[..., None])
        steps = [[t.detach()[:, k].clone().requires_grad_() for t in columns] for k in range(u.shape[1])]
        flows = [ConditionedPlanar((b_k, u_k, w_k)) for u_k, w_k, b_k in steps]
    else:
        flows = [_fill(Planar(z.shape[-1]), u=u, w=w, bias=b) for u, w, b in _shared(inputs, "Pyro")[1]]
        steps = [[f.u, f.w, f.bias] for f in flows]

    def run(z: Tensor) -> tuple[Tensor, Tensor]:
        z = z.view_as(z)  # else the transform would return its cached output, whose graph is freed, for the same tensor
        log_det = z.new_zeros(len(z))
        for flow in flows:
            y = flow(z)
            log_det = log_det + flow.log_abs_det_jacobian(z, y)
            z = y
        return z, log_det

    return _prepared(z, steps, run, inputs)


def _pythae(inputs: list[Tensor]) -> Prepared:
    with _importing("pythae"):
        from pythae.models.normalizing_flows.planar_flow import PlanarFlow, PlanarFlowConfig
    z, steps = _shared(inputs, "pythae")
    config = PlanarFlowConfig(input_dim=(z.shape[-1],), activation="tanh")
    flows = [_fill(PlanarFlow(config), u=u, w=w, b=b) for u, w, b in steps]

    def run(z: Tensor) -> tuple[Tensor, Tensor]:
        log_det = z.new_zeros(len(z))
        for flow in flows:
            out = flow(z)
            z, log_det = out.out, log_det + out.log_abs_det_jac
        return z, log_det

    return _prepared(z, [[f.u, f.w, f.b] for f in flows], run, inputs)


class _Jitted(torch.autograd.Function):
    """A function of JAX arrays in PyTorch's graph, without copies; both of its passes are compiled."""

    @staticmethod
    def forward(ctx, forward: Callable, backward: Callable, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs, ctx.vjp = forward(*map(_to_jax, inputs))
        ctx.backward = backward
        return tuple(map(torch.from_dlpack, outputs))

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *map(torch.from_dlpack, ctx.backward(ctx.vjp, *map(_to_jax, grads)))


def _to_jax(tensor: Tensor):
    import jax

    return jax.dlpack.from_dlpack(tensor.detach().contiguous())


def _flowjax(inputs: list[Tensor]) -> Prepared:
    """Its Planar layers in its Scan, which XLA compiles as one loop; amortized, with one flow for each row."""
    with _importing("flowjax"):
        import equinox
        import jax
        from flowjax.bijections import Planar, Scan
    z, u, w, b = inputs
    if z.is_cuda:
        raise Unavailable("not run: flowjax is timed on CPUs")
    jax.config.update("jax_enable_x64", True)  # float32 stays float32
    num_steps, dim = u.shape[-2:]
    keys = jax.random.split(jax.random.key(0), num_steps)
    flow = Scan(equinox.filter_vmap(lambda key: Planar(key, dim=dim))(keys))

    def of_a_row(params, z):
        return equinox.tree_at(lambda flow: flow.bijection.params, flow, params).transform_and_log_det(z)

    rows = jax.vmap(of_a_row, (None if u.dim() == 2 else 0, 0))
    forward = jax.jit(lambda params, z: jax.vjp(rows, params, z))
    backward = jax.jit(lambda vjp, *grads: vjp(grads))
    params = torch.cat([w, u, b[..., None]], -1).detach().requires_grad_()  # [*, K, 2 D + 1]

    def gradients(grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        dz, dparams = grads
        dw, du, db = dparams.split([dim, dim, 1], -1)
        return dz, du, dw, db[..., 0]

    return Prepared(lambda: _Jitted.apply(forward, backward, params, z), [z, params], gradients)


def peers() -> list[Contestant]:
    """normflows, Pyro, pythae and flowjax; one that is not installed says so when it is built."""
    return [
        Contestant("normflows", "peer", _normflows),
        Contestant("Pyro", "peer", _pyro),
        # pythae has no constraint and takes log(|det| + 1e-4): off by at most 1e-4 / |det| nats a step, with one sign.
        # The inputs keep |det| above 0.5 without a constraint too, so 2e-4 a step, and 2e-4 in the gradient of the log.
        Contestant("pythae", "peer", _pythae, constraint="none", tolerance=1e-3, log_det_slack=2e-4),
        Contestant("flowjax", "peer", _flowjax, constraint="log_softplus"),
    ]
