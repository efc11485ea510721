"""What OpenAI's official Python client sees of files and fine-tuning.

usage: fine_tuning_suite.py URL MODEL KIND

KINDs, and what is printed: suite.py.
"""

import json
import sys
import time

import openai
from suite import check, run, say

ROWS = "".join(f'{{"text": "What is {a} + 2? {a + 2}"}}\n' for a in range(10, 26)).encode()
PAIRS = "".join(f'{{"prompt": "What is {a} + 2?", "chosen": "{a + 2}", "rejected": "{a}"}}\n' for a in range(10, 14)).encode()
OVER = ("succeeded", "failed", "cancelled")


def refused(kind, call, param=None, code=None):
    try:
        call()
    except kind as error:
        assert error.body["message"] and error.body["type"], error.body
        assert param is None or error.body["param"] == param, error.body
        assert code is None or error.body["code"] == code, error.body
        return error.body
    raise AssertionError(f"not refused: {param or code}")


def uploaded(client, content=ROWS, name="rows.jsonl"):
    return client.files.create(file=(name, content), purpose="fine-tune")


def wait(client, job, done, seconds=150):
    limit = time.monotonic() + seconds
    while not done(job):
        assert time.monotonic() < limit, job
        time.sleep(0.2)
        job = client.fine_tuning.jobs.retrieve(job.id)
    return job


@check("demo")
def files_come_and_go(client, model):
    file = uploaded(client)
    assert (file.object, file.bytes, file.filename, file.purpose) == ("file", len(ROWS), "rows.jsonl", "fine-tune"), file
    again = uploaded(client, name="again.jsonl")
    assert again.id != file.id, "each upload is a file of its own"
    listed = [entry.id for entry in client.files.list(purpose="fine-tune", limit=1)]
    assert file.id in listed and again.id in listed, listed
    assert client.files.retrieve(again.id).filename == "again.jsonl"
    assert client.files.delete(again.id).deleted
    assert client.files.content(file.id).read() == ROWS, "the same content has another name still"
    refused(openai.NotFoundError, lambda: client.files.retrieve(again.id), "id", "not_found")
    refused(openai.NotFoundError, lambda: client.files.content("file-x"), "id", "not_found")
    refused(openai.NotFoundError, lambda: client.files.delete("../../x"))
    large = b'{"text": "' + b"x" * (3 << 20) + b'"}\n'
    assert client.files.content(uploaded(client, large).id).read() == large
    empty = uploaded(client, b"")
    assert empty.bytes == 0 and client.files.content(empty.id).read() == b""
    bad = openai.BadRequestError
    refused(bad, lambda: client.files.create(file=b"x", purpose="assistants"), "purpose")
    refused(bad, lambda: client.files.create(file=b"x", purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}))
    refused(bad, lambda: client.files.list(after="file-x").data, "after")


@check("demo")
def a_model_is_fine_tuned_and_asked_at_once(client, model):
    file = uploaded(client)
    job = client.fine_tuning.jobs.create(
        model=model,
        training_file=file.id,
        validation_file=file.id,
        suffix="poet",
        seed=7,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 4, "learning_rate_multiplier": 2}}},
        metadata={"who": "ann"},
        extra_body={"configuration": {"num_layers": 2, "steps_per_eval": 2, "val_batches": 1}, "workers": 2},
    )
    assert (job.object, job.model, job.training_file, job.seed) == ("fine_tuning.job", model, file.id, 7), job
    assert job.hyperparameters.n_epochs == 1 and job.hyperparameters.learning_rate_multiplier == 2, job
    assert job.metadata == {"who": "ann"} and job.validation_file == file.id and job.workers == 2, job
    client.files.delete(file.id)  # the job has it still
    job = wait(client, job, lambda job: job.status in OVER)
    assert job.status == "succeeded" and job.error is None, job
    answer = client.chat.completions.create(
        model=job.fine_tuned_model, messages=say("What is 17 + 2?"), max_tokens=4, temperature=0
    )
    assert answer.choices[0].message.content, answer
    assert job.fine_tuned_model == f"{model}:poet" and job.trained_tokens > 0 and job.finished_at, job
    assert job.id in [entry.id for entry in client.fine_tuning.jobs.list(limit=1)]
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=5))  # the client goes from page to page
    losses = {event.data["step"]: event.data["train_loss"] for event in events if event.type == "metrics"}
    assert sorted(step for step, loss in losses.items() if loss) == [1, 2, 3, 4], events
    assert len({event.id for event in events}) == len(events), events
    assert any("finished" in event.message for event in events), events
    checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert checkpoints[0].step_number == 4 and checkpoints[0].metrics.train_loss > 0, checkpoints
    assert checkpoints[0].fine_tuned_model_checkpoint == job.fine_tuned_model, checkpoints
    what_it_made_is_downloaded(client, job)
    taken = lambda: client.fine_tuning.jobs.create(model=model, training_file=uploaded(client).id, suffix="poet")
    refused(openai.BadRequestError, taken, "suffix")
    refused(openai.ConflictError, lambda: client.fine_tuning.jobs.cancel(job.id))


def what_it_made_is_downloaded(client, job):
    files = {file.filename: file for file in map(client.files.retrieve, job.result_files)}
    assert sorted(files) == ["adapter_config.json", "adapters.safetensors", "step_metrics.csv"], files
    assert all((file.object, file.purpose, file.created_at) == ("file", "fine-tune-results", job.finished_at) for file in files.values()), files
    content = {name: client.files.content(file.id).read() for name, file in files.items()}
    assert all(len(content[name]) == file.bytes > 0 for name, file in files.items()), files
    lines = content["step_metrics.csv"].decode().splitlines()
    assert lines[0] == "step,train_loss,valid_loss" and [line.split(",")[0] for line in lines[1:]] == ["0", "1", "2", "3", "4"], lines
    assert json.loads(content["adapter_config.json"])["num_layers"] == 2, content["adapter_config.json"]
    head = int.from_bytes(content["adapters.safetensors"][:8], "little")
    assert json.loads(content["adapters.safetensors"][8 : 8 + head]), "a safetensors file"
    refused(openai.ConflictError, lambda: client.files.delete(job.result_files[0]), code="conflict")
    assert not set(job.result_files) & {file.id for file in client.files.list()}, "they are the job's"
    refused(openai.BadRequestError, lambda: client.fine_tuning.jobs.create(model=job.model, training_file=job.result_files[0]), "training_file")
    refused(openai.NotFoundError, lambda: client.files.content("file-metrics-none"), "id", "not_found")


@check("demo")
def a_model_is_divided_among_nodes(client, model):
    keys = {"num_layers": 1, "iters": 5000, "grad_accumulation_steps": 2}
    job = client.fine_tuning.jobs.create(
        model=model,
        training_file=uploaded(client).id,
        hyperparameters={"batch_size": 1},
        extra_body={"configuration": keys, "stages": 2, "share_percent": 100},
    )
    assert job.stages == 2 and job.workers == 1 and job.result_files == [], job
    job = wait(client, job, lambda job: job.status == "running" and job.step > 0)
    nodes, borders = {stage["node"] for stage in job.plan}, [(stage["first_layer"], stage["end_layer"]) for stage in job.plan]
    assert len(nodes) == 2 and borders[0][0] == 0 and borders[0][1] == borders[1][0], job.plan
    assert all(stage["memory_bytes"] > 0 for stage in job.plan), job.plan
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"


@check("demo")
def a_job_stands_still_goes_on_and_ends(client, model):
    create = lambda key, iters: client.fine_tuning.jobs.create(
        model=model,
        training_file=file.id,
        hyperparameters={"batch_size": 1},
        extra_body={"configuration": f"num_layers: 1\niters: {iters}\n", "share_percent": 100},
        extra_headers={"Idempotency-Key": key},
    )
    file = uploaded(client)
    key = f"suite {time.time()}"
    job = create(key, 5000)
    assert create(key, 5000).id == job.id, "the same key is the same job"
    refused(openai.ConflictError, lambda: create(key, 5001))
    assert job.hyperparameters.n_epochs == "auto" and job.hyperparameters.batch_size == 1, job
    wait(client, job, lambda job: job.status == "running" and job.step > 0)
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    wait(client, job, lambda job: job.status == "paused" and not job.node)
    assert client.fine_tuning.jobs.checkpoints.list(job.id).data, "it saved before it stood still"
    assert client.fine_tuning.jobs.resume(job.id).status in ("queued", "validating_files", "running")
    wait(client, job, lambda job: job.status == "running")
    cancelled = client.fine_tuning.jobs.cancel(job.id)
    assert cancelled.status == "cancelled" and cancelled.fine_tuned_model is None, cancelled
    refused(openai.ConflictError, lambda: client.fine_tuning.jobs.resume(job.id))


@check("demo")
def pairs_of_answers_are_learned_from(client, model):
    job = client.fine_tuning.jobs.create(
        model=model,
        training_file=uploaded(client, PAIRS).id,
        method={"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 1, "batch_size": 2, "beta": 0.2}}},
        extra_body={"configuration": {"num_layers": 1}},
    )
    assert job.method.type == "dpo" and job.method.dpo.hyperparameters.beta == 0.2, job
    job = wait(client, job, lambda job: job.status in OVER)
    assert job.status == "succeeded" and job.fine_tuned_model == f"{model}:{job.id}", job


@check("demo")
def what_is_wrong_is_refused_before_it_runs(client, model):
    file = uploaded(client)
    create = lambda **fields: client.fine_tuning.jobs.create(**{"model": model, "training_file": file.id, **fields})
    bad = openai.BadRequestError
    for fields, param in [
        ({"training_file": "file-1"}, "training_file"),
        ({"validation_file": "rows.jsonl"}, "validation_file"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"batch_size": "many"}}, "hyperparameters.batch_size"),
        ({"hyperparameters": {"batch_size": 17}}, "batch_size"),
        ({"method": {"type": "reinforcement"}}, "method.type"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, "integrations"),
        ({"suffix": "a:b"}, "suffix"),
        ({"model": "some/other", "suffix": "poet"}, "suffix"),
        ({"extra_body": {"typo": 1}}, "typo"),
        ({"extra_body": {"stages": 9}}, "stages"),
        ({"extra_body": {"stages": "many"}}, "stages"),
        ({"extra_body": {"stages": 2, "workers": 3}}, "stages"),
        ({"extra_body": {"configuration": {"itres": 1}}}, "configuration"),
        ({"extra_body": {"configuration": {"iters": 1}}, "hyperparameters": {"n_epochs": 1}}, "n_epochs"),
    ]:
        refused(bad, lambda: create(**fields), param)
    broken = uploaded(client, ROWS + b'{"text": 7}\n')
    body = refused(bad, lambda: create(training_file=broken.id), "training_file", "invalid_training_file")
    assert "line 17" in body["message"], body
    body = refused(bad, lambda: create(validation_file=broken.id), "validation_file", "invalid_validation_file")
    empty = uploaded(client, b"")
    refused(bad, lambda: create(training_file=empty.id), "training_file", "invalid_training_file")
    rows = uploaded(client, b'{"words": "a"}\n')
    assert "text_feature" in refused(bad, lambda: create(training_file=rows.id), "training_file")["message"]
    missing = openai.NotFoundError
    for call in [client.fine_tuning.jobs.retrieve, client.fine_tuning.jobs.cancel, client.fine_tuning.jobs.pause]:
        refused(missing, lambda: call("ftjob-none"), "fine_tuning_job_id", "not_found")
    refused(missing, lambda: client.fine_tuning.jobs.list_events("ftjob-none").data)
    refused(missing, lambda: client.fine_tuning.jobs.checkpoints.list("ftjob-none").data)


url, model, kind = sys.argv[1:]
run(openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=60), model, kind)
