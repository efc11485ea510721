// The page: which view is shown, who is asking, and the stream of pictures of the cluster that all views live on.

import { ask, events, key } from "./access.js";
import { chat } from "./chat.js";
import { cluster } from "./cluster.js";
import { askForKey } from "./dialogs.js";
import { byId } from "./dom.js";
import { jobs } from "./jobs.js";
import { models } from "./models.js";

const VIEWS = { cluster, models, chat, jobs };
const RETRY = 2000;

// --- Views ---

function show(isFirst) {
  const name = location.hash.slice(1) in VIEWS ? location.hash.slice(1) : "cluster";
  for (const view of Object.keys(VIEWS)) byId(`view-${view}`).hidden = view !== name;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${byId(`title-${name}`).textContent} · mlxnode`;
  VIEWS[name].shown?.();
  // Who reads by ear hears where they are; the first view is the page's own beginning.
  if (!isFirst) byId(`title-${name}`).focus();
}

window.addEventListener("hashchange", () => {
  if (location.hash !== "#main") show(false);
});
byId("skip").addEventListener("click", (event) => {
  event.preventDefault();
  byId("main").focus();
});

// --- Light and dark ---

const THEMES = ["auto", "light", "dark"];

function paint(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  byId("theme").textContent = `Theme: ${theme}`;
}

const kept = () => (THEMES.includes(localStorage.getItem("mlxnode-theme")) ? localStorage.getItem("mlxnode-theme") : "auto");
byId("theme").addEventListener("click", () => {
  const theme = THEMES[(THEMES.indexOf(kept()) + 1) % THEMES.length];
  localStorage.setItem("mlxnode-theme", theme);
  paint(theme);
});

// --- Pictures ---

let following = new AbortController();

function live(kind, words) {
  const place = byId("live");
  place.className = `live ${kind}`;
  // Said once, not at every picture.
  if (place.lastElementChild.textContent !== words) place.lastElementChild.textContent = words;
}

function picture(told) {
  byId("cluster-name").textContent = told.cluster || "mlxnode";
  for (const view of Object.values(VIEWS)) view.picture?.(told);
  live("on", "live");
}

/** Follows the cluster until another key is used; asks for a key when the node wants one. */
async function follow() {
  following.abort();
  following = new AbortController();
  const { signal } = following;
  while (!signal.aborted) {
    try {
      const session = await ask("/api/v1/session", { signal });
      byId("key").textContent = session.key ? `Key: ${session.key}` : "API key";
      models.session(session);
      jobs.session(session);
      for await (const { name, data } of events("/api/v1/events", { signal })) {
        if (name === "cluster") picture(JSON.parse(data));
      }
      live("off", "reconnecting");
    } catch (error) {
      if (error.name === "AbortError") return;
      live("off", error.status === 401 || error.status === 403 ? "key needed" : "not reachable");
      if (error.status === 401 || error.status === 403) {
        const why = key() ? `The node does not take this key: ${error.message}` : "This node asks for an API key. Whoever runs the cluster makes one by mlxnode keys create NAME.";
        if (await askForKey(why)) continue;
        return;
      }
    }
    await new Promise((resolve) => setTimeout(resolve, RETRY));
  }
}

byId("key").addEventListener("click", async () => {
  if (await askForKey("The key that this tab sends. Where a cluster has no keys, none is needed.")) follow();
});

paint(kept());
show(true);
follow();
