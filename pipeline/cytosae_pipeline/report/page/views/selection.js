// Cells selected on the map, compared with all others: labels, latents and pictures.
"use strict";

const SELECTION_LATENTS = 10;
const SELECTION_IMAGES = 6;

/**
 * @param {MapRecord} map
 * @param {MapPoints} points
 * @param {number[]} inside - places on the map
 */
function selectionPanel(map, points, inside) {
  const n = points.rows.length;
  if (!inside.length || inside.length === n) {
    return h("p.quiet", {}, inside.length ? "All cells are selected." : "No cell is selected.");
  }
  const shares = state.overview.labels
    .map(({ name }, label) => {
      const count = inside.filter((i) => points.labels[i] === label).length;
      const all = points.labels.filter((other) => other === label).length;
      return { name, href: `#/label/${label}`, value: count, text: `${format(count)} of ${format(all)}` };
    })
    .filter(({ value }) => value > 0)
    .sort((a, b) => b.value - a.value);
  const step = Math.max(1, Math.floor(inside.length / SELECTION_IMAGES));
  const tiles = inside
    .filter((_, i) => i % step === 0)
    .slice(0, SELECTION_IMAGES)
    .map((i) => imageTile({ row: points.rows[i], label: points.labels[i], patient: points.patients[i] }));
  return h(
    "div",
    {},
    h("h2", {}, `${format(inside.length)} of ${countOf(n, "cell")} selected`),
    shares.length > 0 && barChart(shares, { label: "Labels of the selection" }),
    h("h3", {}, "Latents"),
    later(compareSelection(map, points, inside), (found) =>
      h(
        "div",
        {},
        ["more", "less"].map((side) => comparedTable(found, side)),
      ),
    ),
    h("h3", {}, "Cells"),
    h("div.grid-small", {}, tiles),
  );
}

/**
 * Mean scores of each latent of the map in the selection and in the rest.
 *
 * @param {MapRecord} map
 * @param {MapPoints} points
 * @param {number[]} inside
 * @returns {Promise<ComparedLatent[]>} falling by effect: the chance that a selected cell has the larger score
 */
async function compareSelection(map, points, inside) {
  const isInside = new Uint8Array(points.rows.length);
  for (const i of inside) isInside[i] = 1;
  const found = [];
  for (const [place, latent] of points.latents.entries()) {
    const { levels, peak } = await mapScores(map, place);
    const [sums, counts] = [
      [0, 0],
      [new Float64Array(256), new Float64Array(256)],
    ];
    for (let i = 0; i < levels.length; i++) {
      sums[isInside[i]] += levels[i];
      counts[isInside[i]][levels[i]]++;
    }
    const [rest, here] = [levels.length - inside.length, inside.length];
    let [below, wins] = [0, 0];
    for (let level = 0; level < 256; level++) {
      wins += counts[1][level] * (below + counts[0][level] / 2);
      below += counts[0][level];
    }
    const scale = peak / 255;
    found.push({
      latent,
      here: (sums[1] / here) * scale,
      rest: (sums[0] / rest) * scale,
      effect: wins / (here * rest),
    });
  }
  return found.sort((a, b) => b.effect - a.effect);
}

/**
 * @param {ComparedLatent[]} found
 * @param {string} side
 */
function comparedTable(found, side) {
  const chosen =
    side === "more"
      ? found.slice(0, SELECTION_LATENTS).filter(({ effect }) => effect > 0.5)
      : found
          .slice(-SELECTION_LATENTS)
          .reverse()
          .filter(({ effect }) => effect < 0.5);
  const caption = side === "more" ? "Stronger in the selection" : "Stronger in the rest";
  if (!chosen.length) return h("p.quiet", {}, `${caption}: none.`);
  const rows = chosen.map(({ latent, here, rest, effect }) => [
    h("a", { href: `#/latent/${latent}` }, latentTitle(latent)),
    format(here, 2),
    format(rest, 2),
    effect.toFixed(2),
  ]);
  return h(
    "div",
    {},
    h("p.quiet", {}, `${caption}: mean score here and in the rest, and AUC.`),
    table(["latent", "here", "rest", "AUC"], rows, { numeric: [1, 2, 3], caption }),
  );
}
