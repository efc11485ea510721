"""MiMo-V2-Flash as it is published: every expert by itself, and layers for further tokens."""

import sys
from pathlib import Path

import mlx.core as mx

sys.path.insert(0, str(Path(__file__).parent))

from deepseek_v3 import single_experts


def hugging_face(weights, config):
    stored = single_experts(weights)
    stored["model.mtp.layers.0.self_attn.q_proj.weight"] = mx.zeros((8, 8))
    return stored, config
