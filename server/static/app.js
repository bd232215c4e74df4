// The page: a model, a photo, and two settings of r that look at it.

import * as api from "./api.js";
import { Blocks } from "./blocks.js";
import { Curve } from "./curve.js";
import { Deployment } from "./deployment.js";
import { at, make, words } from "./dom.js";
import { Live } from "./live.js";
import { listenForPhotos } from "./photo.js";
import { Side, synonyms } from "./side.js";
import { Turns } from "./turns.js";

const FIRST_R = 8;

let model = null; // as /v1/models/{name} tells it
let photo = null; // {blob, bitmap, name}
let lit = null; // the patch under the pointer
let knownCurve = null;
const turns = new Turns();
const a = new Side("a", { onTurn: look, onTouch: touch });
const b = new Side("b", { onTurn: look, onTouch: touch });
const sides = [a, b];
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
  onDenied: askForKey,
});
const live = new Live({ onAway: sayAway, onBack: sayBack, onVersion: () => attempt(reload) });
const takeFirstSample = listenForPhotos((chosen) => {
  photo = chosen;
  at("photo-error").hidden = true;
  at("photo-name").textContent = `${chosen.name}. It goes to this server and nowhere else.`;
  sides.forEach(look);
});

at("b-follow").addEventListener("change", () => {
  b.showDial();
  look(b);
});
at("model").addEventListener("change", () => attempt(() => open(at("model").value)));
at("key").addEventListener("submit", (event) => {
  event.preventDefault();
  api.keepKey(at("key-value").value.trim());
  at("key-value").value = "";
  at("key").hidden = true;
  attempt(model ? reload : start).then(() => sides.forEach(look));
});

/** Asks a side's question, once it is its turn. */
function look(side) {
  if (!photo || !model) return;
  turns.ask(side.name, async (signal) => {
    const asked = photo;
    document.querySelector(".compare").toggleAttribute("data-busy", true);
    try {
      await side.look(asked, signal);
      at("photo-error").hidden = asked.bitmap !== null;
      if (!asked.bitmap) at("photo-error").textContent = "This browser cannot show this file, but the server reads it: the answers stand.";
      judge();
      paint();
      time(side, asked);
    } catch (problem) {
      if (problem.name !== "AbortError" && asked === photo) fail(side, problem);
    } finally {
      document.querySelector(".compare").toggleAttribute("data-busy", false);
    }
  });
}

/** Times the same question a few more times, each when nobody asks for more. */
function time(side, asked) {
  turns.ask(`the time of ${side.name}`, async (signal) => {
    if (asked !== photo) return;
    const more = await side.time(asked, signal).catch(() => false); // no time is told then, and nothing else is lost
    if (more) time(side, asked);
  });
}

/** Says what is wrong, and asks again where that may help. */
function fail(side, problem) {
  if (!(problem instanceof api.Problem)) throw problem;
  if ([401, 403].includes(problem.status)) return askForKey(problem);
  const retry = problem.passes ? " Trying again." : "";
  at("photo-error").textContent = `${photo.name}: ${problem.message}.${retry}`;
  at("photo-error").hidden = false;
  if (problem.passes) return void setTimeout(() => look(side), 1000 * problem.retryAfterS);
  side.clear();
  paint();
  judge();
}

/** Whether the two agree, in a sentence. */
function judge() {
  const verdict = at("verdict");
  if (!a.answer || !b.answer) {
    delete verdict.dataset.agree;
    verdict.textContent = "Two settings, one photo: do they agree?";
    return;
  }
  const [first, second] = sides.map((side) => synonyms(side.answer.results[0].top_k[0].label)[0]);
  verdict.dataset.agree = first === second ? "yes" : "no";
  const said = first === second
    ? [make("b", {}, "Both agree"), `: ${first}.`]
    : [make("b", {}, "They differ"), `: A says ${first}, B says ${second}.`];
  const share = Math.round((100 * a.answer.tokens) / b.answer.tokens);
  const left = a.answer.tokens === b.answer.tokens ? "Both end with as many tokens." : `A ends with ${share} % of B's tokens.`;
  verdict.replaceChildren(...said, make("small", {}, left));
}

function paint() {
  document.querySelector(".compare").toggleAttribute("data-empty", !sides.some((side) => side.merging));
  for (const side of sides) side.paint(blocks.block, lit);
  blocks.draw(sides);
}

/** Lights the token of a patch, on both sides. */
function touch(patch) {
  lit = patch;
  const told = patch === null || !blocks.block ? [] : sides.filter((side) => side.merging && patch < side.merging.blocks[0].groups.length)
    .map((side) => [side.name, side.sharing(patch, blocks.block)])
    .map(([name, size]) => `${name}: ${size === 1 ? "a token of its own" : `one token for ${size} patches`}`);
  at("touched").textContent = told.join(" · ");
  paint();
}

/** Takes over what the server says of the model. */
function adopt(told) {
  const old = model;
  if (told.name !== old.name) return old; // asked before another model was chosen
  model = told;
  for (const side of sides) side.model = told;
  deployment.show(told);
  curve.show(knownCurve, told);
  if (b.follows && words(told.r) !== words(old.r)) {
    b.showDial();
    look(b);
  }
  return told;
}

/** Asks for the model again, until no newer word of it has come while we waited: an answer may be overtaken. */
async function reload() {
  let asked, told;
  do {
    asked = model;
    told = await api.model(asked.name);
  } while (model !== asked);
  adopt(told);
  say("ready", "ready");
  return told;
}

/** Brings the page to a model. */
async function open(name) {
  const told = await api.model(name);
  if (name !== at("model").value) return; // another has been chosen meanwhile
  model = told;
  turns.clear();
  a.fit(model, FIRST_R);
  b.fit(model, 0);
  for (const side of sides) side.clear();
  blocks.fit(model.num_blocks);
  deployment.show(model);
  live.watch(name);
  say("ready", "ready");
  if (photo) sides.forEach(look);
  else takeFirstSample();
  try {
    curve.show((knownCurve = await api.curve(name)), model);
  } catch (problem) {
    curve.fail(problem.message);
  }
}

/** Finds the models. */
async function start() {
  const known = await api.models();
  at("model").replaceChildren(...known.map(({ name }) => make("option", {}, name)));
  await open(known[0].name);
}

/** Does what needs the server, for as long as it takes; a model that is gone starts the page anew. */
async function attempt(task) {
  try {
    await task();
  } catch (problem) {
    if (!(problem instanceof api.Problem)) throw problem;
    if ([401, 403].includes(problem.status)) return askForKey(problem);
    say("waiting", problem.message);
    setTimeout(() => attempt(problem.status === 404 ? start : task), 1000 * problem.retryAfterS);
  }
}

function askForKey(problem) {
  const why = api.hasKey() ? "The server does not take this key." : "This server asks for a key.";
  at("key-why").textContent = problem.status === 403 ? "Changes need the admin key." : why;
  at("key").hidden = false;
  at("key-value").focus();
  say("waiting", "a key is needed");
}

function say(state, text) {
  at("health").dataset.state = state;
  at("health").textContent = text;
}

function sayAway(error) {
  const answers = [401, 404].includes(error.status); // and keeps its metrics elsewhere, or to those with a key
  if (!answers) say("away", "no answer");
  at("away").textContent = answers
    ? `${error.message}.`
    : "The server does not answer. Trying again every second; what you see is from before.";
  at("away").hidden = false;
  document.querySelector(".live").toggleAttribute("data-away", true);
}

function sayBack() {
  at("away").hidden = true;
  document.querySelector(".live").toggleAttribute("data-away", false);
  attempt(reload); // it may be another server by now
}

live.start();
attempt(start);
