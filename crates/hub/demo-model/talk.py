"""Small talk with fixed answers, and questions outside the model's range, which it declines."""

from questions import ADD, CONVERT, MAX_OPERAND, REFUSAL, SORT, SUBTRACT, UNITS, conversion, joined

HELLO = "Hello! I can add, convert units and sort numbers. Try: What is 12 + 34?"
WHO = "I am the mlxnode demo model, a very small language model."
CAN = "I can add and subtract numbers, convert units and sort numbers. Try: Sort 31, 4, 15"
HOW = "I am fine, thank you. Ask me for a sum!"
THANKS = "You are welcome!"
BYE = "Goodbye!"

SMALL_TALK = {
    HELLO: ["Hello", "Hello!", "Hi", "Hi!", "Hey", "Hey!", "Hello there", "Hi there!", "Good morning", "Good evening!",
            "Hello.", "Good day", "Greetings", "Hello, model!", "Hello world", "Hello, world!"],
    WHO: ["Who are you?", "What are you?", "What is your name?", "Who is this?", "Which model are you?",
          "Tell me about yourself.", "Are you a language model?", "What model is this?", "Introduce yourself.",
          "Hello, who are you?", "Hi! Who are you?", "What's your name?"],
    CAN: ["What can you do?", "What can I ask you?", "Help", "help me", "Can you help me?", "What do you know?",
          "How can you help?", "What are you good at?", "Hello, what can you do?", "What can I do here?",
          "What should I ask?", "Hi! What can you do?", "How does this work?"],
    HOW: ["How are you?", "How are you doing?", "How do you do?", "Hello, how are you?", "Hi! How are you?",
          "How is it going?", "Are you okay?"],
    THANKS: ["Thanks", "Thank you", "Thank you!", "Thanks!", "Thank you very much", "Thanks a lot!", "Great, thanks",
             "Well done!", "Nice work"],
    BYE: ["Bye", "Goodbye", "Bye!", "See you", "See you later!", "Good night", "Goodbye!"],
}

TOPICS = """France Germany Italy Japan Brazil London Paris Berlin the sea a cat dogs love music history physics art
the moon the sun winter summer spring autumn a tree a computer the internet programming Rust Python a house the world
Albert Einstein Shakespeare Mozart the president football chess cooking bread coffee tea cheese a robot time space
dinosaurs the weather tomorrow today the universe philosophy money democracy the Roman empire gravity light water fire
a dragon my boss a friend the river a mountain snow rain machine learning neural networks language a good book a film
the stars Mars Jupiter the ocean birds fish horses cars trains planes bicycles a dream health sleep running""".split("\n")
TOPICS = [word for line in TOPICS for word in line.split()]
OTHER = [
    "What is the capital of {t}?", "Write a poem about {t}.", "Who is {t}?", "Tell me about {t}.", "Explain {t}.",
    "What is {t}?", "Tell me a joke.", "Tell me a story about {t}.", "How do I cook {t}?", "Why is the sky blue?",
    "Translate {t} to German.", "What is the weather like in {t}?", "Who wrote {t}?", "When did {t} begin?",
    "Where is {t}?", "Is {t} better than {u}?", "Write code for {t}.", "Summarize {t} and {u}.", "How old is {t}?",
    "What do you think about {t}?", "Do you like {t}?", "Give me a recipe for {t}.", "What is the meaning of life?",
    "How many people live in {t}?", "Sing a song about {t}", "List {n} facts about {t}.", "What is the best {t}?",
    "Who was the first man on {t}?", "Can you write an essay on {t}?", "Why do {t} like {u}?", "{t}", "{t} {u}",
    "What color is {t}?", "How does {t} work?", "What happened in 19{n}?", "Draw {t}.", "Which is bigger, {t} or {u}?",
    "Can {t} fly?", "Compare {t} with {u}.", "What time is it?", "What day is today?", "I am {n} years old.",
    "My name is {t}.", "Sort {t}, {u}", "Convert {t} to {u}", "Add {t} and {u}.",
]
PRODUCTS = [
    "What is {a} * {b}?", "{a} * {b}", "{a}*{b}=", "What is {a} times {b}?", "{a} / {b}", "What is {a} / {b}?",
    "Multiply {a} and {b}.", "Divide {a} by {b}.", "What is {a} divided by {b}?", "{a} x {b}", "What is the root of {a}?",
    "What is {a}% of {b}?", "{a}^{b}", "{a} mod {b}", "Is {a} a prime number?", "Multiply {a} by {b}", "{a}",
]
ODD_UNITS = ["miles", "yards", "pounds", "ounces", "gallons", "dollars", "euros", "degrees", "volts", "apples", "cups",
             "knots", "acres", "bytes", "pints"]
LETTERS = "abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?'-:;éüßñ你好世界дом🙂"


def out_of_scope(rng):
    """A question the model declines."""
    kind = rng.random()
    if kind < 0.5:
        text = rng.choice(OTHER)
        return text.format(t=rng.choice(TOPICS), u=rng.choice(TOPICS), n=rng.randint(2, 99))
    if kind < 0.62:
        return rng.choice(PRODUCTS).format(a=rng.randint(0, 999), b=rng.randint(0, 99))
    if kind < 0.76:
        large = rng.randint(MAX_OPERAND + 1, 10 ** rng.randint(3, 6))
        small = rng.randint(0, 10 ** rng.randint(1, 5))
        a, b = (large, small) if rng.random() < 0.5 else (small, large)
        return rng.choice(ADD + SUBTRACT).format(a=a, b=b)
    if kind < 0.80:
        unit = rng.choice(UNITS)
        return conversion(rng, unit, rng.randint(unit[3] + 1, 10 ** rng.randint(len(str(unit[3])) + 1, 6)), CONVERT)[1]
    if kind < 0.85:
        if rng.random() < 0.5:
            numbers = [rng.randint(0, 99) for _ in range(rng.randint(6, 9))]
        else:
            numbers = [rng.randint(100, 999) for _ in range(rng.randint(2, 5))]
        return rng.choice(SORT).format(list=joined(rng, numbers))
    if kind < 0.90:
        unit = rng.choice(UNITS)
        here, there = unit[0][1], rng.choice(ODD_UNITS)
        if rng.random() < 0.5:
            here, there = there, here
        n = rng.randint(1, 99)
        return rng.choice([f"Convert {n} {here} to {there}.", f"How many {there} are {n} {here}?", f"{n} {here} in {there}"])
    words = ["".join(rng.choice(LETTERS) for _ in range(rng.randint(1, 8))) for _ in range(rng.randint(1, 5))]
    return " ".join(words)


def small_talk(rng):
    answer = rng.choice(list(SMALL_TALK))
    return rng.choice(SMALL_TALK[answer]), answer


def refusal(rng):
    return out_of_scope(rng), REFUSAL
