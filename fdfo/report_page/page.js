"use strict";
// The page, from top to bottom.

const isWarned = (line) => Array.isArray(line.warnings) && line.warnings.length > 0;

function grid(charts) {
  return element("div", { class: "grid" }, ...charts);
}

/** A titled part of the page; null where there is nothing to put into it. */
function section(id, title, ...content) {
  const parts = content.filter((node) => node !== null && node.childNodes.length);
  return parts.length
    ? element("section", { id, "aria-labelledby": `${id}-title` }, element("h2", { id: `${id}-title` }, title), ...parts)
    : null;
}

// ---------------------------------------------------------------------------------------------------------------------
// top

function writtenLine() {
  const age = element("span");
  const tell = () => {
    const seconds = Math.max(0, Date.now() / 1000 - page.written);
    age.textContent =
      `Written ${new Date(page.written * 1000).toLocaleString()}` +
      (seconds < 60 ? ", just now" : seconds < 86400 ? `, ${duration(seconds)} ago` : "");
  };
  tell();
  setInterval(tell, 30000);
  const button = element("button", { type: "button" }, "Reload");
  button.addEventListener("click", () => location.reload());
  return element("div", { class: "soft written" }, age, button);
}

function tile(label, value, more) {
  return card(element("dt", {}, label), element("dd", {}, value, element("small", {}, more)));
}

function tiles(run) {
  const [last, evaluated, points] = [run.epochs.at(-1), run.evals.at(-1), rewardPoints(run)];
  const wanted = setting(run, "num_epochs");
  const found = [tile("Epochs done", String(last?.epoch ?? 0), wanted ? `of ${wanted}` : "")];
  if (last) {
    const [before, now] = [points[0], points.at(-1)];
    const first = before === now ? "" : `epoch ${before.x}: ${withError(before.y, before.error)}`;
    found.push(tile("Training reward", withError(now.y, now.error), first));
  }
  if (run.metrics.includes("reward")) {
    const best = run.evals.find((line) => line.epoch === run.best);
    const more = best ? `best: ${meanOf(best, "reward")}, epoch ${best.epoch}` : "";
    found.push(tile(`Held-out reward, epoch ${evaluated.epoch}`, meanOf(evaluated, "reward"), more));
  }
  if (last) {
    const recent = run.epochs.slice(-10).map((line) => total(line.seconds));
    const spent = total(run.epochs.map((line) => total(line.seconds))) + total(run.evals.map((line) => line.seconds));
    found.push(
      tile("Seconds an epoch", short(Number((total(recent) / recent.length).toPrecision(3))), `${duration(spent)} in all`),
    );
  }
  return element("dl", { class: "tiles" }, ...found);
}

/** The newest warnings, and older ones behind a click. */
function warnings() {
  const found = runs.flatMap((run) =>
    [...run.epochs, ...run.evals]
      .filter(isWarned)
      .flatMap((line) => line.warnings.map((text) => ({ run, epoch: line.epoch, text: String(text) }))),
  );
  if (!found.length)
    return element(
      "p",
      { class: "soft notice" },
      runs.some((run) => run.epochs.length) ? "No warnings." : "No epoch is done yet.",
    );
  found.sort((a, b) => b.epoch - a.epoch);
  const place = ({ run, epoch }) => (single ? `epoch ${epoch}` : `${run.name}, epoch ${epoch}`);
  const items = found.map((one) => element("li", {}, element("span", {}, place(one)), element("span", {}, one.text)));
  const older = items.length > 6 ? items.splice(5) : [];
  return element(
    "section",
    { class: `card notice warn ${single ? "" : "several"}`, "aria-label": "Warnings" },
    element("h2", {}, found.length === 1 ? "1 warning" : `${found.length} warnings`),
    element("ul", {}, ...items),
    older.length ? folded(`${older.length} earlier`, element("ul", {}, ...older)) : null,
  );
}

/** What could not be read of the runs. */
function notes() {
  const items = runs.flatMap((run) => run.notes.map((note) => soft(single ? note : `${run.name}: ${note}`)));
  return items.length ? element("div", { class: "notice" }, ...items) : null;
}

// ---------------------------------------------------------------------------------------------------------------------
// pictures

/** The sheets of one kind under a slider; null where the run has none. */
function sheet(kind, title, note) {
  const { shown = [], left_out: leftOut = [] } = page.sheets[kind] ?? {};
  const missing = leftOut.length
    ? folded(
        `${leftOut.length} of ${leftOut.length + shown.length} sheets are left out here, to bound the file's size`,
        soft(`They are in the run's folder samples: epoch ${leftOut.join(", ")}.`),
      )
    : null;
  const head = element("div", { class: "head" }, element("h3", {}, title));
  if (!shown.length) return missing && element("div", { class: "card sheet" }, head, missing);
  const [image, output, actual] = [
    element("img", { decoding: "sync" }),
    element("output"),
    element("input", { type: "checkbox" }),
  ];
  const newest = shown.length - 1;
  const slider = element("input", {
    id: `slider-${kind}`,
    type: "range",
    min: 0,
    max: newest,
    value: newest,
    "aria-label": `${title}: epoch`,
  });
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
  const chosen = element("label", { class: "slider" }, output, slider);
  const controls = element("div", { class: "controls" }, chosen, element("label", {}, actual, "Actual size"));
  const frame = element("div", { class: "frame", tabindex: 0, role: "region", "aria-label": title }, image);
  return element("div", { class: "card sheet" }, head, soft(note), controls, frame, missing);
}

// ---------------------------------------------------------------------------------------------------------------------

function sections() {
  const others = otherCharts();
  const pictures = "The same prompts and seeds at every evaluation.";
  const charts = grid([rewardChart(), ...heldoutCharts(), ...scorerCharts()]);
  return [
    single
      ? section("reward", "Reward", charts, heldoutTable(single))
      : section("reward", "Reward", comparedRuns(), charts),
    section(
      "pictures",
      "Pictures",
      sheet("epoch", "Samples", pictures),
      sheet("pairs", "Training pairs", "Pairs of the epoch before the evaluation."),
    ),
    section("update", "Update and time", grid(updateCharts())),
    section("other", "Other curves", others.length ? folded(`${others.length} more curves`, grid(others)) : null),
    single
      ? section("run", "Run", startList(single), settingsTable(single))
      : section("settings", "Settings that differ", differingSettings()),
  ].filter((part) => part !== null);
}

function build() {
  const parts = sections();
  const links = parts.map((part) => element("a", { href: `#${part.id}` }, part.querySelector("h2").textContent));
  const name = single ? single.name : `${runs.length} runs`;
  const what = element("span", { class: "soft" }, single ? "FDFO training run" : "FDFO comparison");
  document.title = `${name} \u2013 FDFO`;
  filled(document.getElementById("header"), {}, [
    element("div", { class: "kicker" }, what, writtenLine()),
    element("h1", {}, name),
    element("nav", { "aria-label": "Sections" }, ...links),
    single ? tiles(single) : null,
    warnings(),
    notes(),
  ]);
  document.getElementById("main").append(...parts);
}

build();
