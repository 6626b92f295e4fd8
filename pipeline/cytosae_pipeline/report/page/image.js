// One image: click a patch to see its strongest latents, click a latent to see its map.
"use strict";

const imageView = (row, text) => {
  const { store, live } = state.overview;
  if (!(row < store.images)) return h("div", {}, h("h1", {}, "No such image"), h("p.notice", {}, `There is no image ${text}: they are numbered 0 to ${store.images - 1}.`));
  return h("div", {}, later(cytosae.load(`images/${row}`), imageBody, live
    ? `Image ${row} is not readable, or cytosae-cache explore has ended.`
    : `This report holds no page of image ${row}: it holds the top images of its latents. Look at any image with cytosae-cache explore.`));
};

function imageBody(image) {
  const { overview } = state;
  const { grid: [rows, columns], prefix } = overview.store;
  const width = image.token_latents.shape[1];
  const tokenLatents = Int32Array.from(cytosae.decode(image.token_latents), (value) => (value === image.no_latent ? -1 : value));
  const tokenValues = Float32Array.from(cytosae.decode(image.token_values), (value) => value * image.value_step);
  const maps = new Map(image.latents.map((item) => [item.latent, item]));
  const cell = typeof image.row === "number" ? cells.make(image.row, null, { smooth: false, alt: imageTitle(image) }) : uploadedCell(image);
  const about = h("p.quiet", { "aria-live": "polite" }, "Nothing is chosen yet.");
  const patchList = h("div.patch-list", { "aria-live": "polite" },
    h("h3", {}, "A patch's latents"), h("p.quiet", {}, "Click a patch of the cell, or move with the arrow keys."));
  const buttons = new Set();

  let shown = -1;

  function showLatent(latent) {
    shown = latent;
    const item = maps.get(latent);
    let levels;
    if (item) levels = cytosae.decode(item.map);
    else {
      levels = new Uint8Array(rows * columns);
      const here = [];
      for (let i = prefix * width; i < tokenLatents.length; i++) if (tokenLatents[i] === latent) here.push(i);
      const peak = Math.max(1e-12, ...here.map((i) => tokenValues[i]));
      for (const i of here) levels[Math.floor(i / width) - prefix] = Math.ceil((255 * tokenValues[i]) / peak);
    }
    cell.show(levels);
    about.replaceChildren("Map of ", h("a", { href: `#/latent/${latent}` }, latentTitle(latent)), item
      ? `: largest activation ${format(item.peak)}, score of the image ${format(item.score)}.`
      : `: only where it is among the ${width} strongest of a patch.`);
    for (const button of buttons) button.setAttribute("aria-pressed", String(Number(button.dataset.latent) === latent));
  }

  function latentRow(latent, value, share) {
    const button = h("button.map-button", { type: "button", "aria-pressed": String(latent === shown), "data-latent": latent, title: "Show its map", "aria-label": `${latentTitle(latent)}: ${format(value)}. Show its map.`, onclick: () => showLatent(latent) },
      h("span.bar-track", {}, h("span.bar-fill", { style: { width: `${100 * share}%` } })), h("span", {}, format(value)));
    buttons.add(button);
    return h("div.latent-row", {}, h("a", { href: `#/latent/${latent}` }, latentTitle(latent)), button);
  }

  function showToken(token, name) {
    for (const square of squares) {
      const here = Number(square.dataset.token) === token;
      square.setAttribute("aria-pressed", String(here));
      square.setAttribute("tabindex", here || (token < prefix && square === squares[0]) ? "0" : "-1");
    }
    const items = [];
    for (let i = 0; i < width; i++) {
      const latent = tokenLatents[token * width + i];
      if (latent >= 0) items.push([latent, tokenValues[token * width + i]]);
    }
    patchList.replaceChildren(h("h3", {}, name), items.length
      ? h("div", {}, items.map(([latent, value]) => latentRow(latent, value, value / items[0][1])))
      : h("p.quiet", {}, "No latent is active here."));
  }

  const squares = Array.from({ length: rows * columns }, (_, i) => h("button.patch", {
    type: "button", tabindex: i ? "-1" : "0", "data-token": prefix + i, "aria-pressed": "false",
    "aria-label": `Patch, row ${Math.floor(i / columns) + 1}, column ${(i % columns) + 1}`,
    onclick: () => showToken(prefix + i, `Patch in row ${Math.floor(i / columns) + 1}, column ${(i % columns) + 1}`) }));
  const net = h("div.net", { style: { "grid-template": `repeat(${rows}, 1fr) / repeat(${columns}, 1fr)` }, role: "group", "aria-label": "Patches; arrows move",
    onkeydown: (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
      if (!by) return;
      const at = squares.indexOf(document.activeElement) + by;
      if (squares[at]) { squares[at].focus(); squares[at].click(); }
      event.preventDefault();
      event.stopPropagation();
    } }, squares);
  const whole = image.latents.map((item) => latentRow(item.latent, item.score, item.score / image.latents[0].score));
  if (image.latents.length) showLatent(image.latents[0].latent);
  return h("div", {}, h(typeof image.row === "number" ? "h1" : "h2", {}, imageTitle(image)),
    h("p.quiet", {}, image.patient >= 0 && `Patient ${cells.nameOfPatient(image.patient)}. `, image.path && `File ${image.path}. `, "Click a patch."),
    h("div.image-page", {},
      h("div", {}, h("div.large-cell", {}, cell, net), h("div.bar-row", {}, cells.toggle(), prefix > 0 && h("button", { type: "button", onclick: () => showToken(0, "CLS token") }, "CLS token")), about),
      h("div.panel", {}, patchList),
      h("div.panel", {}, h("h3", {}, "The whole image's latents"), whole.length ? whole : h("p.quiet", {}, "No latent is active."))));
}

function imageTitle(image) {
  return typeof image.row === "number" ? `Image ${image.row}: ${cells.nameOfLabel(image.label)}` : "Your image";
}
