"""MiniMax M3 as it is published, and as conversions have it."""

import re
import sys
from pathlib import Path

import mlx.core as mx

sys.path.insert(0, str(Path(__file__).parent))

from deepseek_v3 import single_experts


def hugging_face(weights, config):
    """Every expert by itself, as w1, w2 and w3; parts for images."""
    names = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    parts = ("vision_tower.a", "multi_modal_projector.b", "patch_merge_mlp.c")
    return single_experts(weights, names=names) | {f"{part}.weight": mx.zeros((8, 8)) for part in parts}, config


def folded(weights, config):
    """The shared expert as one more of the others, gate and up joined, a dense network where experts should be."""
    stored = {}
    for name, array in weights.items():
        if found := re.fullmatch(r"(.*\.block_sparse_moe)\.switch_mlp\.(\w+)\.weight", name):
            shared = weights[f"{found[1]}.shared_experts.{found[2]}.weight"]
            stored[name] = mx.concatenate([array, shared[None]])
        elif ".block_sparse_moe.shared_experts." in name:
            continue
        else:
            stored[name.replace(".mlp.", ".block_sparse_moe.")] = array
    for name in [name for name in stored if name.endswith(".switch_mlp.gate_proj.weight")]:
        path = name.removesuffix("gate_proj.weight")
        gate, up = stored.pop(name), stored.pop(f"{path}up_proj.weight")
        stored[f"{path}gate_up_proj.weight"] = mx.concatenate([gate, up], axis=1)
    return stored, config
