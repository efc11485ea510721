"""What mlx-lm's trainer computes, for the tests of training.

Usage: training.py REQUEST, a JSON file {"cases": [CASE]}; prints {"cases": [ANSWER]}. A case has a "kind":

- "gradients": {"model", "make" (a config, to make the model first) or null, "quantize" and "quantized" (a folder for the packed model) or null, "type" (lora, dora, full), "layers", "parameters", "seed", "batch"
  (rows of ids), "lengths" (pairs), "shake", "checkpoint", "file"}. Writes the first values ("p.NAME") and the gradients ("g.NAME") into "file" and answers {"loss", "tokens"}.
- "preference": {"model", "layers", "parameters", "seed", "loss" (dpo, orpo), "beta", "batch" (chosen rows, then rejected ones), "mask", "file"}: arrays as above; answers {"loss"}, a sum over pairs.
- "optimizer": {"name", "arguments", "rate", "steps", "shapes", "seed", "file"}. Writes values and gradients of each step ("p.STEP.I", "g.STEP.I").
- "run": {"model", "make", "quantize", "quantized", "arguments", "rows", "valid", "adapter"}: mlx_lm.lora with these arguments; answers {"train": [...], "valid": [...], "learning_rates": [...]}.
- "generate": {"model", "adapter", "prompt", "tokens"}: greedy tokens with the adapter.
"""

import json
import sys
import types
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path
import released_mlx  # noqa: F401
from mlx_lm import lora
from mlx_lm.generate import generate_step
from mlx_lm.tuner import trainer
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import _get_classes, load_model, quantize_model, save_config, save_model


def loaded(case):
    folder = Path(case["model"])
    if case.get("make"):
        # As mlx-lm calls its tensors, which is not how we do.
        mx.random.seed(1)
        model_class, args_class = _get_classes(case["make"])
        folder.mkdir(parents=True)
        save_model(folder, model_class(args_class.from_dict(case["make"])))
        save_config(dict(case["make"]), folder / "config.json")
    if case.get("quantize"):
        model, config = load_model(folder, strict=True)
        model, config = quantize_model(model, config, **case["quantize"])
        folder = Path(case["quantized"])
        save_model(folder, model)
        save_config(config, folder / "config.json")
    model, _ = load_model(folder, strict=True)
    return model


def gradients(case):
    model = loaded(case)
    mx.random.seed(case["seed"])
    model.freeze()
    if case["type"] == "full":
        for layer in model.layers[-max(case["layers"], 0) :]:
            layer.unfreeze()
    else:
        linear_to_lora_layers(model, case["layers"], case["parameters"], use_dora=case["type"] == "dora")
    first = dict(tree_flatten(model.trainable_parameters()))
    if case.get("shake"):
        # As in the midst of a training: no matrix is zero.
        def shaken(path, value):
            if path.endswith("lora_b"):
                return mx.random.normal(value.shape) * 0.05
            if path.endswith(".m"):
                return value * (1 + 0.3 * mx.random.normal(value.shape))
            return value

        model.update(tree_map_with_path(shaken, model.trainable_parameters()))
    if case.get("checkpoint"):
        trainer.grad_checkpoint(model.layers[0])
    model.train()
    parameters = dict(tree_flatten(model.trainable_parameters()))
    value_and_grad = nn.value_and_grad(model, trainer.default_loss)
    (loss, tokens), gradient = value_and_grad(model, mx.array(case["batch"]), mx.array(case["lengths"]))
    arrays = {f"f.{name}": value for name, value in first.items()}
    arrays |= {f"p.{name}": value for name, value in parameters.items()}
    arrays |= {f"g.{name}": value for name, value in tree_flatten(gradient)}
    mx.save_safetensors(case["file"], arrays)
    return {"loss": loss.item(), "tokens": tokens.item()}


def preference(case):
    """The formulas of the papers: mlx-lm has no such training."""
    model = loaded(case)
    mx.random.seed(case["seed"])
    model.freeze()
    batch, mask = mx.array(case["batch"]), mx.array(case["mask"])
    pairs = batch.shape[0] // 2

    def of_rows(model):
        logprobs = nn.log_softmax(model(batch[:, :-1]).astype(mx.float32))
        chosen = mx.take_along_axis(logprobs, batch[:, 1:, None], axis=-1).squeeze(-1)
        return (chosen * mask).sum(axis=1)

    reference = of_rows(model)
    linear_to_lora_layers(model, case["layers"], case["parameters"])

    def shaken(path, value):
        return mx.random.normal(value.shape) * 0.05 if path.endswith("lora_b") else value

    model.update(tree_map_with_path(shaken, model.trainable_parameters()))
    parameters = dict(tree_flatten(model.trainable_parameters()))

    def loss(model):
        sums = of_rows(model)
        if case["loss"] == "dpo":
            gain = sums - reference
            return -nn.log_sigmoid(case["beta"] * (gain[:pairs] - gain[pairs:])).sum()
        means = sums / mask.sum(axis=1)
        odds = means - mx.log(1 - mx.exp(means))
        ratio = nn.log_sigmoid(odds[:pairs] - odds[pairs:])
        return (-means[:pairs] - case["beta"] * ratio).sum()

    value, gradient = nn.value_and_grad(model, loss)(model)
    arrays = {f"p.{name}": value for name, value in parameters.items()}
    arrays |= {f"g.{name}": value for name, value in tree_flatten(gradient)}
    mx.save_safetensors(case["file"], arrays)
    return {"loss": value.item()}


def optimizer(case):
    mx.random.seed(case["seed"])
    opt = getattr(optim, case["name"])(learning_rate=case["rate"], **case["arguments"])
    parameters = {str(i): mx.random.normal(shape) for i, shape in enumerate(case["shapes"])}
    # Copies: some optimizers write into what they are given.
    arrays = {f"p.0.{name}": value + 0 for name, value in parameters.items()}
    for step in range(case["steps"]):
        gradient = {name: mx.random.normal(value.shape) for name, value in parameters.items()}
        arrays |= {f"g.{step}.{name}": value + 0 for name, value in gradient.items()}
        mx.eval(arrays)
        parameters = opt.apply_gradients(gradient, parameters)
        mx.eval(parameters, opt.state)
        arrays |= {f"p.{step + 1}.{name}": value + 0 for name, value in parameters.items()}
    mx.save_safetensors(case["file"], arrays)
    return {}


class Reports(TrainingCallback):
    def __init__(self):
        self.answer = {"train": [], "valid": [], "learning_rates": []}

    def on_train_loss_report(self, report):
        self.answer["train"].append(report["train_loss"])
        self.answer["learning_rates"].append(report["learning_rate"])

    def on_val_loss_report(self, report):
        self.answer["valid"].append(report["val_loss"])


class Rows:
    """Rows of ids as mlx-lm's data sets give them."""

    def __init__(self, rows):
        self.rows = rows

    def __getitem__(self, index):
        return self.rows[index]

    def __len__(self):
        return len(self.rows)

    def process(self, row):
        return (row["ids"], row.get("offset", 0))


def run(case):
    arguments = dict(lora.CONFIG_DEFAULTS) | case["arguments"]
    arguments |= {"model": case["model"], "adapter_path": case["adapter"], "train": True}
    model = loaded(case)
    np.random.seed(arguments["seed"])
    reports = Reports()
    arguments = types.SimpleNamespace(**arguments)
    lora.train_model(arguments, model, Rows(case["rows"]), Rows(case["valid"]), reports)
    return reports.answer


def generate(case):
    model, _ = load_model(Path(case["model"]), strict=True)
    model = load_adapters(model, case["adapter"])
    model.eval()
    steps = generate_step(mx.array(case["prompt"]), model, max_tokens=case["tokens"])
    return {"tokens": [int(token) for token, _ in steps]}


def main():
    answer, sys.stdout = sys.stdout, sys.stderr  # mlx-lm prints what it does
    kinds = {"gradients": gradients, "preference": preference, "optimizer": optimizer, "run": run, "generate": generate}
    request = json.loads(Path(sys.argv[1]).read_text())
    json.dump({"cases": [kinds[case["kind"]](case) for case in request["cases"]]}, answer)


main()
