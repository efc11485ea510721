"""Writes the gradients beside this file that PEFT and torch have for adapters, as a second judge beside mlx-lm.

    python3 -m venv venv
    venv/bin/pip install -r requirements.txt
    venv/bin/python regenerate.py

Each folder has a tiny model as transformers saves it, and

case.json               rank and scale, the rows with the places whose tokens count, and the sum of their losses
adapter.safetensors     the adapter ("p.NAME") and its gradients of that sum ("g.NAME"), by our names and in our shapes

Maps are changed by PEFT: `lora_a` is `lora_A` transposed, `lora_b` is `lora_B` transposed, `m` is the vector of magnitudes. Experts
and routers, which transformers keeps as parameters and not as modules, are changed by torch alone: their weights are replaced by
weight + scale * B A, of each expert with matrices of its own.
"""

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch.func import functional_call
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

HERE = Path(__file__).parent
VOCABULARY, RANK, SCALE = 96, 4, 2.5
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 128, "tie_word_embeddings": False,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True,
           "decoder_sparse_step": 1, "mlp_only_layers": []}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
CASES = {
    "llama": (LlamaConfig(**SHAPE), ATTENTION + ["gate_proj", "up_proj", "down_proj"], False),
    "llama-dora": (LlamaConfig(**SHAPE), ATTENTION + ["gate_proj", "up_proj", "down_proj"], True),
    "qwen3_moe": (Qwen3MoeConfig(**SHAPE, **EXPERTS), ATTENTION, False),
}


def normal(shape, width):
    return torch.randn(shape) / width**0.5


def made(config):
    """A model whose weights are as large as those of a trained one."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.2 * torch.randn(parameter.shape))
            else:
                parameter.copy_(normal(parameter.shape, parameter.shape[-1]))
    return model


def rows():
    """Ids, and from which place to which the tokens count: a text, a question with an answer, an answer that goes on behind."""
    lengths = [(17, 1, 17), (23, 9, 23), (12, 5, 10)]
    return [(torch.randint(3, VOCABULARY, (length,)), first, end) for length, first, end in lengths]


def loss(call, rows):
    width = max(len(ids) for ids, _, _ in rows)
    batch, mask = torch.zeros((len(rows), width), dtype=torch.long), torch.zeros((len(rows), width), dtype=torch.long)
    for row, (ids, _, _) in enumerate(rows):
        batch[row, : len(ids)], mask[row, : len(ids)] = ids, 1
    logprobs = call(batch, mask).logits.log_softmax(dim=-1)
    return -sum(logprobs[row, place - 1, ids[place]]
                for row, (ids, first, end) in enumerate(rows) for place in range(first, end))


def low_rank(experts, outputs, inputs):
    """Leaves A and B, of one map or of each expert."""
    stack = [experts] if experts else []
    return (normal([*stack, RANK, inputs], inputs).requires_grad_(), (0.2 * torch.randn([*stack, outputs, RANK])).requires_grad_())


def of_experts(model):
    """For each parameter of experts and routers that is replaced: the replacement, as a function, and its leaves by our names."""
    replaced, leaves = {}, {}
    for name, parameter in model.named_parameters():
        path = name.removeprefix("base_model.model.")
        weight = parameter.detach()
        if name.endswith("mlp.gate.weight"):
            parts = [(path.removesuffix(".weight"), weight.shape[0])]
        elif name.endswith("experts.gate_up_proj"):
            block = path.removesuffix("experts.gate_up_proj")
            half = weight.shape[1] // 2
            parts = [(f"{block}switch_mlp.gate_proj", half), (f"{block}switch_mlp.up_proj", half)]
        elif name.endswith("experts.down_proj"):
            block = path.removesuffix("experts.down_proj")
            parts = [(f"{block}switch_mlp.down_proj", weight.shape[1])]
        else:
            continue
        pairs = [low_rank(weight.shape[0] if weight.dim() == 3 else 0, outputs, weight.shape[-1]) for _, outputs in parts]
        replaced[name] = weight + SCALE * torch.cat([b @ a for a, b in pairs], dim=-2)
        for (part, _), (a, b) in zip(parts, pairs):
            leaves[f"{part}.lora_a"], leaves[f"{part}.lora_b"] = a, b
    return replaced, leaves


def write(name, config, targets, dora):
    torch.manual_seed(1)
    folder = HERE / name
    model = made(config)
    model.save_pretrained(folder / "model")
    adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=SCALE * RANK, target_modules=targets, use_dora=dora))
    leaves = {}
    for path, parameter in adapted.named_parameters():
        if not parameter.requires_grad:
            continue
        with torch.no_grad():  # as in the midst of a training: no matrix is zero
            if ".lora_B." in path:
                parameter.copy_(0.2 * torch.randn(parameter.shape))
            elif ".lora_magnitude_vector." in path:
                parameter.mul_(1 + 0.2 * torch.randn(parameter.shape))
        place = path.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".default")
        for theirs, ours in ((".lora_A", ".lora_a"), (".lora_B", ".lora_b"), (".lora_magnitude_vector", ".m")):
            place = place.replace(theirs, ours)
        leaves[place] = parameter
    replaced, of_their_own = of_experts(adapted)
    batch = rows()
    value = loss(lambda ids, mask: functional_call(adapted, replaced, (), {"input_ids": ids, "attention_mask": mask}), batch)
    value.backward()
    arrays = {}
    for place, leaf in (leaves | of_their_own).items():
        # Matrices of maps lie the other way round here; of experts they do not.
        turned = place in leaves or leaf.dim() == 2
        for kind, array in (("p", leaf.detach()), ("g", leaf.grad)):
            arrays[f"{kind}.{place}"] = (array.T if turned and array.dim() == 2 else array.flatten() if place.endswith(".m") else array).contiguous()
    save_file(arrays, folder / "adapter.safetensors")
    case = {"rank": RANK, "scale": SCALE, "kind": "dora" if dora else "lora", "loss": value.item(),
            "rows": [{"ids": ids.tolist(), "counted": [first, end]} for ids, first, end in batch]}
    (folder / "case.json").write_text(json.dumps(case, indent=1) + "\n")


for case, (config, targets, dora) in CASES.items():
    write(case, config, targets, dora)
