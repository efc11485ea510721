// The view of the jobs, with the curves of their losses.

import { ask } from "./access.js";
import { byId, el, meter, svg } from "./dom.js";

const PERIOD = 2000;
let timer = null;

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

function card(job) {
  const share = job.steps ? job.step / job.steps : 0;
  return el("article", { class: "card deployment" },
    el("header", null, el("h2", null, [job.id, job.kind, job.model].filter(Boolean).join(" · ")), el("span", { class: "badge" }, job.state)),
    job.detail ? el("p", { class: job.state === "failed" ? "error" : "soft" }, job.detail) : null,
    job.steps ? el("p", { class: "soft" }, `step ${job.step.toLocaleString("en")} of ${job.steps.toLocaleString("en")}`) : null,
    job.steps ? meter(share, "Steps done") : null,
    pace(job) ? el("p", { class: "soft" }, pace(job)) : null,
    ...curve(job.losses));
}

async function refresh() {
  clearTimeout(timer);
  if (byId("view-jobs").hidden) return;
  try {
    const { jobs } = await ask("/api/v1/jobs");
    byId("jobs").replaceChildren(...jobs.map(card));
    byId("no-jobs").hidden = jobs.length > 0;
  } catch (error) {
    byId("jobs").replaceChildren(el("p", { class: "error" }, error.message));
  }
  timer = setTimeout(refresh, PERIOD);
}

export const jobs = { shown: refresh };
