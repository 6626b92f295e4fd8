// A lasso over a scatter plot: drag with Shift, or while it is switched on, and the points inside are chosen.
"use strict";

class Lasso {
  /**
   * @param {Scatter} scatter
   * @param {(inside: number[]) => void} onchoose - called with the visible points inside
   */
  constructor(scatter, onchoose) {
    this.scatter = scatter;
    this.onchoose = onchoose;
    this.isOn = false;
    /** @type {[number, number][] | null} */
    this.path = null;
    this.line = svg("polygon", {});
    this.overlay = svg("svg", { class: "lasso", "aria-hidden": "true" }, this.line);
    scatter.host.append(this.overlay);
    const { canvas } = scatter;
    // Captured, so that the plot does not move at the same time.
    canvas.addEventListener("pointerdown", (event) => this.onDown(event), { capture: true });
    canvas.addEventListener("pointermove", (event) => this.onMove(event), { capture: true });
    canvas.addEventListener("pointerup", (event) => this.onUp(event), { capture: true });
  }

  /** @param {PointerEvent} event */
  onDown(event) {
    if (!this.isOn && !event.shiftKey) return;
    event.stopImmediatePropagation();
    this.scatter.canvas.setPointerCapture(event.pointerId);
    this.path = [[event.offsetX, event.offsetY]];
  }

  /** @param {PointerEvent} event */
  onMove(event) {
    if (!this.path) return;
    event.stopImmediatePropagation();
    this.path.push([event.offsetX, event.offsetY]);
    this.line.setAttribute("points", this.path.map((point) => point.join(",")).join(" "));
  }

  /** @param {PointerEvent} event */
  onUp(event) {
    if (!this.path) return;
    event.stopImmediatePropagation();
    const path = this.path;
    this.path = null;
    this.line.setAttribute("points", "");
    if (path.length < 3) return;
    const { xs, ys, visible, order } = this.scatter;
    const inside = [...order].filter((i) => {
      const [x, y] = this.scatter.toScreen(xs[i], ys[i]);
      return visible[i] && isInside(path, x, y);
    });
    this.onchoose(inside.sort((a, b) => a - b));
  }
}

/**
 * Whether a point lies inside a polygon, by the even-odd rule.
 *
 * @param {[number, number][]} polygon
 * @param {number} x
 * @param {number} y
 */
function isInside(polygon, x, y) {
  let inside = false;
  for (let i = 0, j = polygon.length - 1; i < polygon.length; j = i++) {
    const [[ax, ay], [bx, by]] = [polygon[i], polygon[j]];
    if (ay > y !== by > y && x < ((bx - ax) * (y - ay)) / (by - ay) + ax) inside = !inside;
  }
  return inside;
}
