"use strict";
// Tables: scores, runs, settings.

function card(...content) {
  return element("div", { class: "card" }, ...content);
}

function soft(text) {
  return element("p", { class: "soft" }, text);
}

function folded(title, ...content) {
  return element("details", {}, element("summary", {}, title), ...content);
}

/** Scrolls by itself where it is wider than the page. */
function table(head, rows, attributes = {}) {
  const cells = (row) => row.map((cell, i) => (i ? element("td", {}, cell) : element("th", { scope: "row" }, cell)));
  const titles = element("tr", {}, ...head.map((title) => element("th", { scope: "col" }, title)));
  const body = element("tbody", {}, ...rows.map((row) => element("tr", {}, ...cells(row))));
  const region = { class: "scroll wide", tabindex: 0, role: "region", "aria-label": head[0] };
  return element("div", region, element("table", attributes, element("thead", {}, titles), body));
}

/** Four digits of a number. */
function short(value) {
  if (value === null) return "\u2013";
  return minus(Math.abs(value) >= 1e5 ? value.toExponential(2) : String(Number(value.toPrecision(4))));
}

/** A number with as many digits as its standard error allows. */
function withError(value, error) {
  if (finite(value) === null) return "\u2013";
  return finite(error) === null ? short(value) : `${format(value, 10 * error)} \u00b1 ${format(error, 10 * error)}`;
}

/** A change, with its sign. */
function change(value, error) {
  return (finite(value) > 0 ? "+" : "") + withError(value, error);
}

function meanOf(line, name) {
  return withError(line?.means?.[name], line?.standard_errors?.[name]);
}

function duration(seconds) {
  if (seconds < 100) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 100 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

// ---------------------------------------------------------------------------------------------------------------------
// scores

/** Every metric at the first, the newest and the best evaluation. */
function heldoutTable(run) {
  if (!run.metrics.length) return null;
  const [first, last] = [run.evals[0], run.evals.at(-1)];
  const best = run.evals.find((line) => line.epoch === run.best);
  const columns = [[`epoch ${first.epoch}`, (name) => meanOf(first, name)]];
  if (last !== first) {
    const paired = (name) => change(last.changes?.[name]?.mean, last.changes?.[name]?.standard_error);
    columns.push([`epoch ${last.epoch}`, (name) => meanOf(last, name)], [`change since epoch ${last.since}`, paired]);
  }
  if (best) columns.push([`best, epoch ${best.epoch}`, (name) => meanOf(best, name)]);
  const rows = run.metrics.map((name) => [metricName(run, name), ...columns.map(([, cell]) => cell(name))]);
  const pictures = `${short(finite(last.prompts))} prompts, ${short(finite(last.repeats))} picture${last.repeats === 1 ? "" : "s"} each.`;
  const note = `${pictures} \u00b1 is 1 standard error over prompts; that of the change is of the differences prompt by prompt.`;
  return card(table(["Held-out prompts", ...columns.map(([title]) => title)], rows), soft(note));
}

function metricName(run, name) {
  if (run.unseen.has(name)) return `${name} (not trained on)`;
  return name === "reward" && run.same ? `reward (${run.same})` : name;
}

/** Every run at its newest epoch and evaluation. */
function comparedRuns() {
  const metrics = [...new Set(runs.flatMap((run) => run.metrics))];
  const names = metrics.map((name) => (name === "reward" ? "held-out reward" : name));
  const head = ["Run", "epochs", "training reward", "seconds an epoch", "evaluated at", ...names, "best at"];
  const rows = runs.map((run) => {
    const [last, evaluated, point] = [run.epochs.at(-1), run.evals.at(-1), rewardPoints(run).at(-1)];
    const training = [short(last?.epoch ?? 0), withError(point?.y, point?.error), short(last ? total(last.seconds) : null)];
    return [
      run.name,
      ...training,
      short(evaluated?.epoch ?? null),
      ...metrics.map((name) => meanOf(evaluated, name)),
      short(run.best),
    ];
  });
  const rewards = new Set(runs.map((run) => `${setting(run, "reward_preset")} ${setting(run, "reward_specs")}`));
  const differ = "The runs were trained on different rewards: their rewards cannot be compared, the scorers can.";
  return card(table(head, rows), soft(`Newest epoch and newest evaluation of each run. ${rewards.size > 1 ? differ : ""}`));
}

// ---------------------------------------------------------------------------------------------------------------------
// how a run was started

function startList(run) {
  return element("div", { class: "grid" }, ...run.starts.map(startCard));
}

function startCard(line) {
  const facts = Object.entries(line).filter(([name, value]) => value !== null && !["kind", "epoch", "command"].includes(name));
  const rows = facts.flatMap(([name, value]) =>
    typeof value === "object" ? Object.entries(value) : [[name.replaceAll("_", " "), value]],
  );
  const texts = rows.map(([name, value]) => [name, String(value)]);
  const title = line.epoch ? `Continued after epoch ${line.epoch}` : "Started";
  return card(element("h3", {}, title), command(line), table(["Versions and scorers", ""], texts, { class: "text" }));
}

/** Broken between words where it is longer than a line. */
function command(line) {
  if (typeof line.command !== "string") return soft("The log does not have the command.");
  return element("pre", {}, ...line.command.split(" ").flatMap((word) => [element("span", { class: "word" }, word), " "]));
}

function settingsTable(run) {
  if (!run.settings.length) return null;
  const changed = run.settings.filter((one) => one.preset !== null && one.preset !== one.value);
  const rows = (settings) => settings.map((one) => [one.name, one.value, one.preset ?? "\u2013"]);
  const all = table(["Setting", "this run", "preset"], rows(run.settings), { class: "text" });
  const differ = changed.length
    ? table(["Changed from the preset", "this run", "preset"], rows(changed), { class: "text" })
    : null;
  return card(differ ?? soft("All settings are the preset's."), folded(`All ${run.settings.length} settings`, all));
}

function differingSettings() {
  const names = [...new Set(runs.flatMap((run) => run.settings.map((one) => one.name)))];
  const rows = names.map((name) => [name, ...runs.map((run) => setting(run, name) ?? "\u2013")]);
  const differ = rows.filter(([, ...values]) => new Set(values).size > 1);
  return differ.length ? card(table(["Setting", ...runs.map((run) => run.name)], differ, { class: "text" })) : null;
}
