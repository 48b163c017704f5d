// The pictures of a gallery, one of which is shown; its number is in the address, so that a link leads to it.

const THUMB_LEVEL = 7; // of DeepZoom: at most 128 px

export class Works {
  constructor(onChosen, onOther) {
    this.onChosen = onChosen;
    this.onOther = onOther;
    this.works = [];
    this.index = -1;
    addEventListener("hashchange", () => { if (this.works.length) this.choose(this.fromAddress()); });
  }

  async open() {
    const answer = await fetch("gallery.json", { cache: "no-cache" });
    ({ works: this.works, page: this.page } = await answer.json());
    document.getElementById("works-section").hidden = this.works.length < 2;
    document.getElementById("works").replaceChildren(...this.works.map((work, index) => this.button(work, index)));
    this.choose(this.fromAddress());
  }

  fromAddress() {
    return Math.min(Math.max(Number.parseInt(location.hash.slice(1), 10) - 1 || 0, 0), this.works.length - 1);
  }

  button(work, index) {
    const button = document.createElement("button");
    button.type = "button";
    const image = document.createElement("img");
    const { tiles, format, width, height } = work.pictures[0];
    const level = Math.min(THUMB_LEVEL, Math.ceil(Math.log2(Math.max(width, height))));
    image.src = `${tiles}${level}/0_0.${format}`;
    image.alt = "";
    const title = document.createElement("span");
    title.textContent = work.title;
    button.append(image, title);
    button.addEventListener("click", () => { location.hash = String(index + 1); });
    return button;
  }

  step(by) {
    const next = Math.min(Math.max(this.index + by, 0), this.works.length - 1);
    if (next !== this.index) location.hash = String(next + 1);
  }

  choose(index) {
    const first = this.index < 0;
    if (index === this.index) return;
    this.index = index;
    [...document.getElementById("works").children].forEach((button, other) => button.setAttribute("aria-pressed", String(other === index)));
    const work = this.works[index];
    const { width, height } = work.pictures[0];
    this.onChosen({
      phase: "done", problem: "", page: this.page, name: work.title, work_dir: "", credit: work.credit, width, height, dpi: work.dpi,
      stage: 0, iteration: 0, eta_s: null, stages: [], log: [], crops: [], allow_crops: false, config_options: [], pictures: work.pictures,
    });
    if (!first) this.onOther();
  }
}
