"""What mlx-lm makes of a training configuration and of rows: arguments, schedules, batches. Prints JSON.

    training_data.py arguments FILE        the arguments of `mlx_lm.lora --config FILE`, as adapter_config.json has them
    training_data.py schedules FILE        values of each schedule of a list of lr_schedule settings, after 0, 1, 2, ... updates
    training_data.py batches FILE          ids and (offset, length) of the batches of a run
    training_data.py dataset FOLDER DATA   rows of the data set DATA as tokens and offsets, with the tokenizer of FOLDER
"""

import contextlib
import json
import sys
import tempfile
import types
from pathlib import Path

import mlx.core as mx
import numpy as np

with contextlib.redirect_stdout(sys.stderr):
    import mlx.optimizers
    from mlx_lm import lora
    from mlx_lm.tuner import datasets, trainer
    from mlx_lm.tuner.utils import build_schedule
    from mlx_lm.utils import load_tokenizer, save_config


def arguments(file):
    # The rules of lora.main, whose last step is to run.
    seen = {}
    lora.run = lambda given: seen.update(vars(given))
    sys.argv = ["lora", "--config", file]
    lora.main()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter_config.json"
        save_config(seen, path)
        return json.loads(path.read_text())


def schedules(file):
    values = []
    for settings in json.loads(Path(file).read_text()):
        schedule = build_schedule(settings)
        optimizer = mlx.optimizers.SGD(learning_rate=schedule)
        values.append([mx.array(schedule(mx.array(step, mx.uint64))).item() for step in range(40)])
        del optimizer
    return values


class Rows:
    """Rows that are tokens already; `fields` is what mlx-lm takes for their length."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {str(field): None for field in range(self.rows[index]["fields"])} | {"row": index}

    def process(self, row):
        row = self.rows[row["row"]]
        return row["tokens"], row["offset"]


def batches(file):
    run = json.loads(Path(file).read_text())
    np.random.seed(run["seed"])
    train, valid = (datasets.CacheDataset(Rows(run[name])) for name in ("train", "valid"))
    shared = {"batch_size": run["batch_size"], "max_seq_length": run["max_seq_length"]}

    def shown(batch):
        ids, lengths = batch
        steps = mx.arange(1, ids.shape[1])
        mask = mx.logical_and(steps >= lengths[:, 0:1], steps <= lengths[:, 1:])
        return {"ids": ids.tolist(), "mask": mask.astype(mx.int32).tolist()}

    iterations = []
    training = trainer.iterate_batches(train, loop=True, **shared)
    for iteration, batch in zip(range(1, run["iters"] + 1), training):
        measured = []
        due = iteration == 1 or iteration % run["steps_per_eval"] == 0 or iteration == run["iters"]
        if len(valid) and due:
            count = run["val_batches"]
            indices = iter(range(count)) if count != -1 else iter(int, 1)
            measured = [shown(batch) for _, batch in zip(indices, trainer.iterate_batches(valid, **shared))]
        iterations.append({"training": shown(batch), "validation": measured})
    return iterations


def dataset(folder, data):
    settings = json.loads(Path(data, "settings.json").read_text())
    tokenizer = load_tokenizer(Path(folder))
    sets = datasets.load_local_dataset(Path(data), tokenizer, types.SimpleNamespace(**settings))
    return [[list(rows.process(rows[i])) for i in range(len(rows))] for rows in sets]


if __name__ == "__main__":
    command, *given = sys.argv[1:]
    with contextlib.redirect_stdout(sys.stderr):
        result = {"arguments": arguments, "schedules": schedules, "batches": batches, "dataset": dataset}[command](*given)
    print(json.dumps(result))
