"""Ling 2.5 as Hugging Face stores it."""

import re

import mlx.core as mx


def hugging_face(weights, config):
    """Experts one by one, the router without a name for its matrix, the heads' matrices as one, a layer for further tokens."""
    stored = {f"model.layers.{config['num_hidden_layers']}.eh_proj.weight": mx.zeros((4, 4))}
    for name, array in weights.items():
        if found := re.fullmatch(r"(.*\.mlp)\.switch_mlp\.(\w+)\.weight", name):
            for expert in range(array.shape[0]):
                stored[f"{found[1]}.experts.{expert}.{found[2]}.weight"] = array[expert]
        elif name.endswith(".embed_q.weight"):
            values = weights[name.replace("embed_q", "unembed_out")]
            joined = mx.concatenate([array.swapaxes(-1, -2), values], axis=1)
            stored[name.replace("embed_q", "kv_b_proj")] = joined.reshape(-1, joined.shape[-1])
        elif not name.endswith(".unembed_out.weight"):
            stored[name.replace(".mlp.gate.gate_proj.", ".mlp.gate.")] = array
    return stored, config
