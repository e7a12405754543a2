"""Drafts in the form of the speculators library, there and back.

Its files hold the same weights as those for engines. The config nests the draft's layers, counts the target's
layers from 1, and says how many tokens are drafted. Of the engines vLLM reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pipeline.errors import RunError
from train.draft import DRAFTS
from train.draft.speculators import LAYERS, TYPE
from train.runs.open import TrainedDraft

FORM = "speculators"
"""Name of the form in `dspark export --to`."""
VERSION = "0.9.0"
"""Version of the library whose source the form is read from."""
READER = "vllm"
"""The engine that reads the form."""
UNREAD = "the export is in speculators' form, which it does not read"
"""Reason why engines other than vLLM can't serve such an export."""
# Weights of the target that versions of the library left in their files.
_TARGETS_OWN = "verifier_"


def speculators_config(draft: TrainedDraft, dtype: str) -> dict[str, Any]:
    """Return the values of `config.json`.

    Args:
        dtype: dtype of the weights.
    """
    form, shape = draft.kind.speculators, draft.shape
    stated = {"dtype": dtype, "torch_dtype": dtype}
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": draft.kind.slots(shape),
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    target = {"name_or_path": draft.target.name, "architectures": [draft.target.architecture]}
    return {
        "architectures": [form.architecture],
        **stated,
        TYPE: form.name,
        "speculators_version": VERSION,
        "speculators_config": {
            "algorithm": form.name,
            "proposal_methods": [proposal],
            "default_proposal_method": proposal["proposal_type"],
            "verifier": target,
        },
        **form.fields(shape),
        LAYERS: {**form.layers(shape), **stated},
    }


def is_speculators(values: Mapping[str, Any]) -> bool:
    """Return whether a config.json has the form."""
    return TYPE in values or "speculators_config" in values


def as_released(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a config.json of the form as that of a draft in its kind's own layout.

    Args:
        values: values of config.json, without null ones.
        where: path of config.json, for messages.

    Raises:
        RunError: no kind of draft here is like it; the message names the field.
    """
    for kind in DRAFTS.values():
        if kind.speculators.claims(values):
            return kind.speculators.released(values, where)
    known = " or ".join(kind.speculators.name for kind in DRAFTS.values())
    raise RunError(
        f"{where} has {TYPE} = {values.get(TYPE)!r}, expected {known}: it is another kind of draft, import "
        "another"
    )


def without_targets_own(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a draft's weights without copies of the target's that no draft needs."""
    return {name: weight for name, weight in weights.items() if not name.startswith(_TARGETS_OWN)}
