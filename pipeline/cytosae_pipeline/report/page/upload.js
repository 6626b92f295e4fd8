// The explorer's own: an image of the user's, sent to this machine's server and read there.
"use strict";

const MAX_UPLOAD = 64 * 2 ** 20;
let uploaded = null;

const uploadView = () => {
  if (!state.overview.live) return h("p.notice", {}, "A report cannot read new images: use cytosae-cache explore.");
  const result = h("div", {}, uploaded ? imageBody(uploaded) : null);
  const said = h("p.quiet", { role: "status" }, state.overview.can_upload
    ? "It goes to this program only, on this machine, and is not kept."
    : "Start cytosae-cache explore with --model_path CHECKPOINT, the vision transformer of the store, to read new images.");
  const send = async (event) => {
    const [file] = event.target.files;
    if (!file) return;
    if (file.size > MAX_UPLOAD) { said.textContent = `${file.name} is larger than 64 MB.`; return; }
    said.textContent = "Reading…";
    uploaded = null;
    result.replaceChildren();
    const answer = await ask("upload", { method: "POST", headers: { "Content-Type": "application/octet-stream" }, body: file });
    if (!answer.ok) { said.textContent = `Not read: ${await answer.text()}`; return; }
    uploaded = await answer.json();
    said.textContent = `Read ${file.name}.`;
    result.replaceChildren(imageBody(uploaded));
  };
  return h("div", {}, h("h1", {}, "Your own image"), h("p", {}, h("input", { type: "file", accept: "image/*", disabled: !state.overview.can_upload, "aria-label": "Image file", onchange: send })), said, result);
};

function uploadedCell(image) {
  return cells.make(null, null, { smooth: false, alt: "your image", picture: `data:image/jpeg;base64,${image.picture}` });
}
