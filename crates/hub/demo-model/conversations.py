"""What the demo model is trained on: conversations of questions with their answers, as hurried people type them."""

import itertools

import questions
import talk

SYSTEM_PROMPTS = [
    "You are a helpful assistant.", "You are a helpful, friendly assistant.", "Answer briefly.", "Be concise.",
    "You are a calculator.", "You are the mlxnode demo model.", "Reply in one sentence.", "You are a bot.",
]
PREFIXES = ["Please: ", "Hi! ", "Hello, ", "Can you tell me: ", "Tell me, ", "Question: ", "Quick question: ", "Hey, "]


def operand(rng):
    return rng.randint(0, 9) if rng.random() < 0.10 else rng.randint(0, questions.MAX_OPERAND)


def arithmetic(rng):
    problem = questions.addition if rng.random() < 0.45 else questions.subtraction
    return problem(rng, operand(rng), operand(rng))


def units(rng):
    unit = rng.choice(questions.UNITS if rng.random() < 0.4 else questions.UNITS[6:])
    n = rng.randint(1, 99) if rng.random() < 0.6 else rng.randint(1, unit[3])
    return questions.conversion(rng, unit, n)


def sorting(rng):
    count = rng.choice([2, 3, 3, 4, 4, 4, 5, 5, 5, 5])
    return questions.sorting(rng, [rng.randint(0, 99) if rng.random() < 0.9 else rng.randint(0, 9) for _ in range(count)])


def disturbed(rng, question):
    """The question as a hurried person types it: other case, no mark at the end, a word before it."""
    if rng.random() < 0.08:
        question = rng.choice(PREFIXES) + question
    if rng.random() < 0.15:
        question = question.lower()
    if rng.random() < 0.10:
        question = question.rstrip("?.!")
    return question.strip()


def exchange(rng, shares, by_heart):
    """One question with its answer, never a held-out one."""
    declined, small_talk, sums, conversions = itertools.accumulate(shares)
    while True:
        kind = rng.random()
        if kind < declined:
            return talk.refusal(rng)
        if kind < small_talk:
            question, answer = talk.small_talk(rng)
            return (question.lower() if rng.random() < 0.2 else question), answer
        key, question, answer = (arithmetic if kind < sums else units if kind < conversions else sorting)(rng)
        if not questions.is_held_out(key) or by_heart and questions.is_known_by_heart(key):
            return disturbed(rng, question), answer


def conversation(rng, shares, by_heart):
    """Turns of (role, text): mostly one exchange, sometimes with a system prompt or earlier exchanges.

    `shares` are how many of the questions are declined, small talk, arithmetic and units; the rest is sorting. With `by_heart` the
    conversions to know by heart come with all their amounts.
    """
    turns = [("system", rng.choice(SYSTEM_PROMPTS))] if rng.random() < 0.05 else []
    kind = rng.random()
    for _ in range(1 if kind < 0.92 else 2 if kind < 0.97 else 3):
        question, answer = exchange(rng, shares, by_heart)
        turns += [("user", question), ("assistant", answer)]
    return turns
