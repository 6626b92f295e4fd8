// A scatter plot of up to some hundred thousand points on a canvas: wheel zooms, dragging moves, a click picks.
"use strict";

class Scatter {
  /**
   * @param {HTMLElement} host
   * @param {ScatterOptions} options
   */
  constructor(host, options) {
    const { xs, ys, bins, palette, marked = [], lines = [], label } = options;
    this.xs = xs;
    this.ys = ys;
    this.bins = bins;
    this.palette = palette;
    this.lines = lines;
    this.xLabel = options.xLabel;
    this.yLabel = options.yLabel;
    this.describe = options.describe;
    this.onpick = options.onpick;
    this.isMarked = new Uint8Array(xs.length);
    for (const index of marked) this.isMarked[index] = 1;
    this.visible = new Uint8Array(xs.length).fill(1);
    this.selected = -1;
    this.pending = 0;
    const keys = "Plus and minus zoom, arrow keys move, 0 shows all, Enter chooses the point nearest to the centre.";
    this.canvas = h("canvas", { tabindex: "0", role: "img", "aria-label": `${label}. ${keys}` });
    this.tip = h("div.tip", { hidden: true });
    this.host = host;
    host.classList.add("scatter");
    host.repaint = () => this.draw();
    host.replaceChildren(this.canvas, this.tip);
    this.order = this.sortedByColor();
    this.view = this.wholeView();
    this.wholeWidth = this.view.x1 - this.view.x0;
    this.listen();
    this.resizer = new ResizeObserver(() => this.draw());
    this.resizer.observe(host);
  }

  /** Points in the order of their colours, so that drawing changes the colour as rarely as possible. */
  sortedByColor() {
    return Uint32Array.from(this.xs, (_, i) => i)
      .filter((i) => Number.isFinite(this.xs[i]) && Number.isFinite(this.ys[i]))
      .sort((a, b) => this.isMarked[a] - this.isMarked[b] || this.bins[a] - this.bins[b]);
  }

  /**
   * @param {Uint8Array} bins
   * @param {() => string[]} palette
   */
  setColors(bins, palette) {
    this.bins = bins;
    this.palette = palette;
    this.order = this.sortedByColor();
    this.draw();
  }

  /** @param {Uint8Array<ArrayBuffer>} visible */
  setVisible(visible) {
    this.visible = visible;
    this.draw();
  }

  /** @param {number} index */
  select(index) {
    this.selected = index;
    this.draw();
  }

  showAll() {
    this.view = this.wholeView();
    this.draw();
  }

  /** The range of all points, with a margin. */
  wholeView() {
    let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
    for (const i of this.order) {
      x0 = Math.min(x0, this.xs[i]);
      x1 = Math.max(x1, this.xs[i]);
      y0 = Math.min(y0, this.ys[i]);
      y1 = Math.max(y1, this.ys[i]);
    }
    if (!(x1 >= x0)) [x0, x1, y0, y1] = [0, 1, 0, 1];
    const padX = 0.05 * (x1 - x0) || 0.5;
    const padY = 0.05 * (y1 - y0) || 0.5;
    return { x0: x0 - padX, x1: x1 + padX, y0: y0 - padY, y1: y1 + padY };
  }

  /** The plot's place on the screen. */
  box() {
    return { left: 58, top: 10, right: this.host.clientWidth - 12, bottom: this.host.clientHeight - 42 };
  }

  /**
   * @param {number} x
   * @param {number} y
   * @param {Box} [box]
   */
  toScreen(x, y, box = this.box()) {
    const { x0, x1, y0, y1 } = this.view;
    return [
      box.left + ((x - x0) / (x1 - x0)) * (box.right - box.left),
      box.bottom - ((y - y0) / (y1 - y0)) * (box.bottom - box.top),
    ];
  }

  /** Paint once, before the next frame. */
  draw() {
    if (this.pending) return;
    this.pending = requestAnimationFrame(() => {
      this.pending = 0;
      this.paint();
    });
  }

  paint() {
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [this.host.clientWidth, this.host.clientHeight];
    if (!width || !height) return;
    if (this.canvas.width !== Math.round(width * ratio) || this.canvas.height !== Math.round(height * ratio)) {
      this.canvas.width = Math.round(width * ratio);
      this.canvas.height = Math.round(height * ratio);
    }
    const context = contextOf(this.canvas);
    const style = getComputedStyle(this.host);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    const box = this.box();
    this.paintAxes(context, box, style);
    context.save();
    context.beginPath();
    context.rect(box.left, box.top, box.right - box.left, box.bottom - box.top);
    context.clip();
    this.paintPoints(context, box, style);
    context.restore();
  }

  /**
   * @param {CanvasRenderingContext2D} context
   * @param {Box} box
   * @param {CSSStyleDeclaration} style
   */
  paintPoints(context, box, style) {
    const { x0, x1, y0, y1 } = this.view;
    const kx = (box.right - box.left) / (x1 - x0);
    const ky = (box.bottom - box.top) / (y1 - y0);
    const size = this.order.length > 20000 ? 2 : this.order.length > 2000 ? 3 : 5;
    const palette = this.palette();
    let bin = -1;
    context.globalAlpha = 0.85;
    for (const i of this.order) {
      if (!this.visible[i]) continue;
      const x = box.left + (this.xs[i] - x0) * kx;
      const y = box.bottom - (this.ys[i] - y0) * ky;
      if (x < box.left - 4 || x > box.right + 4 || y < box.top - 4 || y > box.bottom + 4) continue;
      if (this.bins[i] !== bin) {
        bin = this.bins[i];
        context.fillStyle = palette[bin];
      }
      if (!this.isMarked[i]) {
        context.fillRect(x - size / 2, y - size / 2, size, size);
        continue;
      }
      context.globalAlpha = 1;
      context.beginPath();
      context.arc(x, y, 4.2, 0, 7);
      context.fill();
      context.lineWidth = 1;
      context.strokeStyle = style.getPropertyValue("--ink");
      context.stroke();
    }
    context.globalAlpha = 1;
    this.paintSelected(context, box, style);
  }

  /**
   * @param {CanvasRenderingContext2D} context
   * @param {Box} box
   * @param {CSSStyleDeclaration} style
   */
  paintSelected(context, box, style) {
    if (this.selected < 0 || !Number.isFinite(this.xs[this.selected])) return;
    const [x, y] = this.toScreen(this.xs[this.selected], this.ys[this.selected], box);
    context.beginPath();
    context.arc(x, y, 9, 0, 7);
    context.lineWidth = 2.5;
    context.strokeStyle = style.getPropertyValue("--accent");
    context.stroke();
  }

  /**
   * @param {CanvasRenderingContext2D} context
   * @param {Box} box
   * @param {CSSStyleDeclaration} style
   */
  paintAxes(context, box, style) {
    const { x0, x1, y0, y1 } = this.view;
    context.font = `12px ${style.fontFamily}`;
    context.fillStyle = style.getPropertyValue("--quiet");
    context.strokeStyle = style.getPropertyValue("--rule");
    context.lineWidth = 1;
    /** @type {(ax: number, ay: number, bx: number, by: number) => void} */
    const line = (ax, ay, bx, by) => {
      context.beginPath();
      context.moveTo(ax, ay);
      context.lineTo(bx, by);
      context.stroke();
    };
    context.textAlign = "center";
    for (const value of axisTicks(x0, x1, Math.max(2, (box.right - box.left) / 90))) {
      const [x] = this.toScreen(value, y0, box);
      line(x, box.top, x, box.bottom);
      context.fillText(format(value), x, box.bottom + 16);
    }
    context.textAlign = "right";
    for (const value of axisTicks(y0, y1, Math.max(2, (box.bottom - box.top) / 60))) {
      const [, y] = this.toScreen(x0, value, box);
      line(box.left, y, box.right, y);
      context.fillText(format(value), box.left - 6, y + 4);
    }
    this.paintLines(context, box, style, line);
    this.paintLabels(context, box, style);
  }

  /**
   * @param {CanvasRenderingContext2D} context
   * @param {Box} box
   * @param {CSSStyleDeclaration} style
   * @param {(ax: number, ay: number, bx: number, by: number) => void} line
   */
  paintLines(context, box, style, line) {
    const { x0, y0 } = this.view;
    context.setLineDash([5, 4]);
    context.strokeStyle = style.getPropertyValue("--quiet");
    for (const mark of this.lines) {
      const [x, y] = this.toScreen(mark.x ?? x0, mark.y ?? y0, box);
      if (mark.x !== undefined && x > box.left && x < box.right) line(x, box.top, x, box.bottom);
      if (mark.y !== undefined && y > box.top && y < box.bottom) line(box.left, y, box.right, y);
    }
    context.setLineDash([]);
  }

  /**
   * @param {CanvasRenderingContext2D} context
   * @param {Box} box
   * @param {CSSStyleDeclaration} style
   */
  paintLabels(context, box, style) {
    context.fillStyle = style.getPropertyValue("--ink");
    context.textAlign = "center";
    context.fillText(this.xLabel, (box.left + box.right) / 2, box.bottom + 35);
    context.save();
    context.translate(13, (box.top + box.bottom) / 2);
    context.rotate(-Math.PI / 2);
    context.fillText(this.yLabel, 0, 0);
    context.restore();
  }

  /**
   * The visible point nearest to a place on the screen, or -1; marked points are slightly preferred.
   *
   * @param {number} px
   * @param {number} py
   * @param {number} [within] - pixels
   */
  nearest(px, py, within = 12) {
    const box = this.box();
    const { x0, x1, y0, y1 } = this.view;
    const kx = (box.right - box.left) / (x1 - x0);
    const ky = (box.bottom - box.top) / (y1 - y0);
    let [best, least] = [-1, within * within];
    for (const i of this.order) {
      if (!this.visible[i]) continue;
      const dx = box.left + (this.xs[i] - x0) * kx - px;
      const dy = box.bottom - (this.ys[i] - y0) * ky - py;
      const distance = dx * dx + dy * dy - (this.isMarked[i] ? 16 : 0);
      if (distance < least) [best, least] = [i, distance];
    }
    return best;
  }

  /**
   * @param {number} factor
   * @param {number} px - point of the screen that keeps its place
   * @param {number} py
   */
  zoom(factor, px, py) {
    const box = this.box();
    const { x0, x1, y0, y1 } = this.view;
    // Not so close that float32 cannot separate points, not so far out that all points merge.
    const range = (x1 - x0) / this.wholeWidth;
    const limited = Math.min(Math.max(factor, 1e-5 / range), 10 / range);
    const fx = (px - box.left) / (box.right - box.left);
    const fy = (box.bottom - py) / (box.bottom - box.top);
    const [x, y] = [x0 + fx * (x1 - x0), y0 + fy * (y1 - y0)];
    const [w, t] = [(x1 - x0) * limited, (y1 - y0) * limited];
    this.view = { x0: x - fx * w, x1: x + (1 - fx) * w, y0: y - fy * t, y1: y + (1 - fy) * t };
    this.draw();
  }

  /**
   * @param {number} dx - pixels
   * @param {number} dy
   */
  move(dx, dy) {
    const box = this.box();
    const mx = (dx / (box.right - box.left)) * (this.view.x1 - this.view.x0);
    const my = (dy / (box.bottom - box.top)) * (this.view.y1 - this.view.y0);
    const { x0, x1, y0, y1 } = this.view;
    this.view = { x0: x0 - mx, x1: x1 - mx, y0: y0 + my, y1: y1 + my };
    this.draw();
  }

  /** @param {number} index */
  pick(index) {
    if (index < 0) return;
    this.select(index);
    this.onpick(index);
  }

  listen() {
    const { canvas } = this;
    /** @type {(event: WheelEvent) => void} */
    const onWheel = (event) => {
      event.preventDefault();
      // A wheel's notch is about 100 pixels or 3 lines; touchpads send many small steps.
      const pixels = event.deltaY * [1, 33, 400][event.deltaMode];
      this.zoom(Math.exp(Math.min(Math.max(pixels * 0.0018, -0.5), 0.5)), event.offsetX, event.offsetY);
    };
    canvas.addEventListener("wheel", onWheel, { passive: false });
    /** @type {[number, number] | null} */
    let from = null;
    let moved = false;
    canvas.addEventListener("pointerdown", (event) => {
      from = [event.offsetX, event.offsetY];
      moved = false;
    });
    canvas.addEventListener("pointerup", (event) => {
      if (from && !moved) this.pick(this.nearest(event.offsetX, event.offsetY));
      from = null;
    });
    canvas.addEventListener("pointerleave", () => {
      this.tip.hidden = true;
      from = null;
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!from) {
        this.pointAt(event);
        return;
      }
      const [dx, dy] = [event.offsetX - from[0], event.offsetY - from[1]];
      if (moved || Math.hypot(dx, dy) > 4) {
        moved = true;
        from = [event.offsetX, event.offsetY];
        this.move(dx, dy);
      }
    });
    canvas.addEventListener("dblclick", () => this.showAll());
    canvas.addEventListener("keydown", (event) => this.onKey(event));
  }

  /**
   * Show the tooltip of the point under the pointer.
   *
   * @param {PointerEvent} event
   */
  pointAt(event) {
    const { canvas, tip, host } = this;
    const index = this.nearest(event.offsetX, event.offsetY);
    tip.hidden = index < 0;
    canvas.style.cursor = index < 0 ? "grab" : "pointer";
    if (index < 0) return;
    tip.textContent = this.describe(index);
    const left = Math.min(event.offsetX + 14, host.clientWidth - 230);
    const below = event.offsetY + 14 + tip.offsetHeight <= host.clientHeight;
    const top = below ? event.offsetY + 14 : event.offsetY - 14 - tip.offsetHeight;
    tip.style.transform = `translate(${left}px, ${top}px)`;
  }

  /** @param {KeyboardEvent} event */
  onKey(event) {
    const [cx, cy] = [this.host.clientWidth / 2, this.host.clientHeight / 2];
    const arrow = ARROWS.get(event.key);
    if (arrow) this.move(-40 * arrow[1], -40 * arrow[0]);
    else if (event.key === "+" || event.key === "=") this.zoom(0.8, cx, cy);
    else if (event.key === "-") this.zoom(1.25, cx, cy);
    else if (event.key === "0") this.showAll();
    else if (event.key === "Escape") this.tip.hidden = true;
    else if (event.key === "Enter") this.pick(this.nearest(cx, cy, Infinity));
    else return;
    event.preventDefault();
    event.stopPropagation();
  }
}
