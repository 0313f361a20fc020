"use strict";
// The page, from top to bottom.

const isWarned = (line) => Array.isArray(line.warnings) && line.warnings.length > 0;

function grid(charts) {
  return element("div", { class: "grid" }, ...charts);
}

/** A titled part of the page; null where there is nothing to put into it. */
function section(id, title, ...content) {
  const parts = content.filter((node) => node !== null && node.childNodes.length);
  return parts.length ? element("section", { id, "aria-labelledby": `${id}-title` }, element("h2", { id: `${id}-title` }, title), ...parts) : null;
}

function table(head, rows, attributes = {}) {
  const cells = (row) => row.map((cell, i) => (i ? element("td", {}, cell) : element("th", { scope: "row" }, cell)));
  const titles = head.map((title) => element("th", { scope: "col" }, title));
  return element("div", { class: "scroll wide", tabindex: 0, role: "region", "aria-label": head[0] },
    element("table", attributes, element("thead", {}, element("tr", {}, ...titles)), element("tbody", {}, ...rows.map((row) => element("tr", {}, ...cells(row))))));
}

/** A change with its sign. */
function change(value, error) {
  return (finite(value) > 0 ? "+" : "") + withError(value, error);
}

const short = (value) => (value === null ? "\u2013" : minus(Math.abs(value) >= 1e5 ? value.toExponential(2) : String(Number(value.toPrecision(4)))));

function withError(value, error) {
  if (finite(value) === null) return "\u2013";
  return finite(error) === null ? short(value) : `${format(value, 10 * error)} \u00b1 ${format(error, 10 * error)}`;
}

function duration(seconds) {
  if (seconds < 100) return `${Number(seconds.toPrecision(3))} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 100 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

// ---------------------------------------------------------------------------------------------------------------------
// top

function writtenLine() {
  const age = element("span");
  const tell = () => {
    const seconds = Math.max(0, Date.now() / 1000 - page.written);
    age.textContent = `Written ${new Date(page.written * 1000).toLocaleString()}` + (seconds < 60 ? ", just now" : seconds < 86400 ? `, ${duration(seconds)} ago` : "");
  };
  tell();
  setInterval(tell, 30000);
  const button = element("button", { type: "button" }, "Reload");
  button.addEventListener("click", () => location.reload());
  return element("div", { class: "soft written" }, age, button);
}

function tile(label, value, more) {
  return element("div", { class: "card" }, element("dt", {}, label), element("dd", {}, value, element("small", {}, more)));
}

function tiles(run) {
  const [last, evaluated, points] = [run.epochs.at(-1), run.evals.at(-1), rewardPoints(run)];
  const wanted = setting(run, "num_epochs");
  const spent = total(run.epochs.map((line) => total(line.seconds))) + total(run.evals.map((line) => line.seconds));
  const recent = run.epochs.slice(-10).map((line) => total(line.seconds));
  const best = run.evals.find((line) => line.epoch === run.best);
  const found = [tile("Epochs done", String(last?.epoch ?? 0), wanted ? `of ${wanted}` : "")];
  if (last) found.push(tile("Training reward", withError(points.at(-1).y, points.at(-1).error), last.epoch > run.epochs[0].epoch ? `epoch ${run.epochs[0].epoch}: ${withError(points[0].y, points[0].error)}` : ""));
  if (evaluated && run.metrics.includes("reward")) {
    const at = (line) => withError(line.means?.reward, line.standard_errors?.reward);
    found.push(tile(`Held-out reward, epoch ${evaluated.epoch}`, at(evaluated), best ? `best: ${at(best)}, epoch ${best.epoch}` : ""));
  }
  if (last) found.push(tile("Seconds an epoch", short(Number((total(recent) / recent.length).toPrecision(3))), `${duration(spent)} in all`));
  return element("dl", { class: "tiles" }, ...found);
}

/** The newest warnings, and older ones behind a click. */
function warnings() {
  const found = runs.flatMap((run) => [...run.epochs, ...run.evals].filter(isWarned).flatMap((line) => line.warnings.map((text) => ({ place: `${single ? "" : `${run.name}, `}epoch ${line.epoch}`, epoch: line.epoch, text }))));
  const items = found.sort((a, b) => b.epoch - a.epoch).map(({ place, text }) => element("li", {}, element("span", {}, place), element("span", {}, String(text))));
  if (!items.length) return runs.some((run) => run.epochs.length) ? element("p", { class: "soft notice" }, "No warnings.") : element("p", { class: "soft notice" }, "No epoch is done yet.");
  const older = items.length > 6 ? element("details", {}, element("summary", {}, `${items.length - 5} earlier`), element("ul", {}, ...items.splice(5))) : null;
  return element("section", { class: "card notice warn", "aria-label": "Warnings" }, element("h2", {}, found.length === 1 ? "1 warning" : `${found.length} warnings`), element("ul", {}, ...items), older);
}

function notes() {
  const items = runs.flatMap((run) => run.notes.map((note) => element("p", { class: "soft" }, single ? note : `${run.name}: ${note}`)));
  return items.length ? element("div", { class: "notice" }, ...items) : null;
}

// ---------------------------------------------------------------------------------------------------------------------
// tables

function heldoutTable(run) {
  if (!run.evals.length || !run.metrics.length) return null;
  const [first, last] = [run.evals[0], run.evals.at(-1)];
  const best = run.evals.find((line) => line.epoch === run.best);
  const at = (line, name) => withError(line?.means?.[name], line?.standard_errors?.[name]);
  const head = ["Held-out prompts", `epoch ${first.epoch}`, `epoch ${last.epoch}`, `change since epoch ${last.since}`, ...(best ? [`best, epoch ${best.epoch}`] : [])];
  const rows = run.metrics.map((name) => [run.unseen.has(name) ? `${name} (not trained on)` : name === "reward" && run.same ? `reward (${run.same})` : name, at(first, name), at(last, name), change(last.changes?.[name]?.mean, last.changes?.[name]?.standard_error), ...(best ? [at(best, name)] : [])]);
  const pictures = `${short(finite(last.prompts))} prompts, ${short(finite(last.repeats))} picture${last.repeats === 1 ? "" : "s"} each.`;
  const note = `${pictures} \u00b1 is 1 standard error over prompts; that of the change is of the differences prompt by prompt.`;
  return element("div", { class: "card notice" }, table(head, rows), element("p", { class: "soft" }, note));
}

/** The comparison of base and adapter at the end of a run. */
function endTable(run) {
  const rows = run.heldout.map((line) => [String(line.metric), short(finite(line.before)), short(finite(line.after)), change(finite(line.after - line.before), line.error), short(finite(line.count))]);
  return rows.length ? element("div", { class: "card notice" }, table(["At the end of the run", "base model", "adapter", "change, paired", "prompts"], rows)) : null;
}

function comparedRuns() {
  const metrics = [...new Set(runs.flatMap((run) => run.metrics))];
  const rows = runs.map((run) => {
    const [last, evaluated, points] = [run.epochs.at(-1), run.evals.at(-1), rewardPoints(run)];
    const scores = metrics.map((name) => withError(evaluated?.means?.[name], evaluated?.standard_errors?.[name]));
    return [run.name, short(last?.epoch ?? 0), withError(points.at(-1)?.y ?? null, points.at(-1)?.error), short(last ? total(last.seconds) : null), short(evaluated?.epoch ?? null), ...scores, short(run.best)];
  });
  const head = ["Run", "epochs", "training reward", "seconds an epoch", "evaluated at", ...metrics.map((name) => (name === "reward" ? "held-out reward" : name)), "best at"];
  return element("div", { class: "card" }, table(head, rows), element("p", { class: "soft" }, "Newest epoch and newest evaluation of each run."));
}

// ---------------------------------------------------------------------------------------------------------------------
// pictures

function sheet(kind, title, note) {
  const { shown = [], left_out: leftOut = [] } = page.sheets[kind] ?? {};
  if (!shown.length && !leftOut.length) return null;
  const missing = leftOut.length ? element("p", { class: "soft" }, `Left out here to bound the file's size: epoch${leftOut.length > 1 ? "s" : ""} ${leftOut.join(", ")}. They are in the run's folder samples.`) : null;
  const head = element("div", { class: "head" }, element("h3", {}, title));
  if (!shown.length) return element("div", { class: "card sheet" }, head, missing);
  const image = element("img", { decoding: "sync" });
  const output = element("output");
  const slider = element("input", { type: "range", min: 0, max: shown.length - 1, step: 1, value: shown.length - 1, id: `slider-${kind}` });
  const actual = element("input", { type: "checkbox" });
  const show = () => {
    const { epoch, jpeg } = shown[Number(slider.value)];
    image.src = `data:image/jpeg;base64,${jpeg}`;
    image.alt = `${title}, epoch ${epoch}`;
    output.textContent = `epoch ${epoch}`;
    slider.setAttribute("aria-valuetext", `epoch ${epoch}`);
  };
  slider.addEventListener("input", show);
  actual.addEventListener("change", () => image.classList.toggle("actual", actual.checked));
  show();
  const controls = element("div", { class: "controls" }, element("label", { class: "slider" }, output, slider), element("label", {}, actual, "Actual size"));
  slider.setAttribute("aria-label", `${title}: epoch`);
  return element("div", { class: "card sheet" }, head, element("p", { class: "soft" }, note), controls, element("div", { class: "frame", tabindex: 0, role: "region", "aria-label": title }, image), missing);
}

// ---------------------------------------------------------------------------------------------------------------------
// the run

function startList(run) {
  const cards = run.starts.map((line) => {
    const facts = Object.entries(line).filter(([name]) => !["kind", "epoch", "command"].includes(name)).flatMap(([name, value]) => (value !== null && typeof value === "object" ? Object.entries(value) : [[name.replaceAll("_", " "), value]]));
    const rows = facts.filter(([, value]) => value !== null).map(([name, value]) => [name, String(value)]);
    const command = typeof line.command === "string" ? element("pre", {}, ...line.command.split(" ").flatMap((word) => [element("span", { class: "word" }, word), " "])) : element("p", { class: "soft" }, "The log does not have the command.");
    const title = line.epoch ? `Continued after epoch ${line.epoch}` : "Started";
    return element("div", { class: "card" }, element("h3", {}, title), command, table(["Versions and scorers", ""], rows, { class: "text" }));
  });
  return element("div", { class: "grid" }, ...cards);
}

function settingsTable(run) {
  if (!run.settings.length) return null;
  const changed = run.settings.filter((one) => one.preset !== null && one.preset !== one.value);
  const row = (one) => [one.name, one.value, one.preset ?? "\u2013"];
  const all = element("details", {}, element("summary", {}, `All ${run.settings.length} settings`), table(["Setting", "this run", "preset"], run.settings.map(row), { class: "text" }));
  const differ = changed.length ? table(["Changed from the preset", "this run", "preset"], changed.map(row), { class: "text" }) : element("p", { class: "soft" }, "All settings are the preset's.");
  return element("div", { class: "card notice" }, differ, all);
}

function differingSettings() {
  const names = [...new Set(runs.flatMap((run) => run.settings.map((one) => one.name)))];
  const rows = names.map((name) => [name, ...runs.map((run) => setting(run, name) ?? "\u2013")]).filter(([, ...values]) => new Set(values).size > 1);
  return rows.length ? element("div", { class: "card" }, table(["Setting", ...runs.map((run) => run.name)], rows, { class: "text" })) : null;
}

// ---------------------------------------------------------------------------------------------------------------------

function build() {
  const others = otherCharts();
  const sections = [
    section("reward", "Reward", single ? null : comparedRuns(), grid([rewardChart(), ...heldoutCharts(), ...scorerCharts()]), ...(single ? [heldoutTable(single), endTable(single)] : [])),
    section("pictures", "Pictures", sheet("epoch", "Samples", "The same prompts and seeds at every evaluation."), sheet("pairs", "Training pairs", "Pairs of the epoch before the evaluation.")),
    section("update", "Update and time", grid(updateCharts())),
    section("other", "Other curves", others.length ? element("details", {}, element("summary", {}, `${others.length} more curves`), grid(others)) : null),
    single ? section("run", "Run", startList(single), settingsTable(single)) : section("settings", "Settings that differ", differingSettings()),
  ].filter((part) => part !== null);
  const links = sections.map((part) => element("a", { href: `#${part.id}` }, part.querySelector("h2").textContent));
  const name = single ? single.name : `${runs.length} runs`;
  document.title = `${name} \u2013 FDFO`;
  document.getElementById("header").append(
    element("div", { class: "kicker" }, element("span", { class: "soft" }, single ? "FDFO training run" : "FDFO comparison"), writtenLine()),
    element("h1", {}, name),
    element("nav", { "aria-label": "Sections" }, ...links),
    ...[single ? tiles(single) : null, warnings(), notes()].filter((part) => part !== null),
  );
  document.getElementById("main").append(...sections);
}

build();
