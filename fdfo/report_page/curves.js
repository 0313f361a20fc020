"use strict";
// The data that the page holds, and the curves made of it: one run, or several in one chart each.

const page = JSON.parse(document.getElementById("data").textContent);
const runs = page.runs.map(readRun);
const single = runs.length === 1 ? runs[0] : null;
const DOMAIN = domain(runs.flatMap((run) => [...run.epochs, ...run.evals].map((line) => line.epoch)));

/**
 * A run's lines by kind and by rising epoch, and its evaluated names: the reward first, then what was trained on, then the rest.
 * A scorer that is the whole reward (same) is not shown twice, but for a comparison with runs where it may not be the whole.
 */
function readRun({ name, lines, settings, notes }) {
  const kind = (wanted) => lines.filter((line) => line.kind === wanted).sort((a, b) => a.epoch - b.epoch);
  const run = {
    name,
    settings,
    notes,
    starts: kind("start"),
    epochs: kind("epoch"),
    evals: kind("eval"),
    steps: new Map(),
  };
  for (const step of kind("step")) run.steps.set(step.epoch, [...(run.steps.get(step.epoch) ?? []), step]);
  run.unseen = new Set(run.evals.flatMap((line) => (Array.isArray(line.held_out) ? line.held_out : [])));
  const names = [...new Set(run.evals.flatMap((line) => Object.keys(line.means ?? {})))];
  const rank = (metric) => (metric === "reward" ? 0 : run.unseen.has(metric) ? 2 : 1);
  run.same =
    page.runs.length > 1
      ? null
      : (names.find((metric) => metric !== "reward" && run.evals.every(({ means }) => means?.[metric] === means?.reward)) ??
        null);
  run.metrics = names.filter((metric) => metric !== run.same).sort((a, b) => rank(a) - rank(b));
  run.best = run.evals.map((line) => finite(line.best)).findLast((best) => best !== null) ?? null;
  run.pairs = Number(setting(run, "total_pairs_per_epoch"));
  return run;
}

/** The epochs of every curve's axis, so that curves below each other can be compared. */
function domain(epochs) {
  const [low, high] = extent([1, ...epochs]);
  return low < high ? [low, high] : [low - 1, high + 1];
}

function setting(run, name) {
  return run.settings.find((one) => one.name === name)?.value;
}

// ---------------------------------------------------------------------------------------------------------------------
// points of the curves

function epochPoints(run, value) {
  return run.epochs.map((line) => ({ x: line.epoch, y: finite(value(line)) }));
}

/** The two pictures of a pair are alike, so a pair counts as one: the error of the mean is the spread over the root of the pairs. */
function rewardPoints(run) {
  return run.epochs.map((line) => {
    const error = line.reward_std / Math.sqrt(run.pairs - (line.dropped_pairs ?? 0));
    return { x: line.epoch, y: finite(line.reward_mean), error: finite(line.reward_std) === null ? null : finite(error) };
  });
}

/** An epoch's value with the range of its optimizer steps. */
function stepPoints(run, name) {
  return run.epochs.map((line) => {
    const values = (run.steps.get(line.epoch) ?? []).map((step) => finite(step[name])).filter((value) => value !== null);
    const [low, high] = values.length ? extent(values) : [null, null];
    return { x: line.epoch, y: finite(line[name]), low, high };
  });
}

function evalPoints(run, metric) {
  return run.evals.map((line) => ({
    x: line.epoch,
    y: finite(line.means?.[metric]),
    error: finite(line.standard_errors?.[metric]),
  }));
}

function total(seconds) {
  return Object.values(seconds ?? {}).reduce((sum, value) => sum + (finite(value) ?? 0), 0);
}

/** A chart of every run's points; null where none has any. The colour of one run alone says what the curve is. */
function chart(spec, points, color = 1) {
  const series = runs.map((run, i) => ({
    name: single ? spec.title : run.name,
    color: single ? color : (i % 8) + 1,
    dash: single ? 0 : (i + Math.floor(i / 8)) % 4,
    dots: spec.dots,
    points: points(run),
  }));
  const drawn = series.filter((one) => one.points.some((point) => point.y !== null));
  return drawn.length ? new Chart({ ...spec, domain: DOMAIN, series: drawn }).node : null;
}

// ---------------------------------------------------------------------------------------------------------------------
// charts

function rewardChart() {
  const note = "Mean over the epoch's pictures. Band: \u00b1 1 standard error, the spread over the root of the number of pairs.";
  return chart({ title: "Training reward", badge: "training prompts", note }, rewardPoints);
}

/** The scorers that make up the reward, where there are several. */
function scorerCharts() {
  const names = [...new Set(runs.flatMap((run) => run.epochs.flatMap((line) => Object.keys(line.scores ?? {}))))];
  const note = "Mean over the epoch's pictures.";
  return names.length < 2
    ? []
    : names.map((name) =>
        chart({ title: name, badge: "training prompts", note }, (run) => epochPoints(run, (line) => line.scores?.[name])),
      );
}

function heldoutCharts() {
  return [...new Set(runs.flatMap((run) => run.metrics))].map((name) => {
    const unseen = runs.some((run) => run.unseen.has(name));
    const title = name === "reward" ? `Held-out reward${single?.same ? ` (${single.same})` : ""}` : name;
    const note = "Mean over the held-out prompts. Band: \u00b1 1 standard error over prompts.";
    const badge = unseen ? "not trained on" : "held-out prompts";
    return chart({ title, badge, note, dots: true, best: single?.best }, (run) => evalPoints(run, name), unseen ? 4 : 3);
  });
}

function updateCharts() {
  const steps = "Mean and range of the epoch's optimizer steps.";
  return [
    chart(
      { title: "Clipfrac", zero: true, note: `Share of samples whose ratio left the clip range. ${steps}` },
      (run) => stepPoints(run, "clipfrac"),
      5,
    ),
    chart({ title: "Gradient norm", log: true, note: `Before clipping. ${steps}` }, (run) => stepPoints(run, "grad_norm"), 6),
    secondsChart(),
  ];
}

function secondsChart() {
  if (!single)
    return chart({ title: "Seconds an epoch", zero: true, note: "All stages together." }, (run) =>
      epochPoints(run, (line) => (line.seconds ? total(line.seconds) : null)),
    );
  const spent = (stage) => single.epochs.reduce((sum, line) => sum + (finite(line.seconds?.[stage]) ?? 0), 0);
  const stages = [...new Set(single.epochs.flatMap((line) => Object.keys(line.seconds ?? {})))].sort(
    (a, b) => spent(b) - spent(a),
  );
  const series = stages.map((stage, i) => ({
    name: stage,
    color: (i % 8) + 1,
    points: epochPoints(single, (line) => line.seconds?.[stage]),
  }));
  const note = "Stacked by stage. The clock is read at an epoch's end, so a checkpoint counts to the next epoch.";
  return series.length ? new Chart({ title: "Seconds an epoch", stacked: true, zero: true, note, series }).node : null;
}

/** Whatever else the epochs' lines count. */
function otherCharts() {
  const shown = ["epoch", "reward_mean", "clipfrac", "grad_norm"];
  const names = [
    ...new Set(
      runs.flatMap((run) => run.epochs.flatMap((line) => Object.keys(line).filter((name) => finite(line[name]) !== null))),
    ),
  ];
  return names
    .filter((name) => !shown.includes(name))
    .map((name) => chart({ title: name.replaceAll("_", " ") }, (run) => epochPoints(run, (line) => line[name]), 7));
}
