// The API key, where the router asks for one: kept in this tab alone, sent with every call.

import { byId, setText } from "./dom.js";

const STORED = "segue-key";

const hasKey = () => sessionStorage.getItem(STORED) !== null;

export function headers() {
  const key = sessionStorage.getItem(STORED);
  return key === null ? {} : { Authorization: `Bearer ${key}` };
}

/** `problem` is what the router said of the call that it refused. */
export function askForKey(problem) {
  setText(byId("key-problem"), problem);
  byId("key-button").hidden = false;
  if (!byId("key-dialog").open) byId("key-dialog").showModal();
}

/** `onChange` is called whenever there is another key, or none any more. */
export function startAccess(onChange) {
  const button = byId("key-button");
  const changed = () => {
    button.hidden = !hasKey();
    setText(button, hasKey() ? "Forget key" : "Enter key");
  };
  byId("key-form").addEventListener("submit", () => {
    const key = byId("key").value.trim();
    byId("key").value = "";
    if (!key) return;
    sessionStorage.setItem(STORED, key);
    changed();
    onChange();
  });
  byId("key-later").addEventListener("click", () => byId("key-dialog").close());
  button.addEventListener("click", () => {
    sessionStorage.removeItem(STORED);
    changed();
    onChange();
  });
  changed();
}

/** What an answer that is not 200 says, for a person. */
export async function problemOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the router answered ${response.status}`;
  }
}
