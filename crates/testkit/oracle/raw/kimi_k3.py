"""Kimi K3 as Hugging Face stores it."""

import re
import sys
from pathlib import Path

import mlx.core as mx

sys.path.insert(0, str(Path(__file__).parent))

import kimi_linear


def hugging_face(weights, config):
    """Kimi Linear's names; projections and convolutions apart; parts for images."""
    own = {}
    for name, array in weights.items():
        name = name.removeprefix("language_model.")
        if found := re.fullmatch(r"(.*)\.qkv_(proj\.weight|conv\.conv\.weight)", name):
            for letter, part in zip("qkv", mx.split(array, 3, axis=0)):
                own[f"{found[1]}.{letter}_{found[2]}"] = part
            continue
        if name.endswith(".A_log"):
            # More numbers than heads, of which the first count.
            array = mx.concatenate([array, array])
        name = re.sub(r"(_res)_(proj|norm)\.weight$", r"\1.\2_weight", name)
        own[name] = array
    stored, config = kimi_linear.hugging_face(own, config)
    stored = {f"language_model.{name}": array for name, array in stored.items()}
    parts = ("vision_tower.a", "mm_projector.b")
    return stored | {f"{part}.weight": mx.zeros((8, 8)) for part in parts}, config
