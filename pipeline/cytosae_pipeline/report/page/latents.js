// All latents: the scatter with its filters, and the latents that have a page.
"use strict";

const CARDS_AT_FIRST = 60;

const latentsView = () => {
  const { overview, latents } = state;
  const filters = state.filters;
  const host = h("div.plot", {});
  const panel = h("aside.side.panel", { "aria-live": "polite" }, h("p.quiet", {}, "Click a point to see what makes the latent active."));
  const summary = h("p.quiet", { "aria-live": "polite" });
  const cards = h("div.cards");
  const legend = h("div.legend", {}, legendOf(filters.color));
  let scatter;

  function apply() {
    const visible = new Uint8Array(latents.n);
    let count = 0;
    for (let i = 0; i < latents.n; i++) {
      visible[i] = passes(i) ? 1 : 0;
      count += visible[i] && Number.isFinite(latents.x[i]) ? 1 : 0;
    }
    scatter.setVisible(visible);
    const held = overview.held.filter((latent) => visible[latent]);
    summary.textContent = `${format(count)} of ${format(overview.counts.active)} active latents shown, ${format(held.length)} of them with a ${heldWord()}. `
      + (overview.counts.dead ? `Dead latents (${format(overview.counts.dead)}), which are active on no image, have no point.` : "");
    const [first, others] = [held.slice(0, CARDS_AT_FIRST), held.slice(CARDS_AT_FIRST)];
    cards.replaceChildren(...first.map(latentCard));
    if (!others.length) return;
    const more = h("button", { type: "button", onclick: () => { more.replaceWith(...others.map(latentCard)); cards.children[CARDS_AT_FIRST].focus(); } }, `Show ${format(others.length)} more`);
    cards.append(more);
  }

  function passes(i) {
    const inside = (value, [low, high]) => (low === null || value >= low) && (high === null || value <= high);
    if (filters.held && !latents.isHeld[i]) return false;
    if (filters.cluster !== "" && String(latents.cluster[i]) !== filters.cluster) return false;
    if (!inside(latents.x[i], filters.sparsity) || !inside(latents.y[i], filters.mean)) return false;
    const bounded = filters.entropy[0] !== null || filters.entropy[1] !== null;
    return !bounded || (latents.entropy[i] >= 0 && inside(latents.entropy[i], filters.entropy));
  }

  function pick(index) {
    panel.replaceChildren(latentSummary(index));
  }

  const view = h("div", {}, h("h1", {}, "Latents"),
    filterBar(filters, apply, (by) => { scatter.setColors(...latents.colorsBy(by)); legend.replaceChildren(...legendOf(by)); }),
    summary,
    h("div.plot-and-side", {}, h("div.panel", {}, host, legend), panel),
    h("h2", {}, `Latents with a ${heldWord()}`), h("p.quiet", {}, overview.held_reason), cards);
  queueMicrotask(() => {
    const [bins, palette] = latents.colorsBy(filters.color);
    scatter = new Scatter(host, {
      xs: latents.x, ys: latents.y, bins, palette, marked: overview.held, label: "Scatter of all latents",
      xLabel: "log10 sparsity (share of images where active)", yLabel: "log10 mean activation",
      describe: describeLatent, onpick: pick });
    state.scatter = scatter;
    if (state.left) {
      scatter.view = state.left.view;
      scatter.pick(state.left.selected);
    }
    apply();
  });
  return view;
};

/** What a report has of some latents only: their pages. The explorer has every page, but cards of some only. */
const heldWord = () => (state.overview.live ? "card" : "page");

function describeLatent(i) {
  const { sparsity, mean, entropy, isHeld } = state.latents;
  const name = (state.overview.notes[i] || {}).name;
  return `Latent ${i}${name ? ` “${name}”` : ""}\nactive on ${percent(sparsity[i])} of images\nmean activation ${format(mean[i])}\n`
    + `label entropy ${entropy[i] < 0 ? "not defined" : format(entropy[i])}${isHeld[i] || state.overview.live ? "" : "\n(no page in this report)"}`;
}

/** What a click on a point shows. */
function latentSummary(index) {
  const { overview, latents } = state;
  const heading = [h("h2", {}, latentTitle(index)), h("p.quiet.lines", {}, describeLatent(index).split("\n").slice(1).join("\n"))];
  if (!latents.isHeld[index] && !overview.live) {
    return h("div", {}, heading, h("p.notice", {},
      `This report holds no page of latent ${index}. Make one that does: cytosae-cache report --latents ${index} …, or look at any latent with cytosae-cache explore.`));
  }
  return h("div", {}, heading, h("p", {}, h("a.button", { href: `#/latent/${index}` }, "Open its page")), cells.toggle(),
    later(cytosae.load(`latents/${index}`), (latent) => h("div.grid-small", {}, latent.top.slice(0, 4).map((item) => topImage(item))),
    overview.live && UNANSWERED));
}

function latentTitle(index) {
  const name = (state.overview.notes[index] || {}).name;
  return name ? `Latent ${index}: ${name}` : `Latent ${index}`;
}

function latentCard(latent) {
  const { overview, latents } = state;
  const at = overview.held.indexOf(latent);
  const label = overview.main_label[at];
  return h("a.card", { href: `#/latent/${latent}`, "data-latent": latent },
    h("div.card-images", {}, overview.cards[at].map((row) => cells.make(row))),
    h("b", {}, latentTitle(latent)),
    h("span.quiet", {}, label >= 0 ? `mostly ${cells.nameOfLabel(label)} · ` : "",
      `active on ${percent(latents.sparsity[latent])}`));
}

function filterBar(filters, apply, recolor) {
  const range = (name, text, hint) => {
    const input = (end, word) => h("input", {
      type: "number", step: "any", "aria-label": `${text}, ${word}`, placeholder: word, value: filters[name][end] ?? "", title: hint,
      oninput: (event) => { filters[name][end] = event.target.value === "" ? null : Number(event.target.value); apply(); } });
    return h("label.range", {}, h("span", {}, text), input(0, "from"), input(1, "to"));
  };
  return h("form.filters", { role: "search", "aria-label": "Filter latents", onsubmit: (event) => event.preventDefault(),
    onreset: () => { resetFilters(); setTimeout(() => route()); } },
    range("sparsity", "log10 sparsity", "-2: active on 1 % of the images"), range("mean", "log10 mean"), range("entropy", "entropy", "0: one label only"),
    h("label", {}, h("span", {}, "cluster"), h("select", { onchange: (event) => { filters.cluster = event.target.value; apply(); } },
      h("option", { value: "" }, "all"), clusterNumbers().map((value) => h("option", { value, selected: String(value) === filters.cluster }, String(value))))),
    h("label", {}, h("span", {}, "colour"), h("select", { onchange: (event) => { filters.color = event.target.value; recolor(event.target.value); } },
      [["entropy", "label entropy"], ["cluster", "cluster"]].map(([value, text]) => h("option", { value, selected: value === filters.color }, text)))),
    h("label.tick-box", {}, h("input", { type: "checkbox", checked: filters.held, onchange: (event) => { filters.held = event.target.checked; apply(); } }), `with a ${heldWord()} only`),
    h("button", { type: "reset" }, "Reset"));
}

function resetFilters() {
  state.filters = { sparsity: [null, null], mean: [null, null], entropy: [null, null], cluster: "", color: "entropy", held: false };
}

/** What the points' colours mean. */
function legendOf(by) {
  const held = h("span", {}, h("i.ring"), `has a ${heldWord()}`);
  if (by === "entropy" && !state.overview.labels.length) return [colors.key("var(--undefined)", "without labels, there is no label entropy"), held];
  if (by === "cluster") return [...clusterNumbers().map((value) => colors.key(colors.kind(value), `cluster ${value}`)), held];
  return [...colors.scale("label entropy: 0 (one label)", `${format(state.latents.maxEntropy)} (all alike)`, colors.point), colors.key("var(--undefined)", "not defined"), held];
}

const clusterNumbers = () => [...new Set(state.latents.cluster)].filter((value) => value >= 0).sort((a, b) => a - b);
