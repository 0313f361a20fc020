"use strict";
// What the other scripts build with: elements, numbers as text, ticks of an axis.
// Text from the run reaches the page as text nodes and attributes alone, never as markup.

function element(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

function shape(name, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function filled(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) if (value !== null) node.setAttribute(key, value);
  node.append(...children.filter((child) => child !== null));
  return node;
}

const finite = (value) => (typeof value === "number" && Number.isFinite(value) ? value : null);
const minus = (text) => text.replace("-", "\u2212");

/** Least and greatest of some numbers, of which there may be more than a function takes as arguments. */
function extent(values) {
  return [values.reduce((a, b) => Math.min(a, b), Infinity), values.reduce((a, b) => Math.max(a, b), -Infinity)];
}

/** A number with decimals that tell values apart on a scale of this span. */
function format(value, span) {
  if (value === null) return "\u2013";
  if (value === 0) return "0";
  if (Math.abs(value) >= 1e6 || Math.abs(value) < 1e-4) return minus(value.toExponential(2));
  const decimals = span > 0 ? Math.min(6, Math.max(0, 2 - Math.floor(Math.log10(span)))) : 3;
  return minus(value.toFixed(decimals));
}

/** Round numbers from low to high, about as many as asked for; on a log scale 1, 2 and 5 times powers of ten. */
function ticks(low, high, count, log) {
  if (log) {
    const [first, last] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
    const every = Math.ceil((last - first) / 8);
    const found = [];
    for (let power = first; power <= last; power += every)
      for (const factor of last - first <= 3 ? [1, 2, 5] : [1]) found.push(factor * 10 ** power);
    return found.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
  }
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999) * power;
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(Number((k * step).toPrecision(12)));
  return found;
}

function tickText(tick, step) {
  if (tick !== 0 && (Math.abs(tick) >= 1e6 || step < 1e-5)) return minus(tick.toExponential(1));
  return minus(tick.toFixed(Math.max(0, -Math.floor(Math.log10(step) + 1e-9))));
}

/** Runs of neighbouring points that have what is asked for. */
function unbroken(points, has) {
  const parts = [[]];
  for (const point of points) has(point) ? parts.at(-1).push(point) : parts.push([]);
  return parts.filter((part) => part.length);
}
