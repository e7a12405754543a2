"""Random targets whose near ties are beyond rounding, and drafts for them, to decode with."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.train import drafts
from tests.train.dflash import drafts as dflash_drafts
from tests.train.dflash2 import drafts as dflash2_drafts
from tests.train.eagle3 import drafts as eagle3_drafts
from train.draft import DRAFTS

H, V = 32, 61
SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2}
SMALL_PER_LAYER = {"vocab_size_per_layer_input": V, "hidden_size_per_layer_input": 8, "global_head_dim": 8}
SHARED = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 3}
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "qwen3": {},
    "gemma2": {"query_pre_attn_scalar": 8, **SLIDING},
    "gemma3_text": {"query_pre_attn_scalar": 8, **SLIDING},
    "gemma4_text": {"num_kv_shared_layers": 2, "num_hidden_layers": 6, **SHARED, **SMALL_PER_LAYER},
    "gpt2": {"n_embd": H, "n_layer": 4, "n_head": 4, "n_positions": 128, "n_ctx": 128},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, **SLIDING},
    "deepseek_v3": {
        **{"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1},
        **{"topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4, "q_lora_rank": 16},
        **{"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    },
    "phi3": {
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0, 4.0, 6.0, 8.0]},
        "original_max_position_embeddings": 16,
    },
}


def make_target(family: str = "llama", *, seed: int = 0, vocab: int = V, **overrides) -> nn.Module:
    """A random target in float64, where it can be, whose near ties are beyond rounding."""
    dtype = torch.float32 if "num_experts_per_tok" in FAMILIES[family] else torch.float64
    values = {
        "vocab_size": vocab,
        "hidden_size": H,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**values, **FAMILIES[family], **overrides})
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype).eval()


def make_draft(
    target: nn.Module,
    layer_ids: list[int],
    kind: str = "dspark",
    *,
    seed: int = 0,
    slots: int = 4,
    kept: list[int] | None = None,
) -> nn.Module:
    """A draft with random weights and the target's embedding and head, or those rows of it that are kept."""
    vocab = target.get_input_embeddings().weight.shape[0]
    values = {"hidden_size": H, "vocab_size": vocab, "target_layer_ids": layer_ids}
    values["draft_vocab_size"] = vocab if kept is None else len(kept)
    if kind == "eagle3":
        own = {"target_hidden_size": H, "num_aux_hidden_states": len(layer_ids), "ttt_steps": slots}
        config = eagle3_drafts.small_config(**values, **own)
    else:
        makers = {"dspark": drafts, "dflash": dflash_drafts, "dflash2": dflash2_drafts}
        make, rows = makers[kind], slots + (kind != "dspark")  # their anchor drafts nothing
        if kind == "dflash2":
            values["selector_top_k"] = min(8, vocab - 1)
        config = make.small_config(**values, block_size=rows, mask_token_id=0)
    torch.manual_seed(seed)
    draft = DRAFTS[kind].build(config).to(target.dtype).eval()
    if kept is not None:
        draft.keep(torch.tensor(kept))
    if kind == "dflash2":
        dflash2_drafts.shake(draft, seed)
    draft.initialize_embeddings_and_head(target.get_input_embeddings(), target.get_output_embeddings())
    return draft
