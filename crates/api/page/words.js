// Numbers as people read them.

export function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (count >= 999.5 && unit < units.length - 1) {
    count /= 1000;
    unit += 1;
  }
  return `${unit === 0 || count >= 99.5 ? Math.round(count) : count.toFixed(1)} ${units[unit]}`;
}

export function rate(perSecond) {
  if (perSecond === null || perSecond === undefined) return "–";
  return perSecond >= 99.5 ? Math.round(perSecond).toLocaleString("en") : perSecond.toFixed(1);
}

export function time(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds === 0) return "0";
  if (seconds < 0.001) return `${Math.round(seconds * 1e6)} µs`;
  if (seconds < 1) return `${(seconds * 1000).toFixed(seconds < 0.1 ? 2 : 0)} ms`;
  return `${seconds.toFixed(1)} s`;
}

export const percent = (part) => (part === null || part === undefined ? "–" : `${Math.round(part * 100)} %`);
export const layers = (stage) => `${stage.layer_start}–${stage.layer_end}`;
export const count = (number, one, many) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;
