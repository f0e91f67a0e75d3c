// The two pools of workers side by side, and what flows between them.

import { byId, element, keyed, setText, shape } from "./dom.js";
import { bytes, count, percent } from "./format.js";

const THICKEST = 14;
const LABEL_HEIGHT = 15;

let transfers = [];
new ResizeObserver(() => showFlows()).observe(byId("flows"));

export function showCluster(cluster) {
  const has = (worker, role) => worker.roles.includes(role);
  const both = cluster.workers.filter((worker) => has(worker, "prefill") && has(worker, "decode"));
  showPool("prefill-pool", cluster.workers.filter((worker) => !both.includes(worker) && has(worker, "prefill")));
  showPool("decode-pool", cluster.workers.filter((worker) => !both.includes(worker) && has(worker, "decode")));
  showPool("both-pool", both);
  byId("both").hidden = both.length === 0;
  const routers = cluster.routers.map((router) => `${router.router_id} (${router.http_address})`).join(", ");
  setText(byId("routers"), routers ? `Routers: ${routers}` : "");
  transfers = cluster.transfers;
  showFlows();
}

function showPool(id, workers) {
  keyed(byId(id), workers, (worker) => worker.worker_id, makeCard, updateCard);
}

function makeCard() {
  return element(
    "article",
    { class: "card" },
    element("p", { class: "name" }, element("span"), element("span", { class: "state" })),
    element("div", { class: "bar", "aria-hidden": "true" }, element("i", { class: "leased" }), element("i", { class: "cached" })),
    element("p", { class: "blocks" }),
    element("p", { class: "load" }),
  );
}

function updateCard(card, worker) {
  const { load } = worker;
  card.dataset.state = worker.state;
  const [name, state] = card.querySelector(".name").children;
  setText(name, worker.worker_id);
  setText(state, worker.state);
  const [leased, cached] = card.querySelector(".bar").children;
  leased.style.width = `${(100 * load.leased_blocks) / (load.total_blocks || 1)}%`;
  cached.style.width = `${(100 * load.cached_blocks) / (load.total_blocks || 1)}%`;
  setText(
    card.querySelector(".blocks"),
    `${percent(load.leased_blocks, load.total_blocks)} held, ${percent(load.cached_blocks, load.total_blocks)} cached ` +
      `of ${count(load.total_blocks)}`,
  );
  const queued = load.queued_tokens ? `, ${count(load.queued_tokens)} tokens queued` : "";
  setText(card.querySelector(".load"), `${load.running_requests} running, ${load.waiting_requests} waiting${queued}`);
  const sent = load.transferred_bytes ? `, sent ${bytes(load.transferred_bytes)} of KV` : "";
  card.title = `epoch ${worker.epoch}, pid ${worker.pid} on ${worker.host}, ${worker.address}${sent}`;
}

function showFlows() {
  const svg = byId("flows");
  const box = svg.getBoundingClientRect();
  const middleOf = (pool, name) => {
    const card = [...byId(pool).children].find((child) => child.dataset.key === name);
    if (!card) return null;
    const place = card.getBoundingClientRect();
    return place.top - box.top + place.height / 2;
  };
  const most = Math.max(...transfers.map((transfer) => transfer.bytes_per_s), 1);
  const arcs = [];
  const labels = [];
  for (const transfer of transfers) {
    const from = middleOf("prefill-pool", transfer.prefill_worker);
    const to = middleOf("decode-pool", transfer.decode_worker);
    if (from === null || to === null) continue;
    const half = box.width / 2;
    const arc = shape("path", {
      d: `M0 ${from} C${half} ${from} ${half} ${to} ${box.width} ${to}`,
      "stroke-width": Math.max((THICKEST * transfer.bytes_per_s) / most, 1.5).toFixed(1),
    });
    const rate = `${bytes(transfer.bytes_per_s)}/s`;
    arc.append(shape("title", {}, `${transfer.prefill_worker} to ${transfer.decode_worker}: ${rate}`));
    arcs.push(arc);
    labels.push({ y: (from + to) / 2 + 4, rate });
  }
  svg.replaceChildren(...arcs, ...(box.width < 90 || labels.length > 8 ? [] : apart(labels, box.width / 2)));
  const told = transfers.map((t) => `${t.prefill_worker} to ${t.decode_worker} ${bytes(t.bytes_per_s)} per second`);
  svg.setAttribute("aria-label", `KV transfers: ${told.join(", ") || "none"}`);
}

/** One under the other where they would overlap. */
function apart(labels, x) {
  let next = -Infinity;
  return labels
    .sort((one, other) => one.y - other.y)
    .map(({ y, rate }) => {
      const at = Math.max(y, next);
      next = at + LABEL_HEIGHT;
      return shape("text", { x, y: at }, rate);
    });
}
