// Chooses the block that both pictures show: a slider, a play button, and a chart of the tokens after each block.

import { at, draw, fillTrack } from "./dom.js";

const STEP_MS = 350;

/** The control of the block. */
export class Blocks {
  #slider = at("block");
  #button = at("play");
  #timer = null;
  #onChange;

  constructor(onChange) {
    this.#onChange = onChange;
    this.#slider.addEventListener("input", () => {
      this.#stop();
      this.#changed();
    });
    this.#button.addEventListener("click", () => (this.#timer ? this.#stop() : this.#play()));
  }

  get block() {
    return Number(this.#slider.value);
  }

  fit(numBlocks) {
    this.#slider.max = numBlocks;
    this.#slider.value = numBlocks;
    this.#changed();
  }

  /** Draws the tokens after each block, one line a side. */
  draw(sides) {
    const most = Math.max(...sides.map((side) => side.merging?.tokens ?? 0));
    const blocks = Number(this.#slider.max), svg = at("steps");
    svg.setAttribute("viewBox", `0 0 ${blocks} 100`);
    svg.setAttribute("preserveAspectRatio", "none");
    const lines = sides.filter((side) => side.merging).map((side) => {
      const counts = [side.merging.tokens, ...side.merging.blocks.map((each) => each.tokens)];
      const path = counts.map((tokens, block) => `${block ? "L" : "M"}${block} ${98 - (94 * tokens) / most}`).join("");
      return draw("path", { d: path, class: side.name.toLowerCase() });
    });
    svg.replaceChildren(draw("path", { d: `M${this.block} 0V100`, class: "now" }), ...lines);
    svg.setAttribute("aria-label", sides.filter((side) => side.merging).map(
      (side) => `Tokens of ${side.name}: ${side.merging.tokens}, after each block ${side.merging.blocks.map((each) => each.tokens).join(", ")}`,
    ).join(". ") || "Tokens after each block");
  }

  #changed() {
    const block = this.block, all = this.#slider.max;
    fillTrack(this.#slider);
    at("block-name").textContent = block ? `after block ${block} of ${all}` : "the photo itself";
    this.#slider.setAttribute("aria-valuetext", block ? `after block ${block} of ${all}` : "before block 1");
    this.#onChange();
  }

  #play() {
    const step = () => {
      this.#slider.value = this.block + 1;
      this.#changed();
      if (this.block === Number(this.#slider.max)) this.#stop();
    };
    if (this.block === Number(this.#slider.max)) this.#slider.value = 0;
    this.#timer = setInterval(step, STEP_MS);
    this.#name("Pause", "M4 2.5h3v11H4zm5 0h3v11H9z");
    this.#changed();
  }

  #stop() {
    clearInterval(this.#timer);
    this.#timer = null;
    this.#name("Play the blocks", "M4 2.5v11l9-5.5z");
  }

  #name(label, path) {
    this.#button.setAttribute("aria-label", label);
    this.#button.querySelector("path").setAttribute("d", path);
  }
}
