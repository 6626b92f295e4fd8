// All images by label and patient, page by page; only the files of the images shown are loaded.
"use strict";

const TILES_PER_PAGE = 60;
const TILES_IN_PANEL = 24;

/**
 * Part of a listing: images of one label or one patient, in the order of their numbers.
 *
 * @param {"label" | "patient"} kind
 * @param {number} which
 * @param {number} first - place in the part
 * @param {number} n
 * @returns {Promise<ListedImage[]>}
 */
async function listed(kind, which, first, n) {
  const book = /** @type {NonNullable<Overview["book"]>} */ (state.overview.book);
  const starts = kind === "label" ? book.label_starts : book.patient_starts;
  const end = Math.min(starts[which + 1], starts[which] + first + n);
  /** @type {ListedImage[]} */
  const found = [];
  for (let at = starts[which] + first; at < end; ) {
    const file = Math.floor(at / book.listed_per_file);
    const begin = file * book.listed_per_file;
    const record = await cytosae.load(`listings/${kind}-${file}`);
    const [rows, labels, patients] = [record.numbers, record.labels, record.patients].map((part) =>
      cytosae.decode(part),
    );
    for (; at < Math.min(end, begin + book.listed_per_file); at++) {
      found.push({ row: rows[at - begin], label: labels[at - begin], patient: patients[at - begin] });
    }
  }
  return found;
}

/**
 * How many images a label or patient has.
 *
 * @param {"label" | "patient"} kind
 * @param {number} which
 */
function listedCount(kind, which) {
  const { book } = state.overview;
  const starts = (kind === "label" ? book?.label_starts : book?.patient_starts) ?? [];
  return starts[which + 1] - starts[which];
}

/**
 * The file that describes an image, and the image's place in it.
 *
 * @param {number} row
 * @returns {[file: number, place: number]}
 */
function placeOfRow(row) {
  const n = state.overview.book?.rows_per_file ?? 1;
  return [Math.floor(row / n), row % n];
}

/**
 * Readable images of all labels and patients, in the order of their numbers.
 *
 * @param {number} first - number to begin with
 * @returns {Promise<ListedImage[]>}
 */
async function numbered(first) {
  /** @type {ListedImage[]} */
  const found = [];
  const { images } = state.overview.store;
  for (let row = first; row < Math.min(images, first + TILES_PER_PAGE); row++) {
    const [file, place] = placeOfRow(row);
    const record = await cytosae.load(`rows/${file}`);
    if (!cytosae.decode(record.valid)[place]) continue;
    const [label, patient] = [record.labels, record.patients].map((part) => cytosae.decode(part)[place]);
    found.push({ row, label, patient });
  }
  return found;
}

/**
 * The images of a label and a patient, both or neither given, on one page of the browser.
 *
 * @param {number} label - NaN for all
 * @param {number} patient - NaN for all
 * @param {number} page - from 0
 * @returns {Promise<{total: number, shown: ListedImage[]}>}
 */
async function browsed(label, patient, page) {
  const first = page * TILES_PER_PAGE;
  const [byLabel, byPatient] = [!Number.isNaN(label), !Number.isNaN(patient)];
  if (!byLabel && !byPatient) return { total: state.overview.store.images, shown: await numbered(first) };
  const kind = byPatient ? "patient" : "label";
  const which = byPatient ? patient : label;
  if (!byLabel || !byPatient) {
    return { total: listedCount(kind, which), shown: await listed(kind, which, first, TILES_PER_PAGE) };
  }
  const all = (await listed(kind, which, 0, listedCount(kind, which))).filter((image) => image.label === label);
  return { total: all.length, shown: all.slice(first, first + TILES_PER_PAGE) };
}

/** @param {string[]} rest - label, patient and page of the address; `all` or nothing for any */
const browseView = (rest) => {
  const { labels, patients, image_pages } = state.overview;
  const heading = h("h1", {}, "Images");
  if (!image_pages) return h("div", {}, heading, h("p.notice", {}, "These results came without images."));
  const [label, patient] = [wholeNumber(rest[0]), wholeNumber(rest[1])];
  const page = wholeNumber(rest[2] ?? "0");
  const isKnown = (/** @type {string | undefined} */ text, /** @type {number} */ value, /** @type {number} */ n) =>
    text === undefined || text === "all" || value < n;
  if (!isKnown(rest[0], label, labels.length) || !isKnown(rest[1], patient, patients.length) || Number.isNaN(page)) {
    return h("div", {}, heading, h("p.notice", {}, "There is no such label, patient or page of images."));
  }
  const part = (/** @type {number} */ value) => (Number.isNaN(value) ? "all" : String(value));
  const address = (/** @type {number} */ l, /** @type {number} */ p, /** @type {number} */ at) =>
    `#/images/${part(l)}/${part(p)}/${at}`;
  const body = later(browsed(label, patient, page), ({ total, shown }) => {
    const n = Math.max(1, Math.ceil(total / TILES_PER_PAGE));
    state.step = (by) => {
      if (page + by >= 0 && page + by < n) location.hash = address(label, patient, page + by);
    };
    const all = Number.isNaN(label) && Number.isNaN(patient);
    const what = all ? `${countOf(total, "image")} in the store` : `${countOf(total, "readable image")}`;
    const turn = h(
      "nav.steps",
      { "aria-label": "Pages of images" },
      page > 0 && h("a.button", { href: address(label, patient, page - 1) }, "← previous"),
      page + 1 < n && h("a.button", { href: address(label, patient, page + 1) }, "next →"),
    );
    const about = h("p.quiet", {}, `${what}, page ${format(page + 1)} of ${format(n)}. ${aboutPictures()}`);
    return h("div", {}, h("div.title-row", {}, about, turn), imageTiles(shown));
  });
  return h(
    "div",
    {},
    heading,
    h(
      "form.filters",
      { onsubmit: (event) => event.preventDefault() },
      nameSelect(
        "label",
        labels.map((item) => item.name),
        label,
        (value) => address(value, patient, 0),
      ),
      nameSelect("patient", patients, patient, (value) => address(label, value, 0)),
    ),
    body,
  );
};

/** Why not every image has a picture. */
const aboutPictures = () =>
  state.overview.explore ? "" : "This report has pictures of the top images of its latents; explore has all.";

/**
 * A field that chooses a name or all.
 *
 * @param {string} text
 * @param {string[]} names
 * @param {number} chosen - NaN for all
 * @param {(value: number) => string} address
 */
function nameSelect(text, names, chosen, address) {
  if (!names.length) return null;
  const onchange = (/** @type {InputEvent & {target: HTMLSelectElement}} */ event) => {
    location.hash = address(wholeNumber(event.target.value));
  };
  const options = names.map((name, i) => h("option", { value: i, selected: i === chosen }, name));
  const all = h("option", { value: "all", selected: Number.isNaN(chosen) }, "all");
  return h("label", {}, h("span", {}, text), h("select", { id: `browse-${text}`, onchange }, all, options));
}

/** @param {ListedImage[]} images */
const imageTiles = (images) =>
  images.length ? h("div.grid", {}, images.map(imageTile)) : h("p.quiet", {}, "No readable image.");

/** @param {ListedImage} image */
function imageTile({ row, label, patient }) {
  const hasPicture = state.overview.explore || state.imageAt.has(row);
  const picture = hasPicture ? cells.make(row) : h("div.cell", {}, h("span.number-only", {}, `image ${row}`));
  return h(
    "div.top-image",
    { "data-row": row },
    h("a", { href: `#/image/${row}`, title: `image ${row}` }, picture),
    h("span", {}, labelLink(label)),
    patient >= 0 && h("span.quiet", {}, patientLink(patient)),
  );
}

/**
 * The first images of a label or patient, and a link to the others.
 *
 * @param {"label" | "patient"} kind
 * @param {number} which
 */
function imagesPanel(kind, which) {
  const total = listedCount(kind, which);
  const address = kind === "label" ? `#/images/${which}/all/0` : `#/images/all/${which}/0`;
  const more = h("p", {}, h("a.button", { href: address }, `All ${format(total)} images`));
  const shown = later(listed(kind, which, 0, TILES_IN_PANEL), imageTiles);
  return section("Images", aboutPictures(), shown, total > TILES_IN_PANEL && more);
}
