use super::*;
use crate::spec::{FeedForward, Mixer, QkNorm, RopeScaling};
use mlxnode_compute::Dtype;
use serde_json::{Value, json};

fn config(value: Value) -> Config {
    Config::from_json(value.to_string().as_bytes()).unwrap()
}

/// A small config of a family, with some fields replaced (null removes one).
fn small(model_type: &str, changes: Value) -> Config {
    let mut value = json!({
        "model_type": model_type, "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 128,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-6, "vocab_size": 100,
        "max_position_embeddings": 4096, "rope_theta": 500000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16"
    });
    for (field, change) in changes.as_object().unwrap() {
        value[field] = change.clone();
    }
    config(value)
}

fn attention(spec: &ModelSpec, layer: usize) -> &crate::AttentionSpec {
    spec.layers[layer].mixer.attention().unwrap()
}

fn scaling(rope_scaling: Value) -> Result<RopeScaling, ConfigError> {
    let spec = spec(&small("llama", json!({ "rope_scaling": rope_scaling })))?;
    Ok(attention(&spec, 0).rope.clone().unwrap().scaling)
}

#[test]
fn each_family_has_its_own_shape() {
    for (model_type, architecture, head_dim, qkv_bias, qk_norm) in [
        ("llama", "llama", 32, false, None),
        ("xverse", "llama", 32, false, None),
        ("mistral", "mistral", 32, false, None),
        ("qwen2", "qwen2", 16, true, None), // ignores head_dim
        ("qwen3", "qwen3", 32, false, Some(QkNorm::PER_HEAD)),
    ] {
        let spec = spec(&small(model_type, json!({ "sliding_window": 128 }))).unwrap();
        assert_eq!((spec.architecture, spec.layer_count()), (architecture, 3));
        assert_eq!((spec.hidden, spec.vocabulary, spec.dtype), (64, 100, Dtype::BF16));
        let attention = attention(&spec, 2);
        assert_eq!((attention.heads, attention.kv_heads, attention.head_dim), (4, 2, head_dim));
        assert_eq!((attention.qkv_bias, attention.out_bias), (qkv_bias, false));
        assert_eq!((attention.qk_norm, attention.window), (qk_norm, None));
        assert_eq!(attention.scale, (1.0 / (head_dim as f64).sqrt()) as f32);
        let rope = attention.rope.as_ref().unwrap();
        assert_eq!((rope.dims, rope.base, rope.traditional), (head_dim, 500_000.0, false));
        let FeedForward::Gated { intermediate, bias, .. } = spec.layers[0].feed_forward else {
            panic!("not gated")
        };
        assert_eq!((intermediate, bias), (128, false));
    }
}

#[test]
fn absent_fields_have_mlx_lms_defaults() {
    let absent = json!({ "num_key_value_heads": null, "head_dim": null, "rope_theta": null,
        "tie_word_embeddings": null, "max_position_embeddings": null });
    let llama = spec(&small("llama", absent)).unwrap();
    assert!(llama.tied_embeddings);
    assert_eq!(llama.context, None);
    assert_eq!((attention(&llama, 0).kv_heads, attention(&llama, 0).head_dim), (4, 16));
    assert_eq!(attention(&llama, 0).rope.as_ref().unwrap().base, 10_000.0);
    let absent = json!({ "rope_theta": null, "tie_word_embeddings": null, "max_position_embeddings": null });
    let qwen2 = spec(&small("qwen2", absent)).unwrap();
    assert!(qwen2.tied_embeddings);
    assert_eq!(qwen2.context, Some(32_768));
    assert_eq!(attention(&qwen2, 0).rope.as_ref().unwrap().base, 1_000_000.0);
}

#[test]
fn layer_types_make_windows() {
    let types = json!(["sliding_attention", "full_attention", "sliding_attention"]);
    let spec = spec(&small("llama", json!({ "layer_types": types, "sliding_window": 128 }))).unwrap();
    let windows: Vec<_> = (0..3).map(|layer| attention(&spec, layer).window).collect();
    assert_eq!(windows, [Some(128), None, Some(128)]);
}

#[test]
fn rope_may_be_nested_as_transformers_5_writes_it() {
    let nested = json!({ "rope_theta": null, "rope_parameters": { "rope_theta": 5e6, "rope_type": "linear", "factor": 2.0 } });
    for model_type in ["llama", "mistral", "qwen2", "qwen3"] {
        let spec = spec(&small(model_type, nested.clone())).unwrap();
        let rope = attention(&spec, 0).rope.as_ref().unwrap();
        assert_eq!((rope.base, &rope.scaling), (5e6, &RopeScaling::Linear { factor: 2.0 }));
    }
}

#[test]
fn rope_scalings_read_as_mlx_lm_reads_them() {
    let yarn = |mscale_all_dim| RopeScaling::Yarn {
        factor: 4.0,
        original_max_positions: 4096.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        mscale: 1.0,
        mscale_all_dim,
    };
    let cases = [
        (json!(null), RopeScaling::Default),
        (json!({}), RopeScaling::Default),
        (json!({ "rope_type": "default" }), RopeScaling::Default),
        (
            json!({ "type": "linear", "rope_type": "default", "factor": 2 }),
            RopeScaling::Linear { factor: 2.0 },
        ),
        (
            json!({ "type": "dynamic", "factor": 2.0 }),
            RopeScaling::DynamicNtk { factor: 2.0, max_positions: 4096 },
        ),
        (
            json!({ "rope_type": "llama3", "factor": 8.0 }),
            RopeScaling::Llama3 {
                factor: 8.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_positions: 8192.0,
            },
        ),
        (json!({ "type": "yarn", "factor": 4.0 }), yarn(0.0)),
        (json!({ "type": "deepseek_yarn", "factor": 4.0, "mscale_all_dim": 1 }), yarn(1.0)),
        (
            json!({ "type": "longrope", "original_max_position_embeddings": 1024, "short_factor": 1, "long_factor": 2 }),
            RopeScaling::Longrope {
                long_factor: vec![2.0],
                input_scale: (1.0 + 4f64.ln() / 1024f64.ln()).sqrt(),
            },
        ),
        (
            json!({ "type": "proportional", "partial_rotary_factor": 0.25 }),
            RopeScaling::Proportional { rotated_dims: 8, factor: 1.0 },
        ),
        (json!({ "type": "mrope", "mrope_section": [1, 2, 3] }), RopeScaling::Default),
    ];
    for (json, expected) in cases {
        assert_eq!(scaling(json.clone()), Ok(expected), "{json}");
    }
    for (json, field) in [
        (json!({ "type": "linear" }), "rope_scaling.factor is missing"),
        (json!({ "type": "linear", "factor": 0 }), "rope_scaling.factor is 0"),
        (json!({ "type": "llama3", "factor": "x" }), "rope_scaling.factor is \"x\""),
        (json!({ "type": "spiral" }), "rope_scaling.rope_type is \"spiral\""),
        (json!({ "type": 3 }), "rope_scaling.type is 3"),
        (json!([1]), "rope_scaling is [1]"),
        (json!({ "type": "longrope", "original_max_position_embeddings": 1024 }), "rope_scaling.long_factor"),
        (
            json!({ "type": "longrope", "original_max_position_embeddings": 1024, "long_factor": [1, 2, 3] }),
            "rope_scaling.long_factor",
        ),
    ] {
        let message = scaling(json).unwrap_err().to_string();
        assert!(message.starts_with("config.json: ") && message.contains(field), "{message}");
    }
}

#[test]
fn absurd_configs_are_refused_by_the_field_that_is_wrong() {
    let cases = [
        ("llama", json!({ "hidden_size": null }), "hidden_size is missing"),
        ("llama", json!({ "num_attention_heads": null }), "num_attention_heads is missing"),
        ("llama", json!({ "num_attention_heads": 0 }), "num_attention_heads is 0"),
        ("llama", json!({ "num_attention_heads": "four" }), "num_attention_heads is \"four\""),
        ("llama", json!({ "num_key_value_heads": 3 }), "num_key_value_heads is 3"),
        ("llama", json!({ "num_key_value_heads": 0 }), "num_key_value_heads is 0"),
        ("llama", json!({ "num_hidden_layers": 0 }), "num_hidden_layers is 0"),
        ("llama", json!({ "num_hidden_layers": 4_000_000_000u64 }), "num_hidden_layers is 4000000000"),
        ("llama", json!({ "head_dim": 31 }), "head_dim is 31"),
        (
            "llama",
            json!({ "head_dim": null, "num_attention_heads": 7, "num_key_value_heads": 7 }),
            "num_attention_heads is 7",
        ),
        ("llama", json!({ "vocab_size": -5 }), "vocab_size is -5"),
        ("llama", json!({ "vocab_size": 1e30 }), "vocab_size is 1e+30"),
        ("llama", json!({ "intermediate_size": 128.5 }), "intermediate_size is 128.5"),
        ("llama", json!({ "rms_norm_eps": 2.0 }), "rms_norm_eps is 2"),
        ("llama", json!({ "rms_norm_eps": null }), "rms_norm_eps is missing"),
        ("llama", json!({ "rope_theta": 0.0 }), "rope_theta is 0"),
        ("llama", json!({ "hidden_act": "relu" }), "hidden_act is \"relu\""),
        ("llama", json!({ "tie_word_embeddings": "yes" }), "tie_word_embeddings is \"yes\""),
        ("llama", json!({ "layer_types": ["full_attention"] }), "layer_types is a list of 1"),
        (
            "llama",
            json!({ "layer_types": ["full_attention", "full_attention", "mamba"] }),
            "layer_types[2] is \"mamba\"",
        ),
        (
            "llama",
            json!({ "layer_types": ["full_attention", "full_attention", "sliding_attention"] }),
            "sliding_window is missing",
        ),
        ("llama", json!({ "model_file": "code.py" }), "model_file is code.py"),
        ("qwen2", json!({ "num_key_value_heads": null }), "num_key_value_heads is missing"),
        ("qwen3", json!({ "head_dim": null }), "head_dim is missing"),
        ("qwen3", json!({ "rope_theta": null }), "rope_theta is missing"),
        ("qwen3", json!({ "tie_word_embeddings": null }), "tie_word_embeddings is missing"),
        ("qwen3", json!({ "max_position_embeddings": null }), "max_position_embeddings is missing"),
    ];
    for (model_type, changes, part) in cases {
        let message = spec(&small(model_type, changes)).unwrap_err().to_string();
        assert!(message.starts_with("config.json: ") && message.contains(part), "{part}: {message}");
    }
    assert_eq!(spec(&config(json!({}))).unwrap_err().to_string(), "config.json: model_type is missing");
}

#[test]
fn newer_families_refuse_by_field_too() {
    let cases = [
        (
            "phi3",
            json!({ "rope_scaling": { "type": "yarn", "factor": 4.0 } }),
            "rope_scaling.type is \"yarn\"",
        ),
        ("phi3", json!({ "partial_rotary_factor": 1.5 }), "partial_rotary_factor is 1.5"),
        ("phi3", json!({ "partial_rotary_factor": 0.07 }), "partial_rotary_factor is 0.07"),
        ("gemma", json!({ "head_dim": null }), "head_dim is missing"),
        ("gemma", json!({ "hidden_act": "relu" }), "hidden_act is \"relu\""),
        ("gemma2", json!({ "final_logit_softcapping": 0.0 }), "final_logit_softcapping is 0"),
        ("gemma2", json!({ "query_pre_attn_scalar": -1 }), "query_pre_attn_scalar is -1"),
        ("gemma3_text", json!({ "sliding_window_pattern": 0 }), "sliding_window_pattern is 0"),
        ("gemma3", json!({}), "text_config is missing"),
        ("olmo3", json!({ "sliding_window": null }), "sliding_window is missing"),
        ("smollm3", json!({ "no_rope_layers": [1, 0] }), "no_rope_layers is a list of 2"),
        ("smollm3", json!({ "no_rope_layers": [1, 0, 2] }), "no_rope_layers is 2"),
        ("granite", json!({ "attention_bias": false, "mlp_bias": false }), "attention_multiplier is missing"),
        ("cohere", json!({ "layer_norm_eps": -1.0 }), "layer_norm_eps is -1"),
        ("cohere2", json!({}), "head_dim is 32"),
        ("starcoder2", json!({ "num_key_value_heads": null }), "num_key_value_heads is missing"),
        ("stablelm", json!({}), "partial_rotary_factor is missing"),
        ("glm4", json!({ "partial_rotary_factor": 0.5 }), "attention_bias is missing"),
        ("hunyuan_v1_dense", json!({ "rope_scaling": { "factor": 1.0 } }), "rope_scaling.alpha is missing"),
        ("hunyuan_v1_dense", json!({ "rope_scaling": { "alpha": 0 } }), "rope_scaling.alpha is 0"),
        ("ernie4_5", json!({}), "use_bias is missing"),
        ("nemotron", json!({ "hidden_act": "silu" }), "hidden_act is \"silu\""),
        ("nemotron", json!({}), "norm_eps is missing"),
        (
            "nemotron",
            json!({ "norm_eps": 1e-5, "rope_scaling": { "type": "yarn", "factor": 4.0 } }),
            "rope_scaling is {\"",
        ),
        ("helium", json!({}), "attention_bias is missing"),
        ("mixtral", json!({ "num_experts_per_tok": 9 }), "num_experts_per_tok is 9"),
        (
            "qwen2_moe",
            json!({ "num_experts": 4, "num_experts_per_tok": 2 }),
            "moe_intermediate_size is missing",
        ),
        ("qwen3_moe", json!({ "num_experts": 0 }), "num_experts is 0"),
        (
            "minimax",
            json!({ "shared_intermediate_size": 0, "num_local_experts": 4, "rotary_dim": 15 }),
            "rotary_dim is 15",
        ),
        ("glm4_moe", json!({}), "norm_topk_prob is missing"),
        ("deepseek", json!({ "rope_scaling": { "type": "yarn", "factor": 4.0 } }), "rope_scaling is {\""),
        ("mistral4", json!({}), "moe_intermediate_size is missing"),
        ("kimi_vl", json!({}), "text_config is missing"),
        ("minicpm3", json!({ "qk_nope_head_dim": 16, "kv_lora_rank": 32 }), "q_lora_rank is missing"),
        ("exaone4", json!({ "sliding_window_pattern": "LXG" }), "sliding_window_pattern is \"LXG\""),
        ("exaone4", json!({ "sliding_window_pattern": "LG" }), "sliding_window is missing"),
        // Found by fuzzing: rounded up to a multiple, the product overflowed.
        (
            "lfm2",
            json!({ "block_auto_adjust_ff_dim": true, "block_ffn_dim_multiplier": 1e300, "block_multiple_of": 256 }),
            "block_ffn_dim_multiplier is 1000",
        ),
        (
            "lfm2",
            json!({ "block_ff_dim": 1 << 20, "block_auto_adjust_ff_dim": true, "block_ffn_dim_multiplier": 7.0, "block_multiple_of": 1 }),
            "block_ffn_dim_multiplier is 7",
        ),
    ];
    for (model_type, changes, part) in cases {
        let message = spec(&small(model_type, changes)).unwrap_err().to_string();
        assert!(message.starts_with("config.json: ") && message.contains(part), "{part}: {message}");
    }
}

#[test]
fn the_text_model_of_a_repository_with_vision_takes_over_what_counts_for_it() {
    let text = json!({ "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "head_dim": 16 });
    let value = json!({ "model_type": "gemma3", "text_config": text, "torch_dtype": "bfloat16",
        "quantization": { "group_size": 32, "bits": 4 } });
    let spec = spec(&config(value)).unwrap();
    let attention = attention(&spec, 0);
    assert_eq!((attention.heads, attention.kv_heads, attention.window), (8, 4, Some(512)));
    assert_eq!((spec.vocabulary, spec.dtype), (262_208, Dtype::BF16));
    assert!(spec.quantization.default.is_some() && spec.tied_without_head);
}

#[test]
fn an_unknown_architecture_lists_the_known_ones() {
    let message = spec(&small("bert", json!({}))).unwrap_err().to_string();
    let start = "config.json: model_type \"bert\" is not supported; supported are ";
    let listed: Vec<&str> = message.strip_prefix(start).unwrap().split(", ").collect();
    assert!(listed.is_sorted(), "{message}");
    for name in ["llama", "xverse", "kimi_k2", "qwen3_moe"] {
        assert!(listed.contains(&name), "{name}: {message}");
    }
}

#[test]
fn latent_attention_and_routing_refuse_by_field() {
    let sizes = json!({ "kv_lora_rank": 32, "q_lora_rank": 48, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32,
        "v_head_dim": 32, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32 });
    let cases = [
        ("deepseek_v3", json!({ "qk_rope_head_dim": 15 }), "qk_rope_head_dim is 15"),
        ("deepseek_v3", json!({ "kv_lora_rank": 0 }), "kv_lora_rank is 0"),
        ("deepseek_v3", json!({ "num_experts_per_tok": 9 }), "num_experts_per_tok is 9"),
        ("deepseek_v3", json!({ "topk_method": "greedy" }), "topk_method is \"greedy\""),
        ("deepseek_v3", json!({ "scoring_func": "softmax" }), "scoring_func is \"softmax\""),
        ("deepseek_v3", json!({ "n_group": 3 }), "n_group is 3"),
        ("deepseek_v3", json!({ "n_group": 8, "topk_group": 2 }), "n_group is 8"),
        ("deepseek_v3", json!({ "n_group": 4, "topk_group": 5 }), "topk_group is 5"),
        ("deepseek_v2", json!({ "topk_method": "noaux_tc" }), "topk_method is \"noaux_tc\""),
        (
            "deepseek_v2",
            json!({ "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 1 }),
            "topk_group is 1",
        ),
        ("deepseek_v32", json!({ "q_lora_rank": null }), "q_lora_rank is missing"),
        ("deepseek_v32", json!({ "index_head_dim": 8 }), "index_head_dim is 8"),
        ("deepseek_v32", json!({ "index_topk": 0 }), "index_topk is 0"),
        ("glm_moe_dsa", json!({}), "index_head_dim is missing"),
    ];
    for (model_type, changes, part) in cases {
        let mut config = small(model_type, sizes.clone());
        for (field, value) in changes.as_object().unwrap() {
            config = config.with(field, value.clone());
        }
        let message = spec(&config).unwrap_err().to_string();
        assert!(message.starts_with("config.json: ") && message.contains(part), "{part}: {message}");
    }
}

/// As transformers 5 saves a model that it read by the other name.
#[test]
fn experts_are_counted_by_either_name() {
    let of = |count: &str| {
        let mut fields = json!({ "num_experts_per_tok": 3, "moe_intermediate_size": 32, "mlp_only_layers": [],
            "decoder_sparse_step": 1, "norm_topk_prob": true });
        fields[count] = json!(8);
        spec(&small("qwen3_moe", fields)).unwrap().layers[0].feed_forward.clone()
    };
    assert_eq!(of("num_local_experts"), of("num_experts"));
    assert!(matches!(of("num_local_experts"), FeedForward::Experts(experts) if experts.experts == 8));
}

#[test]
fn mixtures_refuse_by_field() {
    let experts = json!({ "num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32,
        "moe_num_experts": 8, "attention_bias": false, "use_bias": false, "norm_topk_prob": true, "num_shared_experts": 1,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "mlp_only_layers": [], "decoder_sparse_step": 1,
        "use_cla": true, "cla_share_factor": 2, "use_qk_norm": true, "use_mixed_mlp_moe": true, "moe_topk": 2, "num_shared_expert": 1,
        "rope_scaling": { "type": "linear", "factor": 2.0, "alpha": 10.0, "long_factor": 1.0, "short_factor": 1.0, "short_mscale": 1.0,
            "long_mscale": 1.0 },
        "d_model": 64, "n_layers": 2, "n_heads": 4, "attn_config": { "kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4 },
        "ffn_config": { "ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2 },
        "attention_multiplier": 0.1, "embedding_multiplier": 12.0, "residual_multiplier": 0.2, "logits_scaling": 6.0 });
    let dbrx = |field: &str, key: &str, value: Value| {
        let mut object = experts[field].clone();
        object[key] = value;
        json!({ field: object })
    };
    let cases = [
        ("olmoe", json!({ "num_experts_per_tok": 9 }), "num_experts_per_tok is 9"),
        ("olmoe", json!({ "num_experts": null }), "num_experts is missing"),
        ("granitemoe", json!({ "logits_scaling": 0 }), "logits_scaling is 0"),
        ("granitemoe", json!({ "num_local_experts": 5000 }), "num_local_experts is 5000"),
        ("phimoe", json!({ "router_jitter_noise": -1.0 }), "router_jitter_noise is -1"),
        ("phimoe", json!({ "rope_scaling": { "long_factor": 1.0 } }), "rope_scaling.short_factor is missing"),
        ("ernie4_5_moe", json!({ "moe_gate_act": "relu" }), "moe_gate_act is \"relu\""),
        ("ernie4_5_moe", json!({ "moe_layer_end_index": -1 }), "moe_layer_end_index is -1"),
        ("ernie4_5_moe", json!({ "moe_layer_start_index": [] }), "moe_layer_start_index is []"),
        ("ernie4_5_moe", json!({ "moe_k": 9 }), "moe_k is 9"),
        ("qwen3_vl_moe", json!({}), "text_config is missing"),
        ("dbrx", dbrx("attn_config", "clip_qkv", json!(null)), "attn_config.clip_qkv is missing"),
        ("dbrx", dbrx("attn_config", "clip_qkv", json!(-1)), "attn_config.clip_qkv is -1"),
        ("dbrx", dbrx("ffn_config", "moe_top_k", json!(5)), "ffn_config.moe_top_k is 5"),
        ("dbrx", json!({ "d_model": null }), "d_model is missing"),
        ("Klear", json!({ "n_shared_experts": 0 }), "n_shared_experts is 0"),
        ("Klear", json!({ "decoder_sparse_step": 0 }), "decoder_sparse_step is 0"),
        ("bailing_moe", json!({ "score_function": "tanh" }), "score_function is \"tanh\""),
        ("bailing_moe", json!({ "n_group": 3 }), "n_group is 3"),
        ("bailing_moe", json!({ "rotary_dim": 7 }), "rotary_dim is 7"),
        ("bailing_moe", json!({ "norm_head": true, "tie_word_embeddings": true }), "norm_head is true"),
        ("hunyuan", json!({ "cla_share_factor": 0 }), "cla_share_factor is 0"),
        ("hunyuan", json!({ "moe_topk": [2] }), "moe_topk[1] is missing"),
        ("hunyuan", json!({ "moe_intermediate_size": [32, 0, 32] }), "moe_intermediate_size[1] is 0"),
        ("hunyuan", json!({ "rope_scaling": { "factor": 2.0 } }), "rope_scaling.alpha is missing"),
    ];
    for (model_type, changes, part) in cases {
        let mut config = small(model_type, experts.clone());
        if model_type != "qwen3_vl_moe" {
            assert!(spec(&config).is_ok(), "{model_type}: {:?}", spec(&config));
        }
        for (field, value) in changes.as_object().unwrap() {
            config = config.with(field, value.clone());
        }
        let message = spec(&config).unwrap_err().to_string();
        assert!(message.starts_with("config.json: ") && message.contains(part), "{part}: {message}");
    }
}

#[test]
fn layers_that_are_projected_by_another_stay_with_it() {
    let cut = |factor: usize| {
        let config = small(
            "hunyuan",
            json!({ "num_hidden_layers": 6, "num_experts": 1, "use_cla": true, "cla_share_factor": factor, "use_qk_norm": true,
                "attention_bias": false, "rope_scaling": { "type": "dynamic", "factor": 1.0, "alpha": 10.0 } }),
        );
        let model = spec(&config).unwrap();
        (1..6).filter(|layer| model.can_split_before(*layer)).collect::<Vec<_>>()
    };
    assert_eq!(cut(1), [1, 2, 3, 4, 5]);
    assert_eq!(cut(2), [2, 4]);
    assert_eq!(cut(4), [4]);
}

#[test]
fn a_null_query_rank_is_not_an_absent_one() {
    let sizes =
        json!({ "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32 });
    let rank = |config: &Config| match &spec(config).unwrap().layers[0].mixer {
        Mixer::Latent(latent) => latent.query_latent,
        other => panic!("{other:?}"),
    };
    let absent = small("deepseek_v3", sizes);
    assert_eq!(rank(&absent), Some(1536));
    assert_eq!(rank(&absent.with("q_lora_rank", Value::Null)), None);
}

#[test]
fn glm4_moe_stretches_its_rotation_though_mlx_lm_does_not() {
    let fields = json!({ "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1,
        "topk_group": 1, "norm_topk_prob": true, "routed_scaling_factor": 1.0, "first_k_dense_replace": 1, "use_qk_norm": true,
        "attention_bias": true, "partial_rotary_factor": 0.5, "rope_scaling": { "type": "yarn", "factor": 4.0 } });
    let spec = spec(&small("glm4_moe", fields)).unwrap();
    let rope = attention(&spec, 1).rope.clone().unwrap();
    assert_eq!(rope.dims, 16);
    assert!(matches!(rope.scaling, RopeScaling::Yarn { factor: 4.0, .. }));
}

#[test]
fn double_layers_count_both_attentions_and_all_choices() {
    let fields = json!({ "attention_method": "MLA", "zero_expert_type": "identity", "num_layers": 2, "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 32, "n_routed_experts": 6, "zero_expert_num": 3, "moe_topk": 8, "kv_lora_rank": 32,
        "q_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32, "routed_scaling_factor": 1.0,
        "mla_scale_q_lora": true, "mla_scale_kv_lora": false, "attention_bias": false });
    let model = spec(&small("longcat_flash", fields.clone())).unwrap();
    let Mixer::Shortcut(shortcut) = &model.layers[1].mixer else { panic!("not a double layer") };
    assert_eq!((shortcut.attention.query_factor, shortcut.attention.latent_factor), (Some(2.0), None));
    assert_eq!((model.expert_count(), shortcut.experts.routing.identities), (6, 3));
    for (change, part) in [
        (json!({ "moe_topk": 10 }), "moe_topk is 10"),
        (json!({ "zero_expert_type": "drop" }), "zero_expert_type is \"drop\""),
        (json!({ "num_layers": null }), "num_layers is missing"),
    ] {
        let mut config = small("longcat_flash", fields.clone());
        for (field, value) in change.as_object().unwrap() {
            config = config.with(field, value.clone());
        }
        let message = spec(&config).unwrap_err().to_string();
        assert!(message.contains(part), "{part}: {message}");
    }
}

/// A small config of every family, as the comparison with mlx-lm has it.
fn every_family() -> impl Iterator<Item = (&'static Architecture, Config)> {
    let cases = concat!(env!("CARGO_MANIFEST_DIR"), "/../parity/cases");
    known().iter().map(move |known| {
        let file = format!("{cases}/{}.json", known.name);
        let text = std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{file}: {error}"));
        let file: Value = serde_json::from_str(&text).unwrap();
        (known, config(file["base"].clone()))
    })
}

#[test]
fn capabilities_are_true() {
    for (known, config) in every_family() {
        let can = known.capabilities;
        let spec = spec(&config).unwrap_or_else(|error| panic!("{}: {error}", known.name));
        let keeps_keys = spec.layers.iter().any(|layer| !layer.mixer.kept_widths().is_empty());
        assert_eq!(can.quantized_kv, keeps_keys, "{}", known.name);
        assert!(can.speculative, "{}", known.name);
        let can_be_cut = (1..spec.layer_count()).any(|layer| spec.can_split_before(layer));
        assert_eq!(can.pipeline, can_be_cut, "{}", known.name);
        assert!(!can.tensor, "{}: it does not exist yet", known.name);
        // The text model's part of a config is a part of its own beside one for images.
        assert_eq!(can.vision_unused, config.get("text_config").is_some(), "{}", known.name);
    }
}

/// What stands under `field` of the first entry, or beside the entries, of a Hadamard pack.
fn pack_with(field: &str, value: Value, of_entry: bool) -> Config {
    let (_, config) = every_family().find(|(known, _)| known.name == "prism_hadamard_qwen35").unwrap();
    let mut fields = Value::Object(config.raw().clone());
    let place = if of_entry { &mut fields["modules"][0] } else { &mut fields };
    place[field] = value;
    self::config(fields)
}

#[test]
fn packs_of_turned_maps_say_what_is_turned() {
    let model = spec(&pack_with("gdn_activation_layout", json!(null), false)).unwrap();
    assert_eq!(model.turned["model.layers.0.mlp.gate_proj"], 512);
    let modules = model.modules(mlxnode_compute::LayerRange::new(0, 1));
    assert!(modules.iter().any(|module| module.path == "model.layers.0.mlp.gate_proj.signs"));
    let plain = spec(&pack_with("block", json!(0), true)).unwrap();
    assert_eq!(plain.turned.len() + 1, model.turned.len());
    assert_eq!(plain.quantization.per_path.len(), model.quantization.per_path.len());
    for (of_entry, field, value, part) in [
        (false, "schema_version", json!(3), "schema_version is 3"),
        (false, "schema_version", json!(1), "tensor_namespace is \"mlx-vlm-qwen3_5\""),
        (false, "gdn_activation_layout", json!("flat"), "gdn_activation_layout is \"flat\""),
        (false, "quantization", json!({ "bits": 4, "group_size": 64 }), "quantization is "),
        (false, "modules", json!([]), "modules is missing"),
        (true, "path", json!("model.norm"), "modules[0].path is \"model.norm\""),
        (true, "path", json!("model.layers.9.mlp.gate_proj"), "modules[0].path"),
        (true, "path", json!("model.layers.0.mlp.up_proj"), "modules[1].path"),
        (true, "path", json!(7), "modules[0].path is 7"),
        (true, "embedding", json!(true), "modules[0].embedding is true"),
        (true, "dtype", json!("bfloat16"), "modules[0].dtype is \"bfloat16\""),
        (true, "block", json!(256), "modules[0].block is 256"),
        (true, "block", json!(1024), "divide the width, which is 512"),
        (true, "block", json!(null), "modules[0].block"),
    ] {
        let message = spec(&pack_with(field, value.clone(), of_entry)).expect_err(field).to_string();
        assert!(message.contains(part), "{field} {value}: {message}");
    }
}

#[test]
fn families_with_fields_of_their_own_refuse_by_field() {
    let gpt2 = json!({ "n_ctx": 64, "n_positions": 64, "n_embd": 64, "n_head": 4, "n_layer": 2, "layer_norm_epsilon": 1e-5 });
    let gptj = json!({ "n_embd": 64, "n_head": 4 });
    let neox = json!({ "layer_norm_eps": 1e-5, "rotary_pct": 0.5, "rotary_emb_base": 10000 });
    let elm = json!({ "model_dim": 64, "num_transformer_layers": 2, "head_dim": 16, "ffn_dim_divisor": 32,
        "num_query_heads": [4, 6], "num_kv_heads": [2, 3], "ffn_multipliers": [0.5, 2.0] });
    let block = json!([{ "attention": { "n_heads_in_group": 2 }, "ffn": { "ffn_mult": 1.5 } }]);
    let nas = json!({ "num_hidden_layers": 1, "block_configs": block });
    let cases = [
        ("gpt2", &gpt2, json!({ "n_positions": null }), "n_positions is missing"),
        ("gpt2", &gpt2, json!({ "n_embd": 66 }), "n_head is 4, but must be a divisor of n_embd, which is 66"),
        ("gpt_bigcode", &gpt2, json!({ "n_inner": 0 }), "n_inner is 0"),
        ("gptj", &gptj, json!({ "rotary_dim": 17 }), "rotary_dim is 17"),
        ("gptj", &gptj, json!({ "rotary_dim": 7 }), "rotary_dim is 7, but must be even"),
        ("gpt_neox", &neox, json!({ "rotary_pct": 1.5 }), "rotary_pct is 1.5"),
        ("gpt_neox", &neox, json!({ "rotary_emb_base": 1 }), "rotary_emb_base is 1"),
        ("qwen", &json!({ "kv_channels": 16 }), json!({ "kv_channels": 32 }), "kv_channels is 32"),
        ("exaone", &json!({ "num_layers": 2, "layer_norm_epsilon": 1e-5 }), json!({}), "head_dim is 32"),
        ("openelm", &elm, json!({ "num_kv_heads": [2] }), "num_kv_heads is a list of 1"),
        ("openelm", &elm, json!({ "num_kv_heads": [2, 4] }), "num_kv_heads is 4"),
        ("openelm", &elm, json!({ "ffn_multipliers": [1, 1e12] }), "ffn_multipliers is 1000000000000.0"),
        ("openelm", &elm, json!({ "num_query_heads": ["x", 1] }), "num_query_heads is \"x\""),
        ("nemotron-nas", &nas, json!({ "block_configs": [] }), "block_configs is a list of 0"),
        (
            "nemotron-nas",
            &nas,
            json!({ "block_configs": [{}] }),
            "block_configs[0].attention.n_heads_in_group is missing",
        ),
        (
            "nemotron-nas",
            &nas,
            json!({ "block_configs": [{ "attention": { "no_op": true }, "ffn": { "ffn_mult": -1 } }] }),
            "block_configs[0].ffn.ffn_mult is -1",
        ),
        (
            "internlm2",
            &json!({}),
            json!({ "rope_scaling": { "type": "yarn", "factor": 2.0 } }),
            "rope_scaling is {",
        ),
        ("iquestloopcoder", &json!({}), json!({ "loop_num": 3 }), "loop_num is 3, but must be 2"),
        ("nanbeige", &json!({}), json!({ "loop_share_kv": true }), "loop_share_kv is true"),
        ("nanbeige", &json!({}), json!({ "num_loops": 65 }), "num_loops is 65"),
        ("spark2_5", &json!({ "sliding_window": 8 }), json!({}), "rope_parameters is missing"),
        (
            "laguna",
            &json!({}),
            json!({ "num_attention_heads_per_layer": [4, 3, 4] }),
            "num_attention_heads_per_layer[1] is 3",
        ),
        ("laguna", &json!({}), json!({ "moe_router_score_func": "x" }), "moe_router_score_func is \"x\""),
        ("muse_glimmer", &json!({}), json!({ "layer_rope_theta": [1] }), "layer_rope_theta is a list of 1"),
        (
            "gear",
            &json!({}),
            json!({ "use_bidirectional_attention": true }),
            "use_bidirectional_attention is true",
        ),
        ("gear", &json!({}), json!({ "layer_types": ["a", "b", "c"] }), "layer_types[0] is \"a\""),
        ("minimax_m3_vl", &json!({}), json!({}), "text_config is missing"),
        ("ministral3", &json!({}), json!({}), "rope_parameters is missing"),
        ("mistral3", &json!({}), json!({}), "text_config is missing"),
        ("plamo", &json!({}), json!({ "n_shared_head": 3 }), "n_shared_head is 3"),
        ("bitnet", &json!({}), json!({}), "head_dim is 32"),
        ("lille-130m", &json!({ "n_embd": 8 }), json!({}), "n_embd is 8"),
        (
            "phixtral",
            &json!({ "model_dim": 64, "num_heads": 4 }),
            json!({ "rotary_dim": 18 }),
            "rotary_dim is 18",
        ),
    ];
    for (model_type, base, changes, part) in cases {
        let mut config = small(model_type, base.clone());
        for (field, value) in changes.as_object().unwrap() {
            config = config.with(field, value.clone());
        }
        let message = spec(&config).unwrap_err().to_string();
        assert!(
            message.starts_with("config.json: ") && message.contains(part),
            "{model_type}: {part}: {message}"
        );
    }
}

#[test]
fn settings_of_packed_weights_follow_their_paths() {
    let packing = json!({ "group_size": 64, "bits": 4, "model.h.1.attention.query_key_value": { "bits": 8 },
        "model.h.0.mlp.dense_h_to_4h": false, "model.embed_out": { "bits": 6 } });
    let neox = json!({ "layer_norm_eps": 1e-5, "rotary_pct": 0.5, "rotary_emb_base": 10000, "quantization": packing });
    let spec = spec(&small("gpt_neox", neox)).unwrap();
    let paths: Vec<&str> = spec.quantization.per_path.keys().map(String::as_str).collect();
    let attention = ["k_proj", "q_proj", "v_proj"].map(|name| format!("model.layers.1.self_attn.{name}"));
    let mut expected = vec!["lm_head", "model.layers.0.mlp.dense_h_to_4h"];
    expected.extend(attention.iter().map(String::as_str));
    assert_eq!(paths, expected);
}

#[test]
fn the_table_of_families_in_the_docs_is_true() {
    let word = |can: bool| if can { "yes" } else { "" };
    let mut table =
        String::from("| `model_type` | also | pipeline | quantized KV | images |\n|---|---|---|---|---|\n");
    for known in known() {
        let also: Vec<String> = known.aliases.iter().map(|alias| format!("`{alias}`")).collect();
        let can = known.capabilities;
        let (pipeline, packed) = (word(can.pipeline), word(can.quantized_kv));
        let images = if can.vision_unused { "not used" } else { "" };
        table += &format!("| `{}` | {} | {pipeline} | {packed} | {images} |\n", known.name, also.join(", "));
    }
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/models.md");
    let page = std::fs::read_to_string(path).unwrap();
    let (_, rest) = page.split_once("<!-- families:").and_then(|(_, rest)| rest.split_once("-->\n")).unwrap();
    let (found, _) = rest.split_once("<!-- end of families -->").unwrap();
    assert!(found == table, "docs/models.md should have this between its marks:\n{table}");
}
