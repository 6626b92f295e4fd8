// The page as a whole: loads the overview, shows the view that the address names, and handles keys.
"use strict";

/**
 * The view of an address.
 *
 * @param {string} name
 * @param {string[]} rest
 */
function makeView(name, rest) {
  const number = wholeNumber(rest[0]);
  const given = rest[0] || "without a number";
  const makers = new Map([
    ["", overviewView],
    ["latents", latentsView],
    ["latent", () => latentView(number, given)],
    ["image", () => imageView(number, given, wholeNumber(rest[1]))],
    ["images", () => browseView(rest)],
    ["label", () => labelView(number, given)],
    ["patient", () => patientView(number, given)],
    ["group", () => groupView(number, given)],
    ["map", mapView],
    ["search", () => searchView(decodeText(rest.join("/")))],
    ["patients", () => patientsView(...rest)],
    ["upload", uploadView],
  ]);
  const make = makers.get(name);
  if (make) return make();
  return h(
    "div",
    {},
    h("h1", {}, "Page not found"),
    h("p.notice", {}, `There is no view “${name}”. Choose one above.`),
  );
}

/** Main view of each view that is not one itself. */
const PARENTS = new Map([
  ["latent", "latents"],
  ["image", "images"],
  ["label", "images"],
  ["patient", "patients"],
  ["group", "patients"],
]);

/**
 * Text that an address contains encoded; as it is if it cannot be decoded.
 *
 * @param {string} text
 */
function decodeText(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

function route() {
  const [name = "", ...rest] = location.hash.replace(/^#\/?/, "").split("/");
  state.step = null;
  if (state.scatter) {
    state.scatter.resizer.disconnect();
    state.left = { view: state.scatter.view, selected: state.scatter.selected };
    state.scatter = null;
  }
  byId("view").replaceChildren(makeView(name, rest));
  const current = PARENTS.get(name) ?? name;
  for (const link of htmlElements("header nav a")) {
    if (link.dataset.path === current) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  retitle();
  window.scrollTo(0, 0);
}

/** Set the window's title; called again when a heading arrives late or changes. */
function retitle() {
  const heading = document.querySelector("#view h1");
  const text = heading?.textContent ?? "cytosae";
  document.title = text === state.overview.title ? `${text} · cytosae` : `${text} · ${state.overview.title}`;
}

/** Show another address. The focus goes to the view, or stays on an element with an id that the new view has, too. */
function onAddress() {
  const view = byId("view");
  const focused = document.activeElement;
  const id = focused && view.contains(focused) ? focused.id : "";
  route();
  setTimeout(() => ((id && document.getElementById(id)) || view).focus({ preventScroll: true }));
}

/** @param {KeyboardEvent} event */
function onKey(event) {
  const target = /** @type {Element} */ (event.target);
  if (event.ctrlKey || event.metaKey || event.altKey || target.closest("input, textarea, select, dialog")) return;
  const view = mainViews().find(([, , key]) => key === event.key);
  const look = cells.keys.get(event.key);
  if (view) location.hash = `#/${view[0]}`;
  else if (event.key === "/") {
    event.preventDefault();
    byId("search").focus();
  } else if (event.key === "t") switchTheme();
  else if (event.key === "?") showHelp();
  else if (look) look();
  else if (target.closest(".scroll"))
    return; // there, arrow keys scroll
  else if (event.key === "ArrowLeft") state.step?.(-1);
  else if (event.key === "ArrowRight") state.step?.(1);
}

async function start() {
  const theme = rememberedTheme();
  if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;
  try {
    state.overview = await cytosae.load("overview");
  } catch {
    const text = "data/overview.js is missing. Copy the whole folder of the report.";
    byId("view").replaceChildren(h("p.notice", {}, text));
    return;
  }
  for (const [at, row] of state.overview.images.rows.entries()) state.imageAt.set(row, at);
  state.latents = prepareLatents(state.overview);
  resetFilters();
  byId("top").replaceChildren(...headerParts());
  addEventListener("hashchange", onAddress);
  document.querySelector(".skip")?.addEventListener("click", (event) => {
    event.preventDefault();
    byId("view").focus();
  });
  addEventListener("keydown", onKey);
  colors.systemIsDark.addEventListener("change", repaint);
  route();
}

start();
