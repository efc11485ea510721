// The cluster as a drawing: nodes as cards, links between them with their round trips, and the way of the activations through the stages.
// The tables below it say the same in words.

import { svg } from "./dom.js";
import { bytes, layers, rate, time } from "./words.js";

const WIDTH = 216;
const CHIP = 22;
const MOST_CHIPS = 4;

/** Where the cards are: side by side, round a circle when there are many, one below the other on a narrow screen. */
function places(heights, room) {
  const count = heights.length;
  const tallest = Math.max(...heights);
  if (room < 560 || count === 1) {
    let y = 20;
    const spots = heights.map((height) => {
      const spot = { x: 40, y, height };
      y += height + 62;
      return spot;
    });
    return { spots, width: WIDTH + 80 + (count > 2 ? 40 * (count - 1) : 0), height: y - 42, isColumn: true };
  }
  const gap = 130;
  if (count * (WIDTH + gap) - gap <= Math.max(room, 900) && count <= 4) {
    const spots = heights.map((height, index) => ({ x: 30 + index * (WIDTH + gap), y: 20 + (tallest - height) / 2, height }));
    return { spots, width: count * (WIDTH + gap) - gap + 60, height: tallest + 40 + (count > 2 ? 24 + 28 * (count - 2) : 0), isRow: true };
  }
  const radius = Math.max(250, (count * (WIDTH + 60)) / (2 * Math.PI));
  const across = radius * 1.35;
  const spots = heights.map((height, index) => {
    const angle = (index / count) * 2 * Math.PI - Math.PI / 2;
    return { x: across + Math.cos(angle) * across + 20, y: radius + Math.sin(angle) * radius * 0.85 + 20, height };
  });
  const top = Math.min(...spots.map((spot) => spot.y)) - 20;
  for (const spot of spots) spot.y -= top;
  return { spots, width: across * 2 + WIDTH + 40, height: Math.max(...spots.map((spot) => spot.y + spot.height)) + 20 };
}

const middle = (spot) => [spot.x + WIDTH / 2, spot.y + spot.height / 2];

/** The point where the line from the middle of a card toward another point leaves the card. */
function edge(spot, [x, y]) {
  const [cx, cy] = middle(spot);
  const [dx, dy] = [x - cx, y - cy];
  const part = Math.min(WIDTH / 2 / Math.max(1e-6, Math.abs(dx)), spot.height / 2 / Math.max(1e-6, Math.abs(dy)));
  return [cx + dx * part, cy + dy * part];
}

/** A curve between two cards. Those that are not neighbours go round the ones between, at the side or below. */
function way(plan, from, to, lift) {
  const apart = Math.abs(from - to);
  const [a, b] = [plan.spots[from], plan.spots[to]];
  const [ma, mb] = [middle(a), middle(b)];
  let bend = [(ma[0] + mb[0]) / 2 + (plan.isColumn ? lift : 0), (ma[1] + mb[1]) / 2 + (plan.isColumn ? 0 : lift)];
  let start = null;
  let end = null;
  const shift = lift / 3;
  if (apart > 1 && plan.isColumn) {
    const side = a.x + WIDTH;
    bend = [side + 30 + 40 * (apart - 1) - Math.abs(shift), (ma[1] + mb[1]) / 2];
    start = [side, ma[1] + shift];
    end = [side, mb[1] - shift];
  } else if (apart > 1 && plan.isRow) {
    const bottom = Math.max(...plan.spots.map((spot) => spot.y + spot.height));
    bend = [(ma[0] + mb[0]) / 2, bottom + 56 * (apart - 1) - Math.abs(shift)];
    start = [ma[0] + shift, a.y + a.height];
    end = [mb[0] - shift, b.y + b.height];
  }
  start ??= edge(a, bend);
  end ??= edge(b, bend);
  // Where words stand: in the middle; for those that cross in the middle of a circle a third of the way; in a column beside the arrows.
  const ring = Math.min(apart, plan.spots.length - apart);
  const part = !plan.isColumn && !plan.isRow && ring > 1 ? 0.3 : 0.5;
  const along = (axis) => (1 - part) ** 2 * start[axis] + 2 * part * (1 - part) * bend[axis] + part ** 2 * end[axis];
  const at = [along(0) + (plan.isColumn && apart === 1 ? 52 : 0), along(1)];
  return { d: `M${start.map((n) => n.toFixed(1))}Q${bend.map((n) => n.toFixed(1))} ${end.map((n) => n.toFixed(1))}`, at };
}

function card(node, spot, chips, isOwn) {
  const used = node.memory_budget_bytes ? Math.min(1, node.memory_used_bytes / node.memory_budget_bytes) : 0;
  const { x, y, height } = spot;
  const inside = WIDTH - 28;
  const group = svg("g", { class: `${isOwn ? "own" : ""} ${node.state === "alive" ? "" : "away"}` });
  group.append(
    svg("rect", { class: "node", x, y, width: WIDTH, height, rx: 12 }),
    svg("circle", { class: node.state, cx: x + 19, cy: y + 23, r: 4.5 }),
    svg("text", { class: "name", x: x + 31, y: y + 28 }, short(node.name, 21)),
    svg("text", { class: "small", x: x + 14, y: y + 47 }, short(node.state === "alive" ? node.chip : node.problem ?? node.state, 32)),
    svg("rect", { class: "track", x: x + 14, y: y + 57, width: inside, height: 5, rx: 2.5 }),
    svg("rect", { class: "fill", x: x + 14, y: y + 57, width: Math.max(used > 0 ? 3 : 0, inside * used), height: 5, rx: 2.5 }),
    svg("text", { class: "small", x: x + 14, y: y + 78 }, `${bytes(node.memory_used_bytes)} of ${bytes(node.memory_budget_bytes)}`),
  );
  chips.slice(0, MOST_CHIPS).forEach((text, index) => {
    const top = y + 88 + index * CHIP;
    group.append(
      svg("rect", { class: "chip", x: x + 10, y: top, width: WIDTH - 20, height: CHIP - 4, rx: 5 }),
      svg("text", { class: "chip-text", x: x + 17, y: top + 13 }, index === MOST_CHIPS - 1 && chips.length > MOST_CHIPS ? `and ${chips.length - index} more` : text),
    );
  });
  return group;
}

const short = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

function label(group, [x, y], lines) {
  const widest = Math.max(...lines.map((line) => line.length)) * 6.4 + 10;
  group.append(svg("rect", { class: "plate", x: x - widest / 2, y: y - 9, width: widest, height: lines.length * 15 + 3, rx: 4 }));
  lines.forEach((line, index) => group.append(svg("text", { class: "small", x, y: y + 4 + index * 15, "text-anchor": "middle" }, line)));
}

/** The mean of what both ends measured. */
function roundTrip(a, b) {
  const told = [a.links.find((link) => link.to === b.id), b.links.find((link) => link.to === a.id)];
  const known = told.map((link) => link?.rtt_seconds).filter((rtt) => rtt);
  return known.length ? known.reduce((sum, rtt) => sum + rtt, 0) / known.length : null;
}

/** Draws a picture of the cluster for a place of so many pixels. */
export function drawMap(picture, room) {
  const { nodes } = picture;
  if (nodes.length === 0) return [];
  const index = new Map(nodes.map((node, at) => [node.id, at]));
  const chips = nodes.map(() => []);
  const flows = new Map();
  for (const deployment of picture.deployments) {
    deployment.stages.forEach((stage, at) => {
      const here = index.get(stage.node_id);
      if (here === undefined) return;
      chips[here].push(short(`${deployment.model} · ${layers(stage)}`, 30));
      const next = deployment.stages[at + 1];
      const there = next && index.get(next.node_id);
      // Another replica begins at layer 0 again: nothing flows there.
      if (there === undefined || there === here || next.layer_start !== stage.layer_end) return;
      const name = `${here}>${there}`;
      const speed = stage.figures?.rates?.sent_bytes_per_second ?? 0;
      flows.set(name, { here, there, speed: Math.max(speed, flows.get(name)?.speed ?? 0) });
    });
  }
  const heights = chips.map((own) => 90 + Math.min(MOST_CHIPS, own.length) * CHIP + (own.length ? 6 : 0));
  const plan = places(heights, room);
  const drawing = svg("svg", { viewBox: `0 0 ${plan.width.toFixed(0)} ${plan.height.toFixed(0)}`, role: "img", "aria-label": inWords(picture) });
  drawing.style.maxWidth = `${Math.round(plan.width * 1.15)}px`;
  drawing.style.margin = "0 auto";
  drawing.append(svg("defs", null, svg("marker", { id: "tip", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 6, markerHeight: 6, orient: "auto-start-reverse" }, svg("path", { class: "tip", d: "M0 0 8 4 0 8z" }))));
  const labels = svg("g");
  for (let a = 0; a < nodes.length; a += 1) {
    for (let b = a + 1; b < nodes.length; b += 1) {
      const rtt = roundTrip(nodes[a], nodes[b]);
      const flow = flows.get(`${a}>${b}`) ?? flows.get(`${b}>${a}`);
      if (rtt === null && !flow) continue;
      const line = way(plan, a, b, 0);
      drawing.append(svg("path", { class: "link", d: line.d }));
      const words = [];
      if (rtt !== null) words.push(time(rtt));
      if (flow?.speed) words.push(`${bytes(flow.speed)}/s`);
      if (words.length) label(labels, line.at, words);
    }
  }
  for (const { here, there } of flows.values()) {
    drawing.append(svg("path", { class: "flow", d: way(plan, here, there, here < there ? -26 : 26).d, "marker-end": "url(#tip)" }));
  }
  drawing.append(labels);
  nodes.forEach((node, at) => drawing.append(card(node, plan.spots[at], chips[at], node.id === picture.node_id)));
  return [drawing];
}

function inWords(picture) {
  const nodes = picture.nodes.map((node) => `${node.name} ${node.state}`).join(", ");
  const flows = picture.deployments.map((deployment) => `${deployment.model} over ${deployment.stages.map((stage) => `${stage.node} ${layers(stage)}`).join(" to ")}, ${rate(deployment.tokens_per_second)} tokens a second`);
  return `Map of the cluster. Nodes: ${nodes}. ${flows.length ? `Models: ${flows.join("; ")}.` : "No model is loaded."}`;
}
