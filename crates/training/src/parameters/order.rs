//! The order in which mlx-lm comes to a layer's modules, in which random numbers are drawn for them.
//!
//! It walks over modules from the last attribute to the first, and which attribute comes when is up to each family's class. This
//! list has those of the common ones, in the order in which they are made; what it does not have comes last.

const MADE: [&str; 31] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.qkv_proj",
    "self_attn.q_a_proj",
    "self_attn.q_b_proj",
    "self_attn.kv_a_proj_with_mqa",
    "self_attn.kv_b_proj",
    "self_attn.o_proj",
    "linear_attn.in_proj_qkv",
    "linear_attn.in_proj_z",
    "linear_attn.in_proj_b",
    "linear_attn.in_proj_a",
    "linear_attn.out_proj",
    "block_sparse_moe.gate",
    "block_sparse_moe.switch_mlp.gate_proj",
    "block_sparse_moe.switch_mlp.up_proj",
    "block_sparse_moe.switch_mlp.down_proj",
    "mlp.gate",
    "mlp.switch_mlp.gate_proj",
    "mlp.switch_mlp.up_proj",
    "mlp.switch_mlp.down_proj",
    "mlp.shared_experts.gate_proj",
    "mlp.shared_experts.down_proj",
    "mlp.shared_experts.up_proj",
    "mlp.gate_up_proj",
    "mlp.c_fc",
    "mlp.gate_proj",
    "mlp.down_proj",
    "mlp.up_proj",
    "mlp.c_proj",
];

/// Where the module `name` of a layer comes; `index` is its place in our own order.
pub(super) fn rank(name: &str, index: usize) -> usize {
    match MADE.iter().rposition(|made| *made == name) {
        Some(made) => MADE.len() - made,
        None => MADE.len() + 1 + index,
    }
}

/// Where a module comes that is named by its whole path: the head, the layers from the last one on, the embedding.
pub(super) fn rank_by_path(path: &str, index: usize) -> usize {
    match path {
        "lm_head" => 0,
        "model.embed_tokens" => usize::MAX,
        _ => usize::MAX - 1 - index,
    }
}
