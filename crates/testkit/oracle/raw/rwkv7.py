"""RWKV-7 as Hugging Face stores it."""


def hugging_face(weights, config):
    """Some parameters of heads as one row."""
    rows = (".k_k", ".k_a", ".g_norm.weight", ".g_norm.bias")
    return {name: array.reshape(-1) if name.endswith(rows) else array for name, array in weights.items()}, config
