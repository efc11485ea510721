"""What the suites of the official clients share: checks are registered, run one after the other, and reported as one JSON object, from each
check's name to null or to what went wrong.

KIND is "scripted" (the model says what stands behind SAY) or "demo" (the demo model, which adds and sorts).
"""

import json
import traceback

CHECKS = {"scripted": [], "demo": []}


def check(*kinds):
    """Registers a function of (client, model) as a check for these kinds of models, or for all."""

    def register(function):
        for kind in kinds or CHECKS:
            CHECKS[kind].append(function)
        return function

    return register


def say(words):
    return [{"role": "user", "content": f"SAY {words}"}]


def run(client, model, kind):
    results = {}
    for function in CHECKS[kind]:
        try:
            function(client, model)
            results[function.__name__] = None
        except Exception:
            results[function.__name__] = traceback.format_exc(limit=4)
    print(json.dumps(results))
