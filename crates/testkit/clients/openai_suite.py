"""What OpenAI's official Python client sees: every field and every error, streaming and not.

usage: openai_suite.py URL MODEL KIND

KINDs, and what is printed: suite.py.
"""

import json
import re
import sys
import time

import openai
from suite import check, run, say


def refused(kind, call, param=None, code=None):
    try:
        call()
    except kind as error:
        body = error.body
        assert body["type"] and body["message"], body
        assert param is None or body["param"] == param, body
        assert code is None or body["code"] == code, body
        return error
    raise AssertionError(f"not refused: {param or code}")


TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
    },
}
CALL = '<tool_call>{"name": "add", "arguments": {"x": 1}}</tool_call>'


@check()
def models(client, model):
    listed = client.models.list().data
    assert model in [entry.id for entry in listed], listed
    assert client.models.retrieve(model).object == "model"
    refused(openai.NotFoundError, lambda: client.models.retrieve("none"), code="model_not_found")


@check("demo")
def the_demo_model_answers(client, model):
    messages = [{"role": "user", "content": "What is 17 + 25?"}]
    answer = client.chat.completions.create(model=model, messages=messages)
    assert answer.choices[0].message.content == "42", answer
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    stream = client.chat.completions.create(
        model=model, messages=messages, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "42", text
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens, chunks[-1]


@check("demo")
def the_same_seed_says_the_same(client, model):
    def ask(seed, n=1):
        messages = [{"role": "user", "content": "Who are you?"}]
        answer = client.chat.completions.create(
            model=model, messages=messages, temperature=1.5, seed=seed, n=n, max_tokens=30, logprobs=True, top_logprobs=3
        )
        return [choice.message.content for choice in answer.choices], answer

    several, answer = ask(5, n=3)
    assert len(several) == 3
    assert [ask(5 + index)[0][0] for index in range(3)] == several
    for score in answer.choices[0].logprobs.content:
        assert len(score.top_logprobs) == 3 and score.logprob <= 0
        assert score.top_logprobs[0].logprob >= score.top_logprobs[1].logprob
        assert bytes(score.bytes).decode(errors="replace") == score.token


@check("demo")
def what_kills_mlx_lm_does_not_kill_us(client, model):
    complete = lambda **fields: client.completions.create(model=model, max_tokens=4, **fields)
    complete(prompt="What is 1 + 1?")
    complete(prompt="What is 1 + 1?")  # equal to one that is cached
    assert len(complete(prompt=["What is", "Sort 3,"]).choices) == 2
    bad = openai.BadRequestError
    refused(bad, lambda: complete(prompt="x", extra_body={"top_k": 512}), param="top_k")
    refused(bad, lambda: complete(prompt="x", extra_body={"xtc_threshold": 0.6}), param="xtc_threshold")
    refused(bad, lambda: complete(prompt="x", logit_bias={"99999": 1}), param="logit_bias")
    try:
        complete(prompt="")
    except bad:
        pass
    assert complete(prompt="What is 1 + 1?").choices


@check("demo")
def completions_continue_text(client, model):
    answer = client.completions.create(
        model=model, prompt="<|user|>What is 2 + 3?<|end|><|assistant|>", logprobs=2, temperature=0
    )
    choice = answer.choices[0]
    assert choice.text == "5" and choice.finish_reason == "stop", answer
    assert choice.logprobs.tokens == ["5"] and len(choice.logprobs.top_logprobs[0]) == 2, choice
    sort = {"model": model, "prompt": "<|user|>Sort 31, 4, 15<|end|><|assistant|>", "temperature": 0}
    whole = client.completions.create(**sort).choices[0].text
    stop = whole[len(whole) // 2 :]
    stopped = client.completions.create(**sort, stop=[stop]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (whole[: whole.index(stop)], "stop"), (whole, stopped)
    biased = client.completions.create(model=model, prompt="<|user|>What is 2 + 3?<|end|><|assistant|>",
                                       max_tokens=1, temperature=0, logit_bias={"21": 100})
    assert biased.usage.completion_tokens == 1


@check("scripted")
def chat(client, model):
    answer = client.chat.completions.create(
        model=model,
        messages=say("<think>hm</think>Good day."),
        temperature=0.5,
        top_p=0.9,
        n=2,
        seed=7,
        max_completion_tokens=200,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        logit_bias={"5": -10},
        logprobs=True,
        top_logprobs=2,
        user="me",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        stop=["STOP"],
        extra_body={"top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1, "chat_template_kwargs": {"enable_thinking": True}},
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    message = answer.choices[1].message
    assert message.content == "Good day." and message.reasoning_content == message.reasoning == "hm"
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert answer.usage.completion_tokens_details.reasoning_tokens > 0
    assert answer.system_fingerprint.startswith("mlxnode-")


@check("scripted")
def chat_stream(client, model):
    with client.chat.completions.stream(
        model=model, messages=say("One two."), logprobs=True, stream_options={"include_usage": True}
    ) as stream:
        for _ in stream:
            pass
        answer = stream.get_final_completion()
    assert answer.choices[0].message.content == "One two."
    assert "".join(score.token for score in answer.choices[0].logprobs.content) == "One two."
    assert answer.usage.completion_tokens > 2


@check("scripted")
def tools(client, model):
    for choice in ("auto", "required", {"type": "function", "function": {"name": "add"}}):
        answer = client.chat.completions.create(model=model, messages=say(CALL), tools=[TOOL], tool_choice=choice)
        call = answer.choices[0].message.tool_calls[0]
        assert answer.choices[0].finish_reason == "tool_calls"
        assert call.function.name == "add" and json.loads(call.function.arguments) == {"x": 1}
    history = [*say("x"), answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "SAY two"}]
    followed = client.chat.completions.create(model=model, messages=history, tools=[TOOL], parallel_tool_calls=False)
    assert followed.choices[0].message.content == "two"
    with client.chat.completions.stream(model=model, messages=say(CALL), tools=[TOOL]) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion().choices[0].message
    assert final.tool_calls[0].function.name == "add"


@check("scripted")
def formats(client, model):
    schema = {"name": "n", "schema": {"type": "object", "properties": {"n": {"type": "integer"}}}, "strict": True}
    for response_format in ({"type": "text"}, {"type": "json_object"}, {"type": "json_schema", "json_schema": schema}):
        answer = client.chat.completions.create(model=model, messages=say('{"n": 1}'), response_format=response_format)
        assert json.loads(answer.choices[0].message.content) == {"n": 1}
    bad = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "nothing"}}}
    refused(openai.BadRequestError, lambda: client.chat.completions.create(model=model, messages=say("x"), response_format=bad))


@check("scripted")
def completions(client, model):
    answer = client.completions.create(
        model=model, prompt=["SAY a", "SAY b"], n=2, echo=True, logprobs=1, max_tokens=5, seed=1, temperature=0
    )
    assert [choice.text for choice in answer.choices] == ["SAY aa", "SAY aa", "SAY bb", "SAY bb"], answer
    assert answer.choices[0].logprobs.token_logprobs[0] is None
    text = "".join(
        chunk.choices[0].text for chunk in client.completions.create(model=model, prompt="SAY a b", stream=True)
    )
    assert text == "a b"


@check("scripted")
def embeddings(client, model):
    packed = client.embeddings.create(model=model, input=["a", "b"])  # the client asks for base64 by itself
    plain = client.embeddings.create(model=model, input=["a", "b"], encoding_format="float")
    for one, other in zip(packed.data, plain.data, strict=True):  # 32 bits in one, digits in the other
        assert all(abs(a - b) < 1e-6 for a, b in zip(one.embedding, other.embedding, strict=True)), (one, other)
    assert plain.usage.prompt_tokens == plain.usage.total_tokens > 0
    refused(openai.BadRequestError, lambda: client.embeddings.create(model=model, input="a", dimensions=2), param="dimensions")


@check("scripted")
def responses(client, model):
    function = {"type": "function", "name": "add", "parameters": TOOL["function"]["parameters"], "strict": True}
    answer = client.responses.create(
        model=model, instructions="Be brief.", input="SAY <think>hm</think>So. " + CALL, tools=[function], store=False
    )
    assert [item.type for item in answer.output] == ["reasoning", "message", "function_call"], answer.output
    assert answer.output_text == "So. " and answer.status == "completed"
    again = client.responses.create(
        model=model,
        input=[
            {"role": "user", "content": "x"},
            *[item.model_dump(exclude_none=True) for item in answer.output],
            {"type": "function_call_output", "call_id": answer.output[2].call_id, "output": "SAY done"},
        ],
    )
    assert again.output_text == "done"
    with client.responses.stream(model=model, input="SAY One two.") as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_text == "One two."
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed", kinds
    scored = {"model": model, "input": "SAY <think>hm</think>One two.", "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    whole = client.responses.create(**scored).output[1].content[0]
    assert "".join(score.token for score in whole.logprobs).strip() == whole.text == "One two.", whole
    assert all(score.logprob <= 0 and len(score.top_logprobs) == 2 for score in whole.logprobs), whole
    with client.responses.stream(**scored) as stream:
        told = [score.token for event in stream if event.type == "response.output_text.delta" for score in event.logprobs]
        assert told == [score.token for score in stream.get_final_response().output[1].content[0].logprobs]
    refused(openai.BadRequestError, lambda: client.responses.create(model=model, input="x", top_logprobs=2), param="top_logprobs")
    refused(openai.BadRequestError, lambda: client.responses.create(model=model, input="x", previous_response_id="r"),
            param="previous_response_id")


@check("demo")
def constraints(client, model):
    create = lambda **fields: client.chat.completions.create(
        model=model, messages=say("What is 17 + 25?"), max_tokens=20, temperature=0, **fields
    )
    for expression in ["[a-c]{3}", "(yes|no), [0-9]{2}!"]:
        choice = create(extra_body={"guided_regex": expression}).choices[0]
        assert choice.finish_reason == "stop" and re.fullmatch(expression, choice.message.content), choice
    schema = {"name": "answer", "strict": True, "schema": {"enum": ["left", "right"]}}
    choice = create(response_format={"type": "json_schema", "json_schema": schema}).choices[0]
    assert json.loads(choice.message.content) in ("left", "right"), choice


@check("demo")
def scores_and_vectors(client, model):
    fields = {"model": model, "prompt": "What", "logprobs": 2, "temperature": 0}
    echoed = client.completions.create(**fields, max_tokens=1, echo=True).choices[0]
    plain = client.completions.create(**fields, max_tokens=1).choices[0]
    scores = echoed.logprobs.token_logprobs
    assert echoed.text == "What" + plain.text, echoed
    assert scores[0] is None and all(score < 0 for score in scores[1:]), scores
    assert abs(scores[-1] - plain.logprobs.token_logprobs[0]) < 1e-3, (scores, plain)
    vectors = [item.embedding for item in client.embeddings.create(model=model, input=["abc", "x y", "abc"]).data]
    assert vectors[0] == vectors[2] != vectors[1] and len(vectors[0]) == len(vectors[1]), vectors


@check("scripted")
def failures(client, model):
    create = lambda words, **fields: client.chat.completions.create(model=model, messages=say(words), **fields)
    refused(openai.InternalServerError, lambda: create("It will BREAK"), code="service_unavailable")
    try:
        list(create("It will BREAK", stream=True))
    except openai.APIError as error:
        assert "lost" in error.message, error
    else:
        raise AssertionError("the stream did not break")
    error = refused(openai.RateLimitError, lambda: create("QUEUE FULL"), code="rate_limit_exceeded")
    assert int(error.response.headers["retry-after"]) >= 1
    time.sleep(0.2)  # the front lets nobody in for a moment after it was refused


@check()
def errors(client, model):
    create = lambda **fields: client.chat.completions.create(**{"model": model, "messages": say("x"), **fields})
    refused(openai.NotFoundError, lambda: create(model="gpt-9"), param="model", code="model_not_found")
    bad = openai.BadRequestError
    for fields, param in [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"n": 0}, "n"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stop": [""]}, "stop"),
        ({"messages": []}, "messages"),
        ({"store": True}, "store"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"extra_body": {"typo": 1}}, "typo"),
        ({"extra_body": {"draft_model": "x"}}, "draft_model"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
         "messages[0].content[0]"),
    ]:
        refused(bad, lambda: create(**fields), param=param)


url, model, kind = sys.argv[1:]
run(openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=60), model, kind)
