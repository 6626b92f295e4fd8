// Name and note of a latent: shown in a report, edited in the explorer.
"use strict";

/** @param {number} latent */
function notePanel(latent) {
  const { overview } = state;
  const kept = overview.notes[latent] ?? { name: "", note: "" };
  if (overview.explore) return noteForm(latent, kept);
  return kept.note ? section("Note", null, h("p.lines", {}, kept.note)) : null;
}

/**
 * @param {number} latent
 * @param {Note} kept
 */
function noteForm(latent, kept) {
  const { notes, limits } = state.overview;
  let before = kept;
  const name = h("input", {
    type: "text",
    maxlength: limits.name_length,
    value: before.name,
    "aria-label": "Name of this latent",
    placeholder: "Name, such as “nucleoli”",
  });
  const text = h(
    "textarea",
    {
      maxlength: limits.note_length,
      rows: "2",
      "aria-label": "Note on this latent",
      placeholder: "What you see",
    },
    before.note,
  );
  const status = h("span.quiet", { role: "status" });
  /** @param {Note} note */
  const show = (note) => {
    before = note;
    notes[latent] = note;
    const heading = form.isConnected && document.querySelector("h1");
    if (heading) heading.textContent = latentTitle(latent);
    if (heading) retitle();
  };
  /** @type {(why: string, wanted: Note) => void} */
  const refuse = (why, wanted) => {
    status.textContent = why;
    if (form.isConnected) return;
    // The user has moved on to another view and would not see the status line.
    const alert = `${latentTitle(latent)}, “${wanted.name}: ${wanted.note}”: ${why}`;
    byId("view").prepend(h("p.notice", { role: "alert" }, alert));
  };
  /** @param {Event} event */
  const save = async (event) => {
    event.preventDefault();
    const wanted = { name: name.value, note: text.value };
    const answer = await ask(`notes/${latent}`, {
      method: "PUT",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ ...wanted, before }),
    });
    if (answer.ok) {
      show(wanted);
      status.textContent = "Saved.";
    } else if (answer.status === 409) {
      /** @type {Note} */
      const theirs = await answer.json();
      show(theirs);
      const found = [theirs.name, theirs.note].filter(Boolean).join(": ");
      refuse(`Not saved: another window has saved “${found}” since. Save again to replace it.`, wanted);
    } else {
      refuse(`Not saved: ${await answer.text()}`, wanted);
    }
  };
  // Also saved when a field loses the focus, so that nothing is lost on the way to the next latent.
  const form = h(
    "form.note",
    { onsubmit: save, onchange: save },
    name,
    text,
    h("button", { type: "submit" }, "Save"),
    status,
  );
  // Another window may have saved a note since this page was loaded.
  ask(`data/notes/${latent}.json`).then(async (answer) => {
    if (!answer.ok) return;
    /** @type {Note} */
    const current = await answer.json();
    if (name.value !== before.name || text.value !== before.note) return;
    name.value = current.name;
    text.value = current.note;
    show(current);
  });
  return form;
}
