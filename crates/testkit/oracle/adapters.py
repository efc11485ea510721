"""Makes adapters for models with mlx-lm, writes them as its trainer does, and says what the models do with them.

Usage: adapters.py REQUEST, a JSON file {"cases": [{"model", "quantize", "quantized", "adapter", "kind", "parameters", "layers", "seed", "prompts", "tokens"}]}.
Answers {"cases": [{"runs": [{"tokens", "logprobs"}]}]}: greedy tokens and the log-probabilities after the prompt.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model, quantize_model, save_config, save_model


def adapted(case):
    folder = Path(case["model"])
    if case.get("quantize"):
        model, config = load_model(folder, strict=True)
        model, config = quantize_model(model, config, **case["quantize"])
        folder = Path(case["quantized"])
        save_model(folder, model)
        save_config(config, folder / "config.json")
    model, _ = load_model(folder, strict=True)
    model.freeze()
    linear_to_lora_layers(model, case["layers"], case["parameters"], use_dora=case["kind"] == "dora")
    mx.random.seed(case["seed"])

    def shaken(path, value):
        # As trained ones are: no matrix is zero, and lengths are not those of the rows.
        if path.endswith("lora_b"):
            return mx.random.normal(value.shape) * 0.05
        if path.endswith(".m"):
            return value * (1 + 0.3 * mx.random.normal(value.shape))
        return value

    model.update(tree_map_with_path(shaken, model.trainable_parameters()))
    folder = Path(case["adapter"])
    folder.mkdir(parents=True)
    weights = dict(tree_flatten(model.trainable_parameters()))
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {
        "fine_tune_type": case["kind"],
        "num_layers": case["layers"],
        "lora_parameters": case["parameters"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return model


def run(model, prompt, tokens):
    logits = model(mx.array([prompt]), cache=make_prompt_cache(model))[0, -1].astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits)
    steps = generate_step(mx.array(prompt), model, max_tokens=tokens)
    return {"tokens": [int(token) for token, _ in steps], "logprobs": logprobs.tolist()}


def main():
    answer, sys.stdout = sys.stdout, sys.stderr  # mlx-lm prints what it does
    request = json.loads(Path(sys.argv[1]).read_text())
    answers = []
    for case in request["cases"]:
        model = adapted(case)
        answers.append({"runs": [run(model, prompt, case["tokens"]) for prompt in case["prompts"]]})
    json.dump({"cases": answers}, answer)


main()
