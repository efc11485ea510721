"""The questions the demo model is made for, and the split into training and held-out questions.

Every problem has a canonical key built from its operands, whatever the phrasing. A hash of that key decides whether
the problem is held out. A held-out problem never appears in training in any phrasing, and `a + b` shares its key with
`b + a`, as do all orders of the same numbers to sort. Two conversions are the exception: days to hours and weeks to days
are learned by heart, all amounts are trained, and they are never among the held-out questions.
"""

import hashlib

MAX_OPERAND = 99
HELD_OUT_ONE_IN = 10

REFUSAL = "I can add and subtract numbers up to 99, convert units and sort 3 to 5 numbers."

# (singular, plural, symbol) of the source and the target, the factor, and the largest amount asked for.
UNITS = [
    (("kilometer", "kilometers", "km"), ("meter", "meters", "m"), 1000, 999),
    (("meter", "meters", "m"), ("centimeter", "centimeters", "cm"), 100, 999),
    (("centimeter", "centimeters", "cm"), ("millimeter", "millimeters", "mm"), 10, 999),
    (("kilogram", "kilograms", "kg"), ("gram", "grams", "g"), 1000, 999),
    (("ton", "tons", "t"), ("kilogram", "kilograms", "kg"), 1000, 999),
    (("liter", "liters", "l"), ("milliliter", "milliliters", "ml"), 1000, 999),
    (("hour", "hours", "h"), ("minute", "minutes", "min"), 60, 99),
    (("minute", "minutes", "min"), ("second", "seconds", "s"), 60, 99),
    (("day", "days", "days"), ("hour", "hours", "hours"), 24, 99),
    (("week", "weeks", "weeks"), ("day", "days", "days"), 7, 99),
    (("year", "years", "years"), ("month", "months", "months"), 12, 99),
    (("foot", "feet", "ft"), ("inch", "inches", "in"), 12, 99),
]

KNOWN_BY_HEART = {"day", "week"}

ADD = [
    "What is {a} + {b}?", "{a}+{b}=", "{a} + {b} =", "{a} + {b}", "{a}+{b}", "Add {a} and {b}.",
    "What is {a} plus {b}?", "What is the sum of {a} and {b}?", "How much is {a} + {b}?", "Calculate {a} + {b}.",
    "{a} plus {b}", "Compute {a}+{b}", "What is {a}+{b}?", "How much is {a} plus {b}?", "Add {b} to {a}.",
]
SUBTRACT = [
    "What is {a} - {b}?", "{a}-{b}=", "{a} - {b} =", "{a} - {b}", "{a}-{b}", "Subtract {b} from {a}.",
    "What is {a} minus {b}?", "How much is {a} - {b}?", "Calculate {a} - {b}.", "{a} minus {b}", "Compute {a}-{b}",
    "What is {a}-{b}?", "How much is {a} minus {b}?", "Take {b} away from {a}.",
]
CONVERT = [
    "Convert {n} {short} to {to_short}", "Convert {n} {short} to {to_short}.", "Convert {n} {long} to {to_long}.",
    "How many {to_long} are {n} {long}?", "How many {to_long} are in {n} {long}?", "What is {n} {short} in {to_short}?",
    "{n} {short} in {to_short}", "{n} {long} in {to_long}?", "{n} {short} to {to_short}", "{n} {long} to {to_long}",
    "How many {to_short} is {n} {short}?", "How much is {n} {short} in {to_short}?", "Express {n} {long} in {to_long}.",
]
SORT = [
    "Sort {list}", "Sort {list}.", "Sort the numbers {list}.", "Sort these numbers: {list}", "Please sort {list}.",
    "Put {list} in order.", "Order {list}", "Arrange {list} from smallest to largest.", "Sort {list} in ascending order.",
    "Can you sort {list}?", "Sort: {list}",
]


def is_held_out(key):
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def is_known_by_heart(key):
    words = key.split()
    return words[0] == "convert" and words[2] in KNOWN_BY_HEART


def addition(rng, a, b, phrasings=ADD):
    low, high = sorted((a, b))
    question = rng.choice(phrasings).format(a=a, b=b)
    return f"add {low} {high}", question, str(a + b)


def subtraction(rng, a, b, phrasings=SUBTRACT):
    question = rng.choice(phrasings).format(a=a, b=b)
    return f"subtract {a} {b}", question, str(a - b)


def conversion(rng, unit, n, phrasings=CONVERT):
    source, target, factor, _ = unit
    question = rng.choice(phrasings).format(
        n=n, short=source[2], long=source[0] if n == 1 else source[1], to_short=target[2], to_long=target[1])
    return f"convert {n} {source[0]} {target[0]}", question, f"{n * factor} {target[2]}"


def joined(rng, numbers):
    """Numbers as people type them: with commas, with an `and`, or with spaces."""
    words = [str(number) for number in numbers]
    style = rng.random()
    if style < 0.7:
        return ", ".join(words)
    if style < 0.85:
        return ", ".join(words[:-1]) + " and " + words[-1]
    return " ".join(words)


def sorting(rng, numbers, phrasings=SORT):
    question = rng.choice(phrasings).format(list=joined(rng, numbers))
    ordered = sorted(numbers)
    return "sort " + " ".join(map(str, ordered)), question, ", ".join(map(str, ordered))


def uniform_problem(rng, task):
    """A problem drawn evenly from the stated range of `task`."""
    if task == "arithmetic":
        a, b = rng.randint(0, MAX_OPERAND), rng.randint(0, MAX_OPERAND)
        return addition(rng, a, b) if rng.random() < 0.5 else subtraction(rng, a, b)
    if task == "units":
        unit = rng.choice(UNITS)
        return conversion(rng, unit, rng.randint(1, unit[3]))
    return sorting(rng, [rng.randint(0, 99) for _ in range(rng.randint(3, 5))])


def held_out_questions(rng, task, count):
    """`count` different held-out problems of `task`, each in one phrasing."""
    seen, found = set(), []
    while len(found) < count:
        key, question, answer = uniform_problem(rng, task)
        if is_held_out(key) and not is_known_by_heart(key) and key not in seen:
            seen.add(key)
            found.append({"task": task, "question": question, "answer": answer})
    return found
