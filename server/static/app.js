// The page: a model, a photo, and the answers of two settings of r.

import * as api from "./api.js";
import { Blocks } from "./blocks.js";
import { Curve, lastR } from "./curve.js";
import { Deployment } from "./deployment.js";
import { at, make, words } from "./dom.js";
import { askForKey, listenForKeys } from "./key.js";
import { Live } from "./live.js";
import { listenForPhotos } from "./photo.js";
import { Side } from "./side.js";
import * as status from "./status.js";
import { FEW, gain, isSame, MANY, results, Stopwatch } from "./times.js";
import { Turns } from "./turns.js";
import { compilation, judge } from "./verdict.js";

const FIRST_R = 16;
const POLL_MS = 2000, LONGEST_POLL_MS = 32_000;

let model = null; // the answer of /v1/models/{name}
let photo = null; // {blob, bitmap, name}
let lit = null; // the patch under the pointer
let polling = null; // the timer of the next poll of the model
let pollMs = POLL_MS;
const stale = new Set(); // sides whose answer belongs to an earlier r or photo
const turns = new Turns();
const a = new Side("a", { onTurn: look, onTouch: touch });
const b = new Side("b", { onTurn: look, onTouch: touch });
const sides = [a, b];
const stopwatch = new Stopwatch(turns, sides, showTimes);
const blocks = new Blocks(paint);
const curve = new Curve((r) => {
  if (Array.isArray(r)) return;
  a.turn(r);
  look(a);
});
const deployment = new Deployment({
  rOfA: () => words(Number(a.dial.value)),
  onModel: adopt,
  reload,
  onDenied: deny,
});
const live = new Live({ onAway: leave, onBack: comeBack, onVersion: () => attempt(reload) });
const takeFirstSample = listenForPhotos((chosen) => {
  photo = chosen;
  at("photo-error").hidden = true;
  at("photo-name").textContent = `${chosen.name}. It goes to this server and nowhere else.`;
  sides.forEach(look);
});
listenForKeys(() => attempt(model ? reload : start).then(() => sides.forEach(look)));
at("b-follow").addEventListener("change", () => {
  b.showDial();
  look(b);
});
at("model").addEventListener("change", () => attempt(() => open(at("model").value)));
at("measure").addEventListener("click", () => stopwatch.start(MANY));

/** Sends a side's request in its turn, then measures both sides again. */
function look(side) {
  if (!photo || !model) return;
  setStale(side, true);
  stopwatch.stop();
  pollMs = POLL_MS;
  curve.mark(sides);
  turns.ask(side.name, async (signal) => {
    const asked = photo;
    try {
      await side.look(asked, signal);
      at("photo-error").hidden = asked.bitmap !== null;
      if (!asked.bitmap) at("photo-error").textContent = "This browser cannot show this file, but the server reads it: the answers are right.";
      setStale(side, turns.isWaiting(side.name));
      paint();
      curve.mark(sides);
      if (!isSettled(side)) attempt(reload);
      stopwatch.start(FEW);
    } catch (problem) {
      if (problem.name !== "AbortError" && asked === photo) fail(side, problem);
    } finally {
      showTimes();
    }
  });
}

/** Shows a problem, and sends the request again if that may help. */
function fail(side, problem) {
  if (!(problem instanceof api.Problem)) throw problem;
  if ([401, 403].includes(problem.status)) return deny(problem);
  const retry = problem.passes ? " Trying again." : "";
  at("photo-error").textContent = `${photo.name}: ${problem.message}.${retry}`;
  at("photo-error").hidden = false;
  if (problem.passes) return void setTimeout(() => look(side), 1000 * problem.retryAfterS);
  side.clear();
  setStale(side, false);
  paint();
}

function setStale(side, isStale) {
  stale[isStale ? "add" : "delete"](side);
  status.markStale([...stale]);
}

/** Shows the times of both sides, and the verdict on them. */
function showTimes() {
  const medians = results(a.times, b.times);
  const slowestMs = gain(a.times, b.times) === null ? null : Math.max(...medians.map(({ ms }) => ms));
  sides.forEach((side, index) => side.showTime(medians[index], slowestMs));
  const done = Math.min(a.times.count, b.times.count), isMeasuring = stopwatch.wanted >= MANY;
  at("measure").disabled = status.isAway() || isMeasuring || !sides.every((side) => side.answer);
  at("measured").textContent = isMeasuring ? `${done} of ${MANY}` : "";
  if (model && !stale.size) judge(at("verdict"), a, b, model);
  follow();
}

/** Whether the model's own backend computed a side's answer. */
function isSettled({ times: { by } }) {
  return !by || !model.backend || isSame(by, { backend: model.backend.name, precision: model.backend.precision });
}

/** Polls the model while it compiles, and ever more rarely while the times cannot be compared. */
function follow() {
  const differ = a.times.by && b.times.by && !isSame(a.times.by, b.times.by);
  if (polling || !model || !(model.compiling || differ)) return;
  pollMs = model.compiling ? POLL_MS : Math.min(2 * pollMs, LONGEST_POLL_MS);
  polling = setTimeout(async () => {
    polling = null;
    if (!document.hidden) await reload().catch(() => null); // the live view shows a server that does not answer
    if (differ && !model.compiling) stopwatch.start(FEW);
    follow();
  }, pollMs);
}

function paint() {
  at("compare").toggleAttribute("data-empty", !sides.some((side) => side.merging));
  for (const side of sides) side.paint(blocks.block, lit);
  blocks.draw(sides);
}

/** Highlights the token of a patch on both sides. */
function touch(patch) {
  lit = patch;
  const sizes = patch === null || !blocks.block ? [] : sides.filter((side) => side.merging && patch < side.merging.blocks[0].groups.length)
    .map((side) => [side.name, side.sharing(patch, blocks.block)])
    .map(([name, size]) => `${name}: ${size === 1 ? "a token of its own" : `one token for ${size} patches`}`);
  at("touched").textContent = sizes.join(" · ");
  paint();
}

/** Shows a new answer about the model. */
function adopt(now) {
  const old = model;
  if (now.name !== old.name) return old; // the request was sent before another model was chosen
  model = { ...old, ...now }; // the answer to a change has fewer fields than the model
  for (const side of sides) side.model = model;
  deployment.show(model);
  curve.showModel(model);
  status.sayReady(model);
  if (b.follows && words(model.r) !== words(old.r)) {
    b.showDial();
    look(b);
  }
  if (compilation(model) !== compilation(old)) {
    readCurve();
    if (!model.compiling || !sides.every(isSettled)) stopwatch.start(FEW);
  }
  showTimes();
  return model;
}

/** Requests the model again, until no other answer has come meanwhile. */
async function reload() {
  let asked, answer;
  do {
    asked = model;
    answer = await api.model(asked.name);
  } while (model !== asked);
  return adopt(answer);
}

/** Reads the curve again: its speeds change as schedules are compiled. */
async function readCurve() {
  const { name } = model;
  const measured = await curveOf(name);
  if (name === model.name) curve.show(measured, model);
}

/** The curve of a model, or the Problem that prevents it: the page works without a curve. */
const curveOf = (name) => api.curve(name).catch((problem) => problem);

/** Shows a model. */
async function open(name) {
  const [answer, measured] = await Promise.all([api.model(name), curveOf(name)]);
  if (name !== at("model").value) return; // another has been chosen meanwhile
  model = answer;
  turns.clear();
  stopwatch.stop();
  const most = lastR(measured, model);
  a.fit(model, FIRST_R, most);
  b.fit(model, 0, most);
  for (const side of sides) side.clear();
  blocks.fit(model.num_blocks);
  deployment.show(model);
  live.watch(name);
  curve.show(measured, model);
  status.sayReady(model);
  if (photo) sides.forEach(look);
  else takeFirstSample();
}

/** Reads the list of models and shows the first. */
async function start() {
  const known = await api.models();
  at("model").replaceChildren(...known.map(({ name }) => make("option", {}, name)));
  await open(known[0].name);
}

/** Runs a task until the server answers. If the model is gone, the page starts again. */
async function attempt(task) {
  try {
    await task();
  } catch (problem) {
    if (!(problem instanceof api.Problem)) throw problem;
    if ([401, 403].includes(problem.status)) return deny(problem);
    status.sayWaiting(problem.message);
    setTimeout(() => attempt(problem.status === 404 ? start : task), 1000 * problem.retryAfterS);
  }
}

function deny(problem) {
  askForKey(problem);
  status.sayWaiting("a key is needed");
}

/** Handles unreadable metrics. With 401, 403 or 404 the server still answers other requests. */
function leave(error) {
  if ([401, 403, 404].includes(error.status)) {
    if (status.isAway()) comeBack();
    return status.sayNoMetrics(error);
  }
  stopwatch.stop();
  status.sayAway();
  showTimes();
}

function comeBack() {
  status.sayNoMetrics(null);
  status.sayBack();
  attempt(reload).then(() => sides.forEach(look)); // it may be another server now
}

live.start();
attempt(start);
