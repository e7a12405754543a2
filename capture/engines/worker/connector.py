"""Rows of hidden states from vLLM's cache to files. Runs in the processes that vLLM starts.

vLLM's own connector knows its cache's layout and holds a finished request's blocks until they are copied.
This one says which requests have rows to give, under which name, and writes them. A request whose
`kv_transfer_params` are {"id": 7, "answer": true} gets `FOLDER/7.safetensors`, which has `token_ids` [T],
int64, and `states` [T, L, H], in the engine's dtype; or `FOLDER/7.error`, one line. Either appears whole.
T is the prompt's length, and with "answer" that of the answer less one too: no forward reads the last token.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    ExampleHiddenStatesConnectorMetadata,
    PendingSave,
    extract_from_kv_cache,
)
from vllm.v1.request import RequestStatus

# Tokens that are copied at once: a copy needs as many rows of the GPU's memory besides the cache.
PIECE = 512
WHOLE = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)

if not torch.cuda.is_available():
    import cpu_sampling

    cpu_sampling.install()


class StatesConnector(ExampleHiddenStatesConnector):
    """Writes the rows of finished requests."""

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        """Note what has to be written; True holds the blocks until it is copied. Once per request."""
        asked = request.kv_transfer_params or {}
        if "id" not in asked or request.status not in WHOLE:
            return False, None
        tokens = request.all_token_ids[:-1] if asked["answer"] else request.prompt_token_ids
        name, key = str(asked["id"]), request.request_id
        self._pending_saves[key] = PendingSave(key, name, torch.tensor(list(tokens)), list(block_ids))
        return True, None

    def build_connector_meta(self, scheduler_output: Any) -> ExampleHiddenStatesConnectorMetadata:
        """Pass what was noted to the workers."""
        pending, self._pending_saves = list(self._pending_saves.values()), {}
        return ExampleHiddenStatesConnectorMetadata(pending_saves=pending)

    def _submit_async_write(self, pending: PendingSave) -> None:
        """Copy a request's rows, and let a thread write them. Called once per request, on every rank."""
        if not self._is_tp_rank_zero:
            return
        folder, name = Path(self._storage_path), pending.filename
        try:
            states, copied = self._copy(pending.block_ids, len(pending.token_ids))
        except Exception as error:
            copied = Copied()
            self._executor.submit(write_error, folder, name, error)
        else:
            tensors = {"token_ids": pending.token_ids, "states": states}
            self._executor.submit(write, folder, name, tensors, copied)
        self._req_copy_events[pending.req_id] = copied  # the blocks are free when it has happened

    def _copy(self, block_ids: Sequence[int], count: int) -> tuple[torch.Tensor, Any]:
        """Return `count` rows `[T, L, H]` on the CPU, and the event after which they are there.

        The rows in the cache become zeros. Were one not computed for the next owner of its block, it would
        be another sample's, which nobody could see.
        """
        cache, size = self._kv_cache, self._block_size
        if len(block_ids) * size < count:
            raise RuntimeError(f"the engine holds {len(block_ids) * size} of {count} rows")
        slots = torch.tensor(block_ids).unsqueeze(1) * size + torch.arange(size)
        slots = slots.flatten()[:count]
        shape = (count, cache.shape[1], cache.shape[3])
        if not cache.is_cuda:
            states = torch.empty(shape, dtype=cache.dtype)
            _move(cache, slots, states)
            return states, Copied()
        states = torch.empty(shape, dtype=cache.dtype, pin_memory=True)
        computed, copied, stream = torch.cuda.Event(), torch.cuda.Event(), self._get_copy_stream()
        computed.record()
        stream.wait_event(computed)
        with torch.cuda.stream(stream):
            _move(cache, slots, states)
        copied.record(stream)
        return states, copied


class Copied:
    """In place of a CUDA event: something that has happened."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


def _move(cache: torch.Tensor, slots: torch.Tensor, states: torch.Tensor) -> None:
    """Copy rows from the cache to `states`, and leave zeros there."""
    size = cache.shape[2]
    for start in range(0, len(slots), PIECE):
        piece = slots[start : start + PIECE].to(cache.device, non_blocking=True)
        states[start : start + PIECE].copy_(
            extract_from_kv_cache(cache, piece, len(piece)), non_blocking=True
        )
        cache[piece // size, :, piece % size] = 0


def write(folder: Path, name: str, tensors: dict[str, torch.Tensor], copied: Any) -> None:
    """Write a request's rows, or why they can't be."""
    partial = folder / f"{name}.safetensors.partial"
    try:
        copied.synchronize()
        save_file(tensors, partial)
        partial.replace(folder / f"{name}.safetensors")
    except Exception as error:
        partial.unlink(missing_ok=True)
        write_error(folder, name, error)


def write_error(folder: Path, name: str, error: Exception) -> None:
    """Write why there are no rows. If not even that can be written, the engine ends: nobody may wait."""
    try:
        partial = folder / f"{name}.error.partial"
        partial.write_text(" ".join(f"{type(error).__name__}: {error}".split()))
        partial.replace(folder / f"{name}.error")
    except OSError as also:
        print(f"rows of {name} can't be written to {folder}: {error}; {also}", file=sys.stderr, flush=True)
        os._exit(1)
