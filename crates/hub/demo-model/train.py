"""Builds the mlxnode demo model: generates the questions, trains the tokenizer and the model, writes `model/`.

How to rebuild, with Python 3.11 and the pinned packages of `requirements.txt`:

    python3 -m venv venv
    venv/bin/pip install -r requirements.txt
    venv/bin/python train.py

The run uses one CPU thread, no network and no data file: every conversation comes from `conversations.py`, drawn with the
seed below. It takes about 30 minutes on one core of a 2024 server CPU and needs a C++ compiler for
`torch.compile` (pass `--no-compile` to do without, at about half the speed). Every draw comes from the seed, so runs on one
machine see the same batches; rounding differs between processors and versions, so compare models by `evaluate.py` and
not by their bytes. README.md says how the weights beside this script were made.

The model is a plain Llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU, tied embeddings. Only the tokens
of the answers count in the loss. Matrices are trained with Muon, the embedding and the norms with AdamW.
"""

import argparse
import json
import math
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn

import conversations
import questions

SEED = 20240607
HERE = Path(__file__).parent

PAD, BOS, END = range(3)
SPECIAL_TOKENS = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 512, 128, 6, 4, 2, 32, 256
ROPE_THETA, NORM_EPS, MAX_POSITIONS = 10000.0, 1e-5, 512

ROW_TOKENS = 96
ROWS = 24
ANSWER_SLOTS = 1024


@dataclass
class Phase:
    """A stretch of training with its own questions and a fresh optimizer, from the averaged weights of the one before."""

    seed: int
    steps: int
    # How many of the questions are declined, small talk, arithmetic and units; the rest is sorting.
    shares: tuple
    # Factor on the learning rates at the start and at the end, and the last part of the steps over which it falls.
    rate: float = 1.0
    last_rate: float = 1.0
    decay: float = 1.0
    # The weight of an answer in the loss grows with its length to this power.
    length_power: float = 0.5
    # Whether the conversions to know by heart are trained with all their amounts.
    by_heart: bool = False


# The first phase learns the form of the answers, most of whose tokens are in sorting. The second gives the short
# answers of the sums more weight. The third polishes, and learns two conversions by heart.
PHASES = [
    Phase(SEED + 1, 1500, (0.08, 0.03, 0.37, 0.22), length_power=1.0),
    Phase(SEED + 3, 3000, (0.06, 0.02, 0.44, 0.18), last_rate=0.294, decay=0.32),
    Phase(SEED + 4, 800, (0.08, 0.04, 0.33, 0.23), rate=0.3, last_rate=0.0, by_heart=True),
]


# --- tokenizer -----------------------------------------------------------------------------------------------------

def train_tokenizer(rng):
    """Byte-level BPE with single digits. The merges come from the generated questions, so their words are short."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=SPECIAL_TOKENS, show_progress=False, min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    texts = [text for _ in range(20000) for _, text in conversations.conversation(rng, PHASES[0].shares, PHASES[0].by_heart)]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", BOS)])
    assert tokenizer.get_vocab_size() == VOCAB
    assert [tokenizer.token_to_id(text) for text in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    return tokenizer


# --- batches -------------------------------------------------------------------------------------------------------

class Batches:
    """Packs conversations into rows of `ROW_TOKENS`. A token sees only earlier tokens of its own conversation."""

    def __init__(self, tokenizer, phase):
        self.tokenizer, self.phase, self.rng, self.pending = tokenizer, phase, random.Random(phase.seed), []

    def refill(self):
        drawn = [conversations.conversation(self.rng, self.phase.shares, self.phase.by_heart) for _ in range(2000)]
        texts = [text for turns in drawn for _, text in turns]
        encoded = iter(self.tokenizer.encode_batch(texts, add_special_tokens=False))
        for turns in drawn:
            tokens, weights = [BOS], [0.0]
            for role, _ in turns:
                ids = next(encoded).ids
                tokens += [SPECIAL_TOKENS.index(f"<|{role}|>"), *ids, END]
                length = len(ids) + 1
                weights += [0.0] + [length ** (self.phase.length_power - 1) if role == "assistant" else 0.0] * length
            if len(tokens) <= ROW_TOKENS:
                self.pending.append((tokens, weights))

    def next(self):
        if len(self.pending) < ROWS * 12:
            self.refill()
        tokens = torch.full((ROWS, ROW_TOKENS), PAD)
        owner = torch.zeros((ROWS, ROW_TOKENS), dtype=torch.int32)
        answers = []
        for row in range(ROWS):
            used, skipped, number = 0, 0, 0
            while skipped < len(self.pending) and skipped < 12:
                ids, weights = self.pending[-1 - skipped]
                if used + len(ids) > ROW_TOKENS:
                    skipped += 1
                    continue
                self.pending.pop(-1 - skipped)
                number += 1
                tokens[row, used:used + len(ids)] = torch.tensor(ids)
                owner[row, used:used + len(ids)] = number
                for i in range(1, len(ids)):
                    if weights[i]:
                        answers.append((row * ROW_TOKENS + used + i - 1, ids[i], weights[i]))
                used += len(ids)
        answers += [(0, 0, 0.0)] * (ANSWER_SLOTS - len(answers))
        slots, targets, weights = (torch.tensor(column) for column in zip(*answers[:ANSWER_SLOTS]))
        mask = (owner[:, None, :, None] == owner[:, None, None, :]) & CAUSAL
        return tokens, mask, slots, targets, weights


CAUSAL = torch.ones(ROW_TOKENS, ROW_TOKENS, dtype=torch.bool).tril()


# --- model ---------------------------------------------------------------------------------------------------------

def rotary_table(length):
    inverse = 1.0 / (ROPE_THETA ** (torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM))
    angles = torch.arange(length).float()[:, None] * inverse[None, :]
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotated(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HEADS * HEAD_DIM, bias=False)
        self.k_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.v_proj = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.o_proj = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)

    def forward(self, x, mask, cos, sin):
        rows, length, _ = x.shape
        q = rotated(self.q_proj(x).view(rows, length, HEADS, HEAD_DIM).transpose(1, 2), cos, sin)
        k = rotated(self.k_proj(x).view(rows, length, KV_HEADS, HEAD_DIM).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(rows, length, KV_HEADS, HEAD_DIM).transpose(1, 2)
        k = k.repeat_interleave(HEADS // KV_HEADS, dim=1)
        v = v.repeat_interleave(HEADS // KV_HEADS, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(out.transpose(1, 2).reshape(rows, length, HEADS * HEAD_DIM))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, INTERMEDIATE, bias=False)
        self.up_proj = nn.Linear(HIDDEN, INTERMEDIATE, bias=False)
        self.down_proj = nn.Linear(INTERMEDIATE, HIDDEN, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp = Attention(), Mlp()
        self.input_layernorm = nn.RMSNorm(HIDDEN, eps=NORM_EPS)
        self.post_attention_layernorm = nn.RMSNorm(HIDDEN, eps=NORM_EPS)

    def forward(self, x, mask, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), mask, cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Named so that `state_dict()` has the tensor names of a Hugging Face Llama checkpoint."""

    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
        self.model.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.model.norm = nn.RMSNorm(HIDDEN, eps=NORM_EPS)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                scale = 1 / math.sqrt(2 * LAYERS) if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                width = HIDDEN if name == "model.embed_tokens.weight" else parameter.shape[1]
                nn.init.normal_(parameter, std=0.5 * scale / math.sqrt(width))

    def forward(self, tokens, mask, cos, sin, slots, targets, weights):
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x, mask, cos, sin)
        x = self.model.norm(x.reshape(-1, HIDDEN)[slots])
        losses = F.cross_entropy(x @ self.model.embed_tokens.weight.T, targets, reduction="none")
        return (losses * weights).sum() / weights.sum()


# --- training ------------------------------------------------------------------------------------------------------

def rate(step, phase):
    """Warm-up over the first 100 steps, constant, then a straight line to the last rate."""
    fallen = max(0.0, 1 - (phase.steps - step) / (phase.decay * phase.steps))
    return min(1.0, step / 100) * (phase.rate + fallen * (phase.last_rate - phase.rate))


def train(model, forward, tokenizer, phase, folder):
    """Trains `model` for one phase and leaves it with the averaged weights, which are also written to `folder`."""
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    optimizers = [
        (torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01, adjust_lr_fn="original"), 0.02),
        (torch.optim.AdamW(others, lr=0.005, betas=(0.9, 0.98), weight_decay=0.0, fused=True), 0.005),
    ]
    averaged = {name: value.detach().clone() for name, value in model.state_dict().items()}
    batches = Batches(tokenizer, phase)
    cos, sin = rotary_table(ROW_TOKENS)
    start, recent = time.time(), []
    for step in range(1, phase.steps + 1):
        tokens, mask, slots, targets, weights = batches.next()
        loss = forward(tokens, mask, cos, sin, slots, targets, weights)
        loss.backward()
        nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer, peak in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * rate(step, phase)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            for name, value in model.state_dict().items():
                averaged[name].lerp_(value, 0.01)
        recent.append(loss.item())
        if step % 100 == 0:
            print(f"step {step} loss {sum(recent) / len(recent):.4f} after {time.time() - start:.0f} s", flush=True)
            recent = []
        if step % 500 == 0 or step == phase.steps:
            write_weights(averaged, folder)
    model.load_state_dict(averaged)


# --- export --------------------------------------------------------------------------------------------------------

def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_weights(weights, folder):
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})


def write_description(tokenizer, folder):
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    named = {"bos_token": "<|bos|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    write_json(folder / "special_tokens_map.json", named)
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", **named, "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_POSITIONS, "chat_template": CHAT_TEMPLATE,
    })
    write_json(folder / "generation_config.json", {
        "bos_token_id": BOS, "eos_token_id": END, "pad_token_id": PAD, "do_sample": False, "max_new_tokens": 64,
    })
    write_json(folder / "config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32",
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "intermediate_size": INTERMEDIATE, "hidden_act": "silu",
        "rms_norm_eps": NORM_EPS, "rope_theta": ROPE_THETA, "rope_scaling": None, "rope_traditional": False,
        "max_position_embeddings": MAX_POSITIONS, "attention_bias": False, "mlp_bias": False,
        "tie_word_embeddings": True, "bos_token_id": BOS, "eos_token_id": END, "pad_token_id": PAD,
    })


def write_held_out(path):
    rng = random.Random(SEED + 2)
    rows = [row for task in ("arithmetic", "units", "sorting") for row in questions.held_out_questions(rng, task, 200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=HERE / "model")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--start-from", type=Path, help="weights to continue from")
    parser.add_argument("--first-phase", type=int, default=1, help="the phase to continue with")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(random.Random(SEED))
    write_description(tokenizer, arguments.out)
    write_held_out(HERE / "heldout.jsonl")
    torch.manual_seed(SEED)
    model = Llama()
    if arguments.start_from:
        model.load_state_dict(load_file(arguments.start_from))
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    forward = model if arguments.no_compile else torch.compile(model)
    for phase in PHASES[arguments.first_phase - 1:]:
        train(model, forward, tokenizer, phase, arguments.out)


if __name__ == "__main__":
    main()
