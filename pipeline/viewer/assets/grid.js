// The images of a preview beside each other: they zoom together, and each leads to the command and config that make it.

import { copyText, px } from "./format.js";
import { link } from "./link.js";

const OSD = window.OpenSeadragon;
const $ = (id) => document.getElementById(id);

function viewOf(element, { picture }) {
  return new OSD.Viewer({
    element,
    prefixUrl: "",
    drawer: "canvas",
    tileSources: { type: "image", url: picture, buildPyramid: false },
    showNavigationControl: false,
    maxZoomPixelRatio: 16,
    visibilityRatio: 0.4,
    animationTime: matchMedia("(prefers-reduced-motion: reduce)").matches ? 0 : 0.5,
    gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true, scrollToZoom: true },
    gestureSettingsTouch: { clickToZoom: false, dblClickToZoom: true },
  });
}

const lines = ({ settings }) => (settings.length ? settings.map((setting) => `--set ${setting}`).join("\n") : "as the config is");

function figureOf(one) {
  const figure = document.createElement("figure");
  const element = document.createElement("div");
  element.className = "picture";
  element.style.aspectRatio = `${one.width} / ${one.height}`;
  const caption = document.createElement("figcaption");
  const text = document.createElement("span");
  text.textContent = lines(one);
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Choose";
  button.addEventListener("click", () => choose(one, figure));
  caption.append(text, button);
  figure.append(element, caption);
  return figure;
}

function choose(one, figure) {
  document.querySelectorAll("[data-chosen]").forEach((other) => delete other.dataset.chosen);
  if (figure) figure.dataset.chosen = "yes";
  $("choice").hidden = !figure;
  if (!figure) return;
  $("chosen").textContent = lines(one);
  $("command").textContent = one.command;
  $("config").textContent = one.config;
  URL.revokeObjectURL($("download").href);
  $("download").href = URL.createObjectURL(new Blob([one.config], { type: "application/yaml" }));
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
}

$("home").addEventListener("click", () => views[0].viewport.goHome());
$("close").addEventListener("click", () => choose(null, null));
$("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
document.querySelectorAll("[data-copy]").forEach((button) => button.addEventListener("click", () => copyText($(button.dataset.copy), button)));
document.addEventListener("keydown", (event) => {
  if (event.key === "0") $("home").click();
  if (event.key === "Escape") choose(null, null);
});
setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");

const data = await (await fetch("grid.json", { cache: "no-cache" })).json();
document.title = $("name").textContent = data.title;
$("headline").textContent = `${data.pictures.length} × ${px(data.pictures[0].width, data.pictures[0].height)}`;
$("grid").style.setProperty("--across", data.across);
const figures = data.pictures.map(figureOf);
$("grid").replaceChildren(...figures);
const views = figures.map((figure, index) => viewOf(figure.querySelector(".picture"), data.pictures[index]));
link(views);
document.body.dataset.ready = "yes";
window.previewGrid = { views, data }; // for tests, and for the curious
