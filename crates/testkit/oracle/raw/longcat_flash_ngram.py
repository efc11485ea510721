"""LongCat Flash with groups of tokens as Hugging Face stores it: every expert by itself, the heads' matrices as one."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from longcat_flash import hugging_face as longcat_flash


def hugging_face(weights, config):
    weights, config = longcat_flash(weights, config)
    weights["model.embed_tokens.weight"] = weights.pop("model.ngram_embeddings.word_embeddings.weight")
    return weights, config
