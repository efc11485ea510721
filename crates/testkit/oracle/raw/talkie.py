"""Talkie with the tables of its rotation."""

import mlx.core as mx


def tables(weights, config):
    return {**weights, "model.cos": mx.zeros((4, 8)), "model.sin": mx.zeros((4, 8))}, config
