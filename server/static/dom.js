// Elements, by id and by name.

/** The element with this id. */
export const at = (id) => document.getElementById(id);

/** A new element with text or children. */
export function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** A new element of SVG. */
export function draw(name, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** Fills the track of a slider up to its thumb. */
export function fillTrack(slider) {
  const share = (slider.value - slider.min) / Math.max(slider.max - slider.min, 1);
  slider.style.setProperty("--at", `${100 * share}%`);
}

/** A setting of r as text: a number, auto, or a list without its trailing zeros. */
export const words = (r) => (Array.isArray(r) ? r.join(", ").replace(/(, 0)+$/, "") : String(r));

/** A label's first word for its class, and the rest of them. */
export function synonyms(label) {
  const [first, ...more] = label.split(/(?=, )/);
  return [first, more.join("")];
}
