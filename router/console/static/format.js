// Numbers as people read them.

export function duration(seconds) {
  const ms = 1000 * seconds;
  if (ms < 9.95) return `${ms.toFixed(1)} ms`;
  if (ms < 999.5) return `${ms.toFixed(0)} ms`;
  return seconds < 99.95 ? `${seconds.toFixed(seconds < 9.995 ? 2 : 1)} s` : `${seconds.toFixed(0)} s`;
}

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

export function bytes(number) {
  const unit = number < 1 ? 0 : Math.min(Math.floor(Math.log2(number) / 10), UNITS.length - 1);
  const value = number / 1024 ** unit;
  return `${unit === 0 || value >= 99.95 ? value.toFixed(0) : value.toFixed(1)} ${UNITS[unit]}`;
}

export const count = (number) => number.toLocaleString("en-US");

export const clock = (unixSeconds) => new Date(1000 * unixSeconds).toLocaleTimeString("en-GB");

export const percent = (part, whole) => (whole ? `${Math.round((100 * part) / whole)} %` : "–");
