"""NVIDIA's published reader of a cache (nemo-automodel), on the first samples of one of ours."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
import types
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from pipeline.cache import CacheReader

# Number of samples, samples per shard, and batch sizes.
SAMPLES, SHARD, BATCHES = 48, 16, (1, 2)
PACKAGE, MODULE = "nemo_automodel", "components.datasets.llm.dspark_cache"


def nvidia_module() -> types.ModuleType:
    """Import NVIDIA's reader without its package's own imports, which need many more dependencies."""
    root = Path(importlib.util.find_spec(PACKAGE).submodule_search_locations[0])
    *folders, _ = MODULE.split(".")
    for depth in range(len(folders) + 1):
        package = types.ModuleType(".".join([PACKAGE, *folders[:depth]]))
        package.__path__ = [str(root.joinpath(*folders[:depth]))]
        sys.modules.setdefault(package.__name__, package)
    return importlib.import_module(f"{PACKAGE}.{MODULE}")


def make_theirs(theirs: types.ModuleType, path: Path, reader: CacheReader, length: int) -> None:
    """Write the first samples with NVIDIA's writer, each padded to `length` tokens, unless they exist."""
    if (path / "manifest.json").exists():
        return
    path.mkdir(parents=True, exist_ok=True)
    hidden = reader.hidden_size
    for shard in range(SAMPLES // SHARD):
        shape = (SHARD, length)
        ids, mask = torch.zeros(*shape, dtype=torch.long), torch.zeros(*shape, dtype=torch.long)
        context = torch.zeros(*shape, len(reader.layer_ids) * hidden, dtype=torch.bfloat16)
        last_hidden = torch.zeros(*shape, hidden, dtype=torch.bfloat16)
        for row in range(SHARD):
            sample = reader.read(shard * SHARD + row)
            tokens = len(sample.input_ids)
            ids[row, :tokens], mask[row, :tokens] = sample.input_ids, sample.loss_mask
            context[row, :tokens], last_hidden[row, sample.last_positions] = (
                sample.context,
                sample.last_hidden,
            )
        tensors = (ids, mask, context, last_hidden)
        theirs.write_shard(str(path), shard, dict(zip(theirs.CACHE_KEYS, tensors, strict=True)))
    target = reader.manifest.identity.target
    config = types.SimpleNamespace(
        hidden_size=hidden, vocab_size=target.vocab_size, num_hidden_layers=target.num_layers
    )
    manifest = theirs.build_cache_manifest(
        target_model=target.name,
        target_model_type=target.model_type,
        target_text_config=config,
        seq_length=length,
        dtype="bf16",
        num_samples=SAMPLES,
        shard_size=SHARD,
        target_layer_ids=list(reader.layer_ids),
        train_data_path="noise",
        train_split=None,
        shuffle_seed=0,
        mask_reasoning_content=False,
        chat_template_sha256="",
    )
    theirs.write_manifest(str(path), {**manifest, "complete": True})


def serve(path: Path, connection: Connection) -> None:
    """Send the seconds of an epoch for each batch size received."""
    build = nvidia_module().build_cached_dspark_dataloader
    loaders = {n: build(cache_dir=str(path), batch_size=n, shuffle=True) for n in BATCHES}
    while (size := connection.recv()) is not None:
        start = time.perf_counter()
        for _batch in loaders[size]:
            pass
        connection.send(time.perf_counter() - start)
