// The page: what the router says once a second goes into its parts.

import { startAccess } from "./access.js";
import { Chart } from "./chart.js";
import { Chat } from "./chat.js";
import { byId, element, setText } from "./dom.js";
import { bytes, count, duration, percent } from "./format.js";
import { Poll } from "./poll.js";
import { Requests } from "./requests.js";
import { showCluster } from "./workers.js";

const ttftChart = new Chart(byId("ttft-chart"), byId("ttft-readout"));
const interTokenChart = new Chart(byId("inter-token-chart"), byId("inter-token-readout"));
const poll = new Poll(show, showConnection);
const requests = new Requests((id) => (poll.requestId = id));
const chat = new Chat((id) => {
  requests.choose(id);
  poll.now();
});

function show(state) {
  const { cluster } = state;
  setText(byId("model"), `${cluster.model}, Segue ${cluster.version}`);
  showProblems(cluster);
  showSummary(state);
  showCluster(cluster);
  ttftChart.show(state.ttft);
  interTokenChart.show(state.inter_token);
  requests.show(state.requests);
}

function showSummary({ cluster, ttft, inter_token: interToken }) {
  const sum = (field) => cluster.workers.reduce((total, worker) => total + worker.load[field], 0);
  const waiting = cluster.waiting_requests ? `, ${count(cluster.waiting_requests)} waiting` : "";
  const running = count(cluster.active_requests - cluster.waiting_requests);
  setText(byId("active"), `${running} running${waiting}`);
  const ready = cluster.workers.filter((worker) => worker.state === "ready").length;
  setText(byId("ready"), `${ready} of ${cluster.workers.length}`);
  setText(byId("held"), percent(sum("leased_blocks"), sum("total_blocks")));
  const moving = cluster.transfers.reduce((total, transfer) => total + transfer.bytes_per_s, 0);
  setText(byId("moving"), `${bytes(moving)}/s`);
  const both = (latency) => (latency.count ? `${duration(latency.p50_s)} / ${duration(latency.p99_s)}` : "–");
  setText(byId("ttft"), both(ttft));
  setText(byId("inter-token"), both(interToken));
}

function showProblems(cluster) {
  const problems = [];
  if (cluster.missing_roles.length) {
    problems.push(`Cannot serve: no ready worker for ${cluster.missing_roles.join(" and ")}.`);
  }
  if (!cluster.membership_fresh) {
    problems.push("The membership store cannot be reached; this is the last list of workers known.");
  }
  const list = byId("problems");
  const told = [...list.children].map((child) => child.textContent);
  if (told.join("\n") !== problems.join("\n")) {
    list.replaceChildren(...problems.map((problem) => element("li", {}, problem)));
    list.hidden = problems.length === 0;
  }
}

function showConnection(name, text) {
  const connection = byId("connection");
  connection.dataset.state = name;
  setText(connection, text);
  document.body.toggleAttribute("data-old", name !== "live" && name !== "connecting");
}

startAccess(() => poll.now());
chat.start();
poll.start();
