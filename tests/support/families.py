"""Tiny random models of many families, and what they ask of a scorer and a learner that others do not.

Every size is small, every window and every original length shorter than the rollouts that are tried.
"""

from dataclasses import dataclass, field

WINDOW = 8  # of sliding layers
VOCABULARY = 112
_SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=256, initializer_range=0.2,
    bos_token_id=None, eos_token_id=1, pad_token_id=0,
)  # fmt: skip
_MIXED = dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"], sliding_window=WINDOW)
_FULL = dict(layer_types=["full_attention"] * 3)
_EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=48)
_MLA = dict(
    q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, num_key_value_heads=4
)
_ROUTED = _EXPERTS | dict(n_routed_experts=4, n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1)
_DEEPSEEK = _MLA | _ROUTED | dict(head_dim=8)
_LINEAR = dict(
    layer_types=["linear_attention", "full_attention", "linear_attention"], linear_num_key_heads=2,
    linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
)  # fmt: skip
_LONG = dict(rope_type="longrope", rope_theta=10000.0, short_factor=[1.0] * 8, long_factor=[4.0] * 8, factor=4.0)


@dataclass(frozen=True)
class Family:
    """`config` is the name of a configuration class of transformers, `changes` differ from the small sizes."""

    name: str
    config: str
    changes: dict = field(default_factory=dict)
    without: tuple = ()  # sizes that the class does not take
    text: str | None = None  # the field that `changes` go to, of a multimodal configuration
    fast: bool = False  # in the first tier too
    sampled: bool = False  # tried with vLLM on a CPU, in the nightly tier


def _rope(kind, **values):
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=10000.0, **values))


FAMILIES = (
    Family("Qwen2", "Qwen2Config", dict(tie_word_embeddings=True), sampled=True),
    Family("Qwen2, sliding window", "Qwen2Config", _MIXED | dict(use_sliding_window=True), fast=True),
    Family("Qwen2-MoE", "Qwen2MoeConfig", _EXPERTS | dict(shared_expert_intermediate_size=48)),
    Family("Qwen3", "Qwen3Config", fast=True, sampled=True),
    Family("Qwen3-MoE", "Qwen3MoeConfig", _EXPERTS, fast=True),
    Family("Qwen3-MoE, sliding window", "Qwen3MoeConfig",
           _EXPERTS | dict(use_sliding_window=True, sliding_window=WINDOW)),
    Family("Qwen3-Next", "Qwen3NextConfig",
           _EXPERTS | _LINEAR | dict(shared_expert_intermediate_size=48)),
    Family("Qwen3.5", "Qwen3_5TextConfig", _LINEAR),
    Family("Llama, llama3 positions", "LlamaConfig",
           _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                 original_max_position_embeddings=16), fast=True),
    Family("Llama, yarn positions", "LlamaConfig",
           _rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    Family("Llama, dynamic positions", "LlamaConfig", _rope("dynamic", factor=4.0)),
    Family("Llama, dynamic positions, beyond the original length", "LlamaConfig",
           _rope("dynamic", factor=4.0) | dict(max_position_embeddings=16), fast=True),
    Family("Llama 4", "Llama4TextConfig",
           dict(attention_chunk_size=WINDOW, num_local_experts=4, intermediate_size_mlp=96,
                interleave_moe_layer_step=2, no_rope_layers=[1, 0, 1],
                layer_types=["chunked_attention", "full_attention", "chunked_attention"])),
    Family("Mistral", "MistralConfig", dict(sliding_window=None)),
    Family("Mistral, sliding window", "MistralConfig", dict(sliding_window=WINDOW), fast=True, sampled=True),
    Family("Mixtral, sliding window", "MixtralConfig", dict(num_local_experts=4, sliding_window=WINDOW)),
    Family("Ministral", "MinistralConfig", _MIXED),
    Family("Ministral 3", "Ministral3Config",
           dict(sliding_window=WINDOW) | _rope("yarn", factor=4.0, original_max_position_embeddings=16, mscale=1.0,
                                                mscale_all_dim=1.0, beta_fast=32.0, beta_slow=1.0,
                                                llama_4_scaling_beta=0.1)),
    Family("Phi", "PhiConfig"),
    Family("Phi-3, sliding window", "Phi3Config", dict(sliding_window=WINDOW), sampled=True),
    Family("Phi-3, longrope", "Phi3Config",
           dict(rope_parameters=_LONG, original_max_position_embeddings=128, sliding_window=None)),
    Family("Phi-3, longrope, beyond the original length", "Phi3Config",
           dict(rope_parameters=_LONG, original_max_position_embeddings=16, sliding_window=None), fast=True),
    Family("PhiMoE, sliding window", "PhimoeConfig",
           dict(num_local_experts=4, sliding_window=WINDOW, router_jitter_noise=0.3, input_jitter_noise=0.3),
           fast=True),
    Family("StarCoder2, sliding window", "Starcoder2Config", dict(sliding_window=WINDOW)),
    Family("Gemma", "GemmaConfig"),
    Family("Gemma 2", "Gemma2Config", _MIXED | dict(attn_logit_softcapping=5.0, final_logit_softcapping=3.0),
           fast=True),
    Family("Gemma 2 without a cap on logits", "Gemma2Config",
           _MIXED | dict(attn_logit_softcapping=5.0, final_logit_softcapping=None), fast=True),
    Family("Gemma 3, text", "Gemma3TextConfig", _MIXED, sampled=True),
    Family("Gemma 3, multimodal", "Gemma3Config", _MIXED, text="text_config", fast=True),
    Family("Gemma 3n, text", "Gemma3nTextConfig",
           dict(layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
                sliding_window=WINDOW, num_hidden_layers=4, num_kv_shared_layers=2, hidden_size_per_layer_input=16,
                vocab_size_per_layer_input=VOCABULARY, laurel_rank=8, intermediate_size=[96] * 4,
                activation_sparsity_pattern=[0.0] * 4)),
    Family("Gemma 4, text", "Gemma4TextConfig",
           dict(layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
                sliding_window=WINDOW, num_hidden_layers=4, num_kv_shared_layers=0, hidden_size_per_layer_input=16,
                vocab_size_per_layer_input=VOCABULARY, global_head_dim=16)),
    Family("OLMo", "OlmoConfig"),
    Family("OLMo 2", "Olmo2Config", sampled=True),
    Family("OLMo 3", "Olmo3Config", _MIXED),
    Family("OLMoE", "OlmoeConfig", _EXPERTS),
    Family("OLMo hybrid", "OlmoHybridConfig", _LINEAR | dict(linear_num_value_heads=2)),
    Family("Granite", "GraniteConfig", dict(logits_scaling=4.0)),
    Family("Granite, logits not scaled", "GraniteConfig"),
    Family("GraniteMoE", "GraniteMoeConfig", dict(num_local_experts=4, num_experts_per_tok=2)),
    Family("Granite 4 hybrid", "GraniteMoeHybridConfig",
           dict(layer_types=["mamba", "attention", "mamba"], num_local_experts=4, num_experts_per_tok=2,
                mamba_n_heads=4, mamba_d_head=32, mamba_d_state=16, shared_intermediate_size=64,
                mamba_chunk_size=16)),
    Family("GLM", "GlmConfig"),
    Family("GLM 4", "Glm4Config"),
    Family("GLM 4.5 (MoE)", "Glm4MoeConfig", _ROUTED),
    Family("SmolLM3", "SmolLM3Config", dict(no_rope_layers=[1, 0, 1])),
    Family("Cohere", "CohereConfig", dict(logit_scale=0.25)),
    Family("Cohere 2, sliding window", "Cohere2Config", _MIXED | dict(logit_scale=0.25)),
    Family("gpt-oss", "GptOssConfig", _MIXED | _EXPERTS, fast=True),
    Family("EXAONE 4", "Exaone4Config", _MIXED),
    Family("Seed-OSS", "SeedOssConfig"),
    Family("ERNIE 4.5", "Ernie4_5Config"),
    Family("Hunyuan", "HunYuanDenseV1Config"),
    Family("Hunyuan, MoE", "HunYuanMoEV1Config", dict(num_experts=4, moe_topk=[2] * 3)),
    Family("Apertus", "ApertusConfig"),
    Family("Arcee", "ArceeConfig"),
    Family("Helium", "HeliumConfig"),
    Family("Nemotron", "NemotronConfig"),
    Family("StableLM", "StableLmConfig"),
    Family("BitNet", "BitNetConfig"),
    Family("dots.llm1", "Dots1Config", _ROUTED),
    Family("MiniMax-M2", "MiniMaxM2Config", _EXPERTS | dict(rotary_dim=16)),
    Family("AFMoE", "AfmoeConfig", _MIXED | _EXPERTS | dict(num_dense_layers=1)),
    Family("CWM", "CwmConfig", _MIXED | dict(bos_token_id=2)),
    Family("MiMo-V2-Flash", "MiMoV2FlashConfig", _MIXED | _EXPERTS | dict(n_routed_experts=4, v_head_dim=16)),
    Family("DeepSeek-V2", "DeepseekV2Config", _DEEPSEEK),
    Family("DeepSeek-V3", "DeepseekV3Config", _DEEPSEEK, fast=True),
    Family("LongCat-Flash", "LongcatFlashConfig",
           _DEEPSEEK | dict(ffn_hidden_size=96, expert_ffn_hidden_size=48, moe_topk=2, zero_expert_num=1,
                            num_layers=2)),
    Family("Youtu", "YoutuConfig", _MLA | dict(head_dim=8)),
    Family("MiniCPM3", "MiniCPM3Config", _MLA | dict(head_dim=24)),
    Family("LFM2", "Lfm2Config", dict(layer_types=["conv", "full_attention", "conv"], block_ff_dim=96)),
    Family("Jamba", "JambaConfig",
           dict(num_experts=4, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False, mamba_d_state=8),
           fast=True),
    Family("Bamba", "BambaConfig",
           dict(attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=32, mamba_d_state=16, mamba_chunk_size=16)),
    Family("Falcon-H1", "FalconH1Config",
           dict(mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16, mamba_chunk_size=16)),
    Family("Nemotron-H", "NemotronHConfig",
           dict(layers_block_type=["mamba", "attention", "mlp"], mamba_num_heads=4, mamba_head_dim=16,
                ssm_state_size=16, n_groups=1, chunk_size=16, mamba_n_groups=1)),
    Family("DiffLlama", "DiffLlamaConfig"),
    Family("Doge", "DogeConfig"),
    Family("OPT", "OPTConfig", dict(ffn_dim=96, word_embed_proj_dim=64)),
    Family("Persimmon", "PersimmonConfig"),
    Family("GPT-2", "GPT2Config", dict(n_embd=64, n_layer=3, n_head=4, n_positions=256)),
    Family("GPT-NeoX", "GPTNeoXConfig"),
    Family("Falcon", "FalconConfig", without=("head_dim",)),
    Family("Mamba 2", "Mamba2Config", dict(num_heads=8, head_dim=16, state_size=16, n_groups=1, chunk_size=16)),
    Family("RecurrentGemma", "RecurrentGemmaConfig", dict(lru_width=64, attention_window_size=WINDOW)),
)  # fmt: skip
BY_NAME = {family.name: family for family in FAMILIES}


def config_of(family, **changes):
    """The configuration (transformers)."""
    import transformers

    sizes = {k: v for k, v in _SIZES.items() if k not in family.without} | family.changes | changes
    make = getattr(transformers, family.config)
    if family.text is None:
        return make(**sizes)
    vision = dict(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    return make(**{family.text: sizes}, vision_config=vision, mm_tokens_per_image=4, image_token_index=90,
                boi_token_index=91, eoi_token_index=92)  # fmt: skip


def make_family(family, path, **changes):
    """A random model in float32, saved to `path`."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family, **changes)).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "bias" in name:  # zeros hide what is done with them
                parameter.normal_(0, 0.05)
    model.save_pretrained(path)
    return model
