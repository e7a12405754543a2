"""Importing this installs the pretend device, and imports once what the sections' forked processes need."""

from __future__ import annotations

import torch

torch.set_num_threads(1)

import train.cli.train  # noqa: F401
import train.trainer.trainer  # noqa: F401
from tests.gpu_less.pretend import install

install(1)
