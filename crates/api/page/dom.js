// Elements from values. Text is always a text node: nothing that a model or a cluster says is ever read as markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** An element of HTML with attributes and children (nodes or texts). */
export function el(name, attributes, ...children) {
  return fill(document.createElement(name), attributes, children);
}

/** An element of SVG. */
export function svg(name, attributes, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

export const byId = (id) => document.getElementById(id);

/** A line of small numbers over time, the newest at the right. */
export function spark(values, slots) {
  const top = Math.max(1e-9, ...values);
  const start = slots - values.length;
  const points = values.map((value, index) => `${start + index},${(24 - (value / top) * 22).toFixed(2)}`);
  const line = svg("path", { d: points.length > 1 ? `M${points.join("L")}` : "" });
  return svg("svg", { class: "spark", viewBox: `0 0 ${slots - 1} 26`, preserveAspectRatio: "none", "aria-hidden": "true" }, line);
}

/** How much of something is used. */
export function meter(part, label) {
  const bar = el("i");
  bar.style.width = `${(Math.min(1, Math.max(0, part)) * 100).toFixed(1)}%`;
  const percent = Math.round(part * 100);
  return el("div", { class: "meter", role: "meter", "aria-label": label, "aria-valuemin": 0, "aria-valuemax": 100, "aria-valuenow": percent }, bar);
}
