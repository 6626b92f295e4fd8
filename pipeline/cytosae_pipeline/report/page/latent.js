// One latent: what makes it active, on which labels and patients, and which latents are like it.
"use strict";

const latentView = (index, text) => {
  const { overview, latents } = state;
  if (!(index < latents.n)) return h("div", {}, h("h1", {}, "No such latent"), h("p.notice", {}, `There is no latent ${text}: they are numbered 0 to ${latents.n - 1}.`));
  const at = overview.held.indexOf(index);
  const step = (by) => (at < 0 ? null : overview.held[(at + by + overview.held.length) % overview.held.length]);
  state.step = (by) => { if (at >= 0) location.hash = `#/latent/${step(by)}`; };
  return h("div", {},
    h("div.title-row", {}, h("h1", {}, latentTitle(index)), at >= 0 && h("nav.steps", { "aria-label": "Latents with a page" },
      h("a.button", { href: `#/latent/${step(-1)}`, title: "Left arrow" }, "← previous"), h("a.button", { href: `#/latent/${step(1)}`, title: "Right arrow" }, "next →"))),
    h("div.tiles.compact", {},
      h("div.tile", {}, h("b", {}, percent(latents.sparsity[index])), h("span", {}, "of images active (sparsity)")),
      h("div.tile", {}, h("b", {}, format(latents.mean[index])), h("span", {}, "mean activation where active")),
      h("div.tile", { title: "nats; 0 is one label only" }, h("b", {}, latents.entropy[index] < 0 ? "–" : format(latents.entropy[index])), h("span", {}, "label entropy of its top images")),
      latents.cluster[index] >= 0 && h("div.tile", {}, h("b", {}, String(latents.cluster[index])), h("span", {}, "cluster"))),
    later(cytosae.load(`latents/${index}`), latentBody,
      overview.live ? UNANSWERED
        : `This report holds no page of latent ${index}. Make one that does: cytosae-cache report --latents ${index} …, or look at any latent with cytosae-cache explore.`));
};

function latentBody(latent) {
  const { overview } = state;
  const shown = latent.labels.filter((label) => label.n_images);
  return h("div", {},
    notePanel(latent.latent),
    section("Images that activate it most", "Where on the cell: each patch's activation, as a share of the image's largest. Click a cell to take it apart.",
      cells.toggle(),
      latent.top.length ? h("div.grid", {}, latent.top.map((item) => topImage(item))) : h("p.notice", {}, "It is active on no image of this store.")),
    h("div.columns", {}, h("div.stack", {},
      section("Labels", `Mean score of each label's images (${format(latent.n_images)} images read).`, shown.length
        ? charts.bars(shown.map((label) => ({
          name: cells.nameOfLabel(label.label), value: label.mean, text: `${format(label.mean)} · active on ${percent(label.n_active / label.n_images)}` }))
          .sort((a, b) => b.value - a.value), { label: "Mean score a label" })
        : h("p.quiet", {}, "The images have no labels.")),
      section("Patients", latent.patients.length ? `Tokens above ${format(latent.threshold)} an image, the highest patients first.` : null, latent.patients.length
        ? charts.bars(latent.patients.map((patient) => ({
          name: cells.nameOfPatient(patient.patient), value: patient.per_image,
          text: `${format(patient.per_image)} (${format(patient.count)} in ${format(patient.n_images)} images)` })), { label: "Counts a patient", color: "var(--second)" })
        : h("p.quiet", {}, overview.has_patients ? `No patient has a token above ${format(latent.threshold)}.` : "The images have no patients."))),
    h("div.stack", {},
      section("Activations", null, activationHistogram(latent.histogram)),
      section("Latents like it", "Cosine between decoder rows.", latent.neighbours.length ? table(["latent", "cosine", "active on"], latent.neighbours.map(([other, cosine]) => [
        h("a", { href: `#/latent/${other}` }, latentTitle(other)), cosine.toFixed(3), percent(state.latents.sparsity[other])]), { numeric: [1, 2], caption: "Latents like it" })
        : h("p.quiet", {}, "None.")))));
}

/** A top image with its heat map, value, label and patient. */
function topImage(item) {
  const { overview } = state;
  const at = state.imageAt.get(item.row);
  const label = at === undefined ? item.label : overview.images.labels[at];
  const patient = at === undefined ? item.patient : overview.images.patients[at];
  const levels = item.map ? cytosae.decode(item.map) : null;
  const text = `image ${item.row}, ${cells.nameOfLabel(label)}`;
  return h("a.top-image", { href: `#/image/${item.row}`, "data-row": item.row }, cells.make(item.row, levels, { alt: text }),
    h("span", {}, h("b", {}, format(item.value)), ` ${cells.nameOfLabel(label)}`), patient >= 0 && h("span.quiet", {}, cells.nameOfPatient(patient)));
}

function activationHistogram({ lowest, per_octave, counts, n_zero }) {
  const used = counts.map((count, i) => (count ? i : -1)).filter((i) => i >= 0);
  const total = n_zero + counts.reduce((sum, count) => sum + count, 0);
  const zero = h("p.quiet", {}, `Active on ${percent(total ? 1 - n_zero / total : 0)} of ${format(total)} tokens.`);
  if (!used.length) return h("div", {}, zero);
  const [first, last] = [used[0], used[used.length - 1]];
  const value = (bin) => 2 ** (lowest + bin / per_octave);
  const bins = Array.from({ length: last - first + 1 }, (_, i) => first + i);
  return h("div", {}, charts.histogram(bins.map((bin) => counts[bin]),
    bins.map((bin) => `${format(value(bin))} to ${format(value(bin + 1))}: ${format(counts[bin])} tokens`),
    { title: "Tokens by activation, from left to right on a log scale", marks: [format(value(first)), format(value(last + 1))] }), zero);
}

/** Name and note of a latent: read in a report, written in the explorer. */
function notePanel(latent) {
  const { overview } = state;
  let before = { name: "", note: "", ...overview.notes[latent] };
  if (!overview.live) return before.note ? section("Note", null, h("p.lines", {}, before.note)) : null;
  const name = h("input", { type: "text", maxlength: "200", value: before.name, "aria-label": "Name of this latent", placeholder: "Name, such as “nucleoli”" });
  const text = h("textarea", { maxlength: "10000", rows: "2", "aria-label": "Note on this latent", placeholder: "What you see" }, before.note);
  const saved = h("span.quiet", { role: "status" });
  const show = (kept) => {
    before = kept;
    overview.notes[latent] = kept;
    if (form.isConnected) { document.querySelector("h1").textContent = latentTitle(latent); retitle(); }
  };
  const refuse = (why, wanted) => {
    saved.textContent = why;
    // Who went on meanwhile would not see that.
    if (!form.isConnected) document.getElementById("view").prepend(h("p.notice", { role: "alert" }, `${latentTitle(latent)}, “${[wanted.name, wanted.note].join(": ")}”: ${why}`));
  };
  const save = async (event) => {
    event.preventDefault();
    const wanted = { name: name.value, note: text.value };
    const answer = await ask(`notes/${latent}`, { method: "PUT", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ ...wanted, before }) });
    if (answer.ok) { show(wanted); saved.textContent = "Saved."; return; }
    if (answer.status !== 409) { refuse(`Not saved: ${await answer.text()}`, wanted); return; }
    const theirs = await answer.json();
    show(theirs);
    refuse(`Not saved: another window wrote meanwhile “${[theirs.name, theirs.note].filter(Boolean).join(": ")}”. Save again to replace it.`, wanted);
  };
  // Kept when a field is left, too: whoever goes on to the next latent has not lost what they wrote.
  const form = h("form.note", { onsubmit: save, onchange: save }, name, text, h("button", { type: "submit" }, "Save"), saved);
  // Another window may have written since this page was opened.
  ask(`data/notes/${latent}.json`).then(async (answer) => {
    if (!answer.ok) return;
    const kept = await answer.json();
    if (name.value === before.name && text.value === before.note) { name.value = kept.name; text.value = kept.note; show(kept); }
  });
  return form;
}
