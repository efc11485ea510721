// The few marks that models use, as elements. Text goes into text nodes; a link is one only to http and https.

import { el } from "./dom.js";

const INLINE = /(`+)([^]*?)\1|\*\*([^]+?)\*\*|\*([^*\s](?:[^*]*[^*\s])?)\*|\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)/;

function inline(text) {
  const nodes = [];
  let rest = text;
  while (rest) {
    const found = INLINE.exec(rest);
    if (!found) break;
    if (found.index > 0) nodes.push(rest.slice(0, found.index));
    const [whole, , code, bold, slanted, label, target] = found;
    if (code !== undefined) nodes.push(el("code", null, code));
    else if (bold !== undefined) nodes.push(el("strong", null, ...inline(bold)));
    else if (slanted !== undefined) nodes.push(el("em", null, ...inline(slanted)));
    else nodes.push(el("a", { href: target, target: "_blank", rel: "noopener noreferrer" }, label));
    rest = rest.slice(found.index + whole.length);
  }
  if (rest) nodes.push(rest);
  return nodes;
}

const FENCE = /^\s*(```+|~~~+)(.*)$/;
const HEADING = /^#{1,6}\s+(.*)$/;
const BULLET = /^\s*[-*+]\s+(.*)$/;
const NUMBER = /^\s*(\d{1,9})[.)]\s+(.*)$/;
const QUOTE = /^\s*>\s?(.*)$/;

/** Blocks for a text; what is not closed yet (an answer under way) runs to the end. */
export function markdown(text) {
  const blocks = [];
  const lines = text.split("\n");
  let paragraph = [];
  const flush = () => {
    if (paragraph.length === 0) return;
    const parts = paragraph.flatMap((line, index) => (index === 0 ? inline(line) : [el("br"), ...inline(line)]));
    blocks.push(el("p", null, ...parts));
    paragraph = [];
  };
  for (let at = 0; at < lines.length; at += 1) {
    const line = lines[at];
    const fence = FENCE.exec(line);
    if (fence) {
      flush();
      const code = [];
      for (at += 1; at < lines.length && !lines[at].trim().startsWith(fence[1]); at += 1) code.push(lines[at]);
      blocks.push(el("pre", { tabindex: 0 }, el("code", null, code.join("\n"))));
      continue;
    }
    const heading = HEADING.exec(line);
    if (heading) {
      flush();
      blocks.push(el("h3", null, ...inline(heading[1])));
      continue;
    }
    const kind = BULLET.test(line) ? BULLET : NUMBER.test(line) ? NUMBER : null;
    if (kind && !(kind === NUMBER && paragraph.length > 0)) {
      flush();
      const start = kind === NUMBER ? Number(NUMBER.exec(line)[1]) : 1;
      const items = [];
      for (; at < lines.length && kind.test(lines[at]); at += 1) items.push(el("li", null, ...inline(kind.exec(lines[at]).at(-1))));
      at -= 1;
      blocks.push(el(kind === NUMBER ? "ol" : "ul", kind === NUMBER && start !== 1 ? { start } : null, ...items));
      continue;
    }
    const quote = QUOTE.exec(line);
    if (quote) {
      flush();
      const quoted = [];
      for (; at < lines.length && QUOTE.test(lines[at]); at += 1) quoted.push(QUOTE.exec(lines[at])[1]);
      at -= 1;
      blocks.push(el("blockquote", null, ...inline(quoted.join(" "))));
      continue;
    }
    if (line.trim() === "") flush();
    else paragraph.push(line);
  }
  flush();
  return blocks;
}
