"use strict";
// One chart: values at an epoch, an SVG plot that answers to pointer and arrow keys, and a table of all values.

const DASHES = ["", "7 3", "2 3", "9 3 2 3"];
const cursor = { epoch: null, charts: [] }; // all charts show the same epoch; null is the newest of each

/** Low and high end of a point's band, or null. */
function band(point) {
  if (point.y === null) return null;
  if (finite(point.error) !== null) return [point.y - point.error, point.y + point.error];
  return finite(point.low) !== null && finite(point.high) !== null ? [point.low, point.high] : null;
}

/**
 * spec: title, badge, note, domain (first and last epoch of the axis), best (an epoch), zero (the axis starts at 0), log (allowed where values span more than a factor 30),
 * stacked, and series: [{name, color 1 to 8, dash 0 to 3, dots, points: [{x, y, error or low and high}] by rising x}].
 */
class Chart {
  constructor(spec) {
    this.spec = spec;
    this.epochs = [...new Set(spec.series.flatMap((series) => series.points.map((point) => point.x)))].sort((a, b) => a - b);
    this.at = spec.series.map((series) => new Map(series.points.map((point) => [point.x, point])));
    this.setScales();
    this.plot = element("div", {
      class: "plot",
      tabindex: 0,
      role: "slider",
      "aria-label": `${spec.title} by epoch`,
      "aria-orientation": "horizontal",
      "aria-valuemin": this.epochs[0],
      "aria-valuemax": this.epochs.at(-1),
    });
    this.label = element("span", { class: "at" });
    this.values = spec.series.map(() => element("span", { class: "value" }));
    this.node = element("figure", { class: "card chart" }, this.head(), this.legend(), this.plot, this.caption(), this.table());
    this.listen();
    new ResizeObserver(() => this.draw()).observe(this.plot);
    cursor.charts.push(this);
    this.show();
  }

  setScales() {
    const { series, stacked, zero, log } = this.spec;
    const points = series.flatMap((one) => one.points).filter((point) => point.y !== null);
    let values = points.flatMap((point) => [point.y, ...(band(point) ?? [])]);
    if (stacked) values = this.epochs.map((x) => this.at.reduce((sum, at) => sum + (at.get(x)?.y ?? 0), 0));
    const positive = points.map((point) => point.y).filter((y) => y > 0);
    const [least, most] = extent(positive);
    this.log = Boolean(log) && most > 30 * least;
    let [low, high] = extent(values);
    if (this.log) {
      [low, high] = extent(values.filter((value) => value > 0));
      this.range = [low / 1.2, high * 1.2];
    } else {
      if (zero) low = Math.min(0, low);
      const margin = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
      this.range = [zero && low === 0 ? 0 : low - margin, high + margin];
    }
    this.span = this.range[1] - this.range[0];
    this.domain = stacked ? [this.epochs[0] - 0.5, this.epochs.at(-1) + 0.5] : this.spec.domain;
  }

  head() {
    const { title, badge } = this.spec;
    const mark = badge ? element("span", { class: `badge ${badge === "not trained on" ? "heldout" : ""}` }, badge) : null;
    return element("div", { class: "head" }, element("h3", {}, title, mark), this.label);
  }

  legend() {
    const { series } = this.spec;
    const items = series.map((one, i) =>
      element(
        "li",
        {},
        ...(series.length > 1 ? [swatch(one), element("span", { class: "name", title: one.name }, one.name)] : []),
        this.values[i],
      ),
    );
    return element("ul", { class: series.length > 1 ? `values ${this.spec.stacked ? "" : "long"}` : "values one" }, ...items);
  }

  caption() {
    const note = [this.spec.note, this.log ? "Log scale." : ""].filter(Boolean).join(" ");
    return element("figcaption", { class: "soft" }, note);
  }

  /** Filled when it is opened: a long run has thousands of rows. */
  table() {
    const details = element("details", {}, element("summary", {}, "Values"));
    details.addEventListener("toggle", () => {
      if (details.childElementCount > 1) return;
      const names = this.spec.series.map((one) => element("th", { scope: "col" }, one.name));
      const head = element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "epoch"), ...names));
      const rows = this.epochs.map((x) =>
        element(
          "tr",
          {},
          element("th", { scope: "row" }, String(x)),
          ...this.at.map((at) => element("td", {}, this.text(at.get(x)))),
        ),
      );
      const table = element("table", {}, head, element("tbody", {}, ...rows));
      details.append(
        element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `Values of ${this.spec.title}` }, table),
      );
    });
    return details;
  }

  text(point) {
    if (!point || point.y === null) return "\u2013";
    const number = (value) =>
      this.log || this.spec.stacked ? minus(String(Number(value.toPrecision(3)))) : format(value, this.span);
    if (finite(point.error) !== null) return `${number(point.y)} \u00b1 ${number(point.error)}`;
    return band(point) ? `${number(point.y)} (${number(point.low)} to ${number(point.high)})` : number(point.y);
  }

  // ------------------------------------------------------------------------------------------------------------------
  // drawing

  draw() {
    const width = Math.floor(this.plot.clientWidth);
    if (width < 40 || width === this.width) return;
    this.width = width;
    this.height = 190;
    const marks = ticks(...this.range, 5, this.log);
    const step = marks.length > 1 ? marks[1] - marks[0] : this.span;
    const names = marks.map((tick) => (this.log ? minus(String(Number(tick.toPrecision(1)))) : tickText(tick, step)));
    this.left = 12 + 6.6 * Math.max(...names.map((name) => name.length));
    this.svg = shape("svg", { width, height: this.height, viewBox: `0 0 ${width} ${this.height}`, "aria-hidden": "true" });
    marks.forEach((tick, i) => {
      const y = this.y(tick);
      this.svg.append(shape("line", { class: "gridline", x1: this.left, x2: width - 8, y1: y, y2: y }));
      this.svg.append(shape("text", { x: this.left - 6, y: y + 4, "text-anchor": "end" }, names[i]));
    });
    this.drawEpochs();
    if (this.spec.stacked) this.drawStack();
    else this.spec.series.forEach((series) => this.drawSeries(series));
    this.overlay = shape("g");
    this.svg.append(this.overlay);
    this.plot.replaceChildren(this.svg);
    this.show();
  }

  x(epoch) {
    const [low, high] = this.domain;
    return this.left + 6 + ((epoch - low) / (high - low)) * (this.width - this.left - 20);
  }

  y(value) {
    const place = this.log
      ? Math.log(Math.max(value, this.range[0]) / this.range[0]) / Math.log(this.range[1] / this.range[0])
      : (value - this.range[0]) / this.span;
    return this.height - 24 - place * (this.height - 40);
  }

  drawEpochs() {
    const bottom = this.height - 24;
    this.svg.append(shape("line", { class: "axis", x1: this.left, x2: this.width - 8, y1: bottom, y2: bottom }));
    const marks = ticks(Math.ceil(this.domain[0]), Math.floor(this.domain[1]), Math.max(2, Math.floor(this.width / 75)), false);
    this.svg.append(shape("text", { x: this.width - 8, y: this.height - 7, "text-anchor": "end" }, "epoch"));
    for (const tick of marks.filter((tick) => Number.isInteger(tick) && this.x(tick) < this.width - 55))
      this.svg.append(shape("text", { x: this.x(tick), y: this.height - 7, "text-anchor": "middle" }, String(tick)));
    const best = this.spec.best ?? null;
    if (best === null || !this.epochs.includes(best)) return;
    const x = this.x(best);
    this.svg.append(shape("line", { class: "best", x1: x, x2: x, y1: 12, y2: bottom }));
    const end = x > this.width - 60;
    this.svg.append(
      shape("text", { x: end ? x + 4 : Math.max(x - 12, this.left), y: 8, "text-anchor": end ? "end" : "start" }, "best"),
    );
  }

  drawSeries({ points, color, dash, dots }) {
    const group = shape("g", { class: `c${color} ${points.length > 150 ? "thin" : ""}` });
    for (const part of unbroken(points, (point) => band(point) !== null)) {
      const [upper, lower] = [1, 0].map((end) => part.map((point) => `${this.x(point.x)},${this.y(band(point)[end])}`));
      group.append(shape("polygon", { class: "band", points: [...upper, ...lower.reverse()].join(" ") }));
      if (part.length === 1)
        group.append(
          shape("line", {
            class: "line bar",
            x1: this.x(part[0].x),
            x2: this.x(part[0].x),
            y1: this.y(band(part[0])[0]),
            y2: this.y(band(part[0])[1]),
          }),
        );
    }
    for (const part of unbroken(points, (point) => point.y !== null && (!this.log || point.y > 0))) {
      const line = part.map((point) => `${this.x(point.x)},${this.y(point.y)}`).join(" ");
      group.append(shape("polyline", { class: "line", points: line, "stroke-dasharray": DASHES[dash ?? 0] }));
      if (part.length === 1 || (dots && points.length <= 60))
        for (const point of part)
          group.append(shape("circle", { class: "dot", cx: this.x(point.x), cy: this.y(point.y), r: 2.8 }));
    }
    this.svg.append(group);
  }

  drawStack() {
    const heights = new Map(this.epochs.map((x) => [x, 0]));
    this.spec.series.forEach(({ color }, i) => {
      let path = "";
      for (const x of this.epochs) {
        const [low, high] = [heights.get(x), heights.get(x) + (this.at[i].get(x)?.y ?? 0)];
        heights.set(x, high);
        path += `M${this.x(x - 0.5)} ${this.y(low)}V${this.y(high)}H${this.x(x + 0.5)}V${this.y(low)}Z`;
      }
      this.svg.append(shape("path", { class: `area c${color}`, d: path }));
    });
  }

  // ------------------------------------------------------------------------------------------------------------------
  // the shared epoch

  listen() {
    this.plot.addEventListener("pointermove", (event) => {
      const place = (event.clientX - this.plot.getBoundingClientRect().left - this.left - 6) / (this.width - this.left - 20);
      moveTo(this.nearest(this.domain[0] + place * (this.domain[1] - this.domain[0])));
    });
    this.plot.addEventListener("pointerleave", () => moveTo(null));
    this.plot.addEventListener("focus", () => this.plot.matches(":focus-visible") && moveTo(this.shown()));
    this.plot.addEventListener("blur", () => moveTo(null));
    this.plot.addEventListener("keydown", (event) => {
      const here = this.epochs.indexOf(this.shown());
      const last = this.epochs.length - 1;
      const to = { ArrowLeft: Math.max(0, here - 1), ArrowRight: Math.min(last, here + 1), Home: 0, End: last }[event.key];
      if (to === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      moveTo(this.epochs[to]);
    });
  }

  nearest(epoch) {
    return this.epochs.reduce((best, x) => (Math.abs(x - epoch) < Math.abs(best - epoch) ? x : best));
  }

  shown() {
    return cursor.epoch === null ? this.epochs.at(-1) : this.nearest(cursor.epoch);
  }

  show() {
    const epoch = this.shown();
    const newest = this.spec.series.map((series) => series.points.at(-1).x);
    const each = cursor.epoch === null && newest.some((x) => x !== epoch); // runs of different lengths: the newest of each
    this.label.textContent = each ? "newest" : `epoch ${epoch}`;
    const texts = this.at.map((at, i) => this.text(at.get(each ? newest[i] : epoch)));
    texts.forEach((text, i) => (this.values[i].textContent = text));
    this.plot.setAttribute("aria-valuenow", epoch);
    this.plot.setAttribute(
      "aria-valuetext",
      `${this.label.textContent}: ${texts.map((text, i) => `${this.spec.series[i].name} ${text}`).join(", ")}`,
    );
    this.overlay?.replaceChildren();
    if (!this.overlay || cursor.epoch === null) return;
    this.overlay.append(shape("line", { class: "guide", x1: this.x(epoch), x2: this.x(epoch), y1: 12, y2: this.height - 24 }));
    if (this.spec.stacked) return;
    this.spec.series.forEach(({ color }, i) => {
      const y = this.at[i].get(epoch)?.y ?? null;
      if (y !== null) this.overlay.append(shape("circle", { class: `ring c${color}`, cx: this.x(epoch), cy: this.y(y), r: 4 }));
    });
  }
}

function swatch({ color, dash }) {
  const line = shape("line", {
    class: "line",
    x1: 1,
    x2: 19,
    y1: 4,
    y2: 4,
    "stroke-width": 3,
    "stroke-dasharray": DASHES[dash ?? 0],
  });
  return shape("svg", { class: `swatch c${color}`, width: 20, height: 8, "aria-hidden": "true" }, line);
}

function moveTo(epoch) {
  cursor.epoch = epoch;
  for (const chart of cursor.charts) chart.show();
}
