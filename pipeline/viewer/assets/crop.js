// "Crop here": the command that renders the clicked place in full resolution, and the crops that were rendered from here.

import { copyText, shell } from "./format.js";

const SIDE_PX = 512;
const $ = (id) => document.getElementById(id);

export class Crops {
  constructor(view) {
    this.view = view;
    this.state = null;
    this.rect = null;
    this.mark = document.createElement("div");
    this.mark.className = "crop-mark";
    this.marked = false;
    this.drawn = "";
    view.viewer.addHandler("canvas-click", (event) => { if (event.quick) this.at(event.position); });
    $("crop-copy").addEventListener("click", () => copyText($("crop-command"), $("crop-copy")));
    $("crop-render").addEventListener("click", () => this.render());
  }

  update(state) {
    this.state = state;
    $("crop-render").hidden = !state.allow_crops;
    const drawn = JSON.stringify(state.crops);
    if (drawn === this.drawn) return;
    this.drawn = drawn;
    $("crops").replaceChildren(...[...state.crops].reverse().map((crop) => figure(crop)));
  }

  at(position) {
    const { width, height } = this.state ?? {};
    if (!width) return;
    const point = this.view.viewer.viewport.pointFromPixel(position);
    const [x, y] = [point.x * width, point.y * width];
    if (x < 0 || y < 0 || x >= width || y >= height) return;
    const [w, h] = [Math.min(SIDE_PX, width), Math.min(SIDE_PX, height)];
    const left = Math.round(Math.min(Math.max(x - w / 2, 0), width - w));
    const top = Math.round(Math.min(Math.max(y - h / 2, 0), height - h));
    this.rect = { x: left, y: top, width: w, height: h };
    const options = this.state.config_options.length ? this.state.config_options : ["-c", "CONFIG.yaml"];
    $("crop-command").textContent = ["pipeline", "preview", ...options, "--crop", [left, top, w, h].join(",")].map(shell).join(" ");
    $("crop").hidden = false;
    const area = new window.OpenSeadragon.Rect(left / width, top / width, w / width, h / width);
    if (this.marked) this.view.viewer.updateOverlay(this.mark, area);
    else this.view.viewer.addOverlay(this.mark, area);
    this.marked = true;
  }

  async render() {
    const answer = await fetch("crops", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(this.rect) });
    if (!answer.ok) $("crops").prepend(note(await answer.text()));
  }
}

function note(text) {
  const paragraph = document.createElement("p");
  paragraph.className = "hint";
  paragraph.textContent = text;
  return paragraph;
}

function figure({ number, rect, state, text }) {
  const element = document.createElement("figure");
  if (state === "done") {
    const image = document.createElement("img");
    image.src = `crops/${number}.png`;
    image.alt = `Crop at ${rect.join(", ")}`;
    element.append(image);
  }
  const caption = document.createElement("figcaption");
  caption.textContent = `${rect.join(", ")}: ${state === "done" ? "as the run will paint it" : state}${text ? `. ${text}` : ""}`;
  element.append(caption);
  return element;
}
