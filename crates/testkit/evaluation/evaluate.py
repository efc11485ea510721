"""Runs lm-evaluation-harness twice over the same tasks: through a node's /v1/completions, and on mlx-lm itself. Prints both, as JSON.

Usage: evaluate.py URL MODEL FOLDER (the model's weights and tokenizer)
"""

import json
import logging
import os
import sys
import tempfile
from pathlib import Path

url, model, weights = sys.argv[1:]
here = Path(__file__).parent

# The harness writes tables and notes to stdout; ours has the results and nothing else.
stdout = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def evaluate(lm, tasks, **options):
    """What the harness found: by task the means, and the answers by document."""
    results = lm_eval.simple_evaluate(model=lm, tasks=tasks.all_tasks, task_manager=tasks, log_samples=True, **options)
    found = {}
    for task in tasks.all_tasks:
        means = {name: value for name, value in results["results"][task].items() if isinstance(value, float)}
        samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
        # By choice: a log-probability and whether it is the likeliest answer; or the text that was generated.
        answers = [[answer for [answer] in sample["resps"]] for sample in samples]
        found[task] = {"means": means, "answers": answers}
    return found


with tempfile.TemporaryDirectory() as folder:
    os.environ["HF_DATASETS_CACHE"] = folder
    import lm_eval
    import lm_eval.models  # registers them, which it leaves out once another one is there
    from lm_eval.tasks import TaskManager
    from mlx_lm.evaluate import MLXLM

    logging.disable(logging.WARNING)
    for file in here.glob("*.yaml"):
        text = file.read_text().replace("DATA", str(here / "sums.jsonl"))
        Path(folder, file.name).write_text(text)
    tasks = TaskManager(include_path=folder, include_defaults=False)
    remote = {
        "model": model,
        "base_url": f"{url}/v1/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": weights,
        "num_concurrent": 2,
        "max_length": 512,
    }
    ours = evaluate("local-completions", tasks, model_args=remote, batch_size=4)
    theirs = evaluate(MLXLM(weights, max_tokens=512), tasks)
    print(json.dumps({"node": ours, "mlx_lm": theirs}), file=stdout)
