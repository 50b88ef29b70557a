import dataclasses

import pytest

from vvae_fast.train.data.sets import Dataset, load_dataset


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    digits = load_dataset("digits")
    return dataclasses.replace(digits, train=digits.train[:120], val=digits.val[:40], test=digits.test[:30])
