"""Spark 2.5 as some conversions have it."""

import mlx.core as mx


def other_names(weights, config):
    """The embedding under the name that most families have for it, and tables of the rotation."""
    weights = {name.replace("model.embedding.", "model.embed_tokens."): array for name, array in weights.items()}
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = mx.zeros((4,))
    return weights, config
