// The first view: what was measured, how training went, what the latents say about the labels.
"use strict";

const overviewView = () => {
  const { overview } = state;
  const { counts, sae, store } = overview;
  const last = (name) => {
    const curve = overview.training && overview.training.curves.find((item) => item.name === name);
    return curve ? curve.values.filter((value) => value !== null).at(-1) : undefined;
  };
  const tile = (value, text, hint) => h("div.tile", { title: hint }, h("b", {}, value), h("span", {}, text));
  return h("div", {},
    h("h1", {}, overview.title),
    overview.messages.map((text) => h("p.notice", {}, text)),
    h("div.tiles", {},
      tile(format(store.valid), "images", `${format(store.images)} in the store, ${format(store.images - store.valid)} unreadable`),
      tile(format(sae.latents), "latents"),
      tile(percent(counts.active / sae.latents), "active on some image", `${format(counts.active)} latents`),
      tile(percent(counts.dead / sae.latents), "dead", `${format(counts.dead)} latents that are active on no image of this store`),
      tile(format(last("explained variance")), "explained variance", "at the last step of training"),
      tile(format(last("L0")), "L0", "active latents a token, at the last step of training")),
    h("div.columns", {}, h("div.stack", {},
      section("Latents", "Each point is a latent: how often it is active, how strongly, and how specific it is to a label.",
        h("a.picture-link", { href: "#/latents", "aria-label": "All latents" }, miniScatter()),
        h("p", {}, h("a", { href: "#/latents" }, "Look at the latents")), h("p.quiet", {}, overview.held_reason)),
      labelsPanel(), section("Store", null, facts(store.facts))),
    h("div.stack", {}, overview.training ? section("Training", null, h("div.small-charts", {},
        overview.training.curves.map((curve) => charts.lines(overview.training.x, [{ name: curve.name, values: curve.values }], {
          title: curve.name, xLabel: "images seen", low: curve.low, high: curve.high, width: 300, height: 170 }))))
        : section("Training", "No metrics.jsonl lies beside the autoencoder, so there are no training curves."),
      overview.masking ? maskingPanel(overview.masking) : null, section("Autoencoder", null, facts(sae.facts)))));
};

const facts = (pairs) => h("dl.facts", {}, pairs.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, String(value))]));

function labelsPanel() {
  const { labels } = state.overview;
  if (!labels.length) return section("Labels", "The store's images have no labels.");
  return section("Labels", "Readable images of each label.", charts.bars(labels.map((label) => ({
    name: label.name, value: label.images, text: format(label.images) })), { label: "Images a label" }));
}

function miniScatter() {
  const canvas = h("canvas.mini", { width: "640", height: "300", role: "img", "aria-label": "Scatter of all latents" });
  const { x, y, bins, palette } = state.latents;
  const shown = [];
  for (let i = 0; i < x.length; i++) if (Number.isFinite(x[i]) && Number.isFinite(y[i])) shown.push(i);
  const range = (values) => shown.reduce(([low, high], i) => [Math.min(low, values[i]), Math.max(high, values[i])], [Infinity, -Infinity]);
  const [x0, x1] = range(x);
  const [y0, y1] = range(y);
  const size = shown.length > 20000 ? 2 : 4;
  canvas.repaint = () => {
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, canvas.width, canvas.height);
    const fills = palette();
    for (const i of shown) {
      context.fillStyle = fills[bins[i]];
      context.fillRect(8 + ((x[i] - x0) / (x1 - x0 || 1)) * 620, 290 - ((y[i] - y0) / (y1 - y0 || 1)) * 280, size, size);
    }
  };
  canvas.repaint();
  return canvas;
}

function maskingPanel(masking) {
  const series = masking.curves.map((curve, i) => ({ name: curve.name, values: curve.accuracy, color: colors.kind(i), dash: curve.dashed ? "5 4" : null }));
  const x = masking.ks.map((k) => Math.log10(k));
  return section("What the labels hang on",
    `A linear probe tells the label from an image's mean activation: trained on ${format(masking.n_train)} images, tested on ${format(masking.n_test)} `
    + "of other patients, which are reconstructed from some of their latents only.",
    charts.lines(x, series, { title: "Balanced accuracy by k", xTicks: masking.ks.map((k) => [Math.log10(k), String(k)]), xLabel: "k latents", low: 0, high: 1, width: 520, height: 250 }),
    h("p.quiet", {}, `Original activations ${percent(masking.original)}, reconstruction from all latents ${percent(masking.reconstruction)}, `
      + `guessing ${percent(masking.chance)}.`, masking.left_out.length > 0 && ` Left out, with too few images: ${masking.left_out.join(", ")}.`));
}
