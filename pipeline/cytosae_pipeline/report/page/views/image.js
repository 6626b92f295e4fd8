// One image: click a patch to see its strongest latents, click a latent to see its map.
"use strict";

/**
 * @param {number} row
 * @param {string} text - the number as the address gives it
 * @param {number} latent - whose map is shown first; NaN for the image's strongest
 */
const imageView = (row, text, latent) => {
  const { store, explore, image_pages } = state.overview;
  if (!image_pages) {
    const nothing = "These results came without images, so there is nothing to show of this one.";
    return h("div", {}, h("h1", {}, `Image ${text}`), h("p.notice", {}, nothing));
  }
  if (!(row < store.images)) {
    const range = `they are numbered 0 to ${store.images - 1}.`;
    return h("div", {}, h("h1", {}, "No such image"), h("p.notice", {}, `There is no image ${text}: ${range}`));
  }
  if (!explore && !state.imageAt.has(row)) return imageCard(row);
  const unavailable = explore && `Image ${row} is not readable, or cytosae-cache explore has ended.`;
  const loaded = Promise.all([cytosae.load(`images/${row}`), mapOf(latent, row)]);
  return h(
    "div",
    {},
    later(loaded, ([image, from]) => imageBody(image, from), unavailable),
  );
};

/**
 * A latent's map on one of its top images, from the latent's own file; only the latent if that has none.
 *
 * @param {number} latent - NaN for none
 * @param {number} row
 * @returns {Promise<{latent: number, top?: TopImage} | null>}
 */
async function mapOf(latent, row) {
  if (!(latent < state.latents.n)) return null;
  if (!state.overview.explore && !state.latents.isFeatured[latent]) return { latent };
  const record = await cytosae.load(`latents/${latent}`).catch(() => null);
  return { latent, top: record?.top.find((item) => item.row === row) };
}

/**
 * The strongest latents of each token, decoded.
 *
 * @param {ImageRecord} image
 */
function decodeTokens(image) {
  const width = image.token_latents.shape[1];
  const codes = cytosae.decode(image.token_latents);
  const latents = Int32Array.from(codes, (latent) => (latent === image.no_latent ? -1 : latent));
  const values = Float32Array.from(cytosae.decode(image.token_values), (value) => value * image.value_step);
  /** @param {number} token */
  const strongest = (token) => {
    const places = Array.from({ length: width }, (_, i) => token * width + i).filter((i) => latents[i] >= 0);
    return places.map((i) => ({ latent: latents[i], value: values[i] }));
  };
  /** Map of a latent that is not among the image's strongest: known only where it is among a patch's strongest. */
  const partialMap = (/** @type {number} */ latent) => {
    const { grid, prefix } = state.overview.store;
    const levels = new Uint8Array(grid[0] * grid[1]);
    const found = [...latents.keys()].filter((i) => i >= prefix * width && latents[i] === latent);
    const peak = Math.max(1e-12, ...found.map((i) => values[i]));
    for (const i of found) levels[Math.floor(i / width) - prefix] = Math.ceil((255 * values[i]) / peak);
    return levels;
  };
  return { width, strongest, partialMap };
}

/**
 * @param {ImageRecord} image
 * @param {{latent: number, top?: TopImage} | null} [from] - the latent whose page led here
 */
function imageBody(image, from = null) {
  const { prefix } = state.overview.store;
  const tokens = decodeTokens(image);
  const maps = new Map(image.latents.map((item) => [item.latent, item]));
  if (from?.top) maps.set(from.latent, { ...from.top, latent: from.latent, score: from.top.value });
  const cell = imageCell(image);
  const noMap = "The image is a single token, so its latents have no map.";
  const about = h("p.quiet", { "aria-live": "polite" }, hasMaps() ? "Nothing is selected yet." : noMap);
  const patchList = h(
    "div.patch-list",
    { "aria-live": "polite" },
    h("h3", {}, "A patch's latents"),
    h("p.quiet", {}, "Click a patch of the cell, or move with the arrow keys."),
  );
  /** @type {Set<HTMLElement>} */
  const buttons = new Set();
  let shown = -1;

  const effect = state.overview.effects && image.row !== null ? effectPanel(image.row) : null;

  /** @param {number} latent */
  function showLatent(latent) {
    effect?.show(latent);
    if (!hasMaps()) return;
    shown = latent;
    const item = maps.get(latent);
    cell.show(item ? cytosae.decode(item.map) : tokens.partialMap(latent));
    about.replaceChildren(
      "Map of ",
      h("a", { href: `#/latent/${latent}` }, latentTitle(latent)),
      item
        ? `: largest activation ${format(item.peak)}, score of the image ${format(item.score)}.`
        : `: shown only where it is among the ${tokens.width} strongest of a patch.`,
    );
    for (const button of buttons) button.setAttribute("aria-pressed", String(Number(button.dataset.latent) === latent));
  }

  /**
   * @param {number} latent
   * @param {number} value
   * @param {number} share - of the longest bar
   */
  function latentRow(latent, value, share) {
    const label = `${latentTitle(latent)}: ${format(value)}. Show its map.`;
    const bar = [
      h("span.bar-track", {}, h("span.bar-fill", { style: { width: `${100 * share}%` } })),
      h("span", {}, format(value)),
    ];
    const link = h("a", { href: `#/latent/${latent}` }, latentTitle(latent));
    if (!hasMaps()) return h("div.latent-row", {}, link, h("span.map-button", {}, bar));
    const button = h(
      "button.map-button",
      {
        type: "button",
        "aria-pressed": String(latent === shown),
        "data-latent": latent,
        title: "Show its map",
        "aria-label": label,
        onclick: () => showLatent(latent),
      },
      bar,
    );
    buttons.add(button);
    return h("div.latent-row", {}, link, button);
  }

  /**
   * @param {number} token
   * @param {string} name
   */
  function showToken(token, name) {
    net.mark(token);
    const items = tokens.strongest(token);
    const rows = items.map(({ latent, value }) => latentRow(latent, value, value / items[0].value));
    const nothing = h("p.quiet", {}, "No latent is active here.");
    patchList.replaceChildren(h("h3", {}, name), items.length ? h("div", {}, rows) : nothing);
  }

  const net = patchNet(showToken);
  const [strongest] = image.latents;
  const whole = image.latents.map((item) => latentRow(item.latent, item.score, item.score / strongest.score));
  if (from) showLatent(from.latent);
  else if (strongest) showLatent(strongest.latent);
  const showCls = h("button", { type: "button", onclick: () => showToken(0, "CLS token") }, "CLS token");
  return h(
    "div",
    {},
    h(image.row === null ? "h2" : "h1", {}, imageTitle(image)),
    h(
      "p.quiet",
      {},
      image.label >= 0 && ["Label ", labelLink(image.label), ". "],
      image.patient >= 0 && ["Patient ", patientLink(image.patient), ". "],
      image.path && `File ${image.path}. `,
      hasMaps() && "Click a patch.",
    ),
    h(
      "div.image-page",
      {},
      h(
        "div",
        {},
        h("div.large-cell", {}, cell, hasMaps() && net.element),
        h("div.bar-row", {}, cells.toggle(), hasMaps() && prefix > 0 && showCls),
        about,
      ),
      hasMaps() && h("div.panel", {}, patchList),
      h(
        "div.panel",
        {},
        h("h3", {}, "The whole image's latents"),
        whole.length ? whole : h("p.quiet", {}, "No latent is active."),
      ),
      effect?.element,
    ),
  );
}

/**
 * A net of buttons over a cell, one per patch; arrow keys move over it.
 *
 * @param {(token: number, name: string) => void} onpick
 */
function patchNet(onpick) {
  const {
    grid: [rows, columns],
    prefix,
  } = state.overview.store;
  const squares = Array.from({ length: rows * columns }, (_, i) => {
    const place = `row ${Math.floor(i / columns) + 1}, column ${(i % columns) + 1}`;
    return h("button.patch", {
      type: "button",
      tabindex: i ? "-1" : "0",
      "data-token": prefix + i,
      "aria-pressed": "false",
      "aria-label": `Patch, ${place}`,
      onclick: () => onpick(prefix + i, `Patch in ${place}`),
    });
  });
  /** @param {KeyboardEvent} event */
  const onkeydown = (event) => {
    const by = ARROWS.get(event.key);
    if (!by) return;
    const at = squares.indexOf(/** @type {any} */ (document.activeElement)) + columns * by[0] + by[1];
    squares[at]?.focus();
    squares[at]?.click();
    event.preventDefault();
    event.stopPropagation();
  };
  /** Mark the patch of a token; the CLS token and registers have none. */
  const mark = (/** @type {number} */ token) => {
    for (const square of squares) {
      const here = Number(square.dataset.token) === token;
      square.setAttribute("aria-pressed", String(here));
      square.setAttribute("tabindex", here || (token < prefix && square === squares[0]) ? "0" : "-1");
    }
  };
  const style = { "grid-template": `repeat(${rows}, 1fr) / repeat(${columns}, 1fr)` };
  const about = { role: "group", "aria-label": "Patches; arrow keys move" };
  return { element: h("div.net", { style, ...about, onkeydown }, squares), mark };
}

/** @param {ImageRecord} image */
function imageCell({ row, picture }) {
  if (row !== null) return cells.make(row, null, { smooth: false, alt: `image ${row}` });
  return cells.make(null, null, { smooth: false, alt: "your image", picture: `data:image/jpeg;base64,${picture}` });
}

/** @param {ImageRecord} image */
const imageTitle = ({ row, label }) => (row === null ? "Your image" : `Image ${row}: ${labelName(label)}`);
