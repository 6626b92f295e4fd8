// Explorer only: an image of the user's own, sent to the server on this machine and analysed there.
"use strict";

/** @type {ImageRecord | null} */
let uploaded = null;

const uploadView = () => {
  const { explore, can_upload, limits } = state.overview;
  if (!explore) return h("p.notice", {}, "A report cannot analyse new images: use cytosae-cache explore.");
  const result = h("div", {}, uploaded && imageBody(uploaded));
  const status = h(
    "p.quiet",
    { role: "status" },
    can_upload
      ? "The image is sent only to this program, on this machine, and is not stored."
      : "To analyse new images, start cytosae-cache explore with the vision transformer: --model_path CHECKPOINT.",
  );
  /** @param {InputEvent & {target: HTMLInputElement}} event */
  const send = async (event) => {
    const file = event.target.files?.[0];
    if (!file) return;
    if (file.size > limits.upload_bytes) {
      status.textContent = `${file.name} is larger than ${limits.upload_bytes >> 20} MB.`;
      return;
    }
    status.textContent = "Reading…";
    uploaded = null;
    result.replaceChildren();
    const answer = await ask("upload", {
      method: "POST",
      headers: { "Content-Type": "application/octet-stream" },
      body: file,
    });
    if (!answer.ok) {
      status.textContent = `Not read: ${await answer.text()}`;
      return;
    }
    /** @type {ImageRecord} */
    const image = await answer.json();
    uploaded = image;
    status.textContent = `Read ${file.name}.`;
    result.replaceChildren(imageBody(image));
  };
  const field = { type: "file", accept: "image/*", disabled: !can_upload, "aria-label": "Image file", onchange: send };
  return h("div", {}, h("h1", {}, "Your own image"), h("p", {}, h("input", field)), status, result);
};
