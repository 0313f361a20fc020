"use strict";

// What the choices do: the held-out curves, and images of the same prompts before and after. Uses byId and state of page.js.

let drawnLearning = ""; // evaluations that are drawn
let follow = true; // the strip follows the newest evaluation

function drawLearning() {
  const { evaluations, heldout_prompts: prompts } = state;
  const now = JSON.stringify([state.boot, evaluations, prompts]);
  if (now === drawnLearning) return;
  drawnLearning = now;
  byId("learning").hidden = evaluations.length === 0;
  if (evaluations.length === 0) return;
  const slider = byId("slider");
  slider.max = evaluations.length - 1;
  if (follow) slider.value = slider.max;
  byId("choose").hidden = evaluations.length < 2;
  const names = Object.keys(evaluations[evaluations.length - 1].scores);
  byId("curves").replaceChildren(...names.map((name) => curve(name, evaluations)));
  byId("strip").replaceChildren(...prompts.map(beforeAfter));
  drawStrip();
}

function beforeAfter(prompt) {
  const figure = document.createElement("figure");
  const images = document.createElement("div");
  images.append(new Image(), new Image());
  const caption = document.createElement("figcaption");
  caption.textContent = prompt;
  caption.title = prompt;
  figure.append(images, caption);
  return figure;
}

/** Put the first evaluation's images, and the chosen one's, into the strip. */
function drawStrip() {
  const { evaluations, heldout_prompts: prompts } = state;
  const epochs = [evaluations[0].epoch, evaluations[Number(byId("slider").value)].epoch];
  byId("chosen").textContent = `before, and after ${epochs[1]} ${epochs[1] === 1 ? "epoch" : "epochs"}`;
  byId("slider").setAttribute("aria-valuetext", `after ${epochs[1]} epochs`);
  document.querySelectorAll("#strip figure").forEach((figure, i) => {
    figure.querySelectorAll("img").forEach((image, k) => {
      const address = `images/held-out/${epochs[k]}-${i}.jpg`;
      image.alt = `${k ? "after" : "before"}: ${prompts[i]}`;
      image.onload = () => image.classList.toggle("small", image.naturalWidth <= SMALL);
      if (image.getAttribute("src") !== address) image.src = address;
    });
  });
}

function curve(name, evaluations) {
  const points = evaluations.filter((one) => Number.isFinite(one.scores[name])).map((one) => [one.epoch, one.scores[name]]);
  const figure = document.createElement("figure");
  const title = document.createElement("h3");
  title.textContent = `held-out ${name}`;
  figure.append(title);
  if (points.length === 0) return figure;
  const [first, last] = [points[0], points[points.length - 1]];
  const value = document.createElement("p");
  const change = document.createElement("small");
  value.textContent = `${number(last[1])} `;
  if (points.length > 1) change.textContent = `${last[1] < first[1] ? "−" : "+"}${number(Math.abs(last[1] - first[1]), 3)} since epoch ${first[0]}`;
  value.append(change);
  figure.append(value, drawing(points), axis(first, last));
  return figure;
}

/** Draw points [epoch, score] as a line over its own range. */
function drawing(points) {
  const make = (kind, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", kind);
    for (const [key, text] of Object.entries(attributes)) element.setAttribute(key, text);
    return element;
  };
  const scores = points.map((point) => point[1]);
  const [low, high] = [Math.min(...scores), Math.max(...scores)];
  const start = points[0][0];
  const across = points[points.length - 1][0] - start || 1;
  const place = ([epoch, score]) => [(100 * (epoch - start)) / across, high === low ? 20 : 38 - (36 * (score - low)) / (high - low)];
  const svg = make("svg", { viewBox: "0 0 100 40", preserveAspectRatio: "none", role: "img" });
  svg.setAttribute("aria-label", points.map(([epoch, score]) => `epoch ${epoch}: ${number(score)}`).join(", "));
  svg.append(make("line", { x1: 0, x2: 100, y1: 40, y2: 40 }));
  svg.append(make("polyline", { points: points.map((point) => place(point).join(",")).join(" ") }));
  return svg;
}

function axis(first, last) {
  const line = document.createElement("div");
  line.className = "axis";
  for (const [epoch] of first === last ? [first] : [first, last]) {
    const end = document.createElement("span");
    end.textContent = `epoch ${epoch}`;
    line.append(end);
  }
  return line;
}

function number(value, digits = 4) {
  return Number(value.toPrecision(digits)).toString();
}

byId("slider").addEventListener("input", () => {
  follow = byId("slider").value === byId("slider").max;
  drawStrip();
});
