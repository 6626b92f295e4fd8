// All latents: the scatter plot with its filters, and cards of the featured latents.
"use strict";

const CARDS_AT_FIRST = 60;

const latentsView = () => {
  const { overview, latents, filters } = state;
  const host = h("div.plot");
  const panel = h(
    "aside.side.panel",
    { "aria-live": "polite" },
    h("p.quiet", {}, "Click a point to see what activates the latent."),
  );
  const summary = h("p.quiet", { "aria-live": "polite" });
  const cards = h("div.cards");
  const legend = h("div.legend", {}, latentsLegend(filters.color));
  /** @type {Scatter} */
  let scatter;

  function apply() {
    const visible = Uint8Array.from({ length: latents.n }, (_, i) => (passesFilters(i) ? 1 : 0));
    const shown = visible.filter((isVisible, i) => isVisible && Number.isFinite(latents.x[i])).length;
    scatter.setVisible(visible);
    const featured = overview.featured.filter((latent) => visible[latent]);
    const { active, dead } = overview.counts;
    summary.textContent =
      `${format(shown)} of ${format(active)} active latents shown, ${format(featured.length)} of them with a ` +
      `${featuredWord()}. ` +
      (dead ? `Dead latents (${format(dead)}), which are active on no image, have no point.` : "");
    showCards(cards, featured);
  }

  /** @param {ColorBy} by */
  function recolor(by) {
    scatter.setColors(...latents.colorsBy(by));
    legend.replaceChildren(...latentsLegend(by));
  }

  queueMicrotask(() => {
    const [bins, palette] = latents.colorsBy(filters.color);
    scatter = new Scatter(host, {
      xs: latents.x,
      ys: latents.y,
      bins,
      palette,
      marked: overview.featured,
      label: "Scatter plot of all latents",
      xLabel: "log10 sparsity (share of images where active)",
      yLabel: "log10 mean activation",
      describe: describeLatent,
      onpick: (index) => panel.replaceChildren(latentSummary(index)),
    });
    state.scatter = scatter;
    if (state.left) {
      scatter.view = state.left.view;
      scatter.pick(state.left.selected);
    }
    apply();
  });
  return h(
    "div",
    {},
    h("h1", {}, "Latents"),
    filterBar(filters, apply, recolor),
    summary,
    h("div.plot-and-side", {}, h("div.panel", {}, host, legend), panel),
    h("h2", {}, `Latents with a ${featuredWord()}`),
    h("p.quiet", {}, overview.featured_reason),
    cards,
  );
};

/**
 * Cards of latents; those beyond the first ones on request.
 *
 * @param {HTMLElement} host
 * @param {number[]} latents
 */
function showCards(host, latents) {
  host.replaceChildren(...latents.slice(0, CARDS_AT_FIRST).map(latentCard));
  const others = latents.slice(CARDS_AT_FIRST);
  if (!others.length) return;
  const showAll = () => {
    more.replaceWith(...others.map(latentCard));
    /** @type {HTMLElement} */ (host.children[CARDS_AT_FIRST]).focus();
  };
  const more = h("button", { type: "button", onclick: showAll }, `Show ${format(others.length)} more`);
  host.append(more);
}

/** @param {number} latent */
function latentCard(latent) {
  const { overview, latents } = state;
  const at = overview.featured.indexOf(latent);
  const label = overview.main_label[at];
  return h(
    "a.card",
    { href: `#/latent/${latent}`, "data-latent": latent },
    h(
      "div.card-images",
      {},
      overview.cards[at].map((row) => cells.make(row)),
    ),
    h("b", {}, latentTitle(latent)),
    h(
      "span.quiet",
      {},
      label >= 0 && `mostly ${labelName(label)} · `,
      `active on ${percent(latents.sparsity[latent])}`,
      dependsOnPosition(latent) && " · depends on position",
      latents.oneSource[latent] > 0 && ` · ${oneSourceText(latent)}`,
      overview.partners.length > 0 && ` · partner cosine ${format(latents.partner[latent], 2)}`,
    ),
  );
}

/**
 * Whether the filters show a latent.
 *
 * @param {number} i
 */
function passesFilters(i) {
  const { latents, filters } = state;
  /** @type {(value: number, range: Bounds) => boolean} */
  const inside = (value, [low, high]) => (low === null || value >= low) && (high === null || value <= high);
  if (filters.featured && !latents.isFeatured[i]) return false;
  if (filters.cluster !== "" && String(latents.cluster[i]) !== filters.cluster) return false;
  if (!inside(latents.x[i], filters.sparsity) || !inside(latents.y[i], filters.mean)) return false;
  if (filters.oneSource && !latents.oneSource[i]) return false;
  const matched = filters.partner[0] !== null || filters.partner[1] !== null;
  if (matched && !inside(latents.partner[i], filters.partner)) return false;
  const bounded = filters.entropy[0] !== null || filters.entropy[1] !== null;
  return !bounded || (latents.entropy[i] >= 0 && inside(latents.entropy[i], filters.entropy));
}

/**
 * @param {Filters} filters
 * @param {() => void} apply
 * @param {(by: ColorBy) => void} recolor
 */
function filterBar(filters, apply, recolor) {
  const onreset = () => {
    resetFilters();
    setTimeout(route);
  };
  /** @param {InputEvent & {target: HTMLSelectElement}} event */
  const chooseCluster = (event) => {
    filters.cluster = event.target.value;
    apply();
  };
  /** @param {InputEvent & {target: HTMLSelectElement}} event */
  const chooseColor = (event) => {
    filters.color = /** @type {ColorBy} */ (event.target.value);
    recolor(filters.color);
  };
  /** @param {InputEvent & {target: HTMLInputElement}} event */
  const chooseFeatured = (event) => {
    filters.featured = event.target.checked;
    apply();
  };
  /** @param {InputEvent & {target: HTMLInputElement}} event */
  const chooseSource = (event) => {
    filters.oneSource = event.target.checked;
    apply();
  };
  const { overview } = state;
  const clusters = clusterNumbers().map((value) =>
    h("option", { value, selected: String(value) === filters.cluster }, String(value)),
  );
  const colorings = [
    ["entropy", "label entropy"],
    ["label", "most specific label"],
    ["cluster", "cluster"],
  ].map(([value, text]) => h("option", { value, selected: value === filters.color }, text));
  const bar = { role: "search", "aria-label": "Filter latents", onreset };
  return h(
    "form.filters",
    { ...bar, onsubmit: (event) => event.preventDefault() },
    rangeFilter(filters.sparsity, "log10 sparsity", "-2: active on 1 % of the images", apply),
    rangeFilter(filters.mean, "log10 mean", null, apply),
    rangeFilter(filters.entropy, "entropy", "0: a single label", apply),
    overview.partners.length > 0 &&
      rangeFilter(filters.partner, "partner cosine", "of its nearest latent in every other autoencoder", apply),
    h(
      "label",
      {},
      h("span", {}, "cluster"),
      h("select", { onchange: chooseCluster }, h("option", { value: "" }, "all"), clusters),
    ),
    h("label", {}, h("span", {}, "colour"), h("select", { onchange: chooseColor }, colorings)),
    h(
      "label.tick-box",
      {},
      h("input", { type: "checkbox", checked: filters.featured, onchange: chooseFeatured }),
      `with a ${featuredWord()} only`,
    ),
    overview.sources &&
      h(
        "label.tick-box",
        { title: "More than half of its active tokens are of one person, who has far fewer of the images" },
        h("input", { type: "checkbox", checked: filters.oneSource, onchange: chooseSource }),
        `of one ${overview.sources.unit} only`,
      ),
    h("button", { type: "reset" }, "Reset"),
  );
}

/**
 * Two fields for the ends of a range.
 *
 * @param {Bounds} range - changed in place
 * @param {string} text
 * @param {string | null} hint
 * @param {() => void} apply
 */
function rangeFilter(range, text, hint, apply) {
  /** @type {(end: 0 | 1, word: string) => HTMLInputElement} */
  const field = (end, word) => {
    /** @param {InputEvent & {target: HTMLInputElement}} event */
    const oninput = (event) => {
      range[end] = event.target.value === "" ? null : Number(event.target.value);
      apply();
    };
    const about = { "aria-label": `${text}, ${word}`, placeholder: word, title: hint };
    return h("input", { type: "number", step: "any", value: range[end] ?? "", ...about, oninput });
  };
  return h("label.range", {}, h("span", {}, text), field(0, "from"), field(1, "to"));
}

/**
 * What the points' colours mean.
 *
 * @param {ColorBy} by
 */
function latentsLegend(by) {
  const featured = h("span", {}, h("i.ring"), `has a ${featuredWord()}`);
  if (by === "cluster") {
    return [...clusterNumbers().map((value) => colors.key(colors.kind(value), `cluster ${value}`)), featured];
  }
  if (by === "label") {
    const inUse = new Set(state.latents.best);
    const shown = state.overview.labels.map((_, i) => i).filter((i) => inUse.has(i));
    const nothing = colors.key("var(--undefined)", "none");
    return [...shown.map((i) => colors.key(colors.kind(i), labelName(i))), nothing, featured];
  }
  if (!state.overview.labels.length) {
    return [colors.key("var(--undefined)", "no labels, so label entropy is not defined"), featured];
  }
  const high = `${format(state.latents.maxEntropy)} (all labels equally)`;
  const scale = colors.scale("label entropy: 0 (one label)", high, colors.point);
  return [...scale, colors.key("var(--undefined)", "not defined"), featured];
}

/** @param {number} i */
function describeLatent(i) {
  const { sparsity, mean, entropy, lift, best, oneSource, partner, isFeatured } = state.latents;
  const name = latentName(i);
  return [
    `Latent ${i}${name ? ` “${name}”` : ""}`,
    `active on ${percent(sparsity[i])} of images`,
    `mean activation ${format(mean[i])}`,
    `label entropy ${entropy[i] < 0 ? "not defined" : format(entropy[i])}`,
    ...(lift[i] > 1 ? [`${labelName(best[i])} ${format(lift[i])} times more often than by chance`] : []),
    ...(dependsOnPosition(i) ? ["depends on position"] : []),
    ...(oneSource[i] ? [oneSourceText(i)] : []),
    ...(state.overview.partners.length ? [`partner cosine ${format(partner[i], 2)}`] : []),
    ...(isFeatured[i] || state.overview.explore ? [] : ["(a short card in this report)"]),
  ].join("\n");
}

/**
 * What a click on a point shows.
 *
 * @param {number} index
 */
function latentSummary(index) {
  const { overview, latents } = state;
  const facts = describeLatent(index).split("\n").slice(1).join("\n");
  const heading = [h("h2", {}, latentTitle(index)), h("p.quiet.lines", {}, facts)];
  if (!latents.isFeatured[index] && !overview.explore) {
    const link = h("p", {}, h("a.button", { href: `#/latent/${index}` }, "Open its card"));
    return h("div", {}, heading, link, latentCardBody(index));
  }
  /** @param {LatentRecord} latent */
  const topImages = (latent) =>
    h(
      "div.grid-small",
      {},
      latent.top.slice(0, 4).map((item) => topImage(item, index)),
    );
  return h(
    "div",
    {},
    heading,
    h("p", {}, h("a.button", { href: `#/latent/${index}` }, "Open its page")),
    cells.toggle(),
    later(cytosae.load(`latents/${index}`), topImages, overview.explore && NO_ANSWER),
  );
}
