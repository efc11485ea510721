"""Asks a model the held-out questions through its chat template and prints how many answers are exactly right.

    venv/bin/python evaluate.py                             # ./model with mlx-lm on heldout.jsonl
    venv/bin/python evaluate.py --backend transformers      # the same with transformers and torch
    venv/bin/python evaluate.py --fresh 1000                # 1000 newly drawn held-out questions per task

Decoding is greedy. An answer counts only if it equals the expected text; nothing is trimmed or rounded. The command
ends with status 1 if a task is below `--at-least`. With mlx-lm on a CPU the generation runs in float32.
"""

import argparse
import json
import os
import random
import sys
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import questions
import talk

HERE = Path(__file__).parent
MAX_TOKENS = 64
OTHER_QUESTIONS = [
    "What is the capital of Spain?", "Write a limerick about a sailor.", "Who invented the telephone?",
    "What is 7 * 8?", "Why do cats purr?", "Convert 12 miles to km.", "Recommend a restaurant in Rome.",
    "What is the largest planet?", "How do vaccines work?", "Explain recursion to a child.",
]


def with_mlx_lm(folder):
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    model, tokenizer = load(str(folder))

    def answer(messages):
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        tokens = []
        for token, _ in generate_step(mx.array(prompt), model, max_tokens=MAX_TOKENS):
            if int(token) in tokenizer.eos_token_ids:
                break
            tokens.append(int(token))
        return tokenizer.decode(tokens)

    return answer


def with_transformers(folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def answer(messages):
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            tokens = model.generate(**prompt, max_new_tokens=MAX_TOKENS, do_sample=False)[0]
        return tokenizer.decode(tokens[prompt["input_ids"].shape[1]:], skip_special_tokens=True)

    return answer


def rows_to_ask(arguments):
    if arguments.fresh:
        rng = random.Random(arguments.seed)
        return [row for task in ("arithmetic", "units", "sorting")
                for row in questions.held_out_questions(rng, task, arguments.fresh)]
    return [json.loads(line) for line in arguments.questions.read_text().splitlines()]


def talk_rows():
    """Small talk was trained as it stands here; of the other questions only some patterns were."""
    rows = [{"task": "small talk", "question": question, "answer": answer}
            for answer, asked in talk.SMALL_TALK.items() for question in asked]
    return rows + [{"task": "declined", "question": question, "answer": questions.REFUSAL} for question in OTHER_QUESTIONS]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--questions", type=Path, default=HERE / "heldout.jsonl")
    parser.add_argument("--fresh", type=int, help="draw this many held-out questions per task instead of reading a file")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--talk", action="store_true", help="also ask the small talk and some questions to decline")
    parser.add_argument("--backend", choices=["mlx-lm", "transformers"], default="mlx-lm")
    parser.add_argument("--at-least", type=float, default=0.95)
    parser.add_argument("--show-wrong", action="store_true")
    arguments = parser.parse_args()
    answer = (with_mlx_lm if arguments.backend == "mlx-lm" else with_transformers)(arguments.model)
    asked, right = Counter(), Counter()
    for row in rows_to_ask(arguments) + (talk_rows() if arguments.talk else []):
        got = answer([{"role": "user", "content": row["question"]}])
        asked[row["task"]] += 1
        right[row["task"]] += got == row["answer"]
        if arguments.show_wrong and got != row["answer"]:
            print(f"wrong: {row['question']!r} expected {row['answer']!r} got {got!r}")
    for task in asked:
        print(f"{task}: {right[task]} of {asked[task]} exactly right ({right[task] / asked[task]:.1%})")
    measured = [right[task] / asked[task] for task in asked if task not in ("small talk", "declined")]
    sys.exit(0 if min(measured) >= arguments.at_least else 1)


if __name__ == "__main__":
    main()
