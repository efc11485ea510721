"""Gear as Hugging Face stores it: convolutions transposed."""


def hugging_face(weights, config):
    return {name: array.moveaxis(2, 1) if "_conv.weight" in name else array for name, array in weights.items()}, config
