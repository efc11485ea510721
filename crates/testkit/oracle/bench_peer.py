"""The first tokens of an answer, as mlx-lm's command line makes them; what `cargo xtask bench engine` times from outside.

    python bench_peer.py FOLDER PROMPT MAX_TOKENS

Prints {"token_ids": [...]}. It loads and generates as `mlx_lm generate` does, greedy, and imports no more than that needs.
"""

import json
import sys

import released_mlx  # noqa: F401
from mlx_lm.generate import stream_generate
from mlx_lm.utils import load


def main():
    folder, prompt, max_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
    model, tokenizer = load(folder)
    answer = stream_generate(model, tokenizer, prompt, max_tokens=max_tokens)
    print(json.dumps({"token_ids": [response.token for response in answer]}))


main()
