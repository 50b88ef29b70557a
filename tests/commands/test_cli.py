import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import vvae_fast
from vvae_fast.backends import selection
from vvae_fast.train import cli, load_run
from vvae_fast.train.base.files import RunError
from vvae_fast.train.cli import main
from vvae_fast.train.run.runconfig import is_config


def small(*more: str) -> list[str]:
    options = "--epochs 1 --batch-size 40 --latent-dim 2 --hidden 5 --steps 1 --num-samples 5"
    return ["train", *options.split(), *more]


@pytest.fixture
def data(tmp_path) -> str:
    np.save(tmp_path / "bits.npy", np.random.default_rng(0).integers(0, 2, (100, 16)))
    return str(tmp_path / "bits.npy")


def one_line_and_exit_2(capsys, arguments: list[str]) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("vvae-fast: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_train_then_evaluate(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(small("--data", data, "--out", str(out))) == 0
    trained = capsys.readouterr().out
    assert "amortized planar" in trained
    assert "NLL" in trained
    assert main(["evaluate", str(out / "best.ckpt"), "--data", data, "--num-samples", "5"]) == 0
    evaluated = capsys.readouterr().out
    value = next(line.split()[1] for line in evaluated.splitlines() if "neg_elbo" in line)
    assert f"{float(value):.2f}" in trained


def test_families_of_flows_are_trained_and_compared(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(small("--data", data, "--out", str(out), "--flow", "sylvester-orthogonal", "--units", "1")) == 0
    assert "amortized orthogonal Sylvester M=1" in capsys.readouterr().out
    recorded, result = (json.loads((out / name).read_text()) for name in ("config.json", "result.json"))
    assert (recorded["flow"], recorded["units"]) == (result["flow"], result["units"]) == ("sylvester-orthogonal", 1)
    assert main(["evaluate", str(out), "--data", data, "--num-samples", "5"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--units", "1"], "--units is of Sylvester flows, and --flow is planar; leave --units out"),
        (["--flow", "sylvester-orthogonal", "--units", "99"], "num_units must be at most D = 2, got 99"),
        (["--flow", "sylvester-triangular", "--units", "1"], "num_units must be D = 2"),
    ],
)
def test_flows_that_do_not_fit(data, tmp_path, options, message, capsys):
    assert main(small("--data", data, "--out", str(tmp_path / "run"), *options)) == 2
    assert message in capsys.readouterr().err


def test_a_vanilla_vae_has_no_family(data, tmp_path, capsys):
    command = ["train", "--model", "vanilla", "--flow", "householder", "--data", data, "--out", str(tmp_path / "run")]
    assert main(command) == 2
    assert "--flow is householder, and a vanilla VAE has no flow; leave --flow out" in capsys.readouterr().err


def test_a_rank_is_trained_continued_and_evaluated(data, tmp_path, capsys):
    out = tmp_path / "run"
    command = small("--data", data, "--out", str(out), "--rank", "2")
    assert main(command) == 0
    assert "amortized rank-2 planar" in capsys.readouterr().out
    recorded, result = (json.loads((out / name).read_text()) for name in ("config.json", "result.json"))
    assert (recorded["rank"], result["rank"]) == (2, 2)
    weights = torch.load(out / "best.ckpt", weights_only=True)["state_dict"]
    assert weights["vae.flow.head.down.weight"].shape == (2, 5)
    assert result["num_parameters"] == sum(weight.numel() for weight in weights.values())
    assert main([*command, "--epochs", "2"]) == 0
    assert json.loads((out / "result.json").read_text())["epochs_done"] == 2
    capsys.readouterr()
    assert main(["evaluate", str(out / "best.ckpt"), "--data", data, "--num-samples", "5"]) == 0
    assert "amortized-K1-rank2-seed0 after epoch" in capsys.readouterr().out
    for other in ([], ["--rank", "3"]):
        message = one_line_and_exit_2(capsys, small("--data", data, "--out", str(out), "--epochs", "2", *other))
        assert f"rank is 2 there, {other[1] if other else 0} here" in message


def test_normalise_is_trained_continued_and_evaluated(data, tmp_path, capsys):
    out = tmp_path / "run"
    command = small("--data", data, "--out", str(out), "--normalise")
    assert main(command) == 0
    assert json.loads((out / "config.json").read_text())["normalise"] is True
    run = load_run(out, data=data)
    assert run.vae.flow.normalise
    assert run.config.name == "amortized-K1-normalised-seed0"
    assert repr(run).startswith("LoadedRun of amortized-K1-normalised-seed0: vae, config, dataset ")
    assert len(repr(run)) < 200
    assert main([*command, "--epochs", "2"]) == 0
    said = one_line_and_exit_2(capsys, small("--data", data, "--out", str(out), "--epochs", "2"))
    assert "normalise is True there, False here" in said
    recorded = json.loads((out / "config.json").read_text())
    del recorded["normalise"]  # as a version wrote it that had none
    assert is_config(recorded)
    assert not is_config({**recorded, "normalise": 1})


def test_a_layer_norm_is_trained_continued_and_evaluated(data, tmp_path, capsys):
    out = tmp_path / "run"
    command = small("--data", data, "--out", str(out), "--rank", "2", "--layer-norm")
    assert main(command) == 0
    run = load_run(out, data=data)
    assert run.vae.flow.layer_norm
    assert run.config.name == "amortized-K1-rank2-layer-norm-seed0"
    assert main([*command, "--epochs", "2"]) == 0
    said = one_line_and_exit_2(capsys, [*command[:-1], "--epochs", "2"])
    assert "layer_norm is True there, False here" in said
    recorded = json.loads((out / "config.json").read_text())
    del recorded["layer_norm"]  # as a version wrote it that had none
    assert is_config(recorded)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layer-norm"], "--layer-norm is of a head with a rank, and there is no --rank; give one"),
        (["--layer-norm", "--rank", "1"], "a layer norm wants a rank of at least 2, got 1; leave the layer norm out"),
        (["--normalise", "--model", "shared"], "--model is shared; leave --normalise out"),
        (["--rank", "2", "--model", "shared"], "--model is shared; leave --rank out"),
        (["--rank", "2", "--model", "vanilla"], "--model is vanilla; leave --rank out"),
        (["--model", "vanilla"], "--steps is a flow's length, and --model is vanilla; leave --steps out"),
        (["--rank", "6"], "the rank must be at most min(features, K (2 D + 1)) = 5, got 6; leave it out"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_a_folder_is_made(data, tmp_path, capsys, options, message):
    out = tmp_path / "run"
    assert message in one_line_and_exit_2(capsys, small("--data", data, "--out", str(out), *options))
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such checkpoint"),
        (b"no checkpoint", "cannot be read as a checkpoint"),
        ({"state_dict": {}}, "of another program"),
    ],
)
def test_evaluate_refuses_what_is_no_checkpoint_of_ours(tmp_path, capsys, content, message):
    path = tmp_path / "some.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    assert message in one_line_and_exit_2(capsys, ["evaluate", str(path)])


def test_the_advice_on_a_damaged_checkpoint_fits_who_reads_it(data, tmp_path, capsys):
    """--fresh alone is no option of the commands that read; last.ckpt is one they take."""
    out = tmp_path / "run"
    assert main(small("--data", data, "--out", str(out))) == 0
    best, last = out / "best.ckpt", out / "last.ckpt"
    best.write_bytes(best.read_bytes()[:-100])
    arrays = ["--out", str(tmp_path / "of.npz")]
    for command in (["evaluate"], ["gaps"], ["encode", *arrays], ["reconstruct", *arrays], ["sample", *arrays]):
        said = one_line_and_exit_2(capsys, [*command, str(out), "--data", data])
        assert f"; give {last}, the run as it was after its last epoch, or train it again: vvae-fast train or" in said
    assert main(["encode", str(last), "--data", data, *arrays]) == 0
    last.unlink()
    capsys.readouterr()
    said = one_line_and_exit_2(capsys, ["evaluate", str(best), "--data", data])
    assert said.endswith("; give another run, or train it again: vvae-fast train or compare with --fresh\n")


def test_a_runs_folder_stands_for_its_best_checkpoint(data, tmp_path, capsys):
    runs = [tmp_path / "study" / name for name in ("a", "b")]
    for out in runs:
        assert main(small("--data", data, "--out", str(out))) == 0
    capsys.readouterr()
    printed = []
    for run in (runs[0], runs[0] / "best.ckpt"):
        assert main(["evaluate", str(run), "--data", data, "--num-samples", "10"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert main(["gaps", str(runs[0] / "best.ckpt"), "--data", data, "--num-points", "2", "--iterations", "2"]) == 0
    assert (runs[0] / "gaps.json").exists()
    capsys.readouterr()
    for command in (["evaluate"], ["gaps"], ["encode", "--out", "x.npz"]):
        said = one_line_and_exit_2(capsys, [*command, str(tmp_path / "study")])
        assert (
            f"best.ckpt: no such checkpoint; check the path, or give the folder of one run, such as {runs[0]}" in said
        )


def test_evaluate_refuses_other_data(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(small("--data", data, "--out", str(out))) == 0
    capsys.readouterr()
    said = one_line_and_exit_2(capsys, ["evaluate", str(out / "best.ckpt"), "--data", "digits"])
    assert "trained on other data (bits.npy) than those in digits; pass the run's own with --data" in said
    assert "for new rows call the VAE that load_run gives: docs/arrays.md" in said


@pytest.mark.parametrize("command", [["compare"], small()])
@pytest.mark.parametrize(
    "options", [["--data", "mnist"], ["--data", "mnist", "--root", "nowhere"], ["--data", "no.npy"]]
)
def test_missing_data(tmp_path, monkeypatch, capsys, command, options):
    monkeypatch.chdir(tmp_path)
    one_line_and_exit_2(capsys, [*command, *options])
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_model(data, tmp_path, capsys):
    out = str(tmp_path / "run")
    assert main(small("--data", data, "--out", out)) == 0
    capsys.readouterr()
    message = one_line_and_exit_2(capsys, small("--data", data, "--out", out, "--model", "shared"))
    assert "model is amortized there, shared here" in message
    assert main(small("--data", data, "--out", out, "--model", "shared", "--fresh")) == 0


def test_an_out_that_cannot_be_a_folder(data, capsys):
    assert "cannot be made a folder" in one_line_and_exit_2(capsys, small("--data", data, "--out", data))


@pytest.mark.parametrize("backend", ["warp", "cuda"])
def test_a_backend_that_cannot_run(monkeypatch, capsys, backend):
    monkeypatch.setattr(selection, "environment_name", backend)
    assert backend in one_line_and_exit_2(capsys, small())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["compare", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["compare", "--epochs", "0"], "--epochs: must be at least 1, got 0"),
        (["compare", "--lr", "nan"], "--lr: must be a positive number up to 1000, got nan"),
        (["compare", "--lr", "1e300"], "--lr: must be a positive number up to 1000, got 1e300"),
        (["compare", "--seeds", "-1"], "--seeds"),
        (["compare", "--seeds", str(2**32)], "--seeds: must be at most 4294967295"),
        (["train", "--seed", str(2**32)], "--seed: must be at most"),
        (["train", "--latent-dim", "10000001"], "--latent-dim: must be at most 10000000"),
        (["train", "--out", ""], "--out: must be neither empty"),
        (["train", "--data", "a\0.npy"], "--data: must be neither empty nor contain a null character"),
        (["train", "--model", "sylvester"], "--model: invalid choice"),
        (["train", "--rank", "0"], "--rank: must be at least 1, got 0"),
    ],
)
def test_unusable_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_numbers_are_read_as_people_write_them():
    read = cli._parser().parse_args(["compare", "--epochs", "2e2", "--lr", "1e-3", "--seeds", "1e1", "2.0"])
    assert (read.epochs, read.lr, read.seeds) == (200, 1e-3, [10, 2])
    with pytest.raises(SystemExit):
        cli._parser().parse_args(["compare", "--epochs", "2.5"])


def test_info_names_every_backend(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert vvae_fast.__version__ in printed
    for name, backend in vvae_fast.info()["backends"].items():
        line = next(line for line in printed.splitlines() if line.strip().startswith(f"{name}:"))
        assert all(reason in line for reason in backend["reasons"] or ["available"])


def test_info_ends_with_what_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(selection, "environment_name", "bogus")
    assert main(["info"]) == 2
    captured = capsys.readouterr()
    assert "reference" in captured.out
    assert captured.err.count("\n") == 1
    assert "bogus" in captured.err


def test_every_data_set_has_its_own_folder(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(small("--data", data)) == 0
    assert (tmp_path / "runs" / "train-bits" / "result.json").is_file()
    for command, data_, expected in [
        ("compare", "digits", "runs/compare"),
        ("compare", "mnist", "runs/compare-mnist"),
        ("train", "digits", "runs/train"),
    ]:
        assert cli._out(cli._parser().parse_args([command, "--data", data_])) == tmp_path / expected


def test_a_second_start_says_that_all_is_done(data, tmp_path, capsys):
    command = small("--data", data, "--out", str(tmp_path / "run"))
    assert main(command) == 0
    assert "already finished" not in capsys.readouterr().out
    assert main(command) == 0
    assert "seed 0: already finished" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["x" * 300, "a/result.json"])
def test_system_errors_are_one_line(data, tmp_path, capsys, name):
    (tmp_path / "a" / "result.json").mkdir(parents=True)
    out = tmp_path / name if len(name) > 99 else tmp_path / "a"
    one_line_and_exit_2(capsys, small("--data", data, "--out", str(out)))


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left", "some\nfile"),
        RunError("two\nlines"),
        MemoryError(),
        RuntimeError("can't allocate memory"),
    ],
)
def test_whatever_fails_is_one_line(monkeypatch, capsys, error):
    def fail():
        raise error

    monkeypatch.setattr(vvae_fast, "info", fail)
    one_line_and_exit_2(capsys, ["info"])


def test_other_errors_are_not_hidden(monkeypatch):
    def fail():
        raise RuntimeError("a defect")

    monkeypatch.setattr(vvae_fast, "info", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["info"])


def test_torch_alone_is_enough_for_info_and_the_rest_says_what_to_install(tmp_path):
    """In a Python that has none of the extra [train]."""
    hide = (
        "import sys; sys.modules.update(dict.fromkeys(('lightning', 'rich', 'matplotlib', 'sklearn', 'tensorboard')));"
    )
    program = hide + "from vvae_fast.train.cli import main; sys.exit(main(sys.argv[1:]))"
    info, train = (
        subprocess.run([sys.executable, "-c", program, command], capture_output=True, text=True, cwd=tmp_path)
        for command in ("info", "train")
    )
    assert info.returncode == 0
    assert "reference" in info.stdout
    assert info.stderr == ""
    assert train.returncode == 2
    assert train.stderr.count("\n") == 1
    assert "pip install 'vvae_fast[train]'" in train.stderr


def test_interruptions_are_told(monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(vvae_fast, "info", interrupt)
    assert main(["info"]) == 130
    assert "interrupted" in capsys.readouterr().err
