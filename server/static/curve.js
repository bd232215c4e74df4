// The measured curve: agreement with r = 0, or top-1, over images a second; a dot for each r, and marks for A and B.

import { at, draw, make, words } from "./dom.js";

const HIGH = 300, LEFT = 52, RIGHT = 56, TOP = 40, BOTTOM = 56; // pixels
const LETTER = 6.5; // pixels of a label's letter
const MARKS = { A: -20, B: 20 }; // pixels below the curve

const isNumber = (r) => typeof r === "number";

/** The highest r of the dials: the curve's last r, or without a curve the r beyond which no fewer tokens are left. */
export function lastR(curve, model) {
  const measured = Math.max(...(curve?.rows ?? []).map(({ r }) => r).filter(isNumber));
  if (measured > 0) return measured;
  const left = Object.values(model.token_counts).map((counts) => counts.at(-1));
  return Math.max(left.indexOf(Math.min(...left)), 1);
}

/** Draws a curve, or shows the command that measures one. */
export class Curve {
  #curve = null;
  #model = null;
  #marks = []; // [name, r] of each side
  #onChoose;

  /** @param onChoose Called with the r of a chosen dot. */
  constructor(onChoose) {
    this.#onChoose = onChoose;
    at("curve-what").addEventListener("change", () => this.#draw());
    addEventListener("resize", () => this.#draw());
  }

  /** Shows a curve (null: none was measured; a Problem: it cannot be read) with the deployment's r marked. */
  show(curve, model) {
    this.#curve = curve;
    this.#model = model;
    at("curve-what").hidden = !curve?.rows?.some((row) => row.top1 !== null);
    at("curve-says").textContent = at("curve-from").textContent = "";
    if (curve?.rows?.length) return this.#draw();
    at("curve").replaceChildren(make("div", { class: "empty" }, ...(curve ? [`The curve cannot be read: ${curve.message}.`] : [
      "This model has no measured curve. A folder of photos, without labels, is enough to measure one:",
      make("code", {}, `tome-server calibrate --model ${model.source} --images FOLDER`),
    ])));
  }

  /** Updates the mark of the deployment's r. */
  showModel(model) {
    const hasMoved = this.#operating !== words(model.r);
    this.#model = model;
    if (hasMoved) this.#draw();
  }

  /** Marks the r of each side. */
  mark(sides) {
    const marks = sides.map((side) => [side.name, side.shownR]);
    if (JSON.stringify(marks) === JSON.stringify(this.#marks)) return;
    this.#marks = marks;
    this.#draw();
  }

  get #operating() {
    return this.#model && words(this.#model.r);
  }

  #isOperating(row) {
    return words(row.r) === this.#operating;
  }

  #draw() {
    if (!this.#curve?.rows?.length) return;
    const what = at("curve-what").hidden ? "agreement" : document.querySelector("input[name=what]:checked").value;
    const rows = this.#curve.rows.filter((row) => row[what] !== null).sort((a, b) => a.images_per_s - b.images_per_s);
    const low = Math.min(...rows.map((row) => (what === "agreement" ? row.agreement_interval[0] : row.top1)));
    const high = Math.max(...rows.map((row) => (what === "agreement" ? row.agreement_interval[1] : row.top1)));
    const wide = Math.max(at("curve").clientWidth, 260);
    const ys = ticks(low, high, 4), xs = ticks(rows[0].images_per_s, rows.at(-1).images_per_s, wide / 120);
    const x = (value) => LEFT + ((wide - LEFT - RIGHT) * (value - xs[0])) / (xs.at(-1) - xs[0]);
    const y = (value) => HIGH - BOTTOM - ((HIGH - TOP - BOTTOM) * (value - ys[0])) / (ys.at(-1) - ys[0]);
    const svg = draw("svg", { viewBox: `0 0 ${wide} ${HIGH}`, role: "group", "aria-label": "A dot for each r" });
    for (const tick of ys) {
      svg.append(
        draw("path", { class: "axis", d: `M${LEFT} ${y(tick)}H${wide - RIGHT}` }),
        draw("text", { x: LEFT - 8, y: y(tick) + 4, "text-anchor": "end" }, `${number(100 * tick)} %`),
      );
    }
    for (const tick of xs) {
      svg.append(draw("text", { x: x(tick), y: HIGH - 22, "text-anchor": "middle" }, number(tick)));
    }
    svg.append(
      draw("text", { x: wide - RIGHT, y: HIGH - 4, "text-anchor": "end" }, "images/s"),
      draw("path", {
        class: "road", d: rows.map((row, i) => `${i ? "L" : "M"}${x(row.images_per_s)} ${y(row[what])}`).join(""),
      }),
      ...rows.map((row) => this.#dot(row, what, x, y)),
      ...this.#labels(rows, what, x, y),
      ...this.#marks.map(([name, r]) => mark(name, place(rows, r, what), x, y)).filter(Boolean),
    );
    const focused = [...at("curve").querySelectorAll(".dot")].indexOf(document.activeElement);
    at("curve").replaceChildren(svg);
    if (focused >= 0) svg.querySelectorAll(".dot")[focused]?.focus();
    else this.#say(rows.find((row) => this.#isOperating(row)));
  }

  #dot(row, what, x, y) {
    const [left, top] = [x(row.images_per_s), y(row[what])];
    const dot = draw("g", { class: "dot", tabindex: 0, role: "button", "aria-label": `${this.#words(row)} Show it as A.` });
    if (what === "agreement") {
      const [from, to] = row.agreement_interval;
      dot.append(draw("path", { class: "whisker", d: `M${left} ${y(from)}V${y(to)}` }));
    }
    dot.append(
      draw("circle", { class: "reach", cx: left, cy: top, r: 16 }),
      draw("circle", { class: "point", cx: left, cy: top, r: 5 }),
    );
    if (this.#isOperating(row)) dot.append(draw("circle", { class: "ring", cx: left, cy: top, r: 9 }));
    dot.addEventListener("pointerenter", () => this.#say(row));
    dot.addEventListener("focus", () => this.#say(row));
    dot.addEventListener("click", () => this.#onChoose(row.r));
    dot.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      this.#onChoose(row.r);
    });
    return dot;
  }

  /** Labels the dots that have room for a label, the deployment's first. */
  #labels(rows, what, x, y) {
    const labels = [];
    for (const row of [...rows].sort((one, other) => this.#isOperating(other) - this.#isOperating(one))) {
      const here = this.#isOperating(row);
      const text = `r = ${Array.isArray(row.r) ? "a list" : row.r}${here ? ", deployment" : ""}`;
      const from = x(row.images_per_s) + 14, to = from + LETTER * text.length;
      if (labels.some((other) => from < other.to && other.from < to)) continue;
      labels.push({ from, to, text, top: y(row[what]) - 9, here });
    }
    return labels.map(({ from, text, top, here }) => draw("text", { x: from, y: top, class: here ? "label here" : "label" }, text));
  }

  #say(row) {
    const { speed_from: speed, agreement_from: agreement } = this.#curve;
    at("curve-says").textContent = row
      ? this.#words(row) : `The curve has no row for the deployment's r = ${this.#operating}.`;
    at("curve-from").textContent = `Speed: ${origin(speed)}. ` +
      `Agreement: ${agreement.photos.toLocaleString("en")} photos, ${origin(agreement)}.`;
  }

  #words(row) {
    const interval = row.agreement_interval.map((share) => number(100 * share)).join(" to ");
    const top1 = row.top1 === null ? "" : `, ${number(100 * row.top1)} % top-1`;
    const here = this.#isOperating(row) ? " This is the deployment's r." : "";
    const unmerged = this.#curve.rows[0], times = row.images_per_s / unmerged.images_per_s;
    const faster = row === unmerged ? "" : ` (${times.toFixed(1)}× r = 0)`;
    return `r = ${words(row.r)}: ${number(row.images_per_s)} images/s${faster}, ${row.tokens} tokens left, ` +
      `agrees with r = 0 on ${number(100 * row.agreement)} % (95 %: ${interval})${top1}.${here}`;
  }
}

/** The origin of a measurement, as text. */
const origin = ({ device, backend, precision, measured }) => `${device}, ${backend}, ${precision}, ${measured}`;

/** The place of r on the curve, [images/s, share]: interpolated if it has no row, null outside the curve. */
function place(rows, r, what) {
  const own = rows.find((row) => words(row.r) === words(r));
  if (own) return [own.images_per_s, own[what]];
  const numbers = rows.filter((row) => isNumber(row.r)).sort((one, other) => one.r - other.r);
  const next = numbers.findIndex((row) => row.r > r);
  if (!isNumber(r) || next < 1) return null;
  const [before, after] = [numbers[next - 1], numbers[next]], share = (r - before.r) / (after.r - before.r);
  const between = (field) => before[field] + share * (after[field] - before[field]);
  return [between("images_per_s"), between(what)];
}

/** The letter of a side at its place on the curve. */
function mark(name, where, x, y) {
  if (!where) return null;
  const [left, top] = [x(where[0]), y(where[1])], away = MARKS[name];
  return draw(
    "g", { class: `mark-of ${name.toLowerCase()}`, role: "img", "aria-label": `${name} is here` },
    draw("path", { d: `M${left} ${top}v${away}` }),
    draw("circle", { cx: left, cy: top + away, r: 9 }),
    draw("text", { x: left, y: top + away + 4, "text-anchor": "middle" }, name),
  );
}

/** Round numbers that reach from below the least to above the greatest. */
function ticks(low, high, about) {
  const span = Math.max(high - low, Math.abs(high) * 1e-3, 1e-6);
  const rough = span / about, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((times) => times * power).find((each) => each >= rough);
  const from = Math.floor(low / step + 1e-9), to = Math.max(Math.ceil(high / step - 1e-9), from + 1);
  return Array.from({ length: to - from + 1 }, (_, index) => (from + index) * step);
}

function number(value) {
  return String(Number(value.toPrecision(3)));
}
