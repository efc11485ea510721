// Questions to the person. The browser's own modal dialogs keep the focus inside and give it back.

import { byId } from "./dom.js";
import { key, useKey } from "./access.js";

function open(dialog) {
  if (dialog.open) return Promise.resolve("cancel");
  const from = document.activeElement;
  dialog.returnValue = "cancel";
  dialog.showModal();
  return new Promise((resolve) => {
    const closed = () => {
      // News of the time before: the event comes a little after the closing, and the dialog may be open again by then.
      if (dialog.open) return;
      dialog.removeEventListener("close", closed);
      from?.focus?.();
      resolve(dialog.returnValue);
    };
    dialog.addEventListener("close", closed);
  });
}

/** Asks for the API key; true when it changed. `why` is what the node said. */
export async function askForKey(why) {
  if (why) byId("key-why").textContent = why;
  const text = byId("key-text");
  text.value = "";
  const answer = await open(byId("key-dialog"));
  if (answer === "use" && text.value.trim()) useKey(text.value.trim());
  else if (answer === "forget" && key()) useKey(null);
  else return false;
  text.value = "";
  return true;
}

/** Yes or no. */
export async function confirm(title, text, yes) {
  byId("ask-title").textContent = title;
  byId("ask-text").textContent = text;
  byId("ask-yes").textContent = yes;
  return (await open(byId("ask-dialog"))) === "yes";
}
