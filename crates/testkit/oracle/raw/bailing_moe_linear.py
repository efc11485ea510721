"""Ling's linear models as Hugging Face stores them."""

import re


def hugging_face(weights, config):
    """Experts one by one, the router without a name for its matrix."""
    stored = {}
    for name, array in weights.items():
        if found := re.fullmatch(r"(.*\.mlp)\.switch_mlp\.(\w+)\.weight", name):
            for expert in range(array.shape[0]):
                stored[f"{found[1]}.experts.{expert}.{found[2]}.weight"] = array[expert]
        else:
            stored[name.replace(".mlp.gate.gate_proj.", ".mlp.gate.")] = array
    return stored, config
