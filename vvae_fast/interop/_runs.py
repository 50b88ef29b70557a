"""Runs of equal planar layers in another package's list of layers, and the names of their parameters."""

import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping

import torch
from torch import Tensor, nn


class Stack(nn.Module):
    """A fused layer of K steps: u, w [K, *shape] and b [K]. One step has K = 1, so that steps and stacks join alike."""

    u: nn.Parameter
    w: nn.Parameter
    b: nn.Parameter

    @property
    def num_steps(self) -> int:
        """K."""
        return len(self.b)


def is_class(layer: nn.Module, module: str, name: str) -> bool:
    """Whether the layer is of another package's class itself, which need not be installed, and not of a subclass."""
    return (type(layer).__module__, type(layer).__name__) == (module, name)


def uses(model: nn.Module) -> Counter[int]:
    """How often each parameter occurs in a model: one that occurs twice is tied, and a stack would untie it."""
    return Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))


def key(layer: nn.Module, counts: Counter[int], *facts: Hashable) -> Hashable | None:
    """What neighbours must share to be one stack; None for a layer that a stack cannot replace."""
    params = (layer.u, layer.w, layer.b)
    plain = layer.u.shape == layer.w.shape and layer.b.dim() == 1 and len(layer.u) == len(layer.b)
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    if not plain or any(hooks) or any(counts[id(p)] > 1 for p in params):
        return None
    kinds = tuple((p.dtype, p.device, p.requires_grad) for p in params)
    return (*facts, layer.u.shape[1:], kinds, layer.training)


def fuse(
    layers: nn.ModuleList,
    key_of: Callable[[nn.Module], Hashable | None],
    build: Callable[[nn.Module], Stack],
) -> None:
    """Replaces, in the list itself, each run of layers of one key by a stack; `build` makes one like a layer."""
    fused = []
    for run_key, run in itertools.groupby(layers, key=key_of):
        run = list(run)
        if run_key is None or (len(run) == 1 and isinstance(run[0], Stack)):
            fused += run
        else:
            fused.append(_joined(run, build(run[0])))
    del layers[:]
    layers.extend(fused)


def _joined(run: list[nn.Module], stack: Stack) -> Stack:
    for name in ("u", "w", "b"):
        rows = [getattr(layer, name) for layer in run]
        joined = torch.cat([row.detach() for row in rows])
        setattr(stack, name, nn.Parameter(joined, requires_grad=rows[0].requires_grad))
    return stack.train(run[0].training)


def unfused_state_dict(model: nn.Module, attribute: str) -> dict[str, Tensor]:
    """The model's state_dict as it would be with one layer for each step in the list `attribute`; copies."""
    prefix, spans = f"{attribute}.", list(_spans(getattr(model, attribute)))
    result = {}
    for name, value in model.state_dict().items():
        if not name.startswith(prefix):
            result[name] = value.clone()
            continue
        position, rest = name[len(prefix) :].split(".", 1)
        first, steps = spans[int(position)]
        for k in range(steps or 1):
            result[f"{prefix}{first + k}.{rest}"] = (value[k : k + 1] if steps else value).clone()
    return result


def load_unfused_state_dict(model: nn.Module, attribute: str, state_dict: dict[str, Tensor]) -> None:
    """Loads what `unfused_state_dict` gives. Raises TypeError for what is no state_dict, ValueError for a step that is
    missing or has another shape, and load_state_dict's errors."""
    check_state_dict(state_dict)
    prefix, spans = f"{attribute}.", list(_spans(getattr(model, attribute)))
    rest, result = dict(state_dict), {}
    for name, own_value in model.state_dict().items():
        names = [name]
        steps = None
        if name.startswith(prefix):
            position, own = name[len(prefix) :].split(".", 1)
            first, steps = spans[int(position)]
            names = [f"{prefix}{first + k}.{own}" for k in range(steps or 1)]
        missing = [n for n in names if n not in rest]
        if missing:
            raise ValueError(
                f"state_dict must have {', '.join(missing)} for the model's {name}, got none: load a state_dict of the "
                "model as it was before its layers were fused"
            )
        values = [rest.pop(n) for n in names]
        if steps:
            check_rows(dict(zip(names, values, strict=True)), (1, *own_value.shape[1:]))
        result[name] = torch.cat(values) if steps else values[0]
    model.load_state_dict({**rest, **result})  # what is left over is its error


def check_state_dict(state_dict: object) -> None:
    """Raises TypeError where it is no mapping, such as a module is."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a dict of names and tensors, got {type(state_dict).__name__}")


def check_rows(rows: dict[str, object], wanted: tuple[int, ...]) -> None:
    """Raises TypeError or ValueError where what a state_dict has for a step is no tensor of the shape `wanted`."""
    for name, row in rows.items():
        if not isinstance(row, Tensor):
            raise TypeError(f"state_dict's {name} must be a torch.Tensor, got {type(row).__name__}")
        if row.shape != wanted:
            raise ValueError(f"state_dict's {name} must have shape {wanted}, got {tuple(row.shape)}")


def _spans(layers: nn.ModuleList) -> Iterator[tuple[int, int | None]]:
    """For each layer the position that it has, or that its first step has, unfused; and a stack's K."""
    first = 0
    for layer in layers:
        steps = layer.num_steps if isinstance(layer, Stack) else None
        yield first, steps
        first += steps or 1
