// A conversation with a model, as it is written. Reasoning is folded, tool calls are shown and not carried out.

import { events } from "./access.js";
import { byId, el } from "./dom.js";
import { markdown } from "./markdown.js";
import { count, rate } from "./words.js";

let messages = [];
let answering = null;

const log = byId("chat-log");
const input = byId("chat-input");

/** One turn of the model, growing. Text is drawn at most once a frame. */
class Answer {
  constructor(model) {
    this.text = "";
    this.thoughts = "";
    this.calls = [];
    this.began = performance.now();
    this.said = el("div", { class: "said" });
    this.end = el("p", { class: "end" });
    this.root = el("article", { class: "turn assistant", "aria-busy": true }, el("p", { class: "who" }, model), this.said, this.end);
  }

  add(delta) {
    if (!this.first && (delta.content || delta.reasoning_content || delta.tool_calls)) this.first = performance.now();
    if (delta.reasoning_content) this.thoughts += delta.reasoning_content;
    if (delta.content) this.text += delta.content;
    for (const call of delta.tool_calls ?? []) this.calls.push(call);
    if (delta.content && this.thoughts && !this.thought) this.thought = performance.now();
    this.frame ??= requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.frame = null;
    const nearEnd = window.innerHeight + window.scrollY > document.body.scrollHeight - 120;
    if (this.thoughts) {
      if (!this.folded) {
        this.folded = { words: el("summary", null, "Thinking…"), text: el("div") };
        this.said.before(el("details", { class: "thought" }, this.folded.words, this.folded.text));
      }
      if (this.folded.text.textContent !== this.thoughts) this.folded.text.textContent = this.thoughts;
      if (this.thought) this.folded.words.textContent = `Thought for ${((this.thought - this.began) / 1000).toFixed(1)} seconds`;
    }
    const calls = this.calls.map((call) => el("div", { class: "call" }, "Calls ", el("strong", null, call.function?.name ?? "a function"), el("pre", null, el("code", null, call.function?.arguments ?? ""))));
    this.said.replaceChildren(...markdown(this.text.trimStart()), ...calls);
    if (nearEnd) window.scrollTo({ top: document.body.scrollHeight });
  }

  finish(words) {
    if (this.frame) cancelAnimationFrame(this.frame);
    if (this.thoughts && !this.thought) this.thought = performance.now();
    this.draw();
    this.end.textContent = words;
    this.root.removeAttribute("aria-busy");
  }
}

const ENDS = { length: "cut at the most tokens", tool_calls: "waits for a tool", content_filter: "filtered" };

function ending(answer, usage, reason) {
  const words = [];
  if (usage) {
    words.push(count(usage.completion_tokens, "token", "tokens"));
    const seconds = (performance.now() - answer.first) / 1000;
    if (usage.completion_tokens > 1 && seconds > 0) words.push(`${rate((usage.completion_tokens - 1) / seconds)} tokens/s`);
    words.push(`first after ${((answer.first - answer.began) / 1000).toFixed(2)} s`);
  }
  if (ENDS[reason]) words.push(ENDS[reason]);
  return words.join(" · ");
}

function request() {
  const number = (id) => (byId(id).value === "" ? null : Number(byId(id).value));
  const system = byId("chat-system").value.trim();
  return {
    model: byId("chat-model").value,
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    temperature: number("chat-temperature"),
    max_tokens: number("chat-tokens"),
    stream: true,
    stream_options: { include_usage: true },
  };
}

async function send() {
  const text = input.value.trim();
  if (!text || answering || !byId("chat-model").value) return;
  input.value = "";
  grow();
  messages.push({ role: "user", content: text });
  const asked = el("article", { class: "turn user" }, el("p", { class: "who" }, "You"), el("div", { class: "said" }, text));
  const answer = new Answer(byId("chat-model").value);
  log.append(asked, answer.root);
  answer.root.scrollIntoView({ block: "end" });
  const stop = new AbortController();
  answering = stop;
  buttons();
  let usage = null;
  let reason = null;
  try {
    for await (const { data } of events("/v1/chat/completions", { body: request(), signal: stop.signal })) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      usage = chunk.usage ?? usage;
      reason = chunk.choices?.[0]?.finish_reason ?? reason;
      if (chunk.choices?.[0]?.delta) answer.add(chunk.choices[0].delta);
    }
    answer.finish(ending(answer, usage, reason));
  } catch (error) {
    const stopped = error.name === "AbortError";
    answer.finish(stopped ? "stopped" : error.message);
    answer.end.classList.toggle("error", !stopped);
  } finally {
    answering = null;
    buttons();
  }
  // What was said stays part of the conversation, even cut; a question without any answer does not.
  if (answer.text.trim()) messages.push({ role: "assistant", content: answer.text });
  else {
    messages.pop();
    if (!answer.calls.length && !input.value) input.value = text;
  }
  if (document.activeElement === document.body || document.activeElement === byId("chat-stop")) input.focus();
}

function buttons() {
  byId("chat-stop").hidden = !answering;
  byId("chat-send").hidden = Boolean(answering);
  byId("chat-send").disabled = !byId("chat-model").value;
}

function grow() {
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight + 2}px`;
}

byId("chat-form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
byId("chat-stop").addEventListener("click", () => {
  answering?.abort();
  input.focus();
});
byId("chat-new").addEventListener("click", () => {
  answering?.abort();
  messages = [];
  log.replaceChildren();
  input.focus();
});
input.addEventListener("input", grow);
input.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
byId("view-chat").addEventListener("keydown", (event) => {
  if (event.key === "Escape") answering?.abort();
});

export const chat = {
  picture(picture) {
    const select = byId("chat-model");
    const names = ({ model, adapters }) => [model, ...adapters.filter((adapter) => !adapter.problem).map((adapter) => `${model}:${adapter.name}`)];
    const ready = picture.deployments.filter((deployment) => deployment.state === "ready").flatMap(names).filter((model, at, all) => all.indexOf(model) === at);
    if (select.dataset.listed === ready.join("\n") && select.options.length) return;
    select.dataset.listed = ready.join("\n");
    const chosen = select.value;
    const none = el("option", { value: "" }, "no model is ready");
    select.replaceChildren(...(ready.length ? ready.map((model) => el("option", { value: model }, model)) : [none]));
    if (ready.includes(chosen)) select.value = chosen;
    buttons();
  },
};
