"""What an amortized Sylvester flow costs: python -m benchmarks.calls.sylvester [rounds] [cpu or cuda]

First the flow alone, forward + backward, B = 100, D = 64, float32, one thread, Q, R, R~ and b given for each row:

- loop: plain PyTorch as the family's published code is written, a loop over the layers with batched products;
- vvae_fast: `sylvester_flow`; packed: the same from one matrix for R and R~, as `AmortizedSylvesterFlow` calls it;
- reference: `sylvester_flow` by PyTorch's matrix products, on a GPU alone, to compare with the kernels;
- planar: `planar_flow` of L M steps, which is the same map, and reads and writes u and w of L M D numbers each.

All give the same z and log_det, which is checked before anything is timed. Then a step of a VAE by van den Berg et
al.'s protocol, gated convolutions with 64 latents, B = 100, two threads, fused Adam: each family against no flow.
Contestants take turns; printed are medians over the rounds and the median ratio of a round.
On a GPU a call ends when its kernels have.
"""

import functools
import statistics
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.calls.turns import in_turn, quiet, ratio
from vvae_fast import (
    VAE,
    AmortizedHouseholderFlow,
    AmortizedPlanarFlow,
    AmortizedSylvesterFlow,
    planar_flow,
    sylvester_flow,
)
from vvae_fast.nn.gated import CONV_FEATURES, gated_conv_decoder, gated_conv_encoder
from vvae_fast.sylvester import packed_sylvester_flow

Calls = dict[str, Callable[[], object]]
ROWS, DIM = 100, 64
CASES = {  # L, M, whether there is a Q
    "orthogonal, L = 16, M = 16": (16, 16, True),
    "orthogonal, L = 8, M = 32": (8, 32, True),
    "triangular, L = 4": (4, 64, False),
}
FAMILIES: dict[str, Callable[[], nn.Module | None]] = {
    "no flow": lambda: None,
    "planar, K = 16": lambda: AmortizedPlanarFlow(DIM, 16, CONV_FEATURES),
    "planar, K = 80": lambda: AmortizedPlanarFlow(DIM, 80, CONV_FEATURES),
    "orthogonal Sylvester, L = 4, M = 16": lambda: AmortizedSylvesterFlow(DIM, 4, 16, CONV_FEATURES),
    "orthogonal Sylvester, L = 16, M = 16": lambda: AmortizedSylvesterFlow(DIM, 16, 16, CONV_FEATURES),
    "householder Sylvester, L = 4, H = 8": lambda: AmortizedSylvesterFlow(
        DIM, 4, DIM, CONV_FEATURES, kind="householder"
    ),
    "triangular Sylvester, L = 4": lambda: AmortizedSylvesterFlow(DIM, 4, DIM, CONV_FEATURES, kind="triangular"),
    "Householder, K = 8": lambda: AmortizedHouseholderFlow(DIM, 8, CONV_FEATURES),
}


def loop(z: Tensor, q: Tensor | None, r: Tensor, r_tilde: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """z [B, D] and log_det [B] for q [B, L, D, M], r, r_tilde [B, L, M, M] and b [B, L, M]."""
    z, log_det = z[:, None], z.new_zeros(len(z))
    for layer in range(r.shape[1]):
        upper, upper_tilde = r[:, layer], r_tilde[:, layer]
        turned = q is None and layer % 2
        into = upper_tilde.mT if q is None else torch.bmm(q[:, layer], upper_tilde.mT)
        out_of = upper if q is None else torch.bmm(q[:, layer], upper)
        a = torch.bmm(z.flip(-1) if turned else z, into) + b[:, layer, None]
        h = torch.tanh(a)
        added = torch.bmm(h, out_of.mT)
        z = z + (added.flip(-1) if turned else added)
        diagonals = upper.diagonal(dim1=-2, dim2=-1) * upper_tilde.diagonal(dim1=-2, dim2=-1)
        log_det = log_det + (1 + (1 - h.squeeze(1).square()) * diagonals).abs().log().sum(-1)
    return z.squeeze(1), log_det


def as_planar(q: Tensor | None, r: Tensor, r_tilde: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u, w [B, L M, D] and b [B, L M] of the same map, docs/math.md (57)."""
    if q is None:
        q = torch.eye(DIM).expand(*r.shape).clone()
        q[:, 1::2] = q[:, 1::2].flip(-2)
    u, w = (q @ r).mT, (q @ r_tilde.mT).mT
    return u.flatten(1, 2).contiguous(), w.flatten(1, 2).contiguous(), b.flatten(1, 2)


def both_passes(
    flow: Callable[..., tuple[Tensor, Tensor]], leaves: list[Tensor | None], grads: tuple[Tensor, Tensor]
) -> object:
    return torch.autograd.grad(flow(*leaves), [t for t in leaves if t is not None], grads)


def calls_of_flows(layers: int, units: int, with_q: bool, on_gpu: bool) -> Calls:
    """Forward + backward of each contestant, which agrees with the loop."""
    torch.manual_seed(0)
    z = torch.randn(ROWS, DIM)
    q = torch.linalg.qr(torch.randn(ROWS, layers, DIM, units))[0].mT.contiguous().mT if with_q else None
    r, r_tilde = (torch.randn(ROWS, layers, units, units).triu() / units for _ in range(2))
    b = torch.randn(ROWS, layers, units)
    mixed = r.triu(1) + r_tilde.triu(1).mT
    d, d_tilde = (t.diagonal(dim1=-2, dim2=-1).contiguous() for t in (r, r_tilde))
    flows: dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], tuple[Tensor | None, ...]]] = {
        "vvae_fast": (sylvester_flow, (z, q, r, r_tilde, b)),
        "packed": (packed_sylvester_flow, (z, q, mixed, d, d_tilde, b)),
        "planar": (functools.partial(planar_flow, constraint="none"), (z, *as_planar(q, r, r_tilde, b))),
        "loop": (loop, (z, q, r, r_tilde, b)),
    }
    if on_gpu:
        flows["reference"] = functools.partial(sylvester_flow, backend="reference"), (z, q, r, r_tilde, b)
    grads = torch.randn(ROWS, DIM), torch.randn(ROWS)
    calls = {}
    for name, (flow, tensors) in flows.items():
        for ours, theirs in zip(flow(*tensors), loop(z, q, r, r_tilde, b), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        leaves = [t if t is None else t.clone().requires_grad_() for t in tensors]
        calls[name] = functools.partial(both_passes, flow, leaves, grads)
    return calls


def time_flows(rounds: int, device: torch.device) -> None:
    quiet()
    on_gpu = device.type == "cuda"
    print(f"The flow alone, forward + backward, B = 100, D = 64, {_where(on_gpu, 'one thread')}")
    for title, case in CASES.items():
        with device:  # where tensors are made; not while they are timed, for it looks on at every call
            calls = calls_of_flows(*case, on_gpu)
        times = in_turn(_to_the_end(calls, on_gpu), rounds)
        shown = ", ".join(f"{name} {1e3 * statistics.median(kept):.2f} ms" for name, kept in times.items())
        print(f"  {title}: {shown}")
        slower, slower_packed = (ratio(times, "loop", ours) for ours in ("vvae_fast", "packed"))
        print(
            f"    the loop takes {slower:.1f} times as long as vvae_fast, {slower_packed:.1f} times as packed; "
            f"vvae_fast {ratio(times, 'vvae_fast', 'planar'):.2f} times the planar engine",
            flush=True,
        )


def calls_of_steps() -> Calls:
    """A training step of the VAE with each family."""
    x = torch.rand(ROWS, 1, 28, 28)
    calls = {}
    for title, make in FAMILIES.items():
        torch.manual_seed(0)
        vae = VAE(gated_conv_encoder(), gated_conv_decoder(DIM, 1), DIM, make(), feature_dim=CONV_FEATURES)
        optimizer = torch.optim.Adam(vae.parameters(), fused=True)

        def step(vae: VAE = vae, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            (-vae.elbo(x).mean()).backward()
            optimizer.step()

        calls[title] = step
    return calls


def time_steps(rounds: int, device: torch.device) -> None:
    quiet(2)
    on_gpu = device.type == "cuda"
    where = _where(on_gpu, "two threads")
    print(f"A step of the VAE of gated convolutions, 64 latents, B = 100, {where}, against no flow")
    with device:
        calls = calls_of_steps()
    times = in_turn(_to_the_end(calls, on_gpu), rounds)
    for title, kept in times.items():
        print(f"  {title}: {1e3 * statistics.median(kept):.1f} ms, {ratio(times, title, 'no flow'):.2f}x", flush=True)


def _where(on_gpu: bool, threads: str) -> str:
    return torch.cuda.get_device_name() if on_gpu else threads


def _to_the_end(calls: Calls, on_gpu: bool) -> Calls:
    """Calls that return when their kernels have."""

    def waiting(call: Callable[[], object]) -> Callable[[], object]:
        return lambda: (call(), torch.cuda.synchronize())

    return {name: waiting(call) for name, call in calls.items()} if on_gpu else calls


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    device = torch.device(sys.argv[2] if len(sys.argv) > 2 else "cpu")
    print(f"torch {torch.__version__}")
    time_flows(rounds, device)
    time_steps(rounds, device)


if __name__ == "__main__":
    main()
