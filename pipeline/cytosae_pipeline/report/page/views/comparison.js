// Two groups of patients compared: a volcano plot and tables of the largest differences.
"use strict";

/**
 * @param {PatientsRecord} data
 * @param {string} which - number of the comparison, as the address gives it
 */
function comparisonsPanel(data, which) {
  const { comparisons } = data;
  if (!comparisons.length) return noGroups(data);
  const isAll = which === "all" && data.all_groups !== null;
  const chosen = wholeNumber(which);
  if (!isAll && !(chosen < comparisons.length)) {
    const range = `they are numbered 0 to ${comparisons.length - 1}.`;
    return h("p.notice", {}, `There is no comparison ${which}: ${range}`);
  }
  /** @param {InputEvent & {target: HTMLSelectElement}} event */
  const onchange = (event) => {
    location.hash = `#/patients/compare/${event.target.value}`;
  };
  const options = comparisons.map(({ first, second, n_first, n_second }, i) =>
    h("option", { value: i, selected: i === chosen }, `${first} (${n_first}) against ${second} (${n_second})`),
  );
  const together = data.all_groups && `all ${data.all_groups.length} groups at once`;
  if (together && isAll) options.push(h("option", { value: "all", selected: isAll }, together));
  return h(
    "div",
    {},
    aboutSubjects(data),
    together &&
      !isAll &&
      h("p", {}, "First: ", h("a", { href: "#/patients/compare/all" }, together), ". Then, in pairs:"),
    h("p", {}, h("select", { id: "compared", "aria-label": "Groups compared", onchange }, options)),
    isAll
      ? later(cytosae.load("comparisons/all"), (result) => allGroupsBody(result, data))
      : later(cytosae.load(`comparisons/${chosen}`), (result) =>
          comparisonBody(result, comparisons[chosen], unitsOf(data)),
        ),
  );
}

/**
 * What was tested, and what was left out because no grouping of so few subjects could make it significant.
 *
 * @param {number} tested
 * @param {number} varying
 * @param {string} units
 */
function aboutTested(tested, varying, units) {
  const some = `${format(varying)} of ${format(state.latents.n)} latents vary among these ${units}`;
  if (tested === varying) return `${some} and were tested`;
  return `${some}; the ${format(tested)} that could be significant, whatever the groups, were tested`;
}

/**
 * @param {AllGroupsRecord} result
 * @param {PatientsRecord} data
 */
function allGroupsBody(result, data) {
  if (result.why_not) return h("p.notice", {}, result.why_not);
  const limit = state.overview.limits.significant_q;
  const names = result.groups.map((group) => data.group_names[group]).join(", ");
  const about =
    `${aboutTested(result.n_tested, result.n_varying, unitsOf(data))} (${result.method}: ${names}); ` +
    `${format(result.n_significant)} differ between any of the groups at a false discovery rate of ` +
    `${percent(limit)} (Benjamini–Hochberg). Effect is ${result.about_effect}. Pairs of groups are above. ` +
    result.left_out;
  const rows = result.latents.map(({ latent, statistic, effect, p, q }) => [
    h("a", { href: `#/latent/${latent}` }, latentTitle(latent)),
    statistic.toFixed(2),
    effect.toFixed(2),
    format(p, 2),
    format(q, 2),
  ]);
  const title = "Largest differences";
  const head = ["latent", result.statistic, "effect", "p", "q"];
  const found = rows.length
    ? table(head, rows, { numeric: [1, 2, 3, 4], caption: title })
    : h("p.quiet", {}, "No latent was tested.");
  return h("div", {}, h("p.quiet", {}, about), section(title, null, found));
}

/**
 * A group's name where there is little room for it.
 *
 * @param {string} name
 */
const shortName = (name) => (name.length > 24 ? `${name.slice(0, 23)}…` : name);

/**
 * The columns of a comparison, decoded; `sides` is 0 where a latent does not differ, else 1 or 2, the group with more.
 *
 * @param {ComparisonRecord} result
 */
function decodeComparison(result) {
  const q = cytosae.decode(result.minus_log10_q);
  const least = -Math.log10(state.overview.limits.significant_q);
  const sides = Uint8Array.from(cytosae.decode(result.direction), (side, i) => {
    if (q[i] <= least || side === 0) return 0;
    return side > 0 ? 1 : 2;
  });
  return {
    latents: cytosae.decode(result.latents),
    fold: cytosae.decode(result.log2_fold_change),
    effect: cytosae.decode(result.effect),
    p: cytosae.decode(result.minus_log10_p),
    q,
    overAll: cytosae.decode(result.minus_log10_q_over_all),
    sides,
  };
}

/**
 * @param {ComparisonRecord} result
 * @param {GroupPair} pair
 * @param {string} units - what was compared: patients or subjects
 */
function comparisonBody(result, { first, second, groups }, units) {
  if (result.why_not) return h("p.notice", {}, result.why_not);
  const { latents, fold, effect, p, q, overAll, sides } = decodeComparison(result);
  const limit = state.overview.limits.significant_q;
  const significant = sides.filter((side) => side > 0).length;
  const lasting = sides.filter((side, i) => side > 0 && overAll[i] > -Math.log10(limit)).length;
  const about =
    `${aboutTested(latents.length, result.n_varying, units)} ` +
    `(${result.method}); ${format(significant)} differ at a false discovery rate of ${percent(limit)} ` +
    `(Benjamini–Hochberg). Effect is ${result.about_effect}.` +
    (significant
      ? ` Over all comparisons of this report, ${format(lasting)} of them do.`
      : " As none does, the tables show the largest differences regardless.") +
    (result.left_out && ` ${result.left_out}`);
  const key = (/** @type {number | null} */ group, /** @type {string} */ name) =>
    colors.key(colors.group(group), `q < ${limit}, more in ${name}`);
  const legend = h(
    "div.legend",
    {},
    key(groups[0], first),
    key(groups[1], second),
    colors.key("var(--undefined)", `q ≥ ${limit}`),
    h("span", {}, h("i.ring"), `has a ${featuredWord()}`),
  );
  const picked = h("div", { "aria-live": "polite" }, h("div.panel.quiet", {}, "Click a point to see the latent."));
  const host = h("div.plot.volcano");
  queueMicrotask(
    () =>
      new Scatter(host, {
        xs: fold,
        ys: p,
        bins: sides,
        lines: [{ x: 0 }],
        label: "Volcano plot",
        palette: () => [
          colors.inTheme("--undefined"),
          ...groups.map((group) => (group === null ? colors.inTheme("--ink") : colors.kind(group))),
        ],
        marked: [...latents.keys()].filter((i) => state.latents.isFeatured[latents[i]]),
        xLabel: `log2 fold change: more in ${shortName(second)}  ←  →  more in ${shortName(first)}`,
        yLabel: "−log10 p",
        describe: (i) =>
          [
            latentTitle(latents[i]),
            `fold change 2^${format(fold[i])}`,
            `effect ${format(effect[i])}`,
            `p ${format(10 ** -p[i])}, q ${format(10 ** -q[i])}`,
          ].join("\n"),
        onpick: (i) => picked.replaceChildren(h("div.panel", {}, latentSummary(latents[i]))),
      }),
  );
  /** @type {(title: string, places: number[], told: string[][]) => HTMLElement} */
  const sideTable = (title, places, told) => {
    if (!places.length) return section(title, null, h("p.quiet", {}, "None."));
    const marked = told.some((names) => names.length);
    const rows = places.map((i, at) => [
      h("a", { href: `#/latent/${latents[i]}` }, latentTitle(latents[i])),
      fold[i].toFixed(2),
      effect[i].toFixed(2),
      format(10 ** -p[i], 2),
      format(10 ** -q[i], 2),
      format(10 ** -overAll[i], 2),
      ...(marked ? [told[at].join(", ")] : []),
    ]);
    const head = ["latent", "log2 fold", "effect", "p", "q", "q over all", ...(marked ? ["told more by"] : [])];
    return section(title, null, table(head, rows, { numeric: [1, 2, 3, 4, 5], caption: title }));
  };
  return h(
    "div",
    {},
    h("p.quiet", {}, about),
    result.cells && h("p.notice", {}, result.cells),
    result.design && h("p.notice", {}, result.design),
    h("div.plot-and-side", {}, h("div.panel", {}, host, legend), h("div", {}, picked)),
    h(
      "div.columns",
      {},
      sideTable(`More in ${first}`, result.more_in_first, result.told_by[0]),
      sideTable(`More in ${second}`, result.more_in_second, result.told_by[1]),
    ),
  );
}
