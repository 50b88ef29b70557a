import subprocess
import sys

import numpy as np
import pytest
import torch

import vvae_fast
from vvae_fast.train.cli import main


def small(*more: str) -> list[str]:
    return [
        "train",
        *[
            "--epochs",
            "1",
            "--batch-size",
            "40",
            "--latent-dim",
            "2",
            "--hidden",
            "5",
            "--steps",
            "1",
            "--num-samples",
            "5",
        ],
        *more,
    ]


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


def test_evaluate_refuses_other_data(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(small("--data", data, "--out", str(out))) == 0
    capsys.readouterr()
    assert "trained on other data" in one_line_and_exit_2(
        capsys, ["evaluate", str(out / "best.ckpt"), "--data", "digits"]
    )


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
    message = one_line_and_exit_2(capsys, small("--data", data, "--out", out, "--model", "vanilla"))
    assert "model is amortized there, vanilla here" in message
    assert main(small("--data", data, "--out", out, "--model", "vanilla", "--fresh")) == 0


def test_an_out_that_cannot_be_a_folder(data, capsys):
    assert "cannot be made a folder" in one_line_and_exit_2(capsys, small("--data", data, "--out", data))


@pytest.mark.parametrize("backend", ["warp", "cuda"])
def test_a_backend_that_cannot_run(monkeypatch, capsys, backend):
    monkeypatch.setenv("VVAE_FAST_BACKEND", backend)
    assert backend in one_line_and_exit_2(capsys, small())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["compare", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["compare", "--epochs", "0"], "--epochs: must be at least 1, got 0"),
        (["compare", "--lr", "nan"], "--lr: must be a positive number, got nan"),
        (["compare", "--seeds", "-1"], "--seeds"),
        (["train", "--model", "sylvester"], "--model: invalid choice"),
    ],
)
def test_unusable_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_info_names_every_backend(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert vvae_fast.__version__ in printed
    for name, backend in vvae_fast.info()["backends"].items():
        line = next(line for line in printed.splitlines() if line.strip().startswith(f"{name}:"))
        assert all(reason in line for reason in backend["reasons"] or ["available"])


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
