"""Laguna as it is published: every expert by itself, a router without a path of its own, the correction with the experts."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from deepseek_v3 import single_experts


def hugging_face(weights, config):
    stored = {}
    for name, array in single_experts(weights).items():
        name = name.replace(".mlp.gate.proj.", ".mlp.gate.").replace(".mlp.gate.e_score", ".mlp.experts.e_score")
        stored[name] = array
    return stored, config
