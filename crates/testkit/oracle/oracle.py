"""What mlx-lm computes, for tests that compare against it.

    python oracle.py REQUEST.json     a list of models at once
    python oracle.py -                one model per line of standard input, one answer per line of standard output

Each model is made from its config with random weights of a stated seed, written as mlx-lm writes models, loaded again by mlx-lm,
and run on its prompts. One process does many: starting Python costs more than a small model.

    {"models": [{
        "folder": where to write the model,
        "config": config.json without "quantization",
        "seed": 1, "dtype": "float32",
        "quantize": null or {"group_size": 64, "bits": 4, "mode": "affine",
                             "per_path": {"lm_head": false or {"group_size": 32, "bits": 8}}},
        "existing": false,     take the folder as it is instead of making it
        "without": [],         modules of the model to leave out, such as "lm_head" or "model.vision_tower"
        "raw": null,           a function of raw/MODEL_TYPE.py that puts the saved weights into another layout (see raw/README.md)
        "logits": [{"prompt": [ids], "pieces": null or [7, 7, 3]}],
        "runs": [{"prompt": [ids], "max_tokens": 128, "seed": null or 7, "logits": false,
                  "sampler": {arguments of make_sampler}, "processors": {arguments of make_logits_processors},
                  "prefill_step": 2048,
                  "cache": {"max_kv_size", "kv_bits", "kv_group_size", "quantized_kv_start" as generate_step takes them},
                  "load_cache": a prompt cache file to start from, "save_cache": where to write the cache afterwards,
                  "save_old_cache": the same as mlx-lm up to 0.32.0 wrote it}]}]}

Prints {"models": [{"runs": [{"tokens": [...], "logprobs": [...]}]}]}; line by line it is what stands for one model, or {"error": text}.
`logprobs` are those of the chosen tokens. For entry N of "logits" the logits of every prompt position go to FOLDER/logits-N.bin, single
precision, row-major: from one call of the model, or from calls with as many tokens as `pieces` says. "logits" in a run is short for such an
entry of the run's prompt and number.
"""

import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy
import released_mlx  # noqa: F401
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.generate import generate_step
from mlx_lm.models.bitlinear_layers import BitLinear
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.utils import _get_classes, load_model, save_config, save_model


# BitNet's linear maps exist as a Metal kernel only. Elsewhere the same sums are made of arrays.
def ternary_product(self, x, packed):
    planes = [((packed >> shift) & 3).astype(mx.float32) - 1 for shift in (0, 2, 4, 6)]
    scale = self.weight_scale.astype(mx.float32)
    scale = 1 / scale if self.invert_weight_scales else scale
    return (x.astype(mx.float32) @ mx.concatenate(planes).T * scale).astype(self.weight_scale.dtype)


if not mx.metal.is_available():
    BitLinear.execute_matmul_kernel = ternary_product

# The only pair of group size and bits that each packing other than affine has.
PACKINGS = {"mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}


def normal(array, deviation, mean=0.0):
    return mean + deviation * mx.random.normal(array.shape)


def uniform(array, low, high):
    return mx.random.uniform(low, high, array.shape)


# Parameters whose numbers mean something, by the last part of their name.
BY_NAME = {
    # State spaces and delta nets: decays between almost none and e^-8 per unit of time, times between 0.1 and 2.
    "A_log": lambda array: mx.log(uniform(array, 1.0, 8.0)),
    "dt_bias": lambda array: uniform(array, -2.0, 1.5),
    "D": lambda array: normal(array, 0.2, 1.0),
    # Logits of an attention's sinks.
    "sinks": lambda array: normal(array, 1.0),
    "attention_sink_bias": lambda array: normal(array, 1.0),
    # Decides which experts work, not how much; the scores it is added to are between 0 and 1.
    "e_score_correction_bias": lambda array: normal(array, 0.1),
    "expert_bias": lambda array: normal(array, 0.1),
    # RWKV's mixes of a token with the one before it.
    **{f"x_{letter}": lambda array: uniform(array, 0.1, 0.9) for letter in "rwkvag"},
    "k_k": lambda array: normal(array, 0.2, 0.8),
    "k_a": lambda array: normal(array, 0.2, 1.0),
    "r_k": lambda array: normal(array, 0.2),
    # Steps to which keys and values of about one are rounded.
    "quant_key_scale": lambda array: uniform(array, 0.01, 0.05),
    "quant_value_scale": lambda array: uniform(array, 0.01, 0.05),
    # The factor on BitNet's weights.
    "weight_scale": lambda array: uniform(array, 0.1, 0.3),
    # Of maps that are packed from the start, 2 bits in groups of 128: weights around zero.
    "scales": lambda array: uniform(array, 0.8, 1.2) * 1.3 / (128 * array.shape[-1]) ** 0.5,
    "biases": lambda array: uniform(array, -1.8, -1.2) * 1.3 / (128 * array.shape[-1]) ** 0.5,
    # The signs of a turn.
    "signs": lambda array: 1.0 - 2.0 * mx.random.bernoulli(0.5, array.shape),
    # Logits of a recurrent gate's decay.
    "recurrent_param": lambda array: normal(array, 1.0),
}


def random_weight(name, array, embeddings):
    """Weights that make a small model say many different things, and keep its numbers finite."""
    if array.dtype == mx.uint8:  # BitNet: four times -1, 0 or 1, counted from 0
        crumbs = mx.random.randint(0, 3, (4, *array.shape)).astype(mx.uint8)
        return crumbs[0] + 4 * crumbs[1] + 16 * crumbs[2] + 64 * crumbs[3]
    if array.dtype == mx.uint32:  # packed from the start
        halves = mx.random.randint(0, 1 << 16, (2, *array.shape)).astype(mx.uint32)
        return halves[0] * (1 << 16) + halves[1]
    if not mx.issubdtype(array.dtype, mx.floating):
        return array
    module, _, leaf = name.rpartition(".")
    if leaf in BY_NAME:
        return BY_NAME[leaf](array)
    if leaf.endswith("freqs"):
        return array
    if leaf == "bias" or leaf.endswith("_bias"):
        return normal(array, 0.5)
    # Norms, gains and factors: whatever has one dimension that counts.
    if "norm" in module.rpartition(".")[2] or "norm" in leaf or sum(size > 1 for size in array.shape) <= 1:
        return normal(array, 0.2, 1.0)
    if module in embeddings:
        # Small, so that with tied embeddings the layers and not the last token decide what comes next.
        return normal(array, 0.2)
    # Convolutions are [channels, taps, inputs], experts [experts, out, in].
    inputs = array.shape[-1] * (array.shape[-2] if "conv" in module else 1)
    return normal(array, 1.5 / inputs**0.5)


def remove_module(model, path):
    parts = path.split(".")
    for part in parts[:-1]:
        model = model[int(part)] if part.isdigit() else model[part]
    model.pop(parts[-1])


def make_model(request, folder):
    config = dict(request["config"])
    mx.random.seed(request["seed"])
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    for module in request.get("without", []):
        remove_module(model, module)
    dtype = getattr(mx, request["dtype"])
    # What mlx-lm's own converter leaves in single precision, a converted model has in single precision.
    is_cast = getattr(model, "cast_predicate", None) or (lambda name: True)
    embeddings = {path for path, module in model.named_modules() if isinstance(module, nn.Embedding)}
    weights = []
    for name, array in tree_flatten(model.parameters()):
        weight = random_weight(name, array, embeddings)
        if mx.issubdtype(weight.dtype, mx.floating):
            weight = weight.astype(dtype if is_cast(name) and not name.endswith(".signs") else mx.float32)
        weights.append((name, weight))
    model.update(tree_unflatten(weights))
    mx.eval(model.parameters())
    if quantize := request.get("quantize"):
        config["quantization"] = pack(model, quantize)
    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder, model, donate_model=False)
    save_config(config, folder / "config.json")
    if raw := request.get("raw"):
        rewrite(folder, config["model_type"], raw)


def packing(entry):
    """Settings with the group size and bits that follow from the mode."""
    mode = entry.get("mode", "affine")
    group_size, bits = PACKINGS.get(mode, (64, 4))
    return {"group_size": group_size, "bits": bits, **entry, "mode": mode}


def pack(model, quantize):
    """Quantizes the model; returns the `quantization` of its config."""
    per_path = {
        path: packing(entry) if isinstance(entry, dict) else entry for path, entry in quantize.get("per_path", {}).items()
    }
    own = packing({key: value for key, value in quantize.items() if key != "per_path"})
    # mlx-lm's converter asks the model what to leave alone, or to pack otherwise, and skips what its groups do not divide.
    ask = getattr(model, "quant_predicate", None) or (lambda path, module: True)
    found = dict(per_path)

    def predicate(path, module):
        if path in per_path:
            return per_path[path]
        if not hasattr(module, "to_quantized"):
            return False
        if module.weight.shape[-1] % own["group_size"]:
            return False
        entry = ask(path, module)
        if isinstance(entry, dict):
            entry = packing(entry)
            if module.weight.shape[-1] % entry["group_size"]:
                return False
            found[path] = entry
        return entry

    nn.quantize(model, **own, class_predicate=predicate)
    return {**own, **found}


def rewrite(folder, model_type, layout):
    """Puts a saved model into another layout, by the function `layout` of raw/MODEL_TYPE.py."""
    path = Path(__file__).parent / "raw" / f"{model_type}.py"
    spec = importlib.util.spec_from_file_location(f"raw_{model_type.replace('-', '_')}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    weights = {}
    for file in sorted(folder.glob("model*.safetensors")):
        weights.update(mx.load(str(file)))
    mx.eval(weights)
    config = json.loads((folder / "config.json").read_text())
    weights, config = getattr(module, layout)(weights, config)
    for file in [*folder.glob("model*.safetensors"), folder / "model.safetensors.index.json"]:
        file.unlink(missing_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=4))


def write_logits(model, request, folder, number):
    prompt = mx.array(request["prompt"], mx.uint32)[None]
    pieces = request.get("pieces") or [prompt.shape[1]]
    assert sum(pieces) == prompt.shape[1]
    # With a cache even in one call: without one, mlx-lm's layers that share keys and values compute their own.
    cache = make_prompt_cache(model)
    parts, start = [], 0
    for length in pieces:
        parts.append(model(prompt[:, start : start + length], cache=cache)[0])
        mx.eval(parts[-1], [entry.state for entry in cache])
        start += length
    logits = mx.concatenate(parts, axis=0)
    numpy.array(logits.astype(mx.float32)).tofile(folder / f"logits-{number}.bin")


def run(model, request, folder):
    prompt = mx.array(request["prompt"], mx.uint32)
    if request.get("seed") is not None:
        mx.random.seed(request["seed"])
    processors = dict(request.get("processors", {}))
    if "logit_bias" in processors:
        processors["logit_bias"] = {int(token): bias for token, bias in processors["logit_bias"].items()}
    options = request.get("cache", {})
    if request.get("load_cache"):
        prompt_cache = load_prompt_cache(request["load_cache"])
    else:
        prompt_cache = make_prompt_cache(model, options.get("max_kv_size"))
    tokens, logprobs = [], []
    steps = generate_step(
        prompt,
        model,
        max_tokens=request["max_tokens"],
        sampler=make_sampler(**request.get("sampler", {})),
        logits_processors=make_logits_processors(**processors),
        prefill_step_size=request.get("prefill_step", 2048),
        prompt_cache=prompt_cache,
        **options,
    )
    for token, logprob in steps:
        tokens.append(token)
        logprobs.append(logprob[token].astype(mx.float32).item())
    if request.get("save_cache"):
        save_prompt_cache(request["save_cache"], prompt_cache, {"model": str(folder), "tokenizer_config": "{}"})
    if request.get("save_old_cache"):
        save_old_cache(request["save_old_cache"], prompt_cache, {"model": str(folder), "tokenizer_config": "{}"})
    return {"tokens": tokens, "logprobs": logprobs}


def save_old_cache(path, caches, notes):
    """The layout of mlx-lm up to 0.32.0: arrays without room, numbers in the notes."""
    states, numbers = [], []
    for cache in caches:
        kind = type(cache).__name__
        if kind == "ArraysCache":
            states.append(cache.cache)
            numbers.append("")
            continue
        size = cache.offset - getattr(cache, "start_position", 0)
        states.append(tree_map(lambda array: array[..., :size, :], (cache.keys, cache.values)))
        numbers.append({
            "RotatingKVCache": lambda: tuple(map(str, (cache.keep, cache.max_size, cache.offset, cache._idx))),
            "QuantizedKVCache": lambda: tuple(map(str, (cache.offset, cache.group_size, cache.bits))),
            "ChunkedKVCache": lambda: tuple(map(str, (cache.chunk_size, cache.start_position))),
        }.get(kind, lambda: "")())
    classes = [type(cache).__name__ for cache in caches]
    mx.save_safetensors(path, dict(tree_flatten(states)), dict(tree_flatten([numbers, notes, classes])))


def answer(request):
    folder = Path(request["folder"])
    if not request.get("existing"):
        make_model(request, folder)
    model, _ = load_model(folder)
    for number, wanted in enumerate(request.get("logits", [])):
        write_logits(model, wanted, folder, number)
    for number, wanted in enumerate(request["runs"]):
        if wanted.get("logits"):
            write_logits(model, wanted, folder, number)
    return {"runs": [run(model, wanted, folder) for wanted in request["runs"]]}


def serve():
    # Whatever the libraries print goes to standard error: standard output has answers only.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except Exception:
            reply = {"error": traceback.format_exc()}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()
        mx.clear_cache()


def main():
    if sys.argv[1] == "-":
        serve()
    else:
        request = json.loads(Path(sys.argv[1]).read_text())
        print(json.dumps({"models": [answer(entry) for entry in request["models"]]}))


main()
