"""RecurrentGemma as Hugging Face stores it."""


def hugging_face(weights, config):
    """Convolutions transposed."""
    return {name: array.moveaxis(2, 1) if "conv_1d.weight" in name else array for name, array in weights.items()}, config
