"""Runs a command of benchmarks/study in this process."""

import dataclasses
import sys

import torch

from benchmarks.study.feature_size import trained_nll


def two_epochs(vae, config, dataset):
    """The NLL after two epochs, of ten samples."""
    return trained_nll(vae, dataclasses.replace(config, epochs=2, num_samples=10), dataset)


def lines_of(command, trained, monkeypatch, capsys, *arguments):
    """The lines that the module `command` prints for these arguments, with `trained` in place of its `trained_nll`."""
    monkeypatch.setattr(sys, "argv", [command.__name__, *arguments])
    monkeypatch.setattr(command, "trained_nll", trained)
    threads = torch.get_num_threads()
    try:
        command.main()
    finally:
        torch.set_num_threads(threads)
    return capsys.readouterr().out.splitlines()
