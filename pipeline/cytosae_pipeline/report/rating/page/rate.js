// The blinded rating: one item at a time, its examples, the intruder test, and the rater's answer.
"use strict";

(() => {
  /**
   * @typedef {{name: string, concept: string | null, confidence: number | null, clicked: number | null}} Draft
   * @typedef {{groups: {title: string, maps: Packed<"u1">[]}[], n_row: number, answer: Draft | null}} RatedItem
   * @typedef {{rater: string, done: boolean[], grid: [number, number], palette: Overview["palette"],
   *   limits: {name_length: number, confidence: number}, concepts: string[]}} RatingState
   */

  /** @type {RatingState} */
  let rating;
  let at = 0;
  /** @type {Draft} */
  let draft = { name: "", concept: null, confidence: null, clicked: null };
  let nInRow = 0;
  let saving = false;
  /** The item that was requested last: an answer that arrives late must not replace another item. */
  let wanted = -1;

  /** @param {string} address */
  async function fetchJson(address) {
    const response = await ask(address);
    if (!response.ok) throw new Error(await response.text());
    return response.json();
  }

  const letter = (/** @type {number} */ place) => String.fromCharCode(65 + place);

  /**
   * The first item without an answer from a place on, then from the start; -1 if all are rated.
   *
   * @param {number} from
   */
  function nextOpen(from) {
    const n = rating.done.length;
    for (let i = 0; i < n; i++) if (!rating.done[(from + i) % n]) return (from + i) % n;
    return -1;
  }

  /** @param {number} place */
  async function show(place) {
    wanted = place;
    /** @type {RatedItem} */
    let item;
    try {
      item = await fetchJson(`data/items/${place}.json`);
    } catch (error) {
      say(/** @type {Error} */ (error).message);
      return;
    }
    if (wanted !== place) return;
    at = place;
    nInRow = item.n_row;
    draft = item.answer ?? { name: "", concept: null, confidence: null, clicked: null };
    byId("view").replaceChildren(
      head(),
      h("p.quiet", {}, "Examples, from those that show it most to those that hardly show it:"),
      h("div.rate-groups", {}, item.groups.map(exampleGroup)),
      row(item.groups.length, item.n_row),
      questions(),
    );
    window.scrollTo(0, 0);
    byId("view").focus({ preventScroll: true });
  }

  function head() {
    const n = rating.done.length;
    const rated = rating.done.filter(Boolean).length;
    return h(
      "div",
      {},
      h(
        "div.rate-head",
        {},
        h("h1", {}, `${at + 1} of ${n}`),
        h("progress", { max: String(n), value: String(rated), "aria-label": "Items rated" }),
        h("span.quiet", { id: "rated" }, `${rated} of ${n} rated by ${rating.rater}`),
      ),
      cells.toggle(),
    );
  }

  /**
   * @param {RatedItem["groups"][number]} group
   * @param {number} number
   */
  function exampleGroup({ title, maps }, number) {
    const shown = maps.map((map, place) =>
      cells.make(null, cytosae.decode(map), {
        alt: `example, ${title}, ${place + 1}`,
        picture: `pictures/${at}/${number}/${place}.jpg`,
      }),
    );
    return h("section.panel", {}, h("h3", {}, title), h("div.rate-cells", {}, shown));
  }

  /**
   * The intruder test; without heat maps, which would tell it.
   *
   * @param {number} number
   * @param {number} n
   */
  function row(number, n) {
    const buttons = Array.from({ length: n }, (_, place) =>
      h(
        "button",
        { type: "button", "data-place": place, "aria-pressed": draft.clicked === place, onclick: () => click(place) },
        cells.make(null, null, { alt: `image ${letter(place)}`, picture: `pictures/${at}/${number}/${place}.jpg` }),
        letter(place),
      ),
    );
    for (const button of buttons) {
      button.setAttribute("aria-pressed", String(button.dataset.place === String(draft.clicked)));
    }
    return section(
      "Which image does not belong?",
      `One of these does not show what the others show. Click it, or press ${letter(0)} to ${letter(n - 1)}.`,
      h("div.rate-row", { role: "group", "aria-label": "Intruder" }, buttons),
    );
  }

  function questions() {
    /** @type {[string, string][]} */
    const concepts = rating.concepts.map((value) => [value, value[0].toUpperCase() + value.slice(1)]);
    /** @type {[string, string][]} */
    const levels = Array.from({ length: rating.limits.confidence }, (_, i) => [String(i + 1), String(i + 1)]);
    const name = h("input", {
      id: "name",
      maxlength: String(rating.limits.name_length),
      autocomplete: "off",
      value: draft.name,
      oninput: (/** @type {InputEvent & {target: HTMLInputElement}} */ event) => {
        draft.name = event.target.value;
      },
    });
    return section(
      "Your answer",
      `Keys: a to ${letter(nInRow - 1).toLowerCase()} for the image, / for the name, y, p, n for the concept, 1 to ` +
        `${rating.limits.confidence} for the confidence, Enter to save, ← and → for other items, h for heat maps.`,
      h(
        "div.rate-questions",
        {},
        h("label", {}, h("span", {}, "What do the examples have in common?"), name),
        h(
          "div",
          {},
          h("span", {}, "Is it one concept?"),
          choice("Is it one concept?", concepts, draft.concept ?? "", (value) => {
            draft.concept = value;
          }),
        ),
        h(
          "div",
          {},
          h("span", {}, "How sure are you? (5: very)"),
          choice("Confidence", levels, String(draft.confidence ?? ""), (value) => {
            draft.confidence = Number(value);
          }),
        ),
        h("button", { type: "button", id: "save", onclick: save }, "Save and go on"),
        h("button", { type: "button", id: "back", onclick: () => step(-1) }, "Back"),
      ),
      h("p", { id: "message", role: "status", "aria-live": "polite" }),
    );
  }

  /** @param {string} text */
  function say(text) {
    const line = document.getElementById("message");
    if (line) line.textContent = text;
    else byId("view").replaceChildren(h("h1", {}, "Rating"), h("p.notice", {}, text));
  }

  /** @param {number} place */
  function click(place) {
    if (place >= nInRow) return;
    draft.clicked = place;
    for (const button of htmlElements(".rate-row button")) {
      button.setAttribute("aria-pressed", String(button.dataset.place === String(place)));
    }
  }

  /**
   * Press one of the buttons of a choice.
   *
   * @param {string} label
   * @param {string} value
   */
  function press(label, value) {
    for (const button of htmlElements(`.choice[aria-label="${label}"] button`)) {
      if (button.dataset.value === value) button.click();
    }
  }

  function missing() {
    if (draft.clicked === null) return "Click the image that does not belong; guess if you are not sure.";
    if (draft.concept === null) return "Say whether it is one concept.";
    if (draft.confidence === null) return "Say how sure you are.";
    if (draft.concept !== "no" && !draft.name.trim()) return "Name the concept, or answer no.";
    return "";
  }

  async function save() {
    const text = missing();
    if (text) {
      say(text);
      return;
    }
    if (saving) return;
    saving = true;
    const place = at;
    try {
      const response = await ask(`answers/${place}`, { method: "PUT", body: JSON.stringify(draft) });
      if (!response.ok) {
        say(await response.text());
        return;
      }
    } finally {
      saving = false;
    }
    rating.done[place] = true;
    const next = nextOpen(place + 1);
    if (next < 0) finish();
    else await show(next);
  }

  function finish() {
    wanted = -1;
    const n = rating.done.length;
    byId("view").replaceChildren(
      h("h1", {}, "All rated"),
      h("p", { id: "rated" }, `${n} of ${n} rated by ${rating.rater}. Everything is saved; you can close this page.`),
      h("button", { type: "button", id: "again", onclick: () => show(0) }, "Look at the first again"),
    );
  }

  /** @param {number} by */
  function step(by) {
    const place = at + by;
    if (place >= 0 && place < rating.done.length) show(place);
  }

  /** Show heat maps over the examples, or the bare cells if any maps are shown. */
  function switchMaps() {
    const isPlain = document.querySelector(".cell-controls button[data-value='plain'][aria-pressed='true']");
    cells.set(isPlain ? "heat" : "plain");
  }

  /** @param {KeyboardEvent} event */
  function onKey(event) {
    const target = /** @type {Element} */ (event.target);
    if (event.ctrlKey || event.metaKey || event.altKey || !document.getElementById("save")) return;
    if (event.key === "Enter" && !target.closest("button")) {
      event.preventDefault();
      save();
      return;
    }
    if (event.key === "Escape") /** @type {HTMLElement} */ (target).blur();
    if (target.closest("input")) return;
    const concept = rating.concepts.find((value) => value[0] === event.key);
    const place = event.key.length === 1 ? event.key.charCodeAt(0) - 97 : -1;
    if (event.key === "/") {
      event.preventDefault();
      byId("name").focus();
    } else if (event.key === "h") switchMaps();
    else if (event.key === "ArrowLeft") step(-1);
    else if (event.key === "ArrowRight") step(1);
    else if (/^[1-9]$/.test(event.key)) press("Confidence", event.key);
    else if (concept) press("Is it one concept?", concept);
    else if (place >= 0 && place < nInRow) click(place);
  }

  async function start() {
    try {
      rating = await fetchJson("data/state.json");
    } catch (error) {
      say(/** @type {Error} */ (error).message);
      return;
    }
    const { palette, grid } = rating;
    state.overview = /** @type {Overview} */ (/** @type {unknown} */ ({ palette, store: { grid }, thumbnails: true }));
    cells.set("plain");
    addEventListener("keydown", onKey);
    const open = nextOpen(0);
    if (open < 0) finish();
    else await show(open);
  }

  start();
})();
