"""Runs of equal planar layers in another package's list of layers, and the names of their parameters."""

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


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
    """Replaces, in the list itself, each run of layers of one key by a stack; `build` makes one like a layer.

    The list's state_dict stays the other package's.
    """
    fused = []
    for run_key, run in itertools.groupby(layers, key=key_of):
        run = list(run)
        if run_key is None or (len(run) == 1 and isinstance(run[0], Stack)):
            fused += run
        else:
            fused.append(_joined(run, without_drawing(build, run[0])))
    del layers[:]
    layers.extend(fused)
    if any(isinstance(layer, Stack) for layer in fused):
        _keep_their_names(layers)


def _joined(run: list[nn.Module], stack: Stack) -> Stack:
    for name in ("u", "w", "b"):
        rows = [getattr(layer, name) for layer in run]
        joined = torch.cat([row.detach() for row in rows])
        setattr(stack, name, nn.Parameter(joined, requires_grad=rows[0].requires_grad))
    return stack.train(run[0].training)


def without_drawing(make: Callable[..., nn.Module], *args: object) -> nn.Module:
    """A module whose parameters are placeholders, to be replaced by copies: the global generator stays where it was."""
    with torch.device("meta"):
        return make(*args)


def unfused_state_dict(model: nn.Module, attribute: str) -> dict[str, Tensor]:
    """The model's state_dict as it would be with one layer for each step in the list `attribute`; copies."""
    with _their_names(getattr(model, attribute)):
        return {name: value.clone() for name, value in model.state_dict().items()}


def load_unfused_state_dict(model: nn.Module, attribute: str, state_dict: dict[str, Tensor]) -> None:
    """Loads what `unfused_state_dict` gives. Raises TypeError for what is no state_dict, ValueError for a step that is
    missing or has another shape, and load_state_dict's errors."""
    check_state_dict(state_dict)
    layers, prefix = getattr(model, attribute), f"{attribute}."
    stacked = list(_stacked(layers, prefix))
    missing = [name for name in unfused_state_dict(model, attribute) if name not in state_dict]
    if missing:
        own = {row: name for name, rows, _ in stacked for row in rows}
        of = dict.fromkeys(own.get(name, name) for name in missing)
        raise ValueError(
            f"state_dict must have {', '.join(missing)} for the model's {', '.join(of)}, got none: load a state_dict "
            "of the model as it was before its layers were fused"
        )
    for _, rows, value in stacked:
        check_rows({row: state_dict[row] for row in rows}, (1, *value.shape[1:]))
    with _their_names(layers):
        model.load_state_dict(state_dict)  # what is left over is its error


@contextlib.contextmanager
def _their_names(layers: nn.ModuleList) -> Iterator[None]:
    """The list's state_dict is, for now or as ever, the other package's."""
    handles = _keep_their_names(layers)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _keep_their_names(layers: nn.ModuleList) -> list[RemovableHandle]:
    """Makes the list's state_dict that of the unfused list: what else saves and loads the model knows no stacks.

    Returns the handles of the hooks that this takes, none where the list has them.
    """
    if _unfuse in layers._state_dict_hooks.values():
        return []
    return [layers.register_state_dict_post_hook(_unfuse), layers.register_load_state_dict_pre_hook(_refuse)]


def _unfuse(layers: nn.ModuleList, state_dict: dict[str, Tensor], prefix: str, _: object) -> None:
    """Gives each step of a stack, in the list's own state_dict, its own entries."""
    own = {name: state_dict.pop(name) for name in list(state_dict) if name.startswith(prefix)}
    for position, (first, steps) in enumerate(_spans(layers)):
        start = f"{prefix}{position}."
        entries = {name.removeprefix(start): value for name, value in own.items() if name.startswith(start)}
        for k in range(steps or 1):
            for name, value in entries.items():
                state_dict[f"{prefix}{first + k}.{name}"] = value[k : k + 1] if steps else value


def _refuse(
    layers: nn.ModuleList,
    state_dict: dict[str, Tensor],
    prefix: str,
    _metadata: object,
    _strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Undoes `_unfuse` in a state_dict that is about to be loaded. One that holds stacks already stays as it is."""
    positions = {name: _position(name, prefix) for name in state_dict}
    if max((p for p in positions.values() if p is not None), default=-1) < len(layers):
        return
    theirs = {name: state_dict.pop(name) for name, position in positions.items() if position is not None}
    for position, (first, steps) in enumerate(_spans(layers)):
        if steps is None:
            start = f"{prefix}{first}."
            for name in [name for name in theirs if name.startswith(start)]:
                state_dict[f"{prefix}{position}.{name.removeprefix(start)}"] = theirs.pop(name)
    for name, rows, value in _stacked(layers, prefix):
        joined = list(value.detach().split(1))
        for k, row in enumerate(rows):
            if row not in theirs:
                missing.append(row)
                continue
            given = theirs.pop(row)
            if not isinstance(given, Tensor) or given.shape != joined[k].shape:
                got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
                errors.append(f"size mismatch for {row}: got {got}, the model has {tuple(joined[k].shape)}")
                continue
            joined[k] = given
        devices = {row.device for row in joined}
        state_dict[name] = torch.cat(joined if len(devices) == 1 else [row.to(value.device) for row in joined])
    unexpected += theirs


def _position(name: str, prefix: str) -> int | None:
    """The position in the list that a name of a state_dict is for; None of any other name."""
    position = name[len(prefix) :].split(".")[0] if name.startswith(prefix) else ""
    return int(position) if position.isdecimal() else None


def _stacked(layers: nn.ModuleList, prefix: str) -> Iterator[tuple[str, list[str], Tensor]]:
    """Of each parameter of each stack its name, the names of its rows in the unfused list, and its value."""
    for position, (first, steps) in enumerate(_spans(layers)):
        for name, value in layers[position].named_parameters() if steps else ():
            yield f"{prefix}{position}.{name}", [f"{prefix}{first + k}.{name}" for k in range(steps)], value


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
