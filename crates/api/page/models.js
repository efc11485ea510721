// The view of the models: what is loaded, and loading, planning, unloading.

import { ask, events } from "./access.js";
import { confirm } from "./dialogs.js";
import { byId, el, meter } from "./dom.js";
import { bytes, count, layers, percent, rate } from "./words.js";

const shown = new Map();
let isAdmin = false;
let loading = null;

// A card stays the same element while its model is there: buttons keep the focus, and only what changed is written.
function card(deployment) {
  const parts = {
    dot: el("span", { class: "dot", "aria-hidden": "true" }),
    state: el("span"),
    detail: el("p", { class: "error" }),
    layers: el("ul", { class: "layers", "aria-label": "Stages" }),
    facts: el("dl", { class: "facts" }),
    unload: el("button", { type: "button" }, "Unload"),
  };
  parts.unload.setAttribute("aria-label", `Unload ${deployment.model}`);
  parts.unload.addEventListener("click", () => unload(deployment.model, parts));
  parts.root = el("article", { class: "card deployment" },
    el("header", null, el("h2", null, deployment.model, deployment.replicas > 1 ? el("span", { class: "soft" }, ` replica ${deployment.replica} of ${deployment.replicas}`) : null), el("span", { class: "badge" }, parts.dot, parts.state), parts.unload),
    parts.detail, parts.layers, parts.facts);
  return parts;
}

function stageBar(stages) {
  return stages.map((stage) => {
    const segment = el("li", { title: `${stage.node}: layers ${layers(stage)}, weights ${bytes(stage.weight_bytes)}, KV cache ${bytes(stage.kv_bytes)}` }, `${stage.node} `, el("span", { class: "soft" }, layers(stage)));
    segment.style.flexGrow = String(Math.max(1, stage.layer_end - stage.layer_start));
    return segment;
  });
}

const fact = (name, value) => el("div", null, el("dt", null, name), el("dd", null, value));

function update(parts, deployment) {
  parts.dot.className = `dot ${deployment.state}`;
  parts.state.textContent = deployment.state;
  parts.detail.textContent = deployment.detail;
  parts.detail.hidden = !deployment.detail;
  parts.unload.hidden = !isAdmin;
  parts.unload.disabled = deployment.state === "unloading";
  const plan = JSON.stringify(deployment.stages.map((stage) => [stage.node, stage.layer_start, stage.layer_end]));
  if (parts.plan !== plan) {
    parts.plan = plan;
    parts.layers.replaceChildren(...stageBar(deployment.stages));
  }
  parts.facts.replaceChildren(
    fact("Architecture", deployment.architecture || "–"),
    fact("Context", `${deployment.context_tokens.toLocaleString("en")} tokens × ${deployment.max_sequences}`),
    fact("Weights", bytes(deployment.stages.reduce((sum, stage) => sum + stage.weight_bytes, 0))),
    fact("Generated", `${rate(deployment.tokens_per_second)} tokens/s`),
    fact("Running", String(deployment.running)),
    fact("Waiting", String(deployment.waiting)),
    fact("KV memory promised", percent(deployment.kv_usage)),
    ...(deployment.pinned ? [fact("Pinned", "until it is unloaded")] : []),
    ...(deployment.ttl_seconds ? [fact("Unloaded after", `${deployment.ttl_seconds.toLocaleString("en")} s without a request`)] : []),
    ...(deployment.guessing ? [fact("Guesses ahead", deployment.guessing.draft_model ?? "from earlier text")] : []),
    ...(deployment.adapters.length ? [fact("Adapters", deployment.adapters.map((adapter) => (adapter.problem ? `${adapter.name} (${adapter.problem})` : adapter.name)).join(", "))] : []),
  );
}

async function unload(model, parts) {
  if (!(await confirm(`Unload ${model}?`, "All of its replicas end, and requests that are running end with an error.", "Unload"))) return;
  parts.unload.disabled = true;
  try {
    await ask("/api/v1/unload", { body: { model } });
    result(el("p", null, `${model} is unloaded.`));
    byId("title-models").focus();
  } catch (error) {
    parts.unload.disabled = false;
    result(el("p", { class: "error" }, error.message));
  }
}

const result = (...nodes) => byId("load-result").replaceChildren(...nodes.filter(Boolean));

/** The form as the endpoints take it. */
function wish() {
  const number = (id) => (byId(id).value === "" ? null : Number(byId(id).value));
  const chosen = [...byId("load-nodes").querySelectorAll("input:checked")].map((box) => box.value);
  return {
    model: byId("load-model").value.trim(),
    stages: number("load-stages"),
    context_tokens: number("load-context"),
    concurrent_sequences: number("load-sequences"),
    nodes: chosen.length ? chosen : null,
    draft_model: byId("load-draft").disabled ? null : byId("load-draft").value.trim() || null,
    prompt_lookup: byId("load-lookup").checked && !byId("load-lookup").disabled ? 3 : null,
  };
}

function planned(plan) {
  const head = el("h3", null, plan.fits ? `Fits: ${count(plan.stages.length, "stage", "stages")}` : "Does not fit");
  const budgets = el("table", null,
    el("thead", null, el("tr", null, ...["Node", "Budget", "Used", "This plan"].map((name, at) => el("th", { scope: "col", class: at ? "n" : null }, name)))),
    el("tbody", null, ...plan.budgets.map((budget) => el("tr", null, el("th", { scope: "row" }, budget.node), ...[budget.budget_bytes, budget.used_bytes, budget.planned_bytes].map((value) => el("td", { class: "n" }, bytes(value)))))));
  const speed = plan.predicted_tokens_per_second ? [fact("Predicted", `${rate(plan.predicted_tokens_per_second)} tokens/s`)] : [];
  result(head, plan.fits ? el("ul", { class: "layers", "aria-label": "Stages" }, ...stageBar(plan.stages)) : null,
    el("dl", { class: "facts" }, fact("Architecture", plan.architecture), fact("Layers", String(plan.layers)), fact("Weights", bytes(plan.total_weight_bytes)), fact("KV cache", bytes(plan.total_kv_bytes)), fact("Context", `${plan.context_tokens.toLocaleString("en")} tokens`), ...speed),
    el("p", { class: "explanation" }, plan.explanation), el("div", { class: "scroll" }, budgets));
}

async function showPlan() {
  const form = byId("load");
  if (!form.reportValidity()) return;
  result(el("p", { class: "soft" }, "Reading the model's sizes…"));
  try {
    planned(await ask("/api/v1/plan", { body: wish() }));
  } catch (error) {
    result(el("p", { class: "error" }, error.message));
  }
}

const PHASES = { resolving: "Finding the model", planning: "Placing its layers", downloading: "Downloading", starting: "Starting workers", loading: "Loading weights", linking: "Linking the stages", ready: "Ready" };

async function load(event) {
  event.preventDefault();
  if (loading) {
    loading.abort();
    return;
  }
  loading = new AbortController();
  const button = byId("do-load");
  button.textContent = "Cancel";
  const words = el("p", null, "Asking the coordinator…");
  const bars = el("div");
  const byNode = new Map();
  result(el("div", { class: "progress" }, words, bars));
  try {
    const replicas = byId("load-replicas").value === "" ? null : Number(byId("load-replicas").value);
    const minutes = byId("load-ttl").disabled || byId("load-ttl").value === "" ? null : Number(byId("load-ttl").value);
    const keep = { pin: byId("load-pin").checked || null, ttl_seconds: minutes === null ? null : minutes * 60 };
    const body = { ...wish(), ...keep, name: byId("load-name").value.trim() || null, replicas, stream: true };
    let ready = null;
    for await (const { name, data } of events("/api/v1/load", { body, signal: loading.signal })) {
      const report = JSON.parse(data);
      if (name === "error") throw new Error(report.error.message);
      const phase = `${PHASES[report.phase] ?? report.phase}${report.detail ? `: ${report.detail}` : ""}`;
      if (words.textContent !== phase) words.textContent = phase;
      if (report.total_bytes > 0) byNode.set(report.node, report);
      bars.replaceChildren(...[...byNode].map(([node, { done_bytes, total_bytes }]) => el("div", { class: "progress" }, el("p", { "aria-hidden": "true" }, `${node || "cluster"}: ${bytes(done_bytes)} of ${bytes(total_bytes)}`), meter(done_bytes / total_bytes, `${node || "cluster"} loaded`))));
      if (report.deployment) ready = report.deployment;
    }
    if (!ready) throw new Error("the load ended without a word; the cluster's view says how it went");
    result(el("p", null, `${ready.model} is ready. `, el("a", { href: "#chat" }, "Chat with it")));
    byId("load").reset();
  } catch (error) {
    result(error.name === "AbortError" ? el("p", null, "The load was taken back.") : el("p", { class: "error" }, error.message));
  } finally {
    loading = null;
    button.textContent = "Load";
  }
}

/** What excludes each other. */
function settle() {
  byId("load-ttl").disabled = byId("load-pin").checked;
  byId("load-lookup").disabled = byId("load-draft").value.trim() !== "";
  byId("load-draft").disabled = byId("load-lookup").checked;
}

byId("load").addEventListener("input", settle);
byId("load").addEventListener("reset", () => setTimeout(settle));
byId("load").addEventListener("submit", load);
byId("do-plan").addEventListener("click", showPlan);

export const models = {
  session(session) {
    isAdmin = session.role === "admin";
    byId("load").hidden = !isAdmin;
    byId("may-not-load").hidden = isAdmin;
  },
  picture(picture) {
    const name = (deployment) => `${deployment.model}#${deployment.replica} of ${deployment.replicas}`;
    const names = new Set(picture.deployments.map(name));
    for (const [gone, parts] of shown) {
      if (!names.has(gone)) {
        parts.root.remove();
        shown.delete(gone);
      }
    }
    for (const deployment of picture.deployments) {
      let parts = shown.get(name(deployment));
      if (!parts) {
        parts = card(deployment);
        shown.set(name(deployment), parts);
        byId("deployments").append(parts.root);
      }
      update(parts, deployment);
    }
    byId("no-models").hidden = picture.deployments.length > 0;
    const group = byId("load-nodes");
    const listed = picture.nodes.map((node) => node.name).join("\n");
    if (group.dataset.listed !== listed) {
      group.dataset.listed = listed;
      group.replaceChildren(el("legend", null, "Only these nodes"), ...picture.nodes.map((node) => el("label", null, el("input", { type: "checkbox", value: node.id }), node.name)));
    }
  },
};
