"""What Anthropic's official Python client sees.

usage: anthropic_suite.py URL MODEL KIND

KINDs, and what is printed: suite.py.
"""

import sys

import anthropic
from suite import check, run, say

TOOL = {"name": "add", "description": "Adds.", "input_schema": {"type": "object", "properties": {"x": {"type": "integer"}}}}
ALL = 'SAY <think>hm</think>So. <tool_call>{"name": "add", "arguments": {"x": 1}}</tool_call>'


@check("demo")
def the_demo_model_answers(client, model):
    messages = [{"role": "user", "content": "What is 17 + 25?"}]
    answer = client.messages.create(model=model, max_tokens=20, messages=messages)
    assert answer.content[0].text == "42" and answer.stop_reason == "end_turn", answer
    with client.messages.stream(model=model, max_tokens=20, messages=messages) as stream:
        assert "".join(stream.text_stream) == "42"
        assert stream.get_final_message().usage.output_tokens == answer.usage.output_tokens
    counted = client.messages.count_tokens(model=model, messages=messages)
    assert counted.input_tokens == answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)
    cut = client.messages.create(model=model, max_tokens=1, messages=messages)
    assert cut.stop_reason == "max_tokens" and cut.usage.output_tokens == 1


@check("scripted")
def blocks(client, model):
    answer = client.messages.create(
        model=model, max_tokens=200, system="Be brief.", messages=[{"role": "user", "content": ALL}], tools=[TOOL],
        extra_body={"temperature": 0.5, "top_p": 0.9, "top_k": 20}, stop_sequences=["STOP"], metadata={"user_id": "me"},
        thinking={"type": "enabled", "budget_tokens": 1024},
    )
    assert [block.type for block in answer.content] == ["thinking", "text", "tool_use"], answer.content
    assert answer.stop_reason == "tool_use" and answer.content[2].input == {"x": 1}
    history = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": answer.content[2].id, "content": "SAY done"}]},
    ]
    again = client.messages.create(model=model, max_tokens=200, messages=history, tools=[TOOL])
    assert again.content[0].text == "done"


@check("scripted")
def stream(client, model):
    with client.messages.stream(
        model=model, max_tokens=200, messages=[{"role": "user", "content": ALL}], tools=[TOOL]
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert [block.type for block in final.content] == ["thinking", "text", "tool_use"], final.content
    assert final.content[2].input == {"x": 1} and final.stop_reason == "tool_use"
    assert "message_start" in kinds and kinds[-1] == "message_stop", kinds


@check("scripted")
def choices(client, model):
    call = 'SAY <tool_call>{"name": "add", "arguments": {"x": 1}}</tool_call>'
    for choice in ({"type": "auto"}, {"type": "any"}, {"type": "tool", "name": "add", "disable_parallel_tool_use": True}):
        answer = client.messages.create(
            model=model, max_tokens=200, messages=[{"role": "user", "content": call}], tools=[TOOL], tool_choice=choice
        )
        assert answer.stop_reason == "tool_use", answer
    stopped = client.messages.create(model=model, max_tokens=200, messages=say("one two"), stop_sequences=[" two"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " two")


@check()
def errors(client, model):
    def refused(kind, **fields):
        try:
            client.messages.create(**{"model": model, "max_tokens": 4, "messages": say("x"), **fields})
        except kind as error:
            assert error.body["type"] == "error" and error.body["error"]["message"], error.body
            return
        raise AssertionError(f"not refused: {fields}")

    refused(anthropic.NotFoundError, model="claude")
    refused(anthropic.BadRequestError, max_tokens=0)
    refused(anthropic.BadRequestError, extra_body={"typo": 1})
    refused(anthropic.BadRequestError, messages=[])
    image = {"type": "image", "source": {"type": "url", "url": "http://x"}}
    refused(anthropic.BadRequestError, messages=[{"role": "user", "content": [image]}])


url, model, kind = sys.argv[1:]
run(anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=60), model, kind)
