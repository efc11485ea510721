// The way to the node: requests with the key of this tab, and streams of events.

const KEY = "mlxnode-key";

export const key = () => sessionStorage.getItem(KEY);

export function useKey(text) {
  if (text) sessionStorage.setItem(KEY, text);
  else sessionStorage.removeItem(KEY);
}

/** What the node said, or that it said nothing. `status` is 0 without an answer. */
export class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** `body` goes as JSON, `form` as it is (files), and without both something is asked; `headers` come besides. */
async function send(path, { body, form, method, signal, headers: more } = {}) {
  const headers = { ...more };
  if (key()) headers.authorization = `Bearer ${key()}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  const tells = body !== undefined || form !== undefined;
  const request = { method: method ?? (tells ? "POST" : "GET"), headers, signal, cache: "no-store", credentials: "omit" };
  if (body !== undefined) request.body = JSON.stringify(body);
  if (form !== undefined) request.body = form;
  let answer;
  try {
    answer = await fetch(path, request);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, "the node does not answer");
  }
  if (answer.ok) return answer;
  let message = `the node answered with status ${answer.status}`;
  try {
    message = (await answer.json()).error.message ?? message;
  } catch {
    // The status alone has to do.
  }
  throw new Refusal(answer.status, message);
}

/** Asks (with a body: tells) and returns the JSON of the answer. */
export const ask = async (path, options) => (await send(path, options)).json();

/** The events of a stream as {name, data}, one after the other, until it ends. */
export async function* events(path, options) {
  const answer = await send(path, options);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        let name = "message";
        const data = [];
        for (const line of block.split("\n")) {
          if (line.startsWith("event: ")) name = line.slice(7);
          else if (line.startsWith("data: ")) data.push(line.slice(6));
        }
        if (data.length > 0) yield { name, data: data.join("\n") };
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
