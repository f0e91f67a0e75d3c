// A playground over the router's own /v1/chat/completions, streamed.

import { askForKey, headers, problemOf } from "./access.js";
import { byId, element, setText } from "./dom.js";
import { duration } from "./format.js";
import { shortId } from "./requests.js";

export class Chat {
  /** `onWaterfall(id)` is called for a request that is to be shown. */
  constructor(onWaterfall) {
    this.onWaterfall = onWaterfall;
    this.model = "";
    this.messages = [];
    this.stopper = null;
  }

  start() {
    byId("chat-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    byId("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.send();
      }
    });
    byId("stop").addEventListener("click", () => this.stopper?.abort());
    byId("clear").addEventListener("click", () => {
      this.stopper?.abort();
      this.messages = [];
      byId("messages").replaceChildren();
    });
  }

  async send() {
    const content = byId("prompt").value.trim();
    if (!content || this.stopper) return;
    byId("prompt").value = "";
    const messages = (this.messages = [...this.messages, { role: "user", content }]);
    addMessage("you", content);
    const answer = addMessage("model", "");
    this.stopper = new AbortController();
    this.setBusy(answer, true);
    const told = { text: "", chunks: 0, startedAt: performance.now(), firstAt: null, requestId: "" };
    try {
      await this.stream(messages, told, answer);
      answer.tell(summaryOf(told));
    } catch (error) {
      const isStopped = error.name === "AbortError";
      answer.tell(isStopped ? `stopped; ${summaryOf(told)}` : error.message, !isStopped);
    } finally {
      this.setBusy(answer, false);
      this.stopper = null;
    }
    // Not into a conversation that was cleared meanwhile.
    if (told.text && this.messages === messages) {
      this.messages = [...messages, { role: "assistant", content: told.text }];
    }
  }

  setBusy(answer, isBusy) {
    answer.item.setAttribute("aria-busy", String(isBusy));
    byId("send").disabled = isBusy;
    byId("stop").disabled = !isBusy;
  }

  async stream(messages, told, answer) {
    const body = { model: await this.modelName(), messages, stream: true };
    const temperature = byId("temperature").valueAsNumber;
    const maxTokens = byId("max-tokens").valueAsNumber;
    if (!Number.isNaN(temperature)) body.temperature = temperature;
    if (!Number.isNaN(maxTokens)) body.max_tokens = maxTokens;
    const response = await this.call("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    });
    told.requestId = response.headers.get("x-request-id");
    answer.link(told.requestId, () => this.onWaterfall(told.requestId));
    let isWhole = false;
    // Read to its end: leaving at [DONE] would look like a client that hangs up.
    for await (const data of eventsOf(response.body)) {
      if (data === "[DONE]") {
        isWhole = true;
        continue;
      }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      const piece = chunk.choices[0]?.delta?.content;
      if (piece) {
        told.firstAt ??= performance.now();
        told.chunks += 1;
        told.text += piece;
        answer.append(piece);
      }
    }
    if (!isWhole) throw new Error("the stream broke off");
  }

  async modelName() {
    if (!this.model) {
      const response = await this.call("v1/models", {});
      this.model = (await response.json()).data[0].id;
    }
    return this.model;
  }

  /** A response that is OK; throws what the router says otherwise. */
  async call(path, options) {
    const all = { ...options, headers: { ...headers(), ...options.headers }, signal: this.stopper.signal };
    let response;
    try {
      response = await fetch(path, all);
    } catch (error) {
      throw error.name === "AbortError" ? error : new Error("the router cannot be reached");
    }
    if (!response.ok) {
      const problem = await problemOf(response);
      if (response.status === 401) askForKey(problem);
      throw new Error(problem);
    }
    return response;
  }
}

/** The data of each server-sent event. */
async function* eventsOf(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const lines = event.split("\n").filter((line) => line.startsWith("data: "));
        if (lines.length) yield lines.map((line) => line.slice("data: ".length)).join("\n");
      }
    }
  } finally {
    await reader.cancel();
  }
}

function addMessage(who, text) {
  const list = byId("messages");
  const body = element("p", { class: "text" }, text);
  const about = element("p", { class: "about" });
  const item = element("li", {}, element("p", { class: "who" }, who), body, about);
  const says = element("span");
  about.append(says);
  list.append(item);
  const follow = () => (list.scrollTop = list.scrollHeight);
  follow();
  return {
    item,
    append(piece) {
      body.append(piece);
      follow();
    },
    link(id, onClick) {
      const button = element("button", { type: "button", class: "link", title: id }, `waterfall ${shortId(id)}`);
      button.addEventListener("click", () => {
        onClick();
        byId("waterfall").scrollIntoView({ block: "nearest" });
      });
      about.append(button);
      onClick();
    },
    tell(words, isError = false) {
      setText(says, words);
      about.classList.toggle("error", isError);
      follow();
    },
  };
}

function summaryOf(told) {
  if (told.firstAt === null) return "nothing came";
  const first = duration((told.firstAt - told.startedAt) / 1000);
  const seconds = (performance.now() - told.firstAt) / 1000;
  const rate = told.chunks > 1 && seconds > 0 ? `, ${((told.chunks - 1) / seconds).toFixed(1)} pieces/s` : "";
  return `first text after ${first}${rate}`;
}
