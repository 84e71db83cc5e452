"""A zoo: one tiny model with random weights of each architecture, to try on them what should hold for every family.

>>> zoo_model("llama").arch.n_kv_heads  # doctest: +SKIP
2
"""

import re
from functools import cache
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

from patchlab.errors import ModelError, unknown
from patchlab.models import Model, bridge_module, wrap_bridge

VOCAB, LAYERS, HEADS, WIDTH, D_MLP = 37, 3, 4, 16, 12
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "intermediate_size": D_MLP,
    "max_position_embeddings": 24,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_GROUPED: dict[str, Any] = {**_SIZES, "num_key_value_heads": 2}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
_GROUPS: dict[str, Any] = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
_LATENT: dict[str, Any] = {
    **_SIZES,
    **_GROUPS,
    "num_key_value_heads": HEADS,
    "moe_intermediate_size": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 2,
    "qk_nope_head_dim": 4,
    "v_head_dim": 3,
}
_GATED_DELTA: dict[str, Any] = {
    "head_dim": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "linear_conv_kernel_dim": 2,
}
_OPT: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_attention_heads": HEADS, "ffn_dim": D_MLP, "max_position_embeddings": 24}
_FALCON: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_attention_heads": HEADS, "ffn_hidden_size": D_MLP}

_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", {"vocab_size": VOCAB, "n_embd": WIDTH, "n_head": HEADS, "n_inner": D_MLP, "n_positions": 24}),
    "gpt-j": ("GPTJConfig", {"vocab_size": VOCAB, "n_embd": WIDTH, "n_head": HEADS, "n_inner": D_MLP, "n_positions": 24, "rotary_dim": 4}),
    "gpt-neo": (
        "GPTNeoConfig",
        {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_heads": HEADS, "intermediate_size": D_MLP, "max_position_embeddings": 24, "window_size": 3},
    ),
    "neox": ("GPTNeoXConfig", {**_SIZES, "use_parallel_residual": True}),
    "neox-sequential": ("GPTNeoXConfig", {**_SIZES, "use_parallel_residual": False}),
    "opt": ("OPTConfig", {**_OPT, "word_embed_proj_dim": WIDTH}),
    "opt-projected": ("OPTConfig", {**_OPT, "word_embed_proj_dim": 10}),
    "opt-postnorm": ("OPTConfig", {**_OPT, "word_embed_proj_dim": 10, "do_layer_norm_before": False}),
    "openai-gpt": ("OpenAIGPTConfig", {"vocab_size": VOCAB, "n_embd": WIDTH, "n_head": HEADS, "n_positions": 24}),
    "bloom": ("BloomConfig", {"vocab_size": VOCAB, "hidden_size": WIDTH, "n_head": HEADS}),
    "llama": ("LlamaConfig", _GROUPED),
    "mistral": ("MistralConfig", {**_GROUPED, "head_dim": 4, "sliding_window": 3}),
    "mixtral": ("MixtralConfig", {**_GROUPED, "intermediate_size": 8, "head_dim": 4, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": ("OlmoeConfig", {**_GROUPED, "intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}),
    "gpt-oss": (
        "GptOssConfig",
        {
            **_GROUPED,
            "intermediate_size": 8,
            "head_dim": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 3,
            "swiglu_limit": 0.7,
        },
    ),
    "granite-moe": ("GraniteMoeConfig", {**_GROUPED, "intermediate_size": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "glm4-moe": (
        "Glm4MoeConfig",
        {**_GROUPED, **_GROUPS, "moe_intermediate_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "head_dim": 4},
    ),
    "minimax-m2": (
        "MiniMaxM2Config",
        {**_GROUPED, "intermediate_size": 8, "head_dim": 4, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "llama4": (
        "Llama4TextConfig",
        {**_GROUPED, "head_dim": 4, "intermediate_size_mlp": 8, "num_local_experts": 4, "num_experts_per_tok": 1},
    ),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen2-moe": ("Qwen2MoeConfig", {**_GROUPED, **_EXPERTS, "decoder_sparse_step": 1, "shared_expert_intermediate_size": 8}),
    "qwen3": ("Qwen3Config", {**_GROUPED, "head_dim": 4}),
    "qwen3-moe": ("Qwen3MoeConfig", {**_GROUPED, **_EXPERTS, "head_dim": 4}),
    "qwen3-next": ("Qwen3NextConfig", {**_GROUPED, **_GATED_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 8}),
    "qwen3.5": ("Qwen3_5TextConfig", {**_GROUPED, **_GATED_DELTA}),
    "gemma": ("GemmaConfig", {**_GROUPED, "head_dim": 4}),
    "gemma2": ("Gemma2Config", {**_GROUPED, "head_dim": 4, "query_pre_attn_scalar": 4, "sliding_window": 3}),
    "gemma3": ("Gemma3TextConfig", {**_GROUPED, "head_dim": 4, "query_pre_attn_scalar": 4, "sliding_window": 3}),
    "olmo": ("OlmoConfig", {**_GROUPED, "clip_qkv": 0.8}),
    "gemma4": ("Gemma4TextConfig", {**_GROUPED, "head_dim": 4, "sliding_window": 3}),
    "vaultgemma": ("VaultGemmaConfig", {**_GROUPED, "head_dim": 4, "query_pre_attn_scalar": 4, "sliding_window": 3}),
    "olmo2": ("Olmo2Config", _GROUPED),
    "olmo3": ("Olmo3Config", {**_GROUPED, "sliding_window": 3}),
    "phi": ("PhiConfig", _SIZES),
    "phi3": ("Phi3Config", _GROUPED),
    "falcon": ("FalconConfig", {**_FALCON, "multi_query": True, "parallel_attn": True, "new_decoder_architecture": False}),
    "falcon-new": ("FalconConfig", {**_FALCON, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "falcon-sequential": ("FalconConfig", {**_FALCON, "multi_query": False, "parallel_attn": False, "alibi": True}),
    "mpt": ("MptConfig", {"vocab_size": VOCAB, "d_model": WIDTH, "n_heads": HEADS, "expansion_ratio": 2, "max_seq_len": 24}),
    "codegen": ("CodeGenConfig", {"vocab_size": VOCAB, "n_embd": WIDTH, "n_head": HEADS, "n_inner": D_MLP, "n_positions": 24, "rotary_dim": 4}),
    "gpt-bigcode": ("GPTBigCodeConfig", {"vocab_size": VOCAB, "n_embd": WIDTH, "n_head": HEADS, "n_inner": D_MLP, "n_positions": 24}),
    "nemotron": ("NemotronConfig", {**_GROUPED, "head_dim": 4}),
    "arcee": ("ArceeConfig", {**_GROUPED, "head_dim": 4}),
    "smollm3": ("SmolLM3Config", _GROUPED),
    "glm4": ("Glm4Config", {**_GROUPED, "head_dim": 4, "partial_rotary_factor": 0.5}),
    "ernie4.5": ("Ernie4_5Config", {**_GROUPED, "head_dim": 4}),
    "exaone4": ("Exaone4Config", {**_GROUPED, "head_dim": 4, "sliding_window": 3}),
    "apertus": ("ApertusConfig", _GROUPED),
    "seed-oss": ("SeedOssConfig", {**_GROUPED, "head_dim": 4}),
    "stablelm": ("StableLmConfig", {**_GROUPED, "partial_rotary_factor": 0.5}),
    "starcoder2": ("Starcoder2Config", {**_GROUPED, "sliding_window": 3}),
    "cohere": ("CohereConfig", {**_GROUPED, "logit_scale": 0.25}),
    "cohere2": ("Cohere2Config", {**_GROUPED, "head_dim": 4, "logit_scale": 0.25, "sliding_window": 3}),
    "granite": (
        "GraniteConfig",
        {**_GROUPED, "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.3, "logits_scaling": 2.0},
    ),
    "deepseek-v2": ("DeepseekV2Config", _LATENT),
    "deepseek-v3": ("DeepseekV3Config", _LATENT),
    "xglm": (
        "XGLMConfig",
        {"vocab_size": VOCAB, "d_model": WIDTH, "ffn_dim": D_MLP, "attention_heads": HEADS, "max_position_embeddings": 24, "scale_embedding": True},
    ),
    "rwkv": ("RwkvConfig", {"vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": D_MLP, "context_length": 24}),
    "mamba": ("MambaConfig", {"vocab_size": VOCAB, "hidden_size": WIDTH, "state_size": 4, "conv_kernel": 2, "use_mambapy": False}),
    "jamba": (
        "JambaConfig",
        {
            **_GROUPED,
            "intermediate_size": 8,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_d_state": 4,
            "mamba_d_conv": 2,
            "use_mamba_kernels": False,
        },
    ),
}
ZOO = tuple(_CONFIGS)
"""The names of the models, Hugging Face's names of the families and their variants."""

_LAYER_OPTIONS = {
    "gpt2": "n_layer",
    "gpt-j": "n_layer",
    "codegen": "n_layer",
    "gpt-bigcode": "n_layer",
    "gpt-neo": "num_layers",
    "openai-gpt": "n_layer",
    "bloom": "n_layer",
    "mpt": "n_layers",
}
_LAYER_KINDS = {
    "gemma3": ("sliding_attention", "full_attention"),
    "cohere2": ("sliding_attention", "full_attention"),
    "qwen3-next": ("linear_attention", "full_attention"),
    "qwen3.5": ("linear_attention", "full_attention"),
}
# with these the scale of a norm is one plus the parameter
_UNIT_OFFSET = ("gemma", "gemma2", "gemma3", "qwen3-next", "qwen3.5")


def _layers_of(name: str, layers: int) -> dict[str, Any]:
    """The number of layers, and a layer of each kind in turn."""
    option = _LAYER_OPTIONS.get(name, "num_hidden_layers")
    if name == "gpt-neo":
        return {option: layers, "attention_types": [[[("global", "local")[i % 2]], 1] for i in range(layers)]}
    if name in _LAYER_KINDS:
        return {option: layers, "layer_types": [_LAYER_KINDS[name][i % 2] for i in range(layers)]}
    return {option: layers}


def zoo_module(name: str, dtype: torch.dtype = torch.float32, layers: int = LAYERS, seed: int = 0) -> PreTrainedModel:
    """A Hugging Face model of a family, in eval mode, whose weights leave no non-linearity idle.

    Raises:
        ModelError: a name that the zoo has not.
    """
    import transformers

    if name not in _CONFIGS:
        raise ModelError(unknown("model of the zoo", name, ZOO))
    kind, options = _CONFIGS[name]
    config = getattr(transformers, kind)(**options, **_layers_of(name, layers))
    # the usual implementation of experts has no float64
    experts = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype, **experts)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            offset = name in _UNIT_OFFSET and "linear_attn" not in key
            is_scale = re.search(r"norm|ln_|\bln\d|pre_ln", key) is not None and key.endswith("weight") and not offset
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3 + float(is_scale))
    return module.eval()


def zoo_bridge(module: PreTrainedModel) -> TransformerBridge:
    """A Hugging Face model as a TransformerLens bridge, without a tokenizer."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    return build_bridge_from_module(module, type(module).__name__, hf_config=module.config, tokenizer=None)


@cache
def zoo_model(name: str, dtype: torch.dtype = torch.float32, layers: int = LAYERS) -> Model:
    """The model of a family, self-tested, built once; nothing that runs may change it.

    Raises:
        ModelError: a name that the zoo has not, or a model that patchlab refuses.
    """
    return wrap_bridge(bridge_module(zoo_module(name, dtype, layers), name), name)
