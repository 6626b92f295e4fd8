// Building elements. Text is always a text node, so no name found in a data set can become markup.
"use strict";

/** `h("div.card", {title: "x", onclick: f}, "text", child)`. */
function h(spec, attributes = {}, ...children) {
  const [tag, ...classes] = spec.split(".");
  const element = document.createElement(tag || "div");
  element.classList.add(...classes);
  return fill(element, attributes, children);
}

/** The same for SVG. */
function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, item] of Object.entries(value)) element.style.setProperty(key, item);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** A number for people: few digits, thousands apart. */
function format(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(digits - 1);
  return value.toPrecision(digits).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");
}

function percent(value) {
  if (value > 0 && value < 0.001) return "< 0.1\u00a0%";
  return `${(100 * value).toFixed(1).replace(/\.0$/, "")}\u00a0%`;
}

/** A section with a heading and, if wanted, a line that explains it. */
function section(title, explanation, ...children) {
  return h("section.panel", {}, h("h2", {}, title), explanation && h("p.quiet", {}, explanation), ...children);
}

/** A table; cells are texts or elements, columns of numbers are set right. */
function table(head, rows, { numeric = [], caption = null } = {}) {
  const side = (column) => (numeric.includes(column) ? { class: "number" } : {});
  return h("div.scroll", { tabindex: "0", role: "region", "aria-label": caption || head.join(", ") }, h("table", {},
    h("thead", {}, h("tr", {}, head.map((text, column) => h("th", { scope: "col", ...side(column) }, text)))),
    h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell, column) => h("td", side(column), cell)))))));
}

/** Buttons of which one is pressed. */
function choice(label, options, chosen, onchoose) {
  const buttons = options.map(([value, text]) => h("button", {
    type: "button", "aria-pressed": String(value === chosen), "data-value": value,
    onclick: () => {
      for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.value === String(value)));
      onchoose(value);
    },
  }, text));
  return h("div.choice", { role: "group", "aria-label": label }, buttons);
}

/** Something that arrives later, with a word while it does not and a message if it cannot. */
function later(promise, make, unavailable) {
  const host = h("div", { "aria-busy": "true" }, h("p.quiet", {}, "Loading…"));
  promise.then((value) => host.replaceChildren(make(value)), (error) => host.replaceChildren(
    h("p.notice", {}, unavailable || error.message))).finally(() => { host.removeAttribute("aria-busy"); retitle(); });
  return host;
}
