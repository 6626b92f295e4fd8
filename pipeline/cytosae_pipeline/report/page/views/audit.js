// The audit for confounders: what known properties of patients tell about latents, beside the group.
"use strict";

/** @param {PatientsRecord} data */
function auditPanel(data) {
  return h(
    "div",
    {},
    aboutSubjects(data),
    later(cytosae.load("audit"), (found) => auditBody(found, data)),
  );
}

/**
 * @param {AuditRecord} found
 * @param {PatientsRecord} data
 */
function auditBody(found, data) {
  const limit = percent(state.overview.limits.significant_q);
  const about =
    `Each property of ${unitsOf(data)} that is known, and the latents of which it tells at a false discovery rate of ` +
    `${limit}. “Groups differ” is Cramér's V of a name and epsilon squared of a number, 0 to 1. A latent of which a ` +
    "property tells more than the group does is marked in the comparisons.";
  const missing =
    "Nothing else is known about them: add columns such as site, scanner, age to the manifest, or give --covariates " +
    "patients.csv (columns patient,site,age).";
  const adjusted = [
    found.strata && `within ${found.strata}`,
    found.adjust.length && `at equal ${found.adjust.join(", ")}`,
  ];
  const compared = adjusted.filter(Boolean).join(", ");
  return h(
    "div",
    {},
    compared && h("p", {}, `Groups are compared ${compared}.`),
    !found.n_known && h("p.notice", {}, missing),
    section("What is known", about, found.columns.length ? auditTable(found) : h("p.quiet", {}, "Nothing to test.")),
    found.columns.map((column) => auditedLatents(column)),
  );
}

/**
 * How much groups differ in a property.
 *
 * @param {[number, number] | null} found
 */
const groupsDiffer = (found) => (found ? `${found[0].toFixed(2)} (p ${format(found[1], 2)})` : "");

/** @param {AuditRecord} found */
function auditTable({ columns, has_groups }) {
  const rows = columns.map((column) => [
    column.name,
    column.n_levels ? `${column.n_levels} names` : "numbers",
    format(column.n_subjects),
    groupsDiffer(column.with_groups),
    `${format(column.n_significant)} of ${format(column.n_tested)}`,
    has_groups ? format(cytosae.decode(column.more_than_group).length) : "",
  ]);
  const head = ["property", "kind", "known of", "groups differ", "latents", "more than the group"];
  return h("div.scroll", {}, table(head, rows, { numeric: [2, 4, 5], caption: "What is known" }));
}

/**
 * Properties that tell more of a latent than the group does; nothing if there are none, or no patients.
 *
 * @param {LatentRecord} latent
 */
function latentConfounders({ latent }) {
  if (!state.overview.image_pages || !state.overview.has_patients) return null;
  return later(cytosae.load("audit"), ({ columns, has_groups }) => {
    const told = columns.filter(({ more_than_group }) => cytosae.decode(more_than_group).includes(latent));
    if (!told.length) return h("div");
    const names = told.map(({ name }) => name).join(", ");
    const more = has_groups ? "tells more of this latent than the group does" : "tells of this latent";
    return h("p.notice", {}, `${names}: ${more}. `, h("a", { href: "#/patients/audit" }, "Confounders"));
  });
}

/** @param {AuditedColumn} column */
function auditedLatents({ name, n_levels, latents }) {
  if (!latents.length) return null;
  const rows = latents.map(({ latent, share, correlation, p, q, group_share }) => [
    h("a", { href: `#/latent/${latent}` }, latentTitle(latent)),
    correlation === null ? share.toFixed(2) : correlation.toFixed(2),
    format(p, 2),
    format(q, 2),
    correlation === null ? "" : share.toFixed(2),
    group_share === null ? "" : group_share.toFixed(2),
  ]);
  const effect = n_levels ? "share" : "correlation";
  const head = ["latent", effect, "p", "q", n_levels ? "" : "share", "share of the group"];
  const shown = n_levels ? head.filter((text) => text) : head;
  const cells = n_levels ? rows.map((row) => row.filter((_, i) => i !== 4)) : rows;
  const about = n_levels
    ? "Kruskal–Wallis; share of the variance of ranks that the property explains, less what a random one would."
    : "Spearman's correlation; share as for names: its square, less what a random number would have.";
  return section(name, about, table(shown, cells, { numeric: shown.map((_, i) => i).slice(1), caption: name }));
}
