// Explorer only: images of the user's own, sent to the server on this machine and analysed there.
"use strict";

/**
 * What was uploaded so far: an image, or why it could not be read.
 *
 * @type {{name: string, image?: ImageRecord, why?: string}[]}
 */
const uploads = [];
/** Place of the upload that is shown. */
let shownUpload = -1;

const uploadView = () => {
  const { explore, can_upload } = state.overview;
  if (!explore) return h("p.notice", {}, "A report cannot analyse new images: use cytosae-cache explore.");
  const result = h("div");
  const list = h("ul.uploads", { "aria-label": "Images so far" });
  const status = h(
    "p.quiet",
    { role: "status" },
    can_upload
      ? "Images are sent only to this program, on this machine, and are not stored."
      : "To analyse new images, start cytosae-cache explore with the vision transformer: --model_path CHECKPOINT.",
  );

  /** @param {number} place */
  function show(place) {
    shownUpload = place;
    const image = uploads[place]?.image;
    result.replaceChildren(...(image ? [nearestPanel(image), imageBody(image)] : []));
    list.replaceChildren(
      ...uploads.map((_, i) =>
        h(
          "li",
          {},
          uploadEntry(i, () => show(i)),
        ),
      ),
    );
  }

  /** @param {Iterable<File>} files - one after another: the server computes one at a time */
  async function send(files) {
    const all = [...files];
    let read = 0;
    for (const [i, file] of all.entries()) {
      status.textContent = `Reading ${file.name} (${i + 1} of ${all.length})…`;
      const { image, why } = await analyse(file);
      uploads.push({ name: file.name, image, why });
      if (image) read++;
      // What was there stays where a file could not be read.
      show(image ? uploads.length - 1 : shownUpload);
    }
    const failed = all.length - read;
    status.textContent = `Read ${countOf(read, "image")}.${failed ? ` Not read: ${failed}, see the list.` : ""}`;
  }

  const field = {
    type: "file",
    accept: "image/*",
    multiple: true,
    disabled: !can_upload,
    "aria-label": "Image files",
    onchange: (/** @type {InputEvent & {target: HTMLInputElement}} */ event) => {
      if (event.target.files?.length) send([...event.target.files]);
      event.target.value = "";
    },
  };
  const zone = h("div.drop", {}, h("input", field), h("span", {}, " or drop images here"));
  const isOver = (/** @type {boolean} */ over) => zone.classList.toggle("over", over && can_upload);
  for (const name of ["dragenter", "dragover"]) {
    zone.addEventListener(name, (event) => {
      event.preventDefault();
      isOver(true);
    });
  }
  zone.addEventListener("dragleave", () => isOver(false));
  zone.addEventListener("drop", (event) => {
    event.preventDefault();
    isOver(false);
    if (can_upload && event.dataTransfer?.files.length) send([...event.dataTransfer.files]);
  });
  show(shownUpload);
  return h("div", {}, h("h1", {}, "Your own images"), zone, status, list, result);
};

/**
 * Send a file to the server.
 *
 * @param {File} file
 * @returns {Promise<{image?: ImageRecord, why?: string}>}
 */
async function analyse(file) {
  const limit = state.overview.limits.upload_bytes;
  if (file.size > limit) return { why: `it is larger than ${limit >> 20} MB` };
  const answer = await ask("upload", {
    method: "POST",
    headers: { "Content-Type": "application/octet-stream" },
    body: file,
  });
  return answer.ok ? { image: await answer.json() } : { why: await answer.text() };
}

/**
 * @param {number} place
 * @param {() => void} onclick
 */
function uploadEntry(place, onclick) {
  const { name, image, why } = uploads[place];
  if (!image) return h("span.quiet", {}, `${name}: not read: ${why}`);
  return h("button", { type: "button", "aria-pressed": String(place === shownUpload), onclick }, name);
}

/** @param {ImageRecord} image */
function nearestPanel({ nearest }) {
  if (!nearest) return h("span");
  const tiles = nearest.map((image) => {
    const tile = imageTile(image);
    tile.append(h("span.quiet", {}, `cosine ${image.similarity.toFixed(2)}`));
    return tile;
  });
  return section(
    "Nearest cells of the store",
    "Among the cells of the map, by the cosine of their scores.",
    tiles.length ? h("div.grid", {}, tiles) : h("p.quiet", {}, "No latent is active on this image."),
  );
}
