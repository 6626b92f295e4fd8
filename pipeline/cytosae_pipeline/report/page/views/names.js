// Pages of a label, a patient and a group of patients: their images, and the latents that stand out.
"use strict";

const LATENTS_LISTED = 24;

/**
 * A page that says what does not exist.
 *
 * @param {string} kind
 * @param {string} text - the number as the address gives it
 * @param {number} n
 */
const noSuch = (kind, text, n) =>
  h(
    "div",
    {},
    h("h1", {}, `No such ${kind}`),
    h(
      "p.notice",
      {},
      n ? `There is no ${kind} ${text}: they are numbered 0 to ${n - 1}.` : `These results have no ${kind}s.`,
    ),
  );

/**
 * @param {number} index
 * @param {string} text
 */
const labelView = (index, text) => {
  const { labels, book } = state.overview;
  if (!(index < labels.length) || !book) return noSuch("label", text, book ? labels.length : 0);
  const { lift, best } = state.latents;
  const chosen = [...lift.keys()]
    .filter((latent) => best[latent] === index && lift[latent] > 1)
    .sort((a, b) => lift[b] - lift[a]);
  const rows = chosen
    .slice(0, LATENTS_LISTED)
    .map((latent) => [
      h("a", { href: `#/latent/${latent}` }, latentTitle(latent)),
      format(lift[latent]),
      percent(state.latents.sparsity[latent]),
      dependsOnPosition(latent) ? "depends on position" : "",
    ]);
  const about = `${countOf(chosen.length, "latent")} with a lift above 1, largest here; the first ${rows.length}.`;
  return h(
    "div",
    {},
    h("h1", {}, labelName(index)),
    h("p.quiet", {}, `Label of ${countOf(labels[index].images, "readable image")}.`),
    section(
      "Its most specific latents",
      rows.length ? about : "No latent is active on its images more often than by chance.",
      rows.length > 0 && table(["latent", "lift", "active on", ""], rows, { numeric: [1, 2], caption: "Latents" }),
    ),
    imagesPanel("label", index),
  );
};

/**
 * @param {number} index
 * @param {string} text
 */
const patientView = (index, text) => {
  const { patients } = state.overview;
  if (!(index < patients.length)) return noSuch("patient", text, patients.length);
  return h(
    "div",
    {},
    h("h1", {}, `Patient ${patients[index]}`),
    later(cytosae.load("patients"), (data) => {
      const group = data.groups[index];
      return h(
        "div",
        {},
        h(
          "p.quiet",
          {},
          `${countOf(data.n_images[index], "readable image")}. `,
          data.subjects && `Of subject ${data.subjects.names[data.subjects.of[index]]}. `,
          group >= 0 && ["Group ", groupLink(data, group), ". "],
          h("a", { href: "#/patients" }, "All patients"),
        ),
        standingOut(data, barcodeOf(data, [index])),
      );
    }),
    imagesPanel("patient", index),
  );
};

/**
 * @param {number} index
 * @param {string} text
 */
const groupView = (index, text) => {
  if (!state.overview.has_patients) return noSuch("group", text, 0);
  return later(cytosae.load("patients"), (data) => {
    if (!(index < data.group_names.length)) return noSuch("group", text, data.group_names.length);
    const members = [...data.groups.keys()].filter((place) => data.groups[place] === index);
    const compared = data.comparisons
      .map((pair, i) => ({ ...pair, i }))
      .filter(({ groups }) => groups[0] === index || groups[1] === index);
    return h(
      "div",
      {},
      h("h1", {}, `Group ${data.group_names[index]}`),
      h(
        "p.quiet",
        {},
        `${countOf(members.length, "patient")}. `,
        compared.map(({ first, second, i }) => [
          h("a", { href: `#/patients/compare/${i}` }, `${first} against ${second}`),
          ". ",
        ]),
      ),
      standingOut(data, barcodeOf(data, members)),
      section(
        "Its patients",
        null,
        table(
          ["patient", "readable images"],
          members.map((place) => [patientLink(place), format(data.n_images[place])]),
          { numeric: [1], caption: "Patients" },
        ),
      ),
    );
  });
};

/**
 * @param {PatientsRecord} data
 * @param {number} group
 */
const groupLink = (data, group) => h("a", { href: `#/group/${group}` }, data.group_names[group]);

/**
 * Mean counts of some patients and of all others, one per latent of the barcodes.
 *
 * @param {PatientsRecord} data
 * @param {number[]} members
 * @returns {{here: number[], others: number[]}}
 */
function barcodeOf(data, members) {
  const { latents, values, peaks } = data.barcodes;
  const [levels, top, n] = [cytosae.decode(values), cytosae.decode(peaks), latents.length];
  const inside = new Set(members);
  const rest = [...data.names.keys()].filter((place) => !inside.has(place));
  const mean = (/** @type {number[]} */ places, /** @type {number} */ column) =>
    places.length
      ? (top[column] * places.reduce((sum, place) => sum + levels[place * n + column], 0)) / (255 * places.length)
      : NaN;
  const columns = [...latents.keys()];
  return { here: columns.map((i) => mean(members, i)), others: columns.map((i) => mean(rest, i)) };
}

/**
 * The latents whose counts differ most from those of all other patients.
 *
 * @param {PatientsRecord} data
 * @param {{here: number[], others: number[]}} means
 */
function standingOut({ barcodes, threshold }, { here, others }) {
  const peaks = cytosae.decode(barcodes.peaks);
  const share = (/** @type {number} */ i) => (here[i] - others[i]) / (peaks[i] || 1);
  const chosen = [...barcodes.latents.keys()]
    .filter((i) => here[i] > (others[i] || 0))
    .sort((a, b) => share(b) - share(a))
    .slice(0, LATENTS_LISTED / 2);
  const rows = chosen.map((i) => [
    h("a", { href: `#/latent/${barcodes.latents[i]}` }, latentTitle(barcodes.latents[i])),
    format(here[i]),
    format(others[i]),
  ]);
  const about =
    `Tokens above ${format(threshold)} per image, of the latents of the barcodes: the largest differences ` +
    "as a share of the latent's largest count.";
  return section(
    "Latents that stand out",
    about,
    rows.length
      ? table(["latent", "here", "other patients"], rows, { numeric: [1, 2], caption: "Latents that stand out" })
      : h("p.quiet", {}, "None."),
  );
}
