"""Runs that take seconds: a part of digits, a small model, few epochs."""

from vvae_fast.train.data.sets import Dataset
from vvae_fast.train.run.runconfig import RunConfig, data_digest


def make_config(dataset: Dataset, **changes) -> RunConfig:
    settings = {
        **{"model": "amortized", "num_steps": 2, "seed": 3, "data": "digits", "data_digest": data_digest(dataset)},
        **{"epochs": 4, "batch_size": 50, "latent_dim": 3, "hidden": (7,), "lr": 1e-2},
        **{"warmup_epochs": 0, "patience": 0, "num_samples": 20},
    }
    return RunConfig(**{**settings, **changes})


def without_times(result: dict) -> dict:
    history = [{key: value for key, value in record.items() if key != "seconds"} for record in result["history"]]
    return {key: value for key, value in result.items() if key != "seconds_per_epoch"} | {"history": history}
