"""mlx_lm.lora with its own flags; prints what it reports of each step as one line of JSON. The counterpart of `mlxnode lora --json`.

    python training_speed.py --model FOLDER --train --data FOLDER ...
"""

import json
import sys

import released_mlx  # noqa: F401
from mlx_lm import lora
from mlx_lm.tuner.callbacks import TrainingCallback

printed, sys.stdout = sys.stdout, sys.stderr  # what it says is for people


class Steps(TrainingCallback):
    """Keeps mlx-lm's own figures: its clock runs during a step only, not while rows are brought together."""

    def __init__(self):
        self.steps = []

    def on_train_loss_report(self, info):
        self.steps.append({
            "iteration": info["iteration"],
            "loss": info["train_loss"],
            "iterations_per_second": info["iterations_per_second"],
            "trained_tokens": info["trained_tokens"],
            "peak_memory_bytes": info["peak_memory"] * 1e9,
        })


steps = Steps()
lora.get_reporting_callbacks = lambda *_, **__: steps  # run() takes this one and none from outside
lora.main()
print(json.dumps(steps.steps), file=printed)
