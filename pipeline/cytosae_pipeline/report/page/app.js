// The page as a whole: reads the overview, shows the view that the address names, themes and keys.
"use strict";

const state = { overview: null, latents: null, filters: null, scatter: null, imageAt: new Map(), step: null };

/** What all views need of every latent. */
function prepareLatents(overview) {
  const [sparsity, mean, entropy] = ["sparsity", "mean_acts", "entropy"].map((name) => cytosae.decode(overview.latents[name]));
  const cluster = cytosae.decode(overview.latents.cluster);
  const n = sparsity.length;
  const log = (values) => Float32Array.from(values, (value) => (value > 0 ? Math.log10(value) : NaN));
  const maxEntropy = Math.max(Math.log(Math.max(overview.labels.length, 2)), 1e-9);
  const isHeld = new Uint8Array(n);
  for (const latent of overview.held) isHeld[latent] = 1;
  const steps = 24;
  const byEntropy = () => [
    Uint8Array.from(entropy, (value) => (value < 0 ? steps : Math.min(steps - 1, Math.max(0, Math.floor((value / maxEntropy) * steps))))),
    [...colors.ramp(steps), "--undefined"]];
  const byCluster = () => [Uint8Array.from(cluster, (value) => (value < 0 ? colors.nKinds : value % colors.nKinds)),
    [...Array.from({ length: colors.nKinds }, (_, i) => colors.kind(i)), "--undefined"]];
  const [bins, palette] = byEntropy();
  return { n, sparsity, mean, entropy, cluster, isHeld, maxEntropy, x: log(sparsity), y: log(mean), bins, palette,
    colorsBy: (name) => (name === "cluster" ? byCluster() : byEntropy()) };
}

const NAV = [["", "Overview", "o"], ["latents", "Latents", "l"], ["patients", "Patients", "p"]];

function header() {
  const { overview } = state;
  const search = h("input", { type: "search", id: "search", placeholder: "latent or name  /", "aria-label": "Go to a latent by number or name" });
  const go = (event) => {
    event.preventDefault();
    const text = search.value.trim();
    if (/^\d+$/.test(text) && Number(text) < state.latents.n) { location.hash = `#/latent/${text}`; search.value = ""; return; }
    const found = Object.entries(overview.notes).find(([, note]) => text && (note.name || "").toLowerCase().includes(text.toLowerCase()));
    search.setCustomValidity(found ? "" : `No latent ${text}: numbers go from 0 to ${state.latents.n - 1}, and no name holds that.`);
    if (found) { location.hash = `#/latent/${found[0]}`; search.value = ""; } else search.reportValidity();
  };
  search.addEventListener("input", () => search.setCustomValidity(""));
  return [
    h("a.brand", { href: "#/" }, h("span", {}, "cytosae"), h("small", {}, overview.store.dataset)),
    h("nav", { "aria-label": "Views" }, [...NAV, ...(overview.live ? [["upload", "Your image", "u"]] : [])].map(([path, text]) =>
      h("a", { href: `#/${path}`, "data-path": path }, text))),
    h("form", { role: "search", onsubmit: go }, search),
    h("button", { type: "button", id: "theme", title: "Dark or light (t)", "aria-label": "Dark or light", onclick: switchTheme }, "◐"),
    h("button", { type: "button", id: "help", title: "Keys (?)", "aria-label": "Keys", onclick: showKeys }, "?"),
  ];
}

function showKeys() {
  const keys = [["o, l, p", "overview, latents, patients"], ["/", "go to a latent"], ["← →", "previous or next latent"], ["h, m, c", "heat map, mask, plain cell"],
    ["arrows", "on an image or a barcode: move over its patches or cells"], ["+ − 0", "on a scatter: zoom, show all"], ["Enter", "on a scatter: choose the point nearest to its middle"], ["t", "dark or light"]];
  const dialog = h("dialog", { onclose: () => dialog.remove() }, h("h2", {}, "Keys"), h("dl.facts", {}, keys.flatMap(([key, text]) => [h("dt", {}, h("kbd", {}, key)), h("dd", {}, text)])),
    h("form", { method: "dialog" }, h("button", { autofocus: true }, "Close")));
  document.body.append(dialog);
  dialog.showModal();
}

const systemIsDark = matchMedia("(prefers-color-scheme: dark)");
const remember = (value) => { try { localStorage.setItem("cytosae-theme", value); } catch { /* a private window keeps nothing */ } };
const remembered = () => { try { return localStorage.getItem("cytosae-theme"); } catch { return null; } };

function switchTheme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : systemIsDark.matches;
  root.dataset.theme = dark ? "light" : "dark";
  remember(root.dataset.theme);
  repaint();
}

/** Canvases do not follow the style sheet by themselves; what is chosen, zoomed or written stays as it is. */
function repaint() {
  for (const host of document.querySelectorAll(".scatter, .mini")) host.repaint();
}

function route() {
  const [name = "", ...rest] = location.hash.replace(/^#\/?/, "").split("/");
  state.step = null;
  const number = /^\d+$/.test(rest[0]) ? Number(rest[0]) : NaN;
  const views = new Map(Object.entries({
    "": overviewView, latents: latentsView, latent: () => latentView(number, rest[0] || "without a number"), image: () => imageView(number, rest[0] || "without a number"),
    patients: () => patientsView(...rest), upload: uploadView }));
  const view = document.getElementById("view");
  if (state.scatter) { state.scatter.resizer.disconnect(); state.scatter = null; }
  view.replaceChildren((views.get(name) || (() => h("div", {}, h("h1", {}, "Nothing here"),
    h("p.notice", {}, `There is no view “${name}”. Choose one above.`))))());
  for (const link of document.querySelectorAll("header nav a")) {
    if (link.dataset.path === name || (name === "latent" && link.dataset.path === "latents")) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const heading = view.querySelector("h1");
  document.title = `${heading ? heading.textContent : "cytosae"} · ${state.overview.title}`;
  window.scrollTo(0, 0);
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, textarea, select, dialog")) return;
  const view = NAV.find(([, , key]) => key === event.key);
  if (view) location.hash = `#/${view[0]}`;
  else if (event.key === "/") { event.preventDefault(); document.getElementById("search").focus(); }
  else if (event.key === "t") switchTheme();
  else if (event.key === "?") showKeys();
  else if (event.key in cells.keys) cells.set(cells.keys[event.key]);
  else if (event.key === "ArrowLeft" && state.step) state.step(-1);
  else if (event.key === "ArrowRight" && state.step) state.step(1);
}

async function start() {
  if (remembered()) document.documentElement.dataset.theme = remembered();
  try {
    state.overview = await cytosae.load("overview");
  } catch {
    document.getElementById("view").replaceChildren(h("p.notice", {}, "data/overview.js is missing: was the whole folder copied?"));
    return;
  }
  state.overview.images.rows.forEach((row, at) => state.imageAt.set(row, at));
  state.latents = prepareLatents(state.overview);
  resetFilters();
  document.getElementById("top").replaceChildren(...header());
  addEventListener("hashchange", route);
  addEventListener("keydown", onKey);
  systemIsDark.addEventListener("change", repaint);
  route();
}

start();
