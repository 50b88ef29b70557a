"""`python -m vvae_fast` is the `vvae-fast` program."""

import sys

from vvae_fast.train.cli import main

sys.exit(main())
