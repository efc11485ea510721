"""How fast mlx-lm decodes several sequences at once; the counterpart of crates/engine/examples/batch_speed.rs.

    python batch_speed.py FOLDER ROWS PROMPT_TOKENS NEW_TOKENS
"""

import json
import resource
import sys
import time
from pathlib import Path

import mlx.core as mx
import released_mlx  # noqa: F401
from counter import Counter
from mlx_lm.generate import BatchGenerator
from mlx_lm.utils import load_model


def cpu_ms():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return (usage.ru_utime + usage.ru_stime) * 1e3


def main():
    folder, (rows, prompt_tokens, new_tokens) = Path(sys.argv[1]), map(int, sys.argv[2:5])
    model, config = load_model(folder)
    vocabulary = config["vocab_size"]
    prompts = [
        [(i * 7919 + 13 + row) % vocabulary for i in range(prompt_tokens + 7 * row)] for row in range(rows)
    ]

    def run(prompts, max_tokens, on_step=lambda: None):
        generator = BatchGenerator(model, max_tokens=max_tokens, prefill_batch_size=rows, completion_batch_size=rows)
        uids = generator.insert(prompts)
        digests, start = dict.fromkeys(uids, 0), None
        while responses := generator.next_generated():
            for response in responses:
                digests[response.uid] = (digests[response.uid] * 31 + response.token + 1) % (1 << 32)
            start = start or (time.perf_counter(), cpu_ms())
            on_step()
        return [digests[uid] for uid in uids], time.perf_counter() - start[0], cpu_ms() - start[1]

    run([prompt[:8] for prompt in prompts], 4)
    digests, seconds, cpu = run(prompts, new_tokens)
    digest = 0
    for part in digests:
        digest = (digest * 31 + part) % (1 << 32)
    peak = mx.get_peak_memory()
    counter, readings = Counter(), []
    counter.install()
    run([prompt[: len(prompt) - prompt_tokens + 8] for prompt in prompts], 8,
        lambda: readings.append((counter.operations, counter.reads)))
    # From one step in the middle to another.
    operations, reads = [(readings[5][kind] - readings[2][kind]) / 3 for kind in (0, 1)]
    tokens = rows * (new_tokens - 1)
    print(json.dumps({
        "generation_tps": tokens / seconds,
        "generation_cpu_ms": cpu / tokens,
        "operations_per_step": operations,
        "reads_per_step": reads,
        "peak_mb": peak / 1e6,
        "digest": digest,
    }))


main()
