// The first view: what was measured, how training went, what the latents say about the labels.
"use strict";

const overviewView = () => {
  const { overview } = state;
  return h(
    "div",
    {},
    h("h1", {}, overview.title),
    overview.messages.map((text) => h("p.notice", {}, text)),
    h("div.tiles", {}, overviewTiles(overview)),
    h(
      "div.columns",
      {},
      h(
        "div.stack",
        {},
        section(
          "Latents",
          "Each point is a latent: how often it is active, how strongly, and how specific it is to a label.",
          h("a.picture-link", { href: "#/latents", "aria-label": "All latents" }, miniScatter()),
          h("p", {}, h("a", { href: "#/latents" }, "Explore the latents")),
          h("p.quiet", {}, overview.featured_reason),
        ),
        labelsPanel(),
        section("Store", null, facts(overview.store.facts)),
      ),
      h(
        "div.stack",
        {},
        trainingPanel(),
        overview.masking && maskingPanel(overview.masking),
        section("Autoencoder", null, facts(overview.sae.facts)),
      ),
    ),
  );
};

/** @param {Overview} overview */
function overviewTiles({ counts, sae, store, training }) {
  /** @param {string} name */
  const last = (name) => {
    const curve = training?.curves.find((item) => item.name === name);
    return curve?.values.filter((value) => value !== null).at(-1);
  };
  const unreadable = store.images - store.valid;
  const images = state.overview.image_pages
    ? tile(format(store.valid), "images", `${format(store.images)} in the store, ${format(unreadable)} unreadable`)
    : tile("–", "images", "not known from these results");
  return [
    images,
    tile(format(sae.latents), "latents"),
    tile(percent(counts.active / sae.latents), "active on some image", `${format(counts.active)} latents`),
    tile(percent(counts.dead / sae.latents), "dead", `${format(counts.dead)} latents active on no image`),
    tile(format(last("explained variance")), "explained variance", "at the last training step"),
    tile(format(last("L0")), "L0", "active latents per token, at the last training step"),
  ];
}

/** @param {[name: string, value: string][]} pairs */
const facts = (pairs) =>
  h(
    "dl.facts",
    {},
    pairs.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]),
  );

function labelsPanel() {
  const { labels } = state.overview;
  if (!labels.length) return section("Labels", "The images have no labels.");
  if (!state.overview.image_pages) return section("Labels", null, labels.map(({ name }) => name).join(", "));
  const items = labels.map(({ name, images }, i) => ({
    name,
    value: images,
    text: format(images),
    href: `#/label/${i}`,
  }));
  return section("Labels", "Readable images per label.", barChart(items, { label: "Images per label" }));
}

function trainingPanel() {
  const { training } = state.overview;
  if (!training) {
    return section("Training", "There is no metrics.jsonl beside the autoencoder, so there are no training curves.");
  }
  const figures = training.curves.map(({ name, values, low, high }) =>
    lineChart(training.x, [{ name, values }], {
      title: name,
      xLabel: "images seen",
      low,
      high,
      width: 300,
      height: 170,
    }),
  );
  return section("Training", null, h("div.small-charts", {}, figures));
}

function miniScatter() {
  const canvas = h("canvas.mini", {
    width: "640",
    height: "300",
    role: "img",
    "aria-label": "Scatter plot of all latents",
  });
  const { x, y, bins, palette } = state.latents;
  /** @type {number[]} */
  const shown = [];
  for (let i = 0; i < x.length; i++) if (Number.isFinite(x[i]) && Number.isFinite(y[i])) shown.push(i);
  /** @param {Float32Array} values */
  const range = (values) => {
    let [low, high] = [Infinity, -Infinity];
    for (const i of shown) [low, high] = [Math.min(low, values[i]), Math.max(high, values[i])];
    return [low, high];
  };
  const [x0, x1] = range(x);
  const [y0, y1] = range(y);
  const size = shown.length > 20000 ? 2 : 4;
  const box = { left: 76, right: 628, top: 10, bottom: 254 };
  const px = (/** @type {number} */ value) => box.left + ((value - x0) / (x1 - x0 || 1)) * (box.right - box.left);
  const py = (/** @type {number} */ value) => box.bottom - ((value - y0) / (y1 - y0 || 1)) * (box.bottom - box.top);
  /** @param {CanvasRenderingContext2D} context */
  const paintNumbers = (context) => {
    context.font = `20px ${getComputedStyle(canvas).fontFamily}`;
    context.fillStyle = colors.inTheme("--quiet");
    context.textAlign = "center";
    for (const value of axisTicks(x0, x1, 5)) context.fillText(format(value), px(value), box.bottom + 24);
    context.fillText("log10 sparsity", (box.left + box.right) / 2, 296);
    context.textAlign = "right";
    for (const value of axisTicks(y0, y1, 4)) context.fillText(format(value), box.left - 8, py(value) + 6);
    context.translate(20, (box.top + box.bottom) / 2);
    context.rotate(-Math.PI / 2);
    context.textAlign = "center";
    context.fillText("log10 mean", 0, 0);
    context.setTransform(1, 0, 0, 1, 0, 0);
  };
  const repaint = () => {
    const context = contextOf(canvas);
    context.clearRect(0, 0, canvas.width, canvas.height);
    const fills = palette();
    for (const i of shown) {
      context.fillStyle = fills[bins[i]];
      context.fillRect(px(x[i]) - size / 2, py(y[i]) - size / 2, size, size);
    }
    if (shown.length) paintNumbers(context);
  };
  repaint();
  return Object.assign(canvas, { repaint });
}

/** @param {Masking} masking */
function maskingPanel(masking) {
  const series = masking.curves.map((curve, i) => ({
    name: curve.name,
    values: curve.accuracy,
    color: colors.kind(i),
    dash: curve.dashed ? "5 4" : null,
  }));
  const places = masking.ks.map((k) => Math.log10(k));
  /** @type {[number, string][]} */
  const xTicks = masking.ks.map((k, i) => [places[i], String(k)]);
  const size = { low: 0, high: 1, width: 520, height: 250 };
  const leftOut = `Left out, with too few images: ${masking.left_out.join(", ")}.`;
  return section(
    "Latent masking experiment",
    "A linear probe predicts the label from an image's mean activation. It was trained on " +
      `${format(masking.n_train)} images and tested on ${format(masking.n_test)} images of other patients, ` +
      "which were reconstructed from only some of their latents.",
    lineChart(places, series, { title: "Balanced accuracy by k", xTicks, xLabel: "k latents", ...size }),
    h(
      "p.quiet",
      {},
      `Original activations ${percent(masking.original)}, reconstruction from all latents ` +
        `${percent(masking.reconstruction)}, chance ${percent(masking.chance)}. `,
      masking.left_out.length > 0 && leftOut,
    ),
  );
}
