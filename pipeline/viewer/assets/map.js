// A map with one value per chunk or tile, drawn over the picture.

import { number } from "./format.js";

const EVERY_MS = 4000;
const LOSSES = ["losses", "content", "style", "variation"];
const TEXT = {
  progress: ([waiting, gradient, updated]) => `${updated} of ${waiting + gradient + updated} chunks updated in this iteration, ${gradient} more have their gradient`,
};

// Dark blue to yellow, readable on light and dark pictures.
function color(share) {
  const stops = [[20, 24, 90], [124, 30, 110], [225, 90, 50], [255, 225, 70]];
  const at = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
  const low = Math.min(Math.floor(at), stops.length - 2);
  return stops[low].map((from, index) => from + (stops[low + 1][index] - from) * (at - low));
}

export class MapOverlay {
  constructor(view, text, ramp) {
    this.view = view;
    this.text = text;
    this.ramp = ramp;
    this.kind = "";
    this.canvas = document.createElement("canvas");
    this.canvas.className = "map";
    this.shown = false;
    setInterval(() => this.refresh(), EVERY_MS);
  }

  choose(kind) {
    this.kind = kind;
    this.refresh();
  }

  async refresh() {
    if (!this.kind) { this.hide(""); return; }
    if (document.hidden) return;
    const kind = this.kind;
    let answer;
    try {
      answer = await fetch(`maps/${kind}`, { cache: "no-store" });
    } catch {
      return; // the page says that the viewer is gone
    }
    if (kind !== this.kind) return;
    if (!answer.ok) { this.hide(await answer.text()); return; }
    this.draw(await answer.json());
  }

  hide(text) {
    this.text.textContent = text;
    this.ramp.hidden = true;
    if (this.shown) this.view.viewer.removeOverlay(this.canvas);
    this.shown = false;
  }

  draw(map) {
    const { kind, stage, iteration, values, width, cell_px } = map;
    const flat = values.flat().filter((value) => value !== null);
    // losses of tiles differ by less than their mean, and a tile may be better than the whole
    const low = LOSSES.includes(kind) ? Math.min(...flat) : 0;
    const top = kind === "progress" ? 2 : Math.max(...flat, low + Number.MIN_VALUE);
    const [rows, columns] = [values.length, values[0].length];
    Object.assign(this.canvas, { width: columns, height: rows });
    const context = this.canvas.getContext("2d");
    const image = context.createImageData(columns, rows);
    values.flat().forEach((value, index) => {
      image.data.set(value === null ? [0, 0, 0, 0] : [...color((value - low) / (top - low)), 255], 4 * index);
    });
    context.putImageData(image, 0, 0);
    const counts = [0, 1, 2].map((state) => flat.filter((value) => value === state).length);
    const of = LOSSES.includes(kind) ? `weighted loss of each tile in iteration ${iteration}` : `mean of each chunk${kind === "change" ? " in levels" : ""}`;
    this.text.textContent = `Stage ${stage + 1}: ${TEXT[kind]?.(counts) ?? of}.`;
    this.ramp.hidden = kind === "progress";
    [this.ramp.firstElementChild.textContent, this.ramp.lastElementChild.textContent] = [low, top].map(number);
    // those at the far border reach beyond the picture
    const area = new window.OpenSeadragon.Rect(0, 0, (columns * cell_px) / width, (rows * cell_px) / width);
    if (this.shown) this.view.viewer.updateOverlay(this.canvas, area);
    else this.view.viewer.addOverlay(this.canvas, area);
    this.shown = true;
    this.drawn = map; // for tests
  }
}
