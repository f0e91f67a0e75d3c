// Asks the router for its state once a second while the page is seen; less and less often while it does not answer.

import { askForKey, headers, problemOf } from "./access.js";

const BETWEEN_MS = 1000;
const LONGEST_PAUSE_MS = 15000;
const PATIENCE_MS = 5000;
const STALE_MS = 3500;

export class Poll {
  /** `onState(state)` gets each answer, `onConnection(name, text)` how things stand between two of them. */
  constructor(onState, onConnection) {
    this.requestId = "";
    this.onState = onState;
    this.onConnection = onConnection;
    this.timer = null;
    this.failures = 0;
    this.problem = "";
    this.isLocked = false;
    this.isAsking = false;
    this.answeredAt = null;
  }

  start() {
    document.addEventListener("visibilitychange", () => (document.hidden ? this.pause() : this.now()));
    setInterval(() => this.tell(), 500);
    this.now();
  }

  pause() {
    clearTimeout(this.timer);
    this.timer = null;
  }

  /** Asks at once, whatever happened before. */
  now() {
    this.pause();
    this.isLocked = false;
    this.failures = 0;
    this.ask();
  }

  async ask() {
    if (this.isAsking) return;
    this.isAsking = true;
    try {
      await this.askOnce();
    } finally {
      this.isAsking = false;
    }
    this.tell();
    if (!document.hidden && !this.isLocked) {
      this.pause();
      const pause = Math.min(BETWEEN_MS * 2 ** this.failures, LONGEST_PAUSE_MS);
      this.timer = setTimeout(() => this.ask(), pause);
    }
  }

  async askOnce() {
    let state;
    try {
      const query = this.requestId ? `?${new URLSearchParams({ request: this.requestId })}` : "";
      const response = await fetch(`console/state${query}`, {
        headers: headers(),
        cache: "no-store",
        signal: AbortSignal.timeout(PATIENCE_MS),
      });
      if (!response.ok) {
        this.problem = await problemOf(response);
        this.isLocked = response.status === 401 || response.status === 403;
        this.failures += 1;
        if (response.status === 401) askForKey(this.problem);
        return;
      }
      state = await response.json();
    } catch (error) {
      this.problem = error.name === "TimeoutError" ? "the router does not answer" : "the router cannot be reached";
      this.failures += 1;
      return;
    }
    this.failures = 0;
    this.answeredAt = performance.now();
    this.onState(state);
  }

  tell() {
    const age = this.answeredAt === null ? Infinity : performance.now() - this.answeredAt;
    const since = age < Infinity ? `, last heard ${Math.round(age / 1000)} s ago` : "";
    if (this.isLocked) this.onConnection("locked", this.problem);
    else if (this.failures > 0) this.onConnection("disconnected", `${this.problem}${since}`);
    else if (age === Infinity) this.onConnection("connecting", "connecting");
    else if (age > STALE_MS) this.onConnection("stale", `stale${since}`);
    else this.onConnection("live", "live");
  }
}
