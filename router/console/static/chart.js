// Percentiles over the latest five minutes, as lines.

import { shape, setText } from "./dom.js";
import { count, duration } from "./format.js";

const SPAN_S = 300;
const LEFT = 52;
const RIGHT = 8;
const TOP = 8;
const BOTTOM = 18;

export class Chart {
  constructor(svg, readout) {
    this.svg = svg;
    this.readout = readout;
    this.latency = null;
    this.pointerX = null;
    svg.addEventListener("pointermove", (event) => this.point(event.clientX - svg.getBoundingClientRect().left));
    svg.addEventListener("pointerleave", () => this.point(null));
    new ResizeObserver(() => this.draw()).observe(svg);
  }

  show(latency) {
    this.latency = latency;
    this.draw();
  }

  point(x) {
    this.pointerX = x;
    this.draw();
  }

  draw() {
    if (this.latency === null) return;
    const { width, height } = this.svg.getBoundingClientRect();
    if (width === 0) return;
    const { points, point_s: pointS } = this.latency;
    // A point stands for the time in its middle; that of the newest is not over.
    const ageOf = (point) => Math.max(point.age_s - pointS / 2, 0);
    const top = niceCeiling(Math.max(...points.map((point) => point.p99_s), 0));
    const x = (ageS) => LEFT + (1 - ageS / SPAN_S) * (width - LEFT - RIGHT);
    const y = (seconds) => TOP + (1 - seconds / top) * (height - TOP - BOTTOM);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const nearest = this.nearest(points, (point) => x(ageOf(point)));
    this.svg.replaceChildren(
      ...grid(width, height, top, x, y),
      ...["p99", "p50"].map((name) => shape("path", { class: name, d: line(points, name, pointS, (p) => x(ageOf(p)), y) })),
      ...(nearest ? [shape("path", { class: "cursor", d: `M${x(ageOf(nearest))} ${TOP}V${height - BOTTOM}` })] : []),
    );
    const told = nearest ? { ...nearest, when: `${Math.round(ageOf(nearest))} s ago: ` } : { ...this.latency, when: "" };
    const text = told.count
      ? `${told.when}p50 ${duration(told.p50_s)}, p99 ${duration(told.p99_s)}, ${count(told.count)} measured`
      : "nothing measured";
    setText(this.readout, text);
    this.svg.setAttribute("aria-label", `${this.svg.parentElement.querySelector("figcaption").firstChild.data.trim()}: ${text}`);
  }

  nearest(points, xOf) {
    if (this.pointerX === null || points.length === 0) return null;
    const distance = (point) => Math.abs(xOf(point) - this.pointerX);
    return points.reduce((best, point) => (distance(point) < distance(best) ? point : best));
  }
}

/** 1, 2 or 5 times a power of ten, not below `value`. */
function niceCeiling(value) {
  if (value <= 0) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value * 0.999);
}

function grid(width, height, top, x, y) {
  const parts = [];
  for (const share of [0, 0.5, 1]) {
    const at = y(share * top);
    parts.push(shape("path", { class: "grid", d: `M${LEFT} ${at}H${width - RIGHT}` }));
    const label = share === 0 ? "0" : duration(share * top).replace(/\.0+ /, " ");
    parts.push(shape("text", { x: LEFT - 6, y: at + 4, "text-anchor": "end" }, label));
  }
  for (const minutes of width < 440 ? [4, 2, 0] : [4, 3, 2, 1, 0]) {
    const anchor = minutes === 0 ? "end" : "middle";
    const text = minutes === 0 ? "now" : `−${minutes} min`;
    parts.push(shape("text", { x: x(60 * minutes), y: height - 4, "text-anchor": anchor }, text));
  }
  return parts;
}

/** Points without a neighbour show as dots; lines break where nothing was measured. */
function line(points, name, pointS, x, y) {
  let path = "";
  points.forEach((point, place) => {
    const before = points[place - 1];
    const follows = before && before.age_s - point.age_s < 1.5 * pointS;
    path += `${follows ? "L" : "M"}${x(point).toFixed(1)} ${y(point[`${name}_s`]).toFixed(1)}`;
    if (!follows) path += "h0.01";
  });
  return path;
}
