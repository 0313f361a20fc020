"use strict";

const AHEAD = 5; // pairs that are held, the one on the screen included
const WAIT = 1000; // milliseconds between two looks at the trainer's state
const SMALL = 256; // images up to this size are drawn larger, pixel by pixel
const KEYS = { ArrowLeft: "left", ArrowRight: "right", ArrowUp: "tie", " ": "tie", b: "both_bad", B: "both_bad" };
const SAID = { left: "left is better", right: "right is better", tie: "a tie", both_bad: "both are bad" };

const byId = (id) => document.getElementById(id);
const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
const tab = sessionStorage.getItem("fdfo-tab") ?? Array.from(crypto.getRandomValues(new Uint32Array(3)), (part) => part.toString(36)).join("");
sessionStorage.setItem("fdfo-tab", tab);

let person = localStorage.getItem("fdfo-person") ?? "";
let queue = []; // pairs that this tab holds; the first one is on the screen
let shown = null; // the pair on the screen
let shownAt = 0; // performance.now() when it came
let busy = false; // a vote or an undo is on its way
let stuck = ""; // why a choice that is on its way does not arrive
let asking = false; // a request for pairs is on its way
let restarted = false; // the trainer was, and does not know yet what this tab holds
let undone = 0; // undos so far
let state = null; // the trainer's, at the last look
const answered = new Set(); // keys of the pairs that this tab has judged

const keyOf = (pair) => `${pair.epoch}/${pair.pair}/${pair.showing}`;
const placeOf = (pair) => [pair.epoch, pair.pair, pair.showing];

// ---------------------------------------------------------------------------------------------------------------------
// talking to the trainer

async function ask(path, message) {
  const post = message && { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(message) };
  const response = await fetch(path, post);
  const answer = await response.json();
  return response.ok ? answer : { refused: answer.error, again: response.status === 503 };
}

/** Ask until there is an answer: the trainer may be down for a while, and a vote must not be lost. */
async function insist(path, message) {
  for (;;) {
    try {
      const answer = await ask(path, message);
      if (!answer.again) {
        stuck = "";
        return answer;
      }
      stuck = answer.refused;
    } catch {
      stuck = "The trainer does not answer. Your choice is kept and sent again.";
    }
    trouble(stuck);
    await pause(WAIT);
  }
}

async function look() {
  for (;;) {
    try {
      const seen = await ask(`state?tab=${person && tab}`);
      if (seen.refused) trouble(seen.refused);
      else await take(seen);
    } catch {
      trouble("The trainer does not answer. This page goes on by itself when it is back.");
    }
    await pause(WAIT);
  }
}

async function take(seen) {
  if (state !== null && state.boot !== seen.boot) restarted = true;
  state = seen;
  drawState();
  drawLearning();
  if (restarted && seen.epoch === null) return; // what this tab holds is said when the epoch is open again
  const always = restarted || seen.epoch === null || queue.some((pair) => pair.epoch !== seen.epoch);
  restarted = false;
  await refill(always);
}

/** Bring the queue up to date with the trainer. always: also if it is full. */
async function refill(always) {
  if (!person || asking || (!always && (busy || queue.length >= AHEAD))) return;
  asking = true;
  const before = undone;
  try {
    const answer = await ask("pairs", { person, tab, held: queue.map(placeOf), most: AHEAD });
    if (answer.refused || before !== undone) return;
    const held = new Map(queue.map((pair) => [keyOf(pair), pair]));
    queue = answer.pairs.filter((pair) => !answered.has(keyOf(pair))).map((pair) => held.get(keyOf(pair)) ?? load(pair));
    if (!busy) show();
  } catch {
    // the next look tells that the trainer does not answer
  } finally {
    asking = false;
  }
}

/** Fetch both images of a pair, so that they are there when it is shown. */
function load(pair) {
  pair.images = [pair.left, pair.right].map((address) => {
    const image = new Image();
    image.src = address;
    image.alt = "";
    image.draggable = false;
    return image;
  });
  pair.ready = Promise.all(pair.images.map((image) => image.decode())).then(() => (pair.loaded = true), () => (pair.broken = true));
  return pair;
}

// ---------------------------------------------------------------------------------------------------------------------
// judging

async function choose(choice) {
  if (shown === null || busy || byId("ask").open) return;
  const pair = shown;
  const seconds = (performance.now() - shownAt) / 1000;
  busy = true;
  mark(choice);
  const answer = await insist("vote", { person, tab, showing: placeOf(pair), choice, seconds });
  answered.add(keyOf(pair));
  queue = queue.filter((other) => keyOf(other) !== keyOf(pair));
  busy = false;
  say(answer.refused ?? `Your last choice: ${SAID[choice]}`, !answer.refused);
  if (!answer.refused && state) state.left -= 1;
  drawState();
  show();
  refill(false);
}

async function takeBack() {
  if (busy || !person || byId("ask").open) return;
  busy = true;
  undone += 1;
  const answer = await insist("undo", { person, tab });
  busy = false;
  if (answer.refused) return say(answer.refused, false);
  answered.delete(keyOf(answer.pair));
  const same = queue.filter((pair) => keyOf(pair) !== keyOf(answer.pair));
  queue = [load(answer.pair), ...same];
  if (state) state.left += 1;
  say("Taken back: choose again", true);
  drawState();
  show();
}

/** Show the first pair of the queue, or why there is none. */
async function show() {
  const pair = queue[0] ?? null;
  if (pair !== null && pair === shown) return;
  if (pair !== null && !pair.loaded) {
    await pair.ready;
    if (queue[0] !== pair) return;
    if (pair.broken) queue = queue.filter((other) => other !== pair);
    return show();
  }
  shown = pair;
  mark(null);
  byId("judge").hidden = pair === null;
  byId("wait").hidden = pair !== null;
  drawTitle();
  if (pair === null) return drawState();
  const prompt = byId("prompt");
  prompt.textContent = pair.prompt;
  prompt.classList.toggle("long", pair.prompt.length > 170);
  prompt.tabIndex = prompt.scrollHeight > prompt.clientHeight + 1 ? 0 : -1;
  document.querySelectorAll(".pair button").forEach((button, i) => {
    const image = pair.images[i];
    const { naturalWidth: width, naturalHeight: height } = image;
    const times = width <= SMALL ? Math.max(1, Math.floor((1.5 * SMALL) / width)) : 1;
    image.classList.toggle("small", times > 1);
    button.style.setProperty("--width", width * times);
    button.style.setProperty("--ratio", width / height);
    button.replaceChildren(image);
  });
  announce(pair.prompt);
  shownAt = performance.now();
}

function mark(choice) {
  for (const button of document.querySelectorAll(".pair button")) button.classList.toggle("chosen", button.dataset.choice === choice);
}

function say(text, undo) {
  byId("said").textContent = text;
  byId("undo").hidden = !undo;
}

// ---------------------------------------------------------------------------------------------------------------------
// the trainer's state

function trouble(text) {
  const status = byId("status");
  status.classList.add("trouble");
  status.textContent = text;
  announce(text);
  if (shown === null) {
    byId("waiting").textContent = state === null ? "Looking for the trainer" : "Waiting for the trainer";
    byId("why").textContent = "";
    byId("stage").hidden = true;
  }
}

/** Let a screen reader say a text, once. */
function announce(text) {
  if (byId("announce").textContent !== text) byId("announce").textContent = text;
}

function duration(seconds) {
  return seconds < 90 ? `about ${Math.round(seconds)} s` : `about ${Math.round(seconds / 60)} minutes`;
}

function capital(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

function fill(bar, done, total) {
  bar.setAttribute("aria-valuemax", total);
  bar.setAttribute("aria-valuenow", done);
  bar.firstElementChild.style.width = `${total ? (100 * done) / total : 0}%`;
}

function drawState() {
  if (state === null) return;
  const { stage, epoch, left, showings } = state;
  const waits = stage.name.startsWith("waiting"); // for people: the counter of the epoch says how far they are
  const count = stage.total && !waits ? `: ${stage.done} of ${stage.total} ${stage.unit}` : "";
  const time = state.seconds_left >= 1 && !waits ? `, ${duration(state.seconds_left)} left` : "";
  if (stuck) trouble(stuck);
  else {
    byId("status").classList.remove("trouble");
    byId("status").textContent = `Trainer: ${stage.name}${count}${time}`;
  }
  byId("run").textContent = state.run;
  byId("epoch").textContent = epoch === null ? "FDFO" : `Epoch ${epoch + 1} of ${state.epochs}`;
  byId("people").textContent = state.people > 1 ? `${state.people} people judge, you as` : "You are";
  byId("person").textContent = person;
  byId("left").textContent = epoch === null ? "" : left === 0 ? "All judged" : `${left} of ${showings} left`;
  byId("progress").style.visibility = epoch === null ? "hidden" : "";
  fill(byId("progress"), showings - left, showings);
  drawTitle();
  if (epoch === null) byId("undo").hidden = true;
  if (shown === null) drawWaiting(count, time);
}

function drawWaiting(count, time) {
  const { stage, epoch, left } = state;
  let title = `${capital(stage.name)}${stage.name === "training" ? " on your choices" : ""}`;
  let why = `${count.slice(2)}${time}`;
  if (epoch !== null && left > 0 && stage.name !== "sampling") {
    title = state.people > 1 ? "The last pairs are with others" : "The next pair comes in a moment";
    why = `${left} of this epoch are not judged yet.`;
  } else if (epoch !== null && left > 0) title = "The next pair is being drawn";
  byId("waiting").textContent = title;
  announce(title);
  byId("why").textContent = why;
  byId("stage").hidden = !stage.total;
  fill(byId("stage"), stage.done, stage.total);
}

function drawTitle() {
  const name = state === null || state.epoch === null || shown === null ? "waiting" : `${state.left} left`;
  document.title = `${name} – FDFO`;
}

// ---------------------------------------------------------------------------------------------------------------------
// keys, clicks and the name

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || event.target.closest("input, dialog")) return;
  if (event.key === "Backspace") {
    event.preventDefault();
    takeBack();
  }
  const choice = KEYS[event.key];
  if (choice === undefined || shown === null || (event.key === " " && event.target.closest("button"))) return;
  event.preventDefault(); // the page does not scroll
  choose(choice);
});

for (const button of document.querySelectorAll("[data-choice]")) {
  button.addEventListener("click", (event) => {
    if (event.detail > 0) button.blur(); // or the space bar would press it again
    choose(button.dataset.choice);
  });
}
byId("undo").addEventListener("click", (event) => {
  if (event.detail > 0) byId("undo").blur();
  takeBack();
});

byId("person").addEventListener("click", askName);
byId("ask").addEventListener("cancel", (event) => {
  if (!person) event.preventDefault();
});
byId("ask").querySelector("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = byId("name").value.trim();
  if (!name) return;
  person = name;
  localStorage.setItem("fdfo-person", name);
  byId("ask").close();
  shownAt = performance.now();
  drawState();
  refill(false);
});

function askName() {
  byId("name").value = person;
  byId("ask").showModal();
}

if (!person) askName();
look();
