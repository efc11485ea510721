"""Hadamard packs of Qwen3.5."""


def text_pack(weights, config):
    """The first schema: names without the wrapper of a multimodal repository."""
    return {name.removeprefix("language_model."): value for name, value in weights.items()}, config
