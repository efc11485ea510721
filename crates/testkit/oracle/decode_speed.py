"""How fast mlx-lm prefills and decodes a model folder; the counterpart of crates/engine/examples/decode_speed.rs.

    python decode_speed.py FOLDER PROMPT_TOKENS NEW_TOKENS
"""

import json
import resource
import sys
import time
from pathlib import Path

import mlx.core as mx
import released_mlx  # noqa: F401
from counter import Counter
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model


def cpu_ms():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return (usage.ru_utime + usage.ru_stime) * 1e3


def count(model, prompt):
    """Operations and reads per generated token."""
    counter = Counter()
    counter.install()
    readings = []
    for token, _ in generate_step(prompt, model, max_tokens=6):
        readings.append((counter.operations, counter.reads))
    steps = len(readings) - 2  # the last step launches nothing
    return [(readings[-2][kind] - readings[0][kind]) / steps for kind in (0, 1)]


def main():
    folder, prompt_tokens, new_tokens = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    start = time.perf_counter()
    model, config = load_model(folder)
    load = time.perf_counter() - start
    prompt = mx.array([(i * 7919 + 13) % config["vocab_size"] for i in range(prompt_tokens)], mx.uint32)
    for _ in generate_step(prompt[:8], model, max_tokens=8):
        pass
    digest, first, last = 0, None, None
    begin = (cpu_ms(), time.perf_counter())
    for token, _ in generate_step(prompt, model, max_tokens=new_tokens):
        digest = (digest * 31 + token + 1) % (1 << 32)
        last = (cpu_ms(), time.perf_counter())
        first = first or last
    decoded = new_tokens - 1
    peak = mx.get_peak_memory()
    operations, reads = count(model, prompt[:8])
    print(json.dumps({
        "operations": operations,
        "reads": reads,
        "load_s": load,
        "prompt_tps": prompt_tokens / (first[1] - begin[1]),
        "prompt_cpu_ms": (first[0] - begin[0]) / prompt_tokens,
        "generation_tps": decoded / (last[1] - first[1]),
        "generation_cpu_ms": (last[0] - first[0]) / decoded,
        "peak_mb": peak / 1e6,
        "digest": digest,
    }))


main()
