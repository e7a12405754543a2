"""Importing this installs the pretend device, and imports once what the sections' forked processes need."""

from __future__ import annotations

import torch

import train.cli.train
import train.trainer.trainer  # noqa: F401
from tests.gpu_less.pretend import install

torch.set_num_threads(1)
install(1)
