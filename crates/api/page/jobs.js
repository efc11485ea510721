// The view of the jobs: the curves of their losses, and what can be done to them.

import { ask } from "./access.js";
import { confirm } from "./dialogs.js";
import { byId, el, meter, svg } from "./dom.js";
import { training } from "./training.js";
import { bytes } from "./words.js";

const PERIOD = 2000;
const shown = new Map();
let timer = null;
let mayTrain = false;
let models = [];

function curve(losses) {
  const known = losses.flatMap((point) => [point.training, point.validation]).filter((value) => value !== null && Number.isFinite(value));
  if (known.length < 2) return [];
  const [low, high] = [Math.min(...known), Math.max(...known)];
  const [first, last] = [losses[0].step, losses.at(-1).step];
  const x = (step) => (last === first ? 0 : ((step - first) / (last - first)) * 600);
  const y = (value) => 170 - (high === low ? 80 : ((value - low) / (high - low)) * 160);
  const line = (of, name) => {
    const points = losses.filter((point) => point[of] !== null).map((point) => `${x(point.step).toFixed(1)},${y(point[of]).toFixed(1)}`);
    return svg("path", { class: name, d: points.length ? `M${points.join("L")}` : "" });
  };
  const label = `Loss from step ${first} to ${last}, between ${low.toFixed(3)} and ${high.toFixed(3)}`;
  return [
    svg("svg", { class: "curve", viewBox: "0 0 600 180", preserveAspectRatio: "none", role: "img", "aria-label": label },
      ...[10, 90, 170].map((at) => svg("line", { x1: 0, x2: 600, y1: at, y2: at })), line("training", "training"), line("validation", "validation")),
    el("p", { class: "legend" }, el("span", null, `step ${first} to ${last}`), el("span", null, `highest ${high.toFixed(3)}`), el("span", null, `lowest ${low.toFixed(3)}`), el("span", null, "training solid, validation dashed")),
  ];
}

function pace(job) {
  const words = [];
  if (job.node) words.push(`on ${job.node}`);
  if (job.state === "running" && job.tokens_per_second > 0) words.push(`${Math.round(job.tokens_per_second).toLocaleString("en")} tokens/s`);
  if (job.seconds_left) words.push(job.seconds_left < 90 ? `${Math.round(job.seconds_left)} s left` : `${Math.ceil(job.seconds_left / 60)} min left`);
  if (job.served_as.length) words.push(`served as ${job.served_as.join(", ")}`);
  return words.join(" · ");
}

const CHANGES = {
  pause: { name: "Pause", in: ["queued", "preparing", "running", "waiting for nodes"] },
  resume: { name: "Resume", in: ["paused", "failed"] },
  cancel: { name: "Cancel", in: ["queued", "preparing", "running", "waiting for nodes", "paused", "failed"] },
};

// A card stays the same element while its job is there: buttons keep the focus, and what is open stays open.
function card(id) {
  const parts = {
    title: el("h2", { tabindex: "-1" }),
    state: el("span", { class: "badge" }),
    detail: el("p"),
    step: el("p", { class: "soft" }),
    bar: el("div"),
    pace: el("p", { class: "soft" }),
    curve: el("div"),
    said: el("p", { role: "status" }),
    buttons: el("div", { class: "actions" }),
    changes: {},
    checkpoint: el("select", { id: `checkpoint-${id}` }),
    model: el("select", { id: `model-${id}` }),
    name: el("input", { id: `name-${id}`, autocomplete: "off", autocapitalize: "off", spellcheck: "false", placeholder: id }),
  };
  for (const [change, { name }] of Object.entries(CHANGES)) {
    const button = el("button", { type: "button", "data-change": change, "aria-label": `${name} ${id}` }, name);
    button.addEventListener("click", () => tell(id, parts, change));
    parts.changes[change] = button;
    parts.buttons.append(button);
  }
  const field = (input, words) => el("div", { class: "field" }, el("label", { for: input.id }, words), input);
  const form = el("form", { class: "publish" },
    el("div", { class: "fields" }, field(parts.checkpoint, "Checkpoint"), field(parts.model, "Model"), field(parts.name, "Name of the adapter")),
    el("button", { type: "submit", class: "primary" }, "Serve it"));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    publish(id, parts);
  });
  parts.publish = el("details", null, el("summary", null, "Checkpoints"), form);
  parts.root = el("article", { class: "card deployment", "data-job": id },
    el("header", null, parts.title, parts.state), parts.detail, parts.step, parts.bar, parts.pace, parts.curve, parts.buttons, parts.publish, parts.said);
  return parts;
}

/** Choices of a list, written anew only when they have changed. */
function choose(select, choices) {
  const listed = JSON.stringify(choices);
  if (select.dataset.listed === listed) return;
  const before = select.value;
  select.dataset.listed = listed;
  select.replaceChildren(...choices.map(([value, words]) => el("option", { value }, words)));
  if (choices.some(([value]) => String(value) === before)) select.value = before;
}

function write(element, text) {
  element.hidden = !text;
  if (element.textContent !== text) element.textContent = text;
}

function update(parts, job) {
  const news = JSON.stringify(job);
  write(parts.title, [job.id, job.kind, job.model].filter(Boolean).join(" · "));
  write(parts.state, job.state);
  if (parts.news !== news) {
    parts.news = news;
    parts.detail.className = job.state === "failed" ? "error" : "soft";
    write(parts.detail, job.detail);
    write(parts.step, job.steps ? `step ${job.step.toLocaleString("en")} of ${job.steps.toLocaleString("en")}` : "");
    parts.bar.replaceChildren(...(job.steps ? [meter(job.step / job.steps, "Steps done")] : []));
    write(parts.pace, pace(job));
    parts.curve.replaceChildren(...curve(job.losses));
  }
  const buttons = Object.values(parts.changes);
  const pressed = buttons.find((button) => button === document.activeElement);
  for (const [change, { in: states }] of Object.entries(CHANGES)) parts.changes[change].hidden = !mayTrain || !states.includes(job.state);
  // A button that goes gives the focus to what can be done now.
  if (pressed?.hidden) (buttons.find((button) => !button.hidden) ?? parts.title).focus();
  parts.publish.hidden = !mayTrain || job.checkpoints.length === 0;
  choose(parts.checkpoint, job.checkpoints.map(({ step, bytes: size }) => [step, `step ${step.toLocaleString("en")}, ${bytes(size)}`]).reverse());
  choose(parts.model, models.map((model) => [model, model]));
}

function say(parts, error, words) {
  parts.said.className = error ? "error" : "soft";
  write(parts.said, words);
}

async function tell(id, parts, change) {
  if (change === "cancel" && !(await confirm(`Cancel ${id}?`, "It does not go on any more. What it saved can still be served.", "Cancel the job"))) return;
  try {
    await ask(`/v1/fine_tuning/jobs/${encodeURIComponent(id)}/${change}`, { method: "POST" });
    say(parts, false, { pause: "It saves a checkpoint and stands still.", resume: "It goes on.", cancel: "It is cancelled." }[change]);
  } catch (error) {
    say(parts, true, error.message);
  }
  await refresh();
}

async function publish(id, parts) {
  const body = { step: Number(parts.checkpoint.value), model: parts.model.value || null, adapter: parts.name.value.trim() || null };
  try {
    const served = await ask(`/api/v1/jobs/${encodeURIComponent(id)}/publish`, { body });
    say(parts, false, `Requests ask for it as ${served.id}.`);
  } catch (error) {
    say(parts, true, error.message);
  }
  await refresh();
}

async function refresh() {
  clearTimeout(timer);
  if (byId("view-jobs").hidden) return;
  try {
    const { jobs: all } = await ask("/api/v1/jobs");
    const ids = new Set(all.map((job) => job.id));
    for (const [id, parts] of shown) {
      if (ids.has(id)) continue;
      parts.root.remove();
      shown.delete(id);
    }
    // The newest first: what is new goes before all that is there.
    for (const job of all.toReversed()) {
      if (!shown.has(job.id)) {
        shown.set(job.id, card(job.id));
        byId("jobs").prepend(shown.get(job.id).root);
      }
      update(shown.get(job.id), job);
    }
    byId("no-jobs").hidden = all.length > 0;
    write(byId("jobs-error"), "");
  } catch (error) {
    write(byId("jobs-error"), error.message);
  }
  clearTimeout(timer);
  timer = setTimeout(refresh, PERIOD);
}

export const jobs = {
  shown: refresh,
  session(session) {
    mayTrain = ["trainer", "admin"].includes(session.role);
    training.session(mayTrain);
    refresh();
  },
  picture(picture) {
    models = [...new Set(picture.deployments.map((deployment) => deployment.model))];
    training.models(models);
  },
};
training.submitted(refresh);
