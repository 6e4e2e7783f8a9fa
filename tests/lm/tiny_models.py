"""A tiny random model for every row of the table of architectures, and a folder to load it from.

Two layers, width 32, 300 logits over a byte-level tokenizer of 257 tokens, 64 positions. All weights are drawn anew
with a standard deviation far above the usual: norms, biases and attention then change every number, so that a key taken
at the wrong place differs plainly.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from knnlm.lm.loading import no_progress_bars

VOCAB, WIDTH, CONTEXT, BOS = 300, 32, 64, "<|bos|>"
SHARED: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 256, "eos_token_id": 256, "tie_word_embeddings": False}
USUAL = SHARED | {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": CONTEXT,
}  # fmt: skip
GPT = SHARED | {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": CONTEXT}
LLAMA = USUAL | {"intermediate_size": 48, "num_key_value_heads": 1, "pad_token_id": None}
GEMMA = LLAMA | {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16, "final_logit_softcapping": 2.0}
OPT = USUAL | {"ffn_dim": 48, "word_embed_proj_dim": WIDTH, "pad_token_id": 1}
KINDS = ["sliding_attention", "full_attention"]

# by a name of ours; the row each one falls to is found by its config
CONFIGS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: GPT2Config(**GPT),
    "gpt_neo": lambda: GPTNeoConfig(
        **SHARED, hidden_size=WIDTH, num_layers=2, num_heads=2, max_position_embeddings=CONTEXT,
        attention_types=[[["global", "local"], 1]], window_size=6,
    ),
    "gptj": lambda: GPTJConfig(**GPT, rotary_dim=8),
    "gpt_neox-parallel": lambda: GPTNeoXConfig(**USUAL, intermediate_size=48),
    "gpt_neox-sequential": lambda: GPTNeoXConfig(**USUAL, intermediate_size=48, use_parallel_residual=False),
    "opt-pre-norm": lambda: OPTConfig(**OPT),
    "opt-no-final-norm": lambda: OPTConfig(**OPT, _remove_final_layer_norm=True),
    "opt-post-norm": lambda: OPTConfig(**(OPT | {"word_embed_proj_dim": 16}), do_layer_norm_before=False),
    "llama": lambda: LlamaConfig(**LLAMA),
    "mistral": lambda: MistralConfig(**LLAMA, sliding_window=6),
    "qwen2": lambda: Qwen2Config(**LLAMA),
    "qwen3": lambda: Qwen3Config(**LLAMA, head_dim=16),
    "phi3": lambda: Phi3Config(**LLAMA),
    "gemma2": lambda: Gemma2Config(**GEMMA, layer_types=KINDS, attn_logit_softcapping=2.0),
    "gemma3_text": lambda: Gemma3TextConfig(**GEMMA, layer_types=KINDS),
    "olmo2": lambda: Olmo2Config(**LLAMA),
    "bloom": lambda: BloomConfig(**(SHARED | {"seq_length": CONTEXT}), hidden_size=WIDTH, n_layer=2, n_head=2),
    "falcon-sequential-alibi": lambda: FalconConfig(**USUAL, alibi=True, parallel_attn=False, multi_query=False),
    "falcon-parallel": lambda: FalconConfig(**USUAL),
    "falcon-new-decoder": lambda: FalconConfig(**USUAL, new_decoder_architecture=True, num_kv_heads=1),
    "falcon-new-decoder-one-norm": lambda: FalconConfig(
        **USUAL, new_decoder_architecture=True, num_kv_heads=1, num_ln_in_parallel_attn=1
    ),
}  # fmt: skip


def random_model(config: Any, seed: int = 0) -> Any:
    """A causal LM in eval mode, float32, every parameter drawn from a normal distribution."""
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            centre = 1.0 if parameter.ndim == 1 else 0.0  # norms' weights around one; their biases, and others', too
            parameter.copy_(centre + 0.25 * torch.randn(parameter.shape, generator=generator))
    return model


def byte_tokenizer(bos: str | None = BOS) -> PreTrainedTokenizerFast:
    """One token a byte; BOS, when there is one, is 256 and EOS the same."""
    alphabet = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([BOS])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=BOS)  # type: ignore[no-untyped-call]


def save(model: Any, folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    with no_progress_bars():
        model.save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return folder
