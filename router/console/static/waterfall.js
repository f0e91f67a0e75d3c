// Where a request's time went: a bar for each stretch, all on one scale. The stretches come from the router.

import { byId, element, setText } from "./dom.js";
import { bytes, clock, count, duration } from "./format.js";

let shown = "";

export function showWaterfall(record) {
  const text = JSON.stringify(record);
  if (text === shown) return;
  shown = text;
  setText(byId("waterfall-id"), record.id);
  const totalS = Math.max(...record.paths.flatMap((path) => path.spans.map((span) => span.end_s)), 1e-9);
  const tokens = `${count(record.num_prompt_tokens)} prompt + ${count(record.num_output_tokens)} output tokens`;
  const facts = `${record.api}, ${clock(record.arrived_unix_s)}, ${record.outcome}, ${tokens}`;
  const parts = [element("p", { class: "facts" }, facts)];
  if (record.error) parts.push(element("p", { class: "facts error" }, record.error));
  record.paths.forEach((path, number) => {
    const heading = record.paths.length > 1 ? `Choice ${number}: ` : "";
    parts.push(element("p", { class: "facts" }, heading + describe(path)));
    parts.push(element("div", { class: "spans" }, ...path.spans.flatMap((span) => rowOf(span, totalS))));
    parts.push(...path.failures.map((failure) => element("p", { class: "facts error" }, failure)));
  });
  byId("waterfall-body").replaceChildren(...parts);
}

function describe(path) {
  if (!path.prefill_worker) return "waits for its turn";
  const decode = path.decode_worker || "nowhere: one token";
  const way = `${path.prefill_worker} → ${decode} over ${path.transport} (${path.placement || "not placed"})`;
  const cached = Object.entries({
    prefill: path.prefill_cached_tokens,
    fetched: path.prefill_pulled_tokens,
    decode: path.decode_cached_tokens,
  })
    .filter(([, number]) => number > 0)
    .map(([place, number]) => `${count(number)} ${place}`);
  return `${way}, ${bytes(path.transferred_bytes)} of KV; cached tokens: ${cached.join(", ") || "none"}`;
}

/** Up to `split_s` a bar is light: a prompt that waits, a transfer that computation hides. */
function rowOf(span, totalS) {
  const stage = span.name.split(" ").at(-1);
  const bar = (kind, startS, endS) => {
    const part = element("i", { class: kind, "data-stage": stage });
    part.style.left = `${(100 * startS) / totalS}%`;
    part.style.width = `${(100 * (endS - startS)) / totalS}%`;
    return part;
  };
  const bars = [];
  if (span.split_s > span.start_s) bars.push(bar("light", span.start_s, span.split_s));
  if (span.end_s > span.split_s) bars.push(bar("full", span.split_s, span.end_s));
  return [
    element("span", { class: "stage" }, span.name),
    element("span", { class: "track", "aria-hidden": "true" }, ...bars),
    element("span", { class: "time" }, duration(span.end_s - span.start_s)),
    element("span", { class: "note" }, span.note),
  ];
}
