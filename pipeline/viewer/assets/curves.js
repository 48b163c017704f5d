// Curves of all stages, one behind the other, drawn by uPlot.

import { number } from "./format.js";

const COLORS = ["#1f77b4", "#d9662b", "#2f9e5a", "#c2405a", "#8a63c9", "#8c6d31", "#3aa6b9", "#777777", "#c77cb5", "#9aa32b"];

export class Curves {
  constructor(element) {
    this.element = element;
    this.kind = "layers";
    this.stages = [];
    this.plot = null;
    this.shape = "";
    new ResizeObserver(() => this.resize()).observe(element);
  }

  choose(kind) {
    this.kind = kind;
    this.draw();
  }

  update(stages) {
    this.stages = stages;
    this.draw();
  }

  // The x of an iteration counts those of all stages before it.
  data() {
    const names = new Set();
    for (const { curves } of this.stages) {
      if (this.kind === "mean |u|") names.add("mean |u|");
      else Object.keys(curves[this.kind]).forEach((name) => names.add(name));
    }
    const x = [], lines = [...names].map(() => []), starts = [];
    let before = 0;
    for (const { curves } of this.stages) {
      if (!curves.iteration.length) continue;
      starts.push(before);
      x.push(...curves.iteration.map((iteration) => before + iteration));
      [...names].forEach((name, index) => {
        const values = this.kind === "mean |u|" ? curves["mean |u|"] : curves[this.kind][name];
        lines[index].push(...(values ?? curves.iteration.map(() => null)).map((value) => (value > 0 ? value : null)));
      });
      before += curves.iteration.at(-1) + 1;
    }
    return { names: [...names], data: [x, ...lines], starts };
  }

  draw() {
    const { names, data, starts } = this.data();
    this.starts = starts;
    this.element.closest("section").hidden = data[0].length === 0;
    if (data[0].length === 0) return;
    const shape = `${this.kind}|${names.join("|")}|${document.documentElement.dataset.theme}`;
    if (this.plot && this.shape === shape) { this.plot.setData(data); return; }
    this.plot?.destroy();
    this.shape = shape;
    this.plot = new window.uPlot(this.options(names), data, this.element);
  }

  options(names) {
    const style = getComputedStyle(document.documentElement);
    const axis = { stroke: style.getPropertyValue("--soft"), grid: { stroke: style.getPropertyValue("--line"), width: 1 }, ticks: { show: false }, font: "11px system-ui" };
    return {
      width: this.element.clientWidth || 300,
      height: 170,
      scales: { x: { time: false }, y: { distr: 3 } },
      axes: [{ ...axis, size: 26 }, { ...axis, size: 50, values: (_plot, ticks) => ticks.map((tick) => (tick === null ? "" : number(tick))) }],
      series: [
        { label: "iteration" },
        ...names.map((label, index) => ({ label, stroke: COLORS[index % COLORS.length], width: 1.5, points: { show: false }, value: (_plot, value) => number(value) })),
      ],
      hooks: { drawClear: [(plot) => this.drawStarts(plot, style.getPropertyValue("--soft"))] },
      cursor: { y: false },
    };
  }

  // A line where each stage starts.
  drawStarts(plot, color) {
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.strokeStyle = color;
    ctx.setLineDash([3, 3]);
    for (const start of this.starts.slice(1)) {
      const x = plot.valToPos(start - 0.5, "x", true);
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
    }
    ctx.restore();
  }

  resize() {
    if (this.plot && this.element.clientWidth) this.plot.setSize({ width: this.element.clientWidth, height: 170 });
  }
}
