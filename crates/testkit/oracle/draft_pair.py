"""A large model and a small one that always agree, for measuring what guessing ahead gains where guesses are right.

    python draft_pair.py FOLDER TARGET DRAFT LAYERS

FOLDER holds a model of Llama's shape. TARGET becomes the same with nothing added to the hidden vectors after its first LAYERS layers, and
no attention's result anywhere: a token then decides the next one, so that the text soon repeats itself and can be looked up. It computes
as much as before. DRAFT becomes the first LAYERS layers of it.
"""

import json
import shutil
import sys
from pathlib import Path

import mlx.core as mx


def write(folder, config, tensors, like):
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(like / name, folder / name)


def main():
    source, target, draft, layers = *map(Path, sys.argv[1:4]), int(sys.argv[4])
    config = json.loads((source / "config.json").read_text())
    tensors = {}
    for file in sorted(source.glob("*.safetensors")):
        tensors.update(mx.load(str(file)))

    def layer_of(name):
        parts = name.split(".")
        return int(parts[2]) if parts[:2] == ["model", "layers"] else -1

    for name in tensors:
        silent = "o_proj" in name or ("down_proj" in name and layer_of(name) >= layers)
        # Of a packed matrix the scales and biases: every element is then 0.
        packed = name.rpartition(".")[0] + ".scales" in tensors
        if silent and not (packed and name.endswith(".weight")):
            tensors[name] = mx.zeros_like(tensors[name])
    write(target, config, tensors, source)
    first = {name: tensor for name, tensor in tensors.items() if layer_of(name) < layers}
    write(draft, {**config, "num_hidden_layers": layers}, first, source)


main()
