// Moves viewers of OpenSeadragon together. Each has the width of its picture as its unit, so that pictures of any size fit.

const NEAR = 1e-6;

export function link(viewers) {
  // Where a viewer was put by another one. It reports that in a later frame; answering would stop the other's animation.
  const put = new Map();
  for (const viewer of viewers) {
    viewer.addHandler("viewport-change", () => {
      const [zoom, center] = [viewer.viewport.getZoom(true), viewer.viewport.getCenter(true)];
      const own = put.get(viewer);
      if (own && Math.abs(own.zoom / zoom - 1) < NEAR && own.center.distanceTo(center) < NEAR) return;
      put.delete(viewer);
      for (const other of viewers) {
        if (other === viewer || !other.world.getItemCount()) continue;
        other.viewport.zoomTo(zoom, null, true);
        other.viewport.panTo(center, true);
        put.set(other, { zoom: other.viewport.getZoom(true), center: other.viewport.getCenter(true) });
      }
    });
  }
}
