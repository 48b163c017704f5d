// One OpenSeadragon viewer with the pictures of a run: a newer version of a picture replaces the older one without a flicker.

const OSD = window.OpenSeadragon;

export function sourceOf(picture) {
  return {
    width: picture.width,
    height: picture.height,
    tileSize: picture.tile_px,
    tileOverlap: picture.overlap,
    // the largest level of one tile: smaller ones are not needed
    minLevel: Math.min(Math.floor(Math.log2(picture.tile_px)), Math.ceil(Math.log2(Math.max(picture.width, picture.height)))),
    // The version is in the address: the same address never means another picture, so that browsers may keep tiles.
    getTileUrl: (level, column, row) => `${picture.tiles}${level}/${column}_${row}.${picture.format}`,
  };
}

export class View {
  constructor(element, navigator) {
    this.viewer = new OSD.Viewer({
      element,
      prefixUrl: "",
      drawer: "canvas",
      showNavigationControl: false,
      showNavigator: navigator,
      navigatorPosition: "BOTTOM_RIGHT",
      navigatorAutoFade: false,
      navigatorSizeRatio: 0.16,
      maxZoomPixelRatio: 16,
      minZoomImageRatio: 0.7,
      visibilityRatio: 0.4,
      animationTime: matchMedia("(prefers-reduced-motion: reduce)").matches ? 0 : 0.7,
      gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
      gestureSettingsTouch: { clickToZoom: false, dblClickToZoom: true },
      imageLoaderLimit: 6,
      maxTilesPerFrame: 6, // of which only one would be asked for in each frame
      maxImageCacheCount: 400,
      timeout: 120000,
    });
    this.layers = new Map(); // place → { picture, item, coming }
    this.clipX = null; // screen px; what is left of it is cut off the layer "b"
    // shows where the picture is transparent; the canvas of OpenSeadragon lies over it
    this.checks = document.createElement("div");
    this.checks.className = "checks";
    this.checks.hidden = true;
    this.viewer.canvas.prepend(this.checks);
    this.viewer.addHandler("update-viewport", () => this.placeChecks());
    this.viewer.addHandler("animation", () => this.reclip());
    this.viewer.addHandler("resize", () => this.reclip());
    this.viewer.addHandler("after-resize", () => {
      if (this.fitting) queueMicrotask(() => this.viewer.viewport.goHome(true)); // after it has kept the old zoom
      this.fitting = false;
    });
  }

  // Shows a picture at a place: "under", "a" or "b", from the bottom to the top. null takes it away.
  show(place, picture) {
    const layer = this.layers.get(place);
    if (!picture) {
      if (layer) { this.drop(layer.item); this.drop(layer.coming); this.layers.delete(place); }
      return;
    }
    if (layer && layer.picture.tiles === picture.tiles) return;
    const next = { picture, item: layer?.item, coming: null };
    if (layer?.coming) this.drop(layer.coming);
    this.layers.set(place, next);
    const first = this.viewer.world.getItemCount() === 0;
    this.viewer.addTiledImage({
      tileSource: sourceOf(picture),
      x: 0, y: 0, width: 1,
      index: this.indexFor(place),
      success: ({ item }) => {
        if (this.layers.get(place) !== next) { this.drop(item); return; } // another picture was chosen meanwhile
        next.coming = item;
        if (first) { this.viewer.viewport.goHome(true); this.refit(); }
        this.reclip();
        if (!next.item) { this.settle(next); return; }
        // Removing the old picture at once would flicker: it stays below until the new one has all tiles on the screen.
        const done = () => { if (item.getFullyLoaded()) { item.removeHandler("fully-loaded-change", done); this.settle(next); } };
        item.addHandler("fully-loaded-change", done);
        done();
      },
    });
  }

  settle(layer) {
    const old = layer.item;
    layer.item = layer.coming;
    layer.coming = null;
    if (old) this.drop(old);
  }

  drop(item) {
    if (item && this.viewer.world.getIndexOfItem(item) >= 0) this.viewer.world.removeItem(item);
  }

  indexFor(place) {
    const order = ["under", "a", "b"];
    const below = order.slice(0, order.indexOf(place) + 1);
    const indices = below.flatMap((name) => {
      const layer = this.layers.get(name);
      return [layer?.item, layer?.coming].filter(Boolean).map((item) => this.viewer.world.getIndexOfItem(item));
    });
    return Math.max(-1, ...indices) + 1;
  }

  clipAt(x) {
    this.clipX = x;
    this.reclip();
  }

  // Cuts "b" at the swipe line, which stays where it is on the screen while the picture moves below it.
  reclip() {
    const layer = this.layers.get("b");
    for (const item of [layer?.item, layer?.coming].filter(Boolean)) {
      const { x: width, y: height } = item.getContentSize();
      if (this.clipX === null) { item.setClip(null); item.setOpacity(1); continue; }
      const cut = this.viewer.viewport.pointFromPixel(new OSD.Point(this.clipX, 0), true).x * width;
      item.setOpacity(cut >= width ? 0 : 1); // a rectangle without width would be no clip at all
      if (cut < width) item.setClip(cut <= 0 ? null : new OSD.Rect(cut, 0, width - cut, height));
    }
  }

  placeChecks() {
    const picture = ["a", "b"].map((place) => this.layers.get(place)?.picture).find((one) => ["webp", "png"].includes(one?.format));
    this.checks.hidden = !picture;
    if (!picture) return;
    const viewport = this.viewer.viewport;
    const [low, high] = [[0, 0], [1, picture.height / picture.width]].map(([x, y]) => viewport.pixelFromPoint(new OSD.Point(x, y), true));
    Object.assign(this.checks.style, { left: `${low.x}px`, top: `${low.y}px`, width: `${high.x - low.x}px`, height: `${high.y - low.y}px` });
  }

  // Fits the whole picture into an element whose size has just changed.
  refit() {
    this.fitting = true; // OpenSeadragon sees the new size in its next frame
    this.viewer.forceResize();
  }

  home() { this.viewer.viewport.goHome(); }
  zoom(factor) { this.viewer.viewport.zoomBy(factor); this.viewer.viewport.applyConstraints(); }

  // One px of the picture on one px of the screen.
  full() {
    const layer = this.layers.get("a");
    if (layer) this.viewer.viewport.zoomTo(layer.picture.width / this.viewer.viewport.getContainerSize().x / devicePixelRatio);
  }

  // Screen px (of CSS) per px of the picture.
  scale() {
    const layer = this.layers.get("a");
    return layer ? (this.viewer.viewport.getZoom(true) * this.viewer.viewport.getContainerSize().x) / layer.picture.width : null;
  }
}
