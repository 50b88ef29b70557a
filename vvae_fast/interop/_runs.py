"""Runs of equal planar layers in another package's list of layers, and the names of their parameters."""

import contextlib
import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

NAMES = ("u", "w", "b")  # a planar layer's parameters
Layer = Any  # a layer of another package, which may not be installed, or ours
Facts = tuple[Hashable, ...]  # properties of a layer that its neighbours must share
Made = TypeVar("Made")


class Stack(nn.Module):
    """A fused layer of K steps: u, w [K, *shape] and b [K]. A single step has K = 1, so it joins as a stack does."""

    u: nn.Parameter
    w: nn.Parameter
    b: nn.Parameter

    @property
    def num_steps(self) -> int:
        """K."""
        return len(self.b)


def is_class(layer: object, module: str, name: str) -> bool:
    """Whether the layer is of this class, and not of a subclass. The other package may not be installed."""
    return (type(layer).__module__, type(layer).__name__) == (module, name)


class LayerList(NamedTuple):
    """The attribute that holds the layers of another package's models, and a class that has it, for messages."""

    attribute: str
    example: str

    def of(self, model: nn.Module) -> nn.ModuleList:
        """The model's list. Raises TypeError if it has none."""
        layers = getattr(model, self.attribute, None)
        if not isinstance(layers, nn.ModuleList):
            raise TypeError(
                f"model must have a ModuleList `{self.attribute}`, as {self.example} has, got {type(model).__name__}"
            )
        return layers

    def fuse(self, model: nn.Module, facts_of: Callable[[Layer], Facts | None], build: Callable[..., Stack]) -> None:
        """Replaces each run of layers with the same facts by a stack, in the list itself. A layer without facts stays.

        `build(layer, *facts)` makes a stack of one step. The list keeps the other package's state_dict. Warns, in the
        name of the caller's caller, if no layer is or becomes a stack.
        """
        layers = self.of(model)
        # A parameter that occurs twice is tied, and a stack would untie it.
        counts = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        fused: list[nn.Module] = []
        for key, group in itertools.groupby(layers, key=lambda layer: _key(layer, counts, facts_of(layer))):
            run = list(group)
            if key is None or (len(run) == 1 and isinstance(run[0], Stack)):
                fused += run
            else:
                fused.append(_joined(run, without_drawing(build, run[0], *key[0])))
        del layers[:]
        layers.extend(fused)
        if any(isinstance(layer, Stack) for layer in fused):
            _keep_their_names(layers)
        else:
            found = Counter(type(layer).__name__ for layer in fused)
            came = ", ".join(f"{count} {name}" for name, count in found.items()) or "no layers"
            warnings.warn(
                f"nothing is fused: model.{self.attribute} should hold planar layers, got {came}; planar layers of a "
                "subclass, with hooks, shared parameters or changed settings stay as they are, and lists inside other "
                "layers are not searched",
                stacklevel=3,
            )

    def unfused_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """A copy of the state_dict that the model would have with one layer for each step."""
        with _their_names(self.of(model)):
            return {name: value.clone() for name, value in model.state_dict().items()}

    def load_unfused_state_dict(self, model: nn.Module, state_dict: dict[str, Tensor]) -> None:
        """Loads a state_dict as `unfused_state_dict` returns it. Raises TypeError if it is not a state_dict, ValueError
        if a step is missing or has another shape, and load_state_dict's errors."""
        layers = self.of(model)
        check_state_dict(state_dict)
        stacked = list(_stacked(layers, f"{self.attribute}."))
        missing = [name for name in self.unfused_state_dict(model) if name not in state_dict]
        if missing:
            own = {row: name for name, rows, _ in stacked for row in rows}
            of = dict.fromkeys(own.get(name, name) for name in missing)
            raise ValueError(
                f"state_dict must have {', '.join(missing)} for the model's {', '.join(of)}, got none: load a "
                "state_dict of the model as it was before its layers were fused"
            )
        for _, rows, value in stacked:
            check_rows({row: state_dict[row] for row in rows}, (1, *value.shape[1:]))
        with _their_names(layers):
            model.load_state_dict(state_dict)  # it raises an error for entries that are left over


def _key(layer: Layer, counts: Counter[int], facts: Facts | None) -> tuple[Facts, Hashable] | None:
    """The properties that neighbours in one stack must share; None for a layer that a stack cannot replace."""
    if facts is None:
        return None
    params = [getattr(layer, name) for name in NAMES]
    plain = layer.u.shape == layer.w.shape and layer.b.dim() == 1 and len(layer.u) == len(layer.b)
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    if not plain or any(hooks) or any(counts[id(p)] > 1 for p in params):
        return None
    kinds = tuple((p.dtype, p.device, p.requires_grad) for p in params)
    return facts, (layer.u.shape[1:], kinds, layer.training)


def _joined(run: list[nn.Module], stack: Stack) -> Stack:
    for name in NAMES:
        rows = [getattr(layer, name) for layer in run]
        joined = torch.cat([row.detach() for row in rows])
        setattr(stack, name, nn.Parameter(joined, requires_grad=rows[0].requires_grad))
    return stack.train(run[0].training)


def without_drawing(make: Callable[..., Made], *args: object) -> Made:
    """Calls `make` without drawing random numbers: the parameters are placeholders, which copies will replace."""
    with torch.device("meta"):
        return make(*args)


@contextlib.contextmanager
def _their_names(layers: nn.ModuleList) -> Iterator[None]:
    """Inside the block, the list has the other package's state_dict."""
    handles = _keep_their_names(layers)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _keep_their_names(layers: nn.ModuleList) -> list[RemovableHandle]:
    """Makes the list save and load the state_dict of the unfused list, since other code that saves it knows no stacks.

    Returns the handles of the new hooks; none if the list has these hooks already.
    """
    if _unfuse in layers._state_dict_hooks.values():
        return []
    return [layers.register_state_dict_post_hook(_unfuse), layers.register_load_state_dict_pre_hook(_refuse)]


def _unfuse(layers: nn.ModuleList, state_dict: dict[str, Tensor], prefix: str, _: object) -> None:
    """Makes separate entries in the list's state_dict for each step of a stack."""
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
    """Undoes `_unfuse` before a state_dict is loaded. One that already holds stacks stays as it is."""
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
    """The position in the list that a name in a state_dict belongs to; None for any other name."""
    position = name[len(prefix) :].split(".")[0] if name.startswith(prefix) else ""
    return int(position) if position.isdecimal() else None


def _stacked(layers: nn.ModuleList, prefix: str) -> Iterator[tuple[str, list[str], Tensor]]:
    """Each stack's parameters: name, names of the rows in the unfused list, value."""
    for position, (first, steps) in enumerate(_spans(layers)):
        for name, value in layers[position].named_parameters() if steps else ():
            yield f"{prefix}{position}.{name}", [f"{prefix}{first + k}.{name}" for k in range(len(value))], value


def check_state_dict(state_dict: object) -> None:
    """Raises TypeError if it is not a mapping, such as a module passed by mistake."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a dict of names and tensors, got {type(state_dict).__name__}")


def check_rows(rows: dict[str, object], wanted: tuple[int, ...]) -> None:
    """Raises TypeError if a state_dict's entry is not a tensor, ValueError if its shape is not `wanted`."""
    for name, row in rows.items():
        if not isinstance(row, Tensor):
            raise TypeError(f"state_dict's {name} must be a torch.Tensor, got {type(row).__name__}")
        if row.shape != wanted:
            raise ValueError(f"state_dict's {name} must have shape {wanted}, got {tuple(row.shape)}")


def _spans(layers: nn.ModuleList) -> Iterator[tuple[int, int | None]]:
    """For each layer, its position in the unfused list (for a stack, that of its first step), and a stack's K."""
    first = 0
    for layer in layers:
        steps = layer.num_steps if isinstance(layer, Stack) else None
        yield first, steps
        first += steps or 1
