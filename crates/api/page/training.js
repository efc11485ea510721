// The form that submits a fine-tuning: its files go to the node first, then the job to the cluster.

import { ask } from "./access.js";
import { byId, el } from "./dom.js";
import { bytes } from "./words.js";

let isBusy = false;
let told = () => {};
// The same submission again is the same job, also when its answer was lost.
let submission = null;

function draw() {
  const numbers = crypto.getRandomValues(new Uint32Array(4));
  return [...numbers].map((number) => number.toString(16).padStart(8, "0")).join("");
}

const result = (...nodes) => byId("train-result").replaceChildren(...nodes.filter(Boolean));

async function upload(file) {
  result(el("p", null, `Uploading ${file.name} (${bytes(file.size)})…`));
  const form = new FormData();
  form.append("purpose", "fine-tune");
  form.append("file", file);
  return (await ask("/v1/files", { form })).id;
}

function wish(training_file, validation_file) {
  const text = (id) => byId(id).value.trim() || null;
  const number = (id) => (byId(id).value === "" ? null : Number(byId(id).value));
  const method = byId("train-method").value;
  const hyperparameters = { n_epochs: number("train-epochs"), batch_size: number("train-batch"), learning_rate_multiplier: number("train-rate") };
  return {
    model: byId("train-model").value.trim(),
    training_file,
    validation_file,
    suffix: text("train-suffix"),
    method: { type: method, [method]: { hyperparameters } },
    workers: number("train-workers"),
    stages: number("train-stages"),
    configuration: text("train-keys"),
  };
}

async function submit(event) {
  event.preventDefault();
  if (isBusy) return;
  isBusy = true;
  byId("do-train").disabled = true;
  submission ??= { key: draw() };
  try {
    const [rows] = byId("train-rows").files;
    const [held] = byId("train-held").files;
    // A file that was uploaded for an attempt that failed is not uploaded again.
    submission.rows ??= await upload(rows);
    if (held) submission.held ??= await upload(held);
    result(el("p", null, "Looking through the rows…"));
    const job = await ask("/v1/fine_tuning/jobs", { body: wish(submission.rows, submission.held ?? null), headers: { "idempotency-key": submission.key } });
    submission = null;
    byId("train").reset();
    result(el("p", null, `${job.id} is submitted.`));
    told();
  } catch (error) {
    result(el("p", { class: "error" }, error.message));
  } finally {
    isBusy = false;
    byId("do-train").disabled = false;
  }
}

byId("train").addEventListener("submit", submit);
// Other files or words: another submission.
byId("train").addEventListener("change", () => {
  submission = null;
});

export const training = {
  session(mayTrain) {
    byId("train").hidden = !mayTrain;
    byId("title-train").hidden = !mayTrain;
    byId("may-not-train").hidden = mayTrain;
  },
  models(names) {
    const list = byId("train-models");
    const listed = names.join("\n");
    if (list.dataset.listed === listed) return;
    list.dataset.listed = listed;
    list.replaceChildren(...names.map((name) => el("option", { value: name })));
  },
  submitted(call) {
    told = call;
  },
};
