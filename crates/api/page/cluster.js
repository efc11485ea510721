// The view of the cluster: sums, map, nodes, stages.

import { byId, el, meter, spark } from "./dom.js";
import { drawMap } from "./map.js";
import { bytes, layers, percent, rate, time } from "./words.js";

/** A minute of pictures. */
const SLOTS = 60;
const history = [];
let last = null;

const cell = (text, kind) => el("td", { class: kind }, text);
const number = (text) => cell(text, "n");

function head(table, names) {
  if (table.tHead.rows.length) return;
  table.tHead.append(el("tr", null, ...names.map((name) => el("th", { scope: "col", class: name.startsWith("#") ? "n" : null }, name.replace("#", "")))));
}

function tile(name, value, unit, below) {
  return el("div", { class: "tile" }, el("dt", null, name), el("dd", null, value, unit ? el("small", null, ` ${unit}`) : null, below ?? null));
}

function tiles(totals) {
  const share = totals.memory_budget_bytes ? totals.memory_used_bytes / totals.memory_budget_bytes : 0;
  byId("tiles").replaceChildren(
    tile("Generated", rate(totals.tokens_per_second), "tokens/s", spark(history.map((entry) => entry.generated), SLOTS)),
    tile("Prompts read", rate(totals.prompt_tokens_per_second), "tokens/s", spark(history.map((entry) => entry.read), SLOTS)),
    tile("Requests running", String(totals.running), "", spark(history.map((entry) => entry.running), SLOTS)),
    tile("Requests waiting", String(totals.waiting), "", spark(history.map((entry) => entry.waiting), SLOTS)),
    tile("Memory used", bytes(totals.memory_used_bytes), `of ${bytes(totals.memory_budget_bytes)}`, meter(share, "Memory used by models")),
  );
}

function nodes(picture) {
  const table = byId("nodes");
  head(table, ["Node", "State", "#Memory", "#Budget", "Round trips", "Chip", "Address"]);
  const name = new Map(picture.nodes.map((node) => [node.id, node.name]));
  const rows = picture.nodes.map((node) => {
    const trips = node.links.filter((link) => link.rtt_seconds && name.has(link.to)).map((link) => `${name.get(link.to)} ${time(link.rtt_seconds)}`);
    const marks = [node.id === picture.node_id ? "this node" : null, node.id === picture.coordinator.node_id ? "coordinator" : null].filter(Boolean);
    return el("tr", null,
      el("th", { scope: "row" }, node.name, marks.length ? el("span", { class: "soft" }, ` ${marks.join(", ")}`) : null),
      el("td", null, el("span", { class: `dot ${node.state}`, "aria-hidden": "true" }), node.problem ?? node.state),
      number(bytes(node.memory_used_bytes)), number(bytes(node.memory_budget_bytes)),
      cell(trips.join(", ") || "–"), cell(node.chip), cell(node.address, "soft"));
  });
  table.tBodies[0].replaceChildren(...rows);
}

function stages(picture) {
  const table = byId("stages");
  head(table, ["Model", "Layers", "Node", "#Busy", "#Compute", "#Wait", "#Send", "#Tokens/s", "#Memory", "#Open"]);
  const rows = picture.deployments.flatMap((deployment) => deployment.stages.map((stage) => {
    const figures = stage.figures;
    const rates = figures?.rates;
    return el("tr", null,
      el("th", { scope: "row" }, deployment.model), cell(layers(stage)), cell(stage.node),
      number(percent(rates?.busy)), number(time(rates?.compute_seconds)), number(time(rates?.wait_seconds)), number(time(rates?.send_seconds)),
      number(rate(rates ? rates.tokens_per_second + rates.prompt_tokens_per_second : null)),
      number(figures ? bytes(figures.memory_bytes) : "–"), number(figures ? String(figures.open_sequences) : "–"));
  }));
  if (rows.length === 0) rows.push(el("tr", null, el("td", { colspan: 10, class: "soft" }, "No model is loaded.")));
  table.tBodies[0].replaceChildren(...rows);
}

function draw() {
  if (!last || byId("view-cluster").hidden) return;
  tiles(last.totals);
  byId("map").replaceChildren(...drawMap(last, byId("map").clientWidth));
  nodes(last);
  stages(last);
  const stale = byId("stale");
  stale.hidden = last.coordinator.reachable;
  stale.textContent = `The coordinator ${last.coordinator.name} cannot be reached; what is said about models may be old.`;
}

export const cluster = {
  shown: draw,
  picture(picture) {
    last = picture;
    const { totals } = picture;
    history.push({ generated: totals.tokens_per_second ?? 0, read: totals.prompt_tokens_per_second ?? 0, running: totals.running, waiting: totals.waiting });
    if (history.length > SLOTS) history.shift();
    draw();
  },
};

new ResizeObserver(draw).observe(byId("map"));
