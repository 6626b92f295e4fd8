// Building elements. Text is always a text node, so no name found in a data set can become markup.
"use strict";

/**
 * Make an element: `h("div.card", {title: "x", onclick: f}, "text", child)`.
 *
 * @template {string} S
 * @param {S} spec
 * @param {Attributes} [attributes]
 * @param {...Child} children
 * @returns {ElementOf<S>}
 */
function h(spec, attributes = {}, ...children) {
  const [tag, ...classes] = spec.split(".");
  const element = document.createElement(tag);
  element.classList.add(...classes);
  fill(element, attributes, children);
  return /** @type {any} */ (element);
}

/**
 * The same for SVG.
 *
 * @param {string} tag
 * @param {Attributes} [attributes]
 * @param {...Child} children
 */
function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  fill(element, attributes, children);
  return element;
}

/**
 * @param {HTMLElement | SVGElement} element
 * @param {Attributes} attributes
 * @param {Child[]} children
 */
function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), /** @type {EventListener} */ (value));
    else if (name === "style") setStyle(element, /** @type {Record<string, string>} */ (value));
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of /** @type {Leaf[]} */ (/** @type {any[]} */ (children).flat(9))) if (child) element.append(child);
}

/**
 * @param {HTMLElement | SVGElement} element
 * @param {Record<string, string>} style
 */
function setStyle(element, style) {
  for (const [name, value] of Object.entries(style)) element.style.setProperty(name, value);
}

/**
 * The element of an id that `index.html` or the header defines.
 *
 * @param {string} id
 */
const byId = (id) => /** @type {HTMLElement} */ (document.getElementById(id));

/**
 * All elements of a selector.
 *
 * @param {string} selector
 */
const htmlElements = (selector) => /** @type {NodeListOf<HTMLElement>} */ (document.querySelectorAll(selector));

/**
 * A drawing context of a canvas.
 *
 * @param {HTMLCanvasElement} canvas
 */
const contextOf = (canvas) => /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));

/**
 * A number for people: few digits, thousands apart.
 *
 * @param {number | null | undefined} value
 * @param {number} [digits]
 */
function format(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(digits - 1);
  return value
    .toPrecision(digits)
    .replace(/(\.\d*?)0+$/, "$1")
    .replace(/\.$/, "");
}

/**
 * A count with its noun, in the plural where that is needed.
 *
 * @param {number} n
 * @param {string} noun
 */
const countOf = (n, noun) => `${format(n)} ${noun}${n === 1 ? "" : "s"}`;

/** @param {number} value */
function percent(value) {
  if (value > 0 && value < 0.001) return "< 0.1\u00a0%";
  return `${(100 * value).toFixed(1).replace(/\.0$/, "")}\u00a0%`;
}

/**
 * The number that a part of an address is, or NaN.
 *
 * @param {string | undefined} text
 */
const wholeNumber = (text) => (text !== undefined && /^\d+$/.test(text) ? Number(text) : NaN);

/**
 * A section with a heading and, optionally, a line that explains it.
 *
 * @param {string} title
 * @param {string | null} explanation
 * @param {...Child} children
 */
function section(title, explanation, ...children) {
  return h("section.panel", {}, h("h2", {}, title), explanation && h("p.quiet", {}, explanation), ...children);
}

/**
 * A number with its meaning.
 *
 * @param {string} value
 * @param {string} text
 * @param {string} [hint]
 */
const tile = (value, text, hint) => h("div.tile", { title: hint }, h("b", {}, value), h("span", {}, text));

/**
 * A table of texts and elements; columns of numbers are aligned right.
 *
 * @param {string[]} head
 * @param {Leaf[][]} rows
 * @param {{numeric?: number[], caption?: string}} [options]
 */
function table(head, rows, { numeric = [], caption = head.join(", ") } = {}) {
  const side = (/** @type {number} */ column) => (numeric.includes(column) ? { class: "number" } : {});
  const headRow = head.map((text, column) => h("th", { scope: "col", ...side(column) }, text));
  const bodyRows = rows.map((row) => h("tr", {}, ...row.map((cell, column) => h("td", side(column), cell))));
  return h(
    "div.scroll",
    { tabindex: "0", role: "region", "aria-label": caption },
    h("table", {}, h("thead", {}, h("tr", {}, headRow)), h("tbody", {}, bodyRows)),
  );
}

/**
 * Buttons of which one is pressed.
 *
 * @template {string} V
 * @param {string} label
 * @param {[value: V, text: string][]} options
 * @param {V} chosen
 * @param {(value: V) => void} onchoose
 */
function choice(label, options, chosen, onchoose) {
  const buttons = options.map(([value, text]) => {
    const choose = () => {
      for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.value === value));
      onchoose(value);
    };
    return h(
      "button",
      { type: "button", "aria-pressed": String(value === chosen), "data-value": value, onclick: choose },
      text,
    );
  });
  return h("div.choice", { role: "group", "aria-label": label }, buttons);
}

/**
 * Something that arrives later: a word while it loads, and a message if it cannot be loaded.
 *
 * @template T
 * @param {Promise<T>} promise
 * @param {(value: T) => Node} make
 * @param {string | false} [unavailable]
 */
function later(promise, make, unavailable) {
  const host = h("div", { "aria-busy": "true" }, h("p.quiet", {}, "Loading…"));
  promise
    .then(
      (value) => host.replaceChildren(make(value)),
      (error) => host.replaceChildren(h("p.notice", {}, unavailable || error.message)),
    )
    .finally(() => {
      host.removeAttribute("aria-busy");
      retitle();
    });
  return host;
}
