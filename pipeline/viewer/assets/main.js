// The page: wires the state of the run to the picture, the panel and the keyboard.

import { Crops } from "./crop.js";
import { Curves } from "./curves.js";
import { bytes, clock, duration, px } from "./format.js";
import { link } from "./link.js";
import { MapOverlay } from "./map.js";
import { follow } from "./stream.js";
import { View } from "./view.js";
import { Works } from "./works.js";

const $ = (id) => document.getElementById(id);
const UNDER_PX = 4096; // above this side, a finished smaller stage lies below until the tiles are there

const page = { state: null, a: null, b: null, mode: "single", following: true, session: null, pageVersion: null };
const viewA = new View($("view-a"), true);
const viewB = new View($("view-b"), false);
const curves = new Curves($("curve"));
const map = new MapOverlay(viewA, $("map-text"), $("map-ramp"));
const crops = new Crops(viewA);
link([viewA.viewer, viewB.viewer]);

// ---- state ----------------------------------------------------------------------------------------------------------

function receive(state) {
  if (page.pageVersion && page.pageVersion !== state.page) { location.reload(); return; } // the program was updated
  page.pageVersion = state.page;
  page.state = state;
  choosePictures();
  writeHeader();
  writeFacts();
  writeLog();
  writeStages();
  curves.update(state.stages);
  crops.update(state);
  notice(state.problem ? `This run directory has a problem: ${state.problem}` : "");
  showPictures();
  document.body.dataset.ready = "yes";
}

function lost(status) {
  $("phase").textContent = "viewer lost";
  $("phase").dataset.phase = "lost";
  notice(status === 403
    ? "The viewer was started again with another token: open the address that it printed."
    : "The viewer does not answer. The run, if there is one, is not affected. This page goes on as soon as `pipeline view` runs again at this address.");
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

// ---- pictures -------------------------------------------------------------------------------------------------------

const shown = () => (page.state?.pictures ?? []).filter((picture) => picture.version);
const find = (id) => shown().find((picture) => picture.id === id);
const stages = () => shown().filter((picture) => picture.kind === "stage");
const gallery = Boolean(document.documentElement.dataset.gallery);

function choosePictures() {
  const newest = stages().at(-1) ?? shown().find((picture) => picture.kind === "gallery");
  if (!find(page.a) || (page.following && newest)) page.a = (newest ?? find("content") ?? shown()[0])?.id ?? null;
  if (!find(page.b) || page.b === page.a) page.b = (page.a === "content" ? newest : find("content") ?? shown().find((picture) => picture.id !== page.a))?.id ?? null;
  for (const [element, chosen] of [[$("picture-a"), page.a], [$("picture-b"), page.b]]) {
    const options = page.state.pictures.map((picture) => {
      const option = new Option(picture.title + (picture.version ? "" : picture.problem ? " (cannot be shown)" : " (being read)"), picture.id);
      option.disabled = !picture.version;
      option.title = picture.problem;
      return option;
    });
    if (document.activeElement !== element || element.options.length !== options.length) element.replaceChildren(...options);
    element.value = chosen ?? "";
  }
}

function showPictures() {
  const [a, b] = [find(page.a), find(page.b)];
  const two = page.mode !== "single" && b;
  viewA.show("under", a && Math.max(a.width, a.height) > UNDER_PX ? underlay(a) : null);
  viewA.show("a", a);
  viewA.show("b", page.mode === "swipe" ? b : null);
  viewB.show("a", page.mode === "beside" ? b : null);
  $("label-a").textContent = a ? label(a) : "";
  $("label-a").hidden = !a;
  $("label-b").textContent = two ? label(b) : "";
  $("label-b").hidden = !two;
}

// The largest finished stage that is small enough to be there at once.
function underlay(picture) {
  const small = stages().filter((other) => other.id !== picture.id && Math.max(other.width, other.height) <= UNDER_PX);
  return picture.kind === "stage" ? small.at(-1) ?? null : null;
}

function label(picture) {
  return `${picture.title} · ${px(picture.width, picture.height)}`;
}

function setMode(mode) {
  const half = (mode === "beside") !== (page.mode === "beside");
  page.mode = mode;
  document.querySelectorAll("[data-mode]").forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.mode === mode)));
  $("picture-b-row").hidden = mode === "single";
  $("view-b").hidden = mode !== "beside";
  $("pictures").classList.toggle("beside", mode === "beside");
  $("swipe").hidden = mode !== "swipe";
  viewA.clipAt(mode === "swipe" ? swipeX() : null);
  if (page.state) showPictures();
  if (half) { viewA.refit(); viewB.refit(); }
}

function choose(place, id) {
  page[place] = id;
  if (place === "a") page.following = id === stages().at(-1)?.id;
  choosePictures();
  writeStages();
  showPictures();
}

// ---- the swipe line -------------------------------------------------------------------------------------------------

let swipe = 0.5;
const swipeX = () => swipe * $("view-a").clientWidth;

function setSwipe(share) {
  swipe = Math.min(Math.max(share, 0), 1);
  $("swipe").style.left = `${100 * swipe}%`;
  $("swipe").setAttribute("aria-valuenow", String(Math.round(100 * swipe)));
  viewA.clipAt(swipeX());
}

$("swipe").addEventListener("pointerdown", (event) => {
  $("swipe").setPointerCapture(event.pointerId);
  event.preventDefault();
  $("swipe").focus();
});
$("swipe").addEventListener("pointermove", (event) => {
  if (!$("swipe").hasPointerCapture(event.pointerId)) return;
  const box = $("pictures").getBoundingClientRect();
  setSwipe((event.clientX - box.left) / box.width);
});
$("swipe").addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -0.02, ArrowRight: 0.02, Home: -1, End: 1 }[event.key];
  if (step === undefined) return;
  setSwipe(swipe + step);
  event.preventDefault();
  event.stopPropagation();
});
new ResizeObserver(() => { if (page.mode === "swipe") setSwipe(swipe); }).observe($("pictures"));

// ---- text -----------------------------------------------------------------------------------------------------------

const PHASES = { waiting: "waiting for the run", running: "painting", done: "done", stopped: "stopped", damaged: "cannot be read" };

function writeHeader() {
  const { state } = page;
  document.title = gallery ? state.name : `${state.name} – pipeline view`;
  $("name").textContent = state.name;
  $("name").title = state.work_dir;
  $("phase").textContent = PHASES[state.phase];
  $("phase").dataset.phase = state.phase;
  const stage = state.stages[state.stage];
  $("headline").textContent = stage && state.phase !== "done"
    ? `stage ${state.stage + 1} of ${state.stages.length}, iteration ${state.iteration} of ${stage.max_iterations}` + (state.phase === "running" && state.eta_s !== null ? `, about ${duration(state.eta_s)} left` : "")
    : state.width ? px(state.width, state.height) : "";
}

function writeFacts() {
  const { state } = page;
  const work = (stage, count) => stage.width * stage.height * count;
  const total = state.stages.reduce((sum, stage) => sum + work(stage, stage.max_iterations), 0);
  const done = state.stages.reduce((sum, stage) => sum + work(stage, stage.state === "done" ? stage.max_iterations : stage.iterations), 0);
  $("bar").value = total ? done / total : 0;
  const facts = gallery ? [["picture", px(state.width, state.height)], ...(state.credit ? [["credit", state.credit]] : [])] : [
    ["picture", state.width ? px(state.width, state.height) : "not planned yet"],
    ...(state.dpi && state.width ? [["print", `${((state.width / state.dpi) * 2.54).toFixed(1)} × ${((state.height / state.dpi) * 2.54).toFixed(1)} cm at ${state.dpi} dpi`]] : []),
    ...(state.phase === "running" ? [["time left", duration(state.eta_s)]] : []),
    ["time so far", duration(state.stages.reduce((sum, stage) => sum + stage.seconds, 0))],
    ["disk", `${bytes(state.disk_used)} used, ${bytes(state.disk_free)} free`],
    ...(state.memory ? [["memory", bytes(state.memory)]] : []),
  ];
  $("facts").replaceChildren(...facts.flatMap(([name, value]) => [element("dt", name), element("dd", value)]));
}

function element(tag, text) {
  const made = document.createElement(tag);
  made.textContent = text;
  return made;
}

function writeLog() {
  $("log").replaceChildren(...[...page.state.log].reverse().map(({ time, text }) => {
    const line = document.createElement("li");
    const when = element("time", clock(time));
    when.dateTime = time;
    line.append(when, element("span", text));
    return line;
  }));
}

function writeStages() {
  const all = stages();
  $("stages").hidden = all.length === 0;
  $("stage").max = String(Math.max(all.length - 1, 0));
  const index = all.findIndex((picture) => picture.id === page.a);
  if (index >= 0) $("stage").value = String(index);
  const picture = all[Math.max(index, 0)];
  if (!picture) return;
  const stage = page.state.stages[Number(picture.id.slice("stage_".length))];
  $("stage-text").textContent = `${index < 0 ? "–" : index + 1} · ${stage.iterations} of ${stage.max_iterations} iterations`;
}

function writeScale() {
  const scale = viewA.scale();
  $("scale-bar").hidden = !scale;
  if (!scale) return;
  const picture = find(page.a);
  const steps = [1, 2, 5].flatMap((digit) => [0, 1, 2, 3, 4, 5].map((power) => digit * 10 ** power)).sort((x, y) => x - y);
  const length = steps.filter((step) => step * scale <= 150).at(-1) ?? 1;
  const { dpi, width } = page.state;
  const cm = dpi && picture && width ? `, ${Number((((length * width) / picture.width / dpi) * 2.54).toPrecision(2))} cm at ${dpi} dpi` : "";
  $("scale-text").textContent = `${length.toLocaleString("en")} px${cm} · ${Math.round(100 * scale * devicePixelRatio)} %`;
  $("scale-line").style.width = `${length * scale}px`;
}

// ---- controls -------------------------------------------------------------------------------------------------------

const ACTIONS = {
  in: () => viewA.zoom(1.6),
  out: () => viewA.zoom(1 / 1.6),
  home: () => viewA.home(),
  full: () => viewA.full(),
  screen: () => (document.fullscreenElement ? document.exitFullscreen() : document.documentElement.requestFullscreen?.()),
  panel: () => {
    const narrow = matchMedia("(max-width: 720px)").matches;
    document.body.classList.toggle(narrow ? "open" : "closed");
    writePanelButton();
    curves.resize();
  },
  swipe: () => setMode(page.mode === "swipe" ? "single" : "swipe"),
  beside: () => setMode(page.mode === "beside" ? "single" : "beside"),
  earlier: () => step(-1),
  later: () => step(1),
};
const KEYS = { "+": "in", "=": "in", "-": "out", 0: "home", 1: "full", f: "screen", p: "panel", s: "swipe", d: "beside", "[": "earlier", "]": "later" };
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function step(by) {
  if (gallery) { works.step(by); return; }
  const all = stages();
  const index = all.findIndex((picture) => picture.id === page.a);
  const next = all[Math.min(Math.max((index < 0 ? all.length : index) + by, 0), all.length - 1)];
  if (next) choose("a", next.id);
}

function writePanelButton() {
  $("toggle-panel").setAttribute("aria-expanded", String(getComputedStyle($("panel")).display !== "none"));
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  curves.draw();
}

document.querySelectorAll("[data-do]").forEach((button) => button.addEventListener("click", () => ACTIONS[button.dataset.do]()));
document.querySelectorAll("[data-mode]").forEach((button) => button.addEventListener("click", () => setMode(button.dataset.mode)));
document.querySelectorAll("[data-curve]").forEach((button) => button.addEventListener("click", () => {
  document.querySelectorAll("[data-curve]").forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
  curves.choose(button.dataset.curve);
}));
$("toggle-panel").addEventListener("click", ACTIONS.panel);
$("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
$("stage").addEventListener("input", () => choose("a", stages()[Number($("stage").value)].id));
$("picture-a").addEventListener("change", () => choose("a", $("picture-a").value));
$("picture-b").addEventListener("change", () => choose("b", $("picture-b").value));
$("map").addEventListener("change", () => map.choose($("map").value));
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(SELECT|INPUT|TEXTAREA)$/.test(event.target.tagName)) return;
  if (ARROWS[event.key]) {
    const [x, y] = ARROWS[event.key];
    viewA.viewer.viewport.panBy(viewA.viewer.viewport.deltaPointsFromPixels(new window.OpenSeadragon.Point(80 * x, 80 * y)));
    viewA.viewer.viewport.applyConstraints();
  } else if (KEYS[event.key]) ACTIONS[KEYS[event.key]]();
  else return;
  event.preventDefault();
});
// The keys are the page's, wherever the focus is.
for (const view of [viewA, viewB]) view.viewer.addHandler("canvas-key", (event) => { event.preventDefaultAction = true; });
viewA.viewer.addHandler("update-viewport", writeScale);
viewA.viewer.addOnceHandler("tile-drawn", () => $("first")?.remove()); // the first tile is the whole picture, as it is

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (event) => setTheme(event.matches ? "dark" : "light"));
setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
writePanelButton();
const works = new Works((state) => { page.a = page.b = null; receive(state); }, () => viewA.home());
if (gallery) works.open();
else {
  const given = $("state").textContent;
  receive(JSON.parse(given));
  follow(given, receive, lost);
}
window.pipelineView = { page, works, map, viewA, viewB, setMode, setSwipe, choose }; // for tests, and for the curious
