"""Makes models and adapters for them with mlx-lm, and fuses each pair with its `fuse` command.

Usage: fuse.py REQUEST, a JSON file {"cases": [{"config", "tokenizer", "quantize", "dtype", "model", "kind", "parameters", "layers",
"adapter", "fused", "dequantize"}]}: "config" is a model's config, "model", "adapter" and "fused" are folders that are written. Prints {}.
"""

import contextlib
import json
import shutil
import sys
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

with contextlib.redirect_stdout(sys.stderr):
    from mlx_lm import fuse
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import _get_classes, load_model, quantize_model, save_config, save_model


def make_model(case):
    folder = Path(case["model"])
    folder.mkdir(parents=True)
    config = dict(case["config"])
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))
    dtype = getattr(mx, case["dtype"])
    model.update(tree_map(lambda value: value.astype(dtype), model.parameters()))
    if case["quantize"]:
        model, config = quantize_model(model, config, **case["quantize"])
    save_model(folder, model)
    save_config(config, folder / "config.json")
    for file in Path(case["tokenizer"]).iterdir():
        if "token" in file.name:
            shutil.copy(file, folder)


def make_adapter(case):
    model, _ = load_model(Path(case["model"]))
    model.freeze()
    if case["kind"] == "full":
        for layer in model.layers[-case["layers"] :]:
            layer.unfreeze()
    else:
        linear_to_lora_layers(model, case["layers"], case["parameters"], use_dora=case["kind"] == "dora")

    def shaken(path, value):
        # As trained ones are: no matrix is zero, and lengths are not those of the rows.
        if path.endswith("lora_b"):
            return mx.random.normal(value.shape) * 0.05
        if path.endswith(".m") or case["kind"] == "full":
            return (value * (1 + 0.3 * mx.random.normal(value.shape))).astype(value.dtype)
        return value

    folder = Path(case["adapter"])
    folder.mkdir(parents=True)
    weights = dict(tree_flatten(tree_map_with_path(shaken, model.trainable_parameters())))
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {
        "fine_tune_type": case["kind"],
        "num_layers": case["layers"],
        "lora_parameters": None if case["kind"] == "full" else case["parameters"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        for number, case in enumerate(json.loads(Path(sys.argv[1]).read_text())["cases"]):
            mx.random.seed(number)
            make_model(case)
            make_adapter(case)
            flags = ["--model", case["model"], "--adapter-path", case["adapter"], "--save-path", case["fused"]]
            request, sys.argv = sys.argv, ["fuse", *flags, *(["--dequantize"] if case["dequantize"] else [])]
            fuse.main()
            sys.argv = request
    print("{}")
