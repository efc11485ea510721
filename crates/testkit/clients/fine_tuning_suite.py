"""What OpenAI's official Python client sees of files and fine-tuning.

usage: fine_tuning_suite.py URL MODEL KIND

KINDs, and what is printed: suite.py.
"""

import sys
import time

import openai
from suite import check, run, say

ROWS = "".join(f'{{"text": "What is {a} + 2? {a + 2}"}}\n' for a in range(10, 26)).encode()


def refused(kind, call, param=None):
    try:
        call()
    except kind as error:
        assert error.body["message"], error.body
        assert param is None or error.body["param"] == param, error.body
        return
    raise AssertionError(f"not refused: {param}")


def uploaded(client):
    return client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")


@check()
def files_come_go_and_are_named_by_their_content(client, model):
    file = uploaded(client)
    assert (file.bytes, file.filename, file.purpose) == (len(ROWS), "rows.jsonl", "fine-tune"), file
    assert uploaded(client).id == file.id, "the same content is the same file"
    assert file.id in [entry.id for entry in client.files.list(purpose="fine-tune").data]
    assert client.files.content(file.id).read() == ROWS
    other = client.files.create(file=("other.jsonl", b'{"text": "x"}\n'), purpose="fine-tune")
    assert client.files.delete(other.id).deleted
    refused(openai.NotFoundError, lambda: client.files.retrieve(other.id))
    refused(openai.BadRequestError, lambda: client.files.create(file=b"x", purpose="assistants"), "purpose")
    refused(openai.BadRequestError, lambda: client.files.retrieve("file-x"), "file_id")


@check()
def a_job_is_submitted_watched_and_its_result_asked(client, model):
    file = uploaded(client)
    job = client.fine_tuning.jobs.create(
        model=model,
        training_file=file.id,
        validation_file=file.id,
        suffix="poet",
        seed=7,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 4}}},
        metadata={"who": "ann"},
        extra_body={"configuration": {"num_layers": 2, "steps_per_eval": 2, "val_batches": 1}},
    )
    assert (job.object, job.model, job.training_file, job.seed) == ("fine_tuning.job", model, file.id, 7), job
    assert job.hyperparameters.n_epochs == 1 and job.metadata == {"who": "ann"}, job
    limit = time.monotonic() + 120
    while job.status not in ("succeeded", "failed", "cancelled") or not (job.fine_tuned_model or job.error):
        assert time.monotonic() < limit, job
        time.sleep(0.2)
        job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded", job
    assert job.fine_tuned_model == f"{model}:poet" and job.trained_tokens > 0 and job.finished_at, job
    assert job.id in [entry.id for entry in client.fine_tuning.jobs.list(limit=5).data]
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=5))
    losses = [event.data["train_loss"] for event in events if event.type == "metrics"]
    assert len(losses) == 4 and all(loss > 0 for loss in losses if loss is not None), events
    assert any("finished" in event.message for event in events), events
    checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert checkpoints[0].step_number == 4, checkpoints
    assert checkpoints[0].fine_tuned_model_checkpoint == job.fine_tuned_model, checkpoints
    answer = client.chat.completions.create(
        model=job.fine_tuned_model, messages=say("What is 17 + 2?"), max_tokens=4
    )
    assert answer.choices, answer


@check()
def what_is_wrong_is_refused(client, model):
    file = uploaded(client)
    create = lambda **fields: client.fine_tuning.jobs.create(**{"model": model, "training_file": file.id, **fields})
    bad = openai.BadRequestError
    for fields, param in [
        ({"training_file": "file-1"}, "training_file"),
        ({"validation_file": "rows.jsonl"}, "validation_file"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"batch_size": "many"}}, "hyperparameters.batch_size"),
        ({"method": {"type": "reinforcement"}}, "method.type"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, "integrations"),
        ({"extra_body": {"typo": 1}}, "typo"),
    ]:
        refused(bad, lambda: create(**fields), param)
    refused(openai.NotFoundError, lambda: client.fine_tuning.jobs.retrieve("ftjob-none"))
    refused(openai.NotFoundError, lambda: client.fine_tuning.jobs.cancel("ftjob-none"))


url, model, kind = sys.argv[1:]
run(openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=60), model, kind)
