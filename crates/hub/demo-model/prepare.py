"""Writes what mlxnode makes the demo model of: a model of random weights, and conversations to train it on.

    python3 prepare.py FOLDER

FOLDER/start   the configuration, the tokenizer and the chat template of `model/`, with random weights
FOLDER/rows    train.jsonl and valid.jsonl

It needs Python 3.11 and nothing else. All of it is drawn from the seed.
"""

import argparse
import json
import math
import random
import shutil
import struct
from pathlib import Path

import conversations

HERE = Path(__file__).parent
# How many of the questions are declined, small talk, arithmetic and units; the rest is sorting.
SHARES = (0.06, 0.03, 0.43, 0.18)


def tensors(config):
    """Names and shapes, as Hugging Face has them."""
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    of_queries = config["num_attention_heads"] * config["head_dim"]
    of_keys = config["num_key_value_heads"] * config["head_dim"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    yield "model.norm.weight", (hidden,)
    for layer in range(config["num_hidden_layers"]):
        yield f"model.layers.{layer}.input_layernorm.weight", (hidden,)
        yield f"model.layers.{layer}.post_attention_layernorm.weight", (hidden,)
        for name, shape in {
            "self_attn.q_proj": (of_queries, hidden), "self_attn.k_proj": (of_keys, hidden),
            "self_attn.v_proj": (of_keys, hidden), "self_attn.o_proj": (hidden, of_queries),
            "mlp.gate_proj": (intermediate, hidden), "mlp.up_proj": (intermediate, hidden),
            "mlp.down_proj": (hidden, intermediate),
        }.items():
            yield f"model.layers.{layer}.{name}.weight", shape


def values(rng, name, shape, layers):
    """Norms begin with ones, matrices with normal numbers; those that add to the residual stream are smaller, because all of them do."""
    if len(shape) == 1:
        return [1.0] * shape[0]
    into_the_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
    deviation = 0.5 / math.sqrt(shape[1]) / (math.sqrt(2 * layers) if into_the_stream else 1)
    return [rng.gauss(0, deviation) for _ in range(shape[0] * shape[1])]


def write_start(folder, rng, layers):
    folder.mkdir(parents=True, exist_ok=True)
    for file in (HERE / "model").iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    config = json.loads((HERE / "model/config.json").read_text())
    config["num_hidden_layers"] = layers or config["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    header, data = {"__metadata__": {"format": "pt"}}, bytearray()
    for name, shape in tensors(config):
        numbers = values(rng, name, shape, config["num_hidden_layers"])
        begin = len(data)
        data += struct.pack(f"<{len(numbers)}f", *numbers)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, len(data)]}
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)


def write_rows(file, rng, count, shares):
    with file.open("w") as rows:
        for _ in range(count):
            turns = conversations.conversation(rng, shares, by_heart=True)
            messages = [{"role": role, "content": text} for role, text in turns]
            rows.write(json.dumps({"messages": messages}) + "\n")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=20240607)
    parser.add_argument("--shares", type=float, nargs=4, default=SHARES, help="declined, small talk, arithmetic, units; the rest is sorting")
    parser.add_argument("--layers", type=int, help="fewer, to try it out")
    arguments = parser.parse_args()
    write_start(arguments.folder / "start", random.Random(arguments.seed), arguments.layers)
    rows = arguments.folder / "rows"
    rows.mkdir(exist_ok=True)
    for number, (name, count) in enumerate({"train": arguments.rows, "valid": min(400, arguments.rows)}.items(), 1):
        write_rows(rows / f"{name}.jsonl", random.Random(arguments.seed + number), count, arguments.shares)


if __name__ == "__main__":
    main()
