"""Muse Glimmer as Meta publishes it: the text model apart, in the config and among the tensors, and parts for images."""

import mlx.core as mx


def hugging_face(weights, config):
    own = {"model_type", "quantization"}
    config = {key: value for key, value in config.items() if key in own} | {
        "text_config": {key: value for key, value in config.items() if key not in own}
    }
    stored = {f"language_model.{name}": array for name, array in weights.items()}
    parts = ("vision_tower.a", "vision_adapter.b", "vision_projection")
    return stored | {f"{part}.weight": mx.zeros((8, 8)) for part in parts}, config
