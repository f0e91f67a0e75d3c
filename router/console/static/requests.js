// The newest requests, one of which is chosen: its waterfall is shown beside.

import { byId, element, keyed, setText } from "./dom.js";
import { clock, count, duration } from "./format.js";
import { showWaterfall } from "./waterfall.js";

export class Requests {
  /** `onChoose(id)` is called when another request is chosen. */
  constructor(onChoose) {
    this.chosen = "";
    this.records = [];
    this.onChoose = onChoose;
  }

  choose(id) {
    this.chosen = id;
    this.onChoose(id);
    this.draw();
  }

  show(records) {
    this.records = records;
    if (!this.chosen && records.length) {
      this.choose(records[0].id);
      return;
    }
    this.draw();
  }

  draw() {
    byId("no-requests").hidden = this.records.length > 0;
    keyed(
      byId("request-rows"),
      this.records,
      (record) => record.id,
      (record) => this.makeRow(record),
      (row, record) => this.updateRow(row, record),
    );
    const record = this.records.find((one) => one.id === this.chosen);
    if (record) showWaterfall(record);
  }

  makeRow(record) {
    const button = element("button", { type: "button", class: "link", title: record.id }, shortId(record.id));
    button.addEventListener("click", () => this.choose(record.id));
    const cell = (kind) => element("td", { class: kind });
    const numbers = ["number", "number", "number"].map(cell);
    return element("tr", {}, element("td", {}, button), cell(""), cell("outcome"), ...numbers, cell(""));
  }

  updateRow(row, record) {
    const isChosen = record.id === this.chosen;
    row.setAttribute("aria-selected", String(isChosen));
    row.querySelector("button").setAttribute("aria-pressed", String(isChosen));
    row.dataset.outcome = ["running", "ok", "cancelled"].includes(record.outcome) ? record.outcome : "failed";
    const path = record.paths[0];
    const texts = [
      clock(record.arrived_unix_s),
      record.outcome,
      count(record.num_prompt_tokens),
      count(record.num_output_tokens),
      path && path.ttft_s ? duration(path.ttft_s) : "",
      path ? wayOf(path) : "",
    ];
    texts.forEach((text, place) => setText(row.children[place + 1], text));
  }
}

export const shortId = (id) => id.replace(/^req_/, "").slice(0, 8);

function wayOf(path) {
  if (!path.prefill_worker) return "queued";
  if (!path.decode_worker || path.decode_worker === path.prefill_worker) return path.prefill_worker;
  return `${path.prefill_worker} → ${path.decode_worker}`;
}
