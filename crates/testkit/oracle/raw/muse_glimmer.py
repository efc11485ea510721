"""Muse Glimmer as Meta publishes it, and as conversions have it."""

import mlx.core as mx


def hugging_face(weights, config):
    """The text model's tensors apart, and parts for images."""
    stored = {f"language_model.{name}": array for name, array in weights.items()}
    parts = ("vision_tower.a", "vision_adapter.b", "vision_projection")
    return stored | {f"{part}.weight": mx.zeros((8, 8)) for part in parts}, config


def flat(weights, config):
    """The text model's fields among the repository's."""
    return weights, config.pop("text_config") | config
