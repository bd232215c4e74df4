// One of the two settings: its dial, its picture, its answer and its times.

import { ask } from "./api.js";
import { at, fillTrack, make, synonyms, words } from "./dom.js";
import { Painter } from "./paint.js";
import { Times } from "./times.js";
import { backend, time } from "./verdict.js";

const BARS = 5;

/** Side A or B of the comparison. */
export class Side {
  #id;
  #painter;
  #photo = null; // of the merging
  answer = null; // of /v1/classify
  merging = null; // of /v1/explain
  times = new Times();

  constructor(id, { onTurn, onTouch }) {
    this.#id = id;
    this.dial = at(`${id}-dial`);
    this.canvas = at(`${id}-picture`);
    this.#painter = new Painter(this.canvas);
    this.dial.addEventListener("input", () => {
      this.showDial();
      onTurn(this);
    });
    this.#listenForTouch(onTouch);
  }

  get name() {
    return this.#id.toUpperCase();
  }

  /** The r of requests; null for the deployment's. */
  get r() {
    return this.follows ? null : Number(this.dial.value);
  }

  get follows() {
    return Boolean(at(`${this.#id}-follow`)?.checked);
  }

  /** Sets the dial's model and range, and its r, clipped to the range. */
  fit(model, r, most) {
    this.model = model;
    this.dial.max = most;
    this.turn(Math.min(r, most));
  }

  turn(r) {
    this.dial.value = r;
    this.showDial();
  }

  /** Shows the r of the dial, before any answer. */
  showDial() {
    const follows = this.follows, r = follows ? this.model.r : Number(this.dial.value);
    this.dial.disabled = follows;
    if (follows && typeof r === "number") this.dial.value = r;
    fillTrack(this.dial);
    this.#showR(r);
    const counts = this.model.token_counts[r]; // none for a list or for auto
    this.dial.setAttribute("aria-valuetext", counts ? `${r}, leaves ${counts.at(-1)} of ${counts[0]} tokens` : words(r));
  }

  #showR(r) {
    this.shownR = r;
    at(`${this.#id}-r`).textContent = words(r);
  }

  /** Sends the requests for a photo; shows the answer, then the merged patches. Throws a Problem. */
  async look(photo, signal) {
    const r = this.r;
    const answer = await ask("classify", photo.blob, this.model.name, r, signal);
    signal.throwIfAborted();
    this.answer = answer;
    this.times.clear();
    this.times.add(answer);
    this.#showAnswer();
    const merging = await ask("explain", photo.blob, this.model.name, r, signal);
    signal.throwIfAborted();
    this.merging = merging;
    this.#photo = photo;
    const through = this.merging.blocks.reduce((sum, { tokens }) => sum + tokens, 0);
    const share = through / (this.merging.tokens * this.merging.blocks.length);
    at(`${this.#id}-work`).textContent = `${Math.round(100 * share)} %`;
  }

  /** Repeats the request for its time. Returns false if the setting has changed. */
  async time(signal) {
    const answer = this.answer;
    if (!answer || !this.#photo) return false;
    const again = await ask("classify", this.#photo.blob, this.model.name, this.r, signal);
    if (answer !== this.answer || words(again.r) !== words(answer.r)) return false;
    this.times.add(again);
    return true;
  }

  /** Shows a median, and a bar that is full at `slowestMs`; null shows no bar. */
  showTime(result, slowestMs) {
    const { by } = this.times;
    at(`${this.#id}-ms`).textContent = result ? time(result.ms) : "–";
    at(`${this.#id}-by`).textContent = by ? backend(by) : "";
    at(`${this.#id}-time`).style.setProperty("--share", result && slowestMs ? result.ms / slowestMs : 0);
  }

  #showAnswer() {
    const { tokens, results, r, tuned } = this.answer;
    this.#showR(r);
    at(`${this.#id}-tokens`).textContent = `${tokens} of ${this.model.num_tokens}${tuned ? ", tuned" : ""}`;
    const list = at(`${this.#id}-bars`);
    const top = results[0].top_k.slice(0, BARS);
    while (list.children.length < top.length) {
      list.append(make("li", {}, make("span", { class: "name" }), make("span", { class: "score" })));
    }
    while (list.children.length > top.length) list.lastChild.remove();
    top.forEach(({ label, score }, index) => {
      const [name, percent] = list.children[index].children;
      const [first, more] = synonyms(label);
      name.replaceChildren(make("span", { class: "first" }, first), make("span", { class: "more" }, more));
      name.title = label;
      percent.textContent = `${(100 * score).toFixed(1)} %`;
      list.children[index].style.setProperty("--share", score);
    });
  }

  /** Paints the photo after a block; block 0 is the photo itself. */
  paint(block, lit) {
    if (!this.merging) return;
    const photo = this.#photo;
    const { blocks, tokens, r } = this.merging;
    const { groups, tokens: left } = block ? blocks[block - 1] : { groups: null, tokens };
    this.#painter.paint(photo.bitmap, this.merging, groups, groups ? lit : null);
    const where = block ? `after block ${block}` : "before block 1";
    at(`${this.#id}-caption`).replaceChildren(make("b", {}, `${left} tokens`), ` of ${tokens} ${where}`);
    this.canvas.setAttribute(
      "aria-label", `${photo.name} at r ${words(r)}, painted by its ${left} tokens ${where}; arrow keys pick a patch`,
    );
  }

  /** The number of patches in the token of this patch after a block. */
  sharing(patch, block) {
    const groups = block ? this.merging.blocks[block - 1].groups : null;
    return groups ? groups.filter((group) => group === groups[patch]).length : 1;
  }

  /** Removes the answer. */
  clear() {
    this.answer = this.merging = this.#photo = null;
    this.times.clear();
    for (const part of ["tokens", "work"]) at(`${this.#id}-${part}`).textContent = "–";
    at(`${this.#id}-bars`).replaceChildren();
    at(`${this.#id}-caption`).textContent = "Nothing to see yet.";
    this.canvas.getContext("2d").clearRect(0, 0, this.canvas.width, this.canvas.height);
    this.canvas.setAttribute("aria-label", "No photo yet");
  }

  #listenForTouch(onTouch) {
    let patch = null;
    const touch = (next) => {
      if (next === patch) return;
      patch = next;
      onTouch(next);
    };
    this.canvas.addEventListener("pointermove", (event) => {
      if (!this.merging) return;
      const [rows, columns] = this.merging.grid, box = this.canvas.getBoundingClientRect();
      const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
      const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
      if (column >= 0 && row >= 0 && column < columns && row < rows) touch(row * columns + column);
    });
    this.canvas.addEventListener("pointerleave", () => touch(null));
    this.canvas.addEventListener("blur", () => touch(null));
    this.canvas.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (event.key === "Escape") touch(null);
      if (!move || !this.merging) return;
      event.preventDefault();
      const [rows, columns] = this.merging.grid, from = patch ?? Math.floor(rows / 2) * columns + Math.floor(columns / 2);
      const row = Math.min(Math.max(Math.floor(from / columns) + move[0], 0), rows - 1);
      const column = Math.min(Math.max((from % columns) + move[1], 0), columns - 1);
      touch(row * columns + column);
    });
  }
}
