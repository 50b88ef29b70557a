"""A VAE's training step in CUDA graphs, by the functions of docs/graphs.md: the losses and parameters of plain steps.

Without a GPU stand-ins for streams and graphs show what those functions do in which order.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from test_docs import BLOCK, DOCS, PAGES
from torch import Tensor, nn

from vvae_fast import VAE, AmortizedPlanarFlow, PlanarFlow
from vvae_fast.nn import mlp_decoder, mlp_encoder

DATA, HIDDEN, LATENT, ROWS = 20, 16, 4, 12
WARM_UPS = 3
FLOWS = {
    "vanilla": lambda backend: None,
    "shared": lambda backend: PlanarFlow(LATENT, 6, backend=backend),
    "amortized": lambda backend: AmortizedPlanarFlow(LATENT, 6, HIDDEN, backend=backend),
}
with_a_flow = pytest.mark.parametrize("flow", ["shared", "amortized"])
each_flow = pytest.mark.parametrize("flow", FLOWS)


@pytest.fixture(scope="module")
def page() -> SimpleNamespace:
    """What the page's examples define; on a GPU they train in graphs."""
    names = {"__name__": "graphs.md"}
    for block in BLOCK.finditer(PAGES["graphs.md"]):
        exec(compile(block[1], DOCS / "graphs.md", "exec"), names)
    return SimpleNamespace(**names)


def make(flow: str, backend: str, device: str) -> tuple[VAE, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = VAE(mlp_encoder(DATA, HIDDEN), mlp_decoder(LATENT, HIDDEN, DATA), LATENT, FLOWS[flow](backend)).to(device)
    # eps far above the rounding of gradients near 0, of whose signs Adam would make whole steps
    return model, torch.optim.Adam(model.parameters(), 1e-2, eps=1e-3, fused=True, capturable=device == "cuda")


def batches(device: str) -> list[tuple[Tensor, Tensor]]:
    """x and noise: one for the warm-up, three to train on."""
    generator = torch.Generator().manual_seed(1)
    drawn = []
    for _ in range(4):
        x = torch.rand(ROWS, DATA, generator=generator).round()
        drawn.append((x.to(device), torch.randn(ROWS, LATENT, generator=generator).to(device)))
    return drawn


def plainly(page, flow: str, backend: str, device: str, repeats: int = WARM_UPS) -> tuple[list[Tensor], nn.Module]:
    """The losses of a plain step on each batch, the first of them as often as the warm-up repeats it."""
    model, optimizer = make(flow, backend, device)
    first, *others = batches(device)
    losses = [page.plain_step(model, optimizer, *batch)() for batch in [first] * repeats + others]
    return losses[repeats:], model


def in_a_graph(page, flow: str, backend: str, device: str, watched=lambda step, *_: step) -> tuple:
    """The same by replays; `watched` may stand before the step that is captured."""
    model, optimizer = make(flow, backend, device)
    (x, noise), *others = batches(device)
    step = page.captured(watched(page.plain_step(model, optimizer, x, noise), model, optimizer), WARM_UPS)
    losses = []
    for batch, fresh in others:
        x.copy_(batch)
        noise.copy_(fresh)
        losses.append(step().clone())
    return losses, model


def compiled(page, flow: str, runs_on: str, device: str, **options) -> tuple[list[Tensor], nn.Module]:
    model, optimizer = make(flow, runs_on, device)
    step = page.compiled_step(model, optimizer, **options)
    return [step(*batch) for batch in batches(device)[1:]], model


def assert_alike(got: tuple[list[Tensor], nn.Module], wanted: tuple[list[Tensor], nn.Module]) -> None:
    losses, parameters = zip(got, wanted, strict=True)
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
    assert len({loss.item() for loss in losses[0]}) == 3
    for (name, x), y in zip(parameters[0].named_parameters(), parameters[1].parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.gpu
@with_a_flow
def test_a_whole_step_in_a_graph(page, gpu_backend, flow):
    assert_alike(in_a_graph(page, flow, gpu_backend, "cuda"), plainly(page, flow, gpu_backend, "cuda"))


@pytest.mark.gpu
def test_a_whole_step_without_a_flow_in_a_graph(page):
    assert_alike(in_a_graph(page, "vanilla", "auto", "cuda"), plainly(page, "vanilla", "auto", "cuda"))


@pytest.mark.gpu
@with_a_flow
def test_a_step_compiled_into_graphs(page, gpu_backend, flow):
    got = compiled(page, flow, gpu_backend, "cuda", mode="reduce-overhead")
    assert_alike(got, plainly(page, flow, gpu_backend, "cuda", repeats=0))


@pytest.mark.gpu
def test_a_registered_generator_goes_on_at_each_replay():
    """As the page says of noise that is drawn within the step."""
    generator, wanted = (torch.Generator("cuda").manual_seed(5) for _ in range(2))
    drawn, graph = torch.empty(ROWS, LATENT, device="cuda"), torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        drawn.copy_(torch.randn(ROWS, LATENT, generator=generator, device="cuda"))
    for _ in range(2):
        graph.replay()
        assert torch.equal(drawn, torch.randn(ROWS, LATENT, generator=wanted, device="cuda"))


@pytest.fixture
def stand_ins(monkeypatch):
    """What torch.cuda has of streams and graphs, where nothing is recorded: each call's name goes to a list."""
    said, capturing = [], []

    class Stream:
        def wait_stream(self, other):
            said.append("wait")

    class Graph:
        def replay(self):
            said.append("replay")
            self.run()

    @contextlib.contextmanager
    def graph(of):
        said.append("capture")
        capturing.append(of)
        yield
        capturing.pop()

    def watched(step, model, optimizer):
        """The step; captured, it trains nothing, and is what its graph runs then, into the loss that was returned."""

        def run():
            if not capturing:
                said.append("step")
                return step()
            weights = [p.detach().clone() for p in model.parameters()]
            moments = [{key: t.clone() for key, t in state.items()} for state in optimizer.state.values()]
            loss = step()
            with torch.no_grad():
                for p, value in zip(model.parameters(), weights, strict=True):
                    p.copy_(value)
                for state, values in zip(optimizer.state.values(), moments, strict=True):
                    for key, value in values.items():
                        state[key].copy_(value)
            capturing[-1].run = lambda: loss.copy_(step())
            return loss

        return run

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return SimpleNamespace(said=said, watched=watched)


@each_flow
def test_a_capture_warms_up_then_replays(page, stand_ins, flow):
    got = in_a_graph(page, flow, "auto", "cpu", stand_ins.watched)
    assert stand_ins.said == ["wait", *["step"] * WARM_UPS, "wait", "capture", *["replay"] * 3]
    assert_alike(got, plainly(page, flow, "auto", "cpu"))


@each_flow
def test_a_step_compiled_in_one_graph(page, flow):
    got = compiled(page, flow, "auto", "cpu", backend="aot_eager")  # fullgraph=True is the page's
    assert_alike(got, plainly(page, flow, "auto", "cpu", repeats=0))


def test_the_first_batch_is_looked_at_before_a_graph(page, stand_ins):
    """Counts to 16 as bits are refused in the warm-up, and by a compiled step in its first call."""
    model, optimizer = make("shared", "auto", "cpu")
    x, noise = 16 * batches("cpu")[0][0], batches("cpu")[0][1]
    with pytest.raises(ValueError, match="x must hold values"):
        page.captured(page.plain_step(model, optimizer, x, noise))
    assert "capture" not in stand_ins.said
    with pytest.raises(ValueError, match="x must hold values"):
        page.compiled_step(model, optimizer, backend="aot_eager")(x, noise)
