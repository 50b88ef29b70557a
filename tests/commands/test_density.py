"""Energies, quadrature and fits of `vvae-fast density`."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from vvae_fast import PlanarFlow
from vvae_fast.train.base.files import RunError
from vvae_fast.train.cli import main
from vvae_fast.train.density import runs as density_runs
from vvae_fast.train.density.energies import ENERGIES
from vvae_fast.train.density.figure import plot_fits
from vvae_fast.train.density.fit import BOX, FitConfig, Restart, divergence, fit, log_density, make_grid, train

ROOT = Path(__file__).parents[2]
SMALL = FitConfig("U1", num_steps=2, iterations=40, restarts=2, batch_size=64)


def identity(num_steps: int = 3) -> PlanarFlow:
    flow = PlanarFlow(2, num_steps).double().requires_grad_(False)
    flow.reset_parameters()  # u_hat = 0 in float64 too
    return flow


def gaussian(mean: float, scale: float):
    """The energy of N(mean, scale^2 I)."""
    return lambda z: 0.5 * ((z - mean) / scale).square().sum(-1)


@pytest.mark.parametrize(
    ("name", "z", "expected"),
    [
        # U1: the ring's distance and the two wells
        ("U1", (2.0, 0.0), -math.log1p(math.exp(-0.5 * (4 / 0.6) ** 2))),
        ("U1", (0.0, 3.0), 0.5 * (1 / 0.4) ** 2 + 0.5 * (2 / 0.6) ** 2 - math.log(2)),
        ("U2", (0.0, 0.8), 2.0),
        ("U2", (1.0, 1.0), 0.0),
        ("U2", (-3.0, 0.2), 0.5 * (0.8 / 0.4) ** 2),
        ("U2", (4.8, math.sin(2.4 * math.pi)), 2.0),  # the taper: two of its widths past 4
        ("U2", (-4.8, math.sin(-2.4 * math.pi)), 2.0),
        # U3 at z_1 = 1: two bells at 1 and -2
        ("U3", (1.0, 1.0), -math.log1p(math.exp(-0.5 * (3 / 0.35) ** 2))),
        ("U3", (1.0, -0.5), 0.5 * (1.5 / 0.35) ** 2 - math.log(2)),
        # U4 at z_1 = 1: w_3 = 1.5, bells at 1 and -0.5 with widths 0.4 and 0.35
        ("U4", (1.0, 1.0), -math.log1p(math.exp(-0.5 * (1.5 / 0.35) ** 2))),
        ("U4", (1.0, -0.5), -math.log1p(math.exp(-0.5 * (1.5 / 0.4) ** 2))),
        ("U4", (6.0, -2.0), 12.5 - math.log(math.exp(-0.5 * (2 / 0.4) ** 2) + math.exp(-0.5 * (1 / 0.35) ** 2))),
    ],
)
def test_energies_by_hand(name, z, expected):
    got = ENERGIES[name](torch.tensor(z, dtype=torch.float64))
    assert got.item() == pytest.approx(expected, rel=1e-6, abs=1e-9)  # w_3 at 6 is 3 up to 2e-7


def test_energies_are_symmetric_where_the_paper_s_are():
    z = 3 * torch.randn(50, 2, dtype=torch.float64)
    mirrored = z * torch.tensor([-1.0, 1.0])
    torch.testing.assert_close(ENERGIES["U1"](mirrored), ENERGIES["U1"](z))
    torch.testing.assert_close(ENERGIES["U1"](-mirrored), ENERGIES["U1"](z))
    torch.testing.assert_close(ENERGIES["U2"](-z), ENERGIES["U2"](z))
    for energy in ENERGIES.values():
        assert energy(z.view(5, 10, 2)).shape == (5, 10)


@pytest.mark.parametrize("name", ENERGIES)
def test_nothing_of_a_target_lies_outside_the_box(name):
    inside, double = (
        divergence(identity(0), ENERGIES[name], make_grid(size, num)).log_normalizer
        for size, num in ((BOX, 256), (2 * BOX, 512))
    )
    finer = divergence(identity(0), ENERGIES[name], make_grid(BOX, 512)).log_normalizer
    assert inside == pytest.approx(double, abs=1e-12)
    assert inside == pytest.approx(finer, abs=1e-7)


@pytest.mark.parametrize(("name", "widths"), [("U2", 0.4), ("U3", 0.7), ("U4", 0.75)])
def test_normalizers_of_the_tapered_energies(name, widths):
    root = math.sqrt(2 * math.pi)
    exact = math.log((8 + 0.4 * root) * widths * root)
    assert divergence(identity(0), ENERGIES[name], make_grid()).log_normalizer == pytest.approx(exact, abs=1e-5)


@pytest.mark.parametrize("num_steps", [0, 5])
def test_the_identity_s_kl_is_that_of_gaussians(num_steps):
    got = divergence(identity(num_steps), gaussian(0.3, 1.2), make_grid(BOX, 256))
    assert got.kl == pytest.approx(2 * math.log(1.2) + (2 + 2 * 0.3**2) / (2 * 1.2**2) - 1, abs=1e-8)
    assert got.mass == pytest.approx(1, abs=1e-12)
    assert got.log_normalizer == pytest.approx(math.log(2 * math.pi * 1.2**2), abs=1e-8)


def test_the_kl_of_a_flow_from_itself_is_0_and_samples_agree_with_its_density():
    flow = identity(4)
    flow.u += torch.randn_like(flow.u)
    grid = make_grid(16.0, 512)
    other = divergence(flow, ENERGIES["U1"], grid)
    assert divergence(flow, lambda z: -log_density(flow, z), grid).kl == pytest.approx(0, abs=1e-9)
    z_0 = torch.randn(100_000, 2, dtype=torch.float64)
    z_K, _ = flow(z_0)
    sampled = log_density(flow, z_K) + ENERGIES["U1"](z_K) + other.log_normalizer
    assert abs(other.kl - sampled.mean().item()) < 5 * sampled.std().item() / len(z_0) ** 0.5
    assert other.mass == pytest.approx(1, abs=1e-6)


def test_a_fit_improves():
    config = FitConfig("U1", num_steps=8, iterations=500, batch_size=256)
    grid = make_grid(BOX, 256)
    fitted = divergence(train(config, 0), ENERGIES["U1"], grid).kl
    assert fitted < 0.5 < 3 < divergence(identity(), ENERGIES["U1"], grid).kl


def test_a_seed_s_fit_has_the_same_bits(threads):
    state = torch.get_rng_state()
    first, second, other = (train(SMALL, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.w, second.w)
    assert torch.equal(first.b, second.b)
    assert not torch.equal(first.w, other.w)


def test_the_best_restart_comes_first():
    told = []
    restarts = fit(
        FitConfig("U1", 2, iterations=100, restarts=3, seed=5, batch_size=64), make_grid(BOX, 128), told.append
    )
    assert told == [100, 200, 300]
    assert sorted(r.seed for r in restarts) == [5, 6, 7]
    kls = [r.divergence.kl for r in restarts]
    assert kls == sorted(kls)
    assert len(set(kls)) == 3


def test_a_grid_that_does_not_resolve_the_flow_is_refused():
    with pytest.raises(RunError, match="U1 K=2: the quadrature's grid does not resolve the flow, q's integral is"):
        fit(SMALL, make_grid(0.5, 64))


def command(out, *more: str) -> list[str]:
    options = "--energies U1 U4 --steps 1 3 --iterations 5 --restarts 2"
    return ["density", *options.split(), "--out", str(out), *more]


@pytest.fixture
def coarse(monkeypatch):
    """A grid that is fast, and fine enough for flows that are hardly trained."""
    monkeypatch.setattr(density_runs, "make_grid", lambda: make_grid(BOX, 128))


@pytest.mark.usefixtures("coarse")
def test_table_results_and_figure(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command(out)) == 0
    printed = capsys.readouterr().out
    content = json.loads((out / "results.json").read_text())
    assert [(f["config"]["energy"], f["config"]["num_steps"]) for f in content["fits"]] == [
        ("U1", 1),
        ("U1", 3),
        ("U4", 1),
        ("U4", 3),
    ]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    assert rows[0] == ["target", "K = 1", "K = 3"]
    assert rows[2:] == [
        [name, *(f"{f['kl']:.4f}" for f in content["fits"] if f["config"]["energy"] == name)] for name in ("U1", "U4")
    ]
    for record in content["fits"]:
        assert record["kl"] == min(record["restarts"].values()) == record["restarts"][str(record["seed"])]
        assert divergence(
            density_runs.load_flow(record), ENERGIES[record["config"]["energy"]], make_grid(BOX, 128)
        ).kl == pytest.approx(record["kl"], rel=1e-12)
    pixels = pytest.importorskip("matplotlib.image").imread(out / "figure.png")
    assert min(pixels.shape[:2]) > 200
    assert pixels[..., :3].std() > 0.05


@pytest.mark.usefixtures("coarse")
def test_a_second_call_fits_nothing_and_fresh_fits_all(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert main(command(out, "--steps", "1")) == 0
    first = (out / "results.json").read_bytes()
    picture = (out / "figure.png").read_bytes()
    assert main(command(out, "--steps", "1", "--fresh")) == 0
    assert (out / "results.json").read_bytes() == first
    fitted = []
    monkeypatch.setattr(density_runs, "fit", lambda config, *more: fitted.append(config.label) or fit(config, *more))
    assert main(command(out, "--steps", "1")) == 0
    assert (out / "results.json").read_bytes() == first
    assert (out / "figure.png").read_bytes() == picture
    assert fitted == []
    assert "[1/2] U1 K=1: already finished" in capsys.readouterr().out
    assert main(command(out)) == 0
    assert fitted == ["U1 K=3", "U4 K=3"]


@pytest.mark.usefixtures("coarse")
def test_an_interrupted_call_goes_on_after_the_last_finished_fit(tmp_path, monkeypatch, capsys):
    out, fitted = tmp_path / "out", []

    def interrupted(config, *more):
        if len(fitted) == 2:
            raise KeyboardInterrupt
        fitted.append(config.label)
        return fit(config, *more)

    monkeypatch.setattr(density_runs, "fit", interrupted)
    assert main(command(out)) == 130
    assert "goes on after the last finished" in capsys.readouterr().err
    monkeypatch.setattr(density_runs, "fit", lambda config, *more: fitted.append(config.label) or fit(config, *more))
    assert main(command(out)) == 0
    assert fitted == ["U1 K=1", "U1 K=3", "U4 K=1", "U4 K=3"]


@pytest.mark.usefixtures("coarse")
def test_another_configuration_and_other_files_are_refused(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command(out, "--steps", "1", "--energies", "U2")) == 0
    capsys.readouterr()
    results = out / "results.json"
    before = results.read_bytes()
    assert main(command(out, "--steps", "1", "--energies", "U2", "--iterations", "6")) == 2
    assert "belongs to another run (iterations is 5 there, 6 here)" in capsys.readouterr().err
    assert results.read_bytes() == before
    content = json.loads(before)
    for damaged in (
        {**content, "quadrature": {**content["quadrature"], "box": 4.0}},
        {**content, "fits": [{**content["fits"][0], "flow": {"u": [[0.0, 0.0]]}}]},
        {**content, "fits": [{**content["fits"][0], "kl": None}]},
        {"fits": 3},
    ):
        results.write_text(json.dumps(damaged))
        assert main(command(out, "--steps", "1", "--energies", "U2")) == 2
        captured = capsys.readouterr().err
        assert captured.count("\n") == 1
        assert str(results) in captured
        assert "--fresh" in captured


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--energies", "U5"], "--energies: invalid choice: 'U5'"),
        (["--steps", "0"], "--steps: must be at least 1, got 0"),
        (["--iterations", "0"], "--iterations: must be at least 1, got 0"),
        (["--restarts", "0"], "--restarts: must be at least 1, got 0"),
        (["--seed", "-1"], "--seed: must be at least 0, got -1"),
    ],
)
def test_bad_arguments_are_named(capsys, options, message):
    with pytest.raises(SystemExit) as exit_:
        main(["density", *options])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_the_figure_has_the_same_bytes_again(tmp_path):
    pytest.importorskip("matplotlib")
    flow = identity()
    fits = [(SMALL, flow, divergence(flow, ENERGIES["U1"], make_grid(BOX, 64)))]
    for name in ("a.png", "b.png"):
        plot_fits(fits, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_record_is_that_of_the_best_restart():
    flow = identity(2)
    best = Restart(7, flow, divergence(flow, ENERGIES["U1"], make_grid(BOX, 64)))
    record = density_runs.to_record(SMALL, [best, Restart(8, flow, best.divergence._replace(kl=9.0))])
    assert record["seed"] == 7
    assert record["restarts"] == {"7": best.divergence.kl, "8": 9.0}
    assert torch.equal(density_runs.load_flow(record).w, flow.w)


def committed() -> list[dict]:
    return json.loads((ROOT / "docs/density/results.json").read_text())["fits"]


@pytest.mark.parametrize(("name", "bar"), [("U1", 0.05), ("U2", 0.05), ("U3", 0.15), ("U4", 0.15)])
def test_the_committed_flows_of_32_steps_are_near_their_targets(name, bar):
    config = FitConfig(name, num_steps=32)
    record = next(record for record in committed() if record["config"] == config.to_json())
    got = divergence(density_runs.load_flow(record), ENERGIES[name], make_grid())
    assert got.kl == pytest.approx(record["kl"], rel=1e-6)
    assert got.mass == pytest.approx(1, abs=1e-6)
    assert got.kl < bar


def test_the_committed_table_is_what_the_command_prints(capsys):
    density_runs.print_table(committed())
    printed = "\n".join(filter(None, map(str.rstrip, capsys.readouterr().out.splitlines())))
    assert printed in re.sub("\n+", "\n", (ROOT / "docs/density.md").read_text())
