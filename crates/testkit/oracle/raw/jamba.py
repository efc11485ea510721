"""Jamba as Hugging Face stores it."""

import re


def hugging_face(weights, config):
    """Convolutions transposed, experts one by one."""
    stored = {}
    for name, array in weights.items():
        if found := re.fullmatch(r"(.*)\.switch_mlp\.(\w+)\.weight", name):
            for expert in range(array.shape[0]):
                stored[f"{found[1]}.experts.{expert}.{found[2]}.weight"] = array[expert]
        else:
            stored[name] = array.moveaxis(2, 1) if "conv1d.weight" in name else array
    return stored, config
