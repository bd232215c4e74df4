// The verdict: whether A and B agree, and which of them is faster.

import { make, synonyms, words } from "./dom.js";
import { gain, isSame, results } from "./times.js";

const NOTICEABLE = 1.05; // a smaller gain is noise

/** "compiling r = 8 (3 of 9)", or null while nothing is compiled. */
export function compilation({ compiling }) {
  if (!compiling) return null;
  const { r, done, total } = compiling;
  return `compiling r = ${words(r)} (${Math.min(done + 1, total)} of ${total})`;
}

/** The name of a backend beside a time. */
export const backend = ({ backend, precision }) => `${backend}, ${precision}`;

/** A time of some milliseconds, as short as its size allows. */
export const time = (ms) => (ms < 1000 ? `${ms.toFixed(ms < 10 ? 1 : 0)} ms` : `${(ms / 1000).toFixed(1)} s`);

/** The faster side and its gain, as text; null while the times cannot be compared. */
function faster(a, b) {
  const times = gain(a.times, b.times);
  if (times === null) return null;
  const [winner, factor] = times >= 1 ? ["A", times] : ["B", 1 / times];
  return factor < NOTICEABLE ? "equally fast" : `${winner} is ${factor.toFixed(1)}× as fast`;
}

/** A sentence about the times. */
function detail(a, b, model) {
  const [one, other] = results(a.times, b.times);
  const compiled = compilation(model)?.replace("c", "C");
  if (gain(a.times, b.times) !== null) {
    const count = Math.min(one.count, other.count);
    const times = `A takes ${time(one.ms)}, B ${time(other.ms)}: medians of ${count} inferences each.`;
    return compiled ? `${times} ${compiled}: all times are longer meanwhile.` : times;
  }
  if (isSame(a.times.by, b.times.by)) return "Measuring the times.";
  if (compiled) return `${compiled}: the times follow.`;
  const each = [a, b].map((side) => `${side.name} was computed by ${backend(side.times.by)}`);
  return `${each.join(", ")}: their times cannot be compared.`;
}

/** Shows the verdict on two sides. */
export function judge(element, a, b, model) {
  if (!a.answer || !b.answer) {
    delete element.dataset.agree;
    element.textContent = "Two settings, one photo: do they agree?";
    return;
  }
  const [first, second] = [a, b].map((side) => synonyms(side.answer.results[0].top_k[0].label)[0]);
  const agree = first === second, speed = faster(a, b);
  element.dataset.agree = agree ? "yes" : "no";
  const head = [agree ? "Same answer" : "Different answers", speed].filter(Boolean).join(", ");
  const classes = agree ? first : `A says ${first}, B says ${second}`;
  element.replaceChildren(make("b", {}, head), `: ${classes}.`, make("small", {}, detail(a, b, model)));
}
