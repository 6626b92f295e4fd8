// Types that the scripts of `page/` share: the data files' records and the page's state. For development, not shipped.

type Rgb = number[];
type Rgba = number[];

interface TypedArrays {
  f4: Float32Array<ArrayBuffer>;
  u1: Uint8Array<ArrayBuffer>;
  u2: Uint16Array<ArrayBuffer>;
  i4: Int32Array<ArrayBuffer>;
  i1: Int8Array<ArrayBuffer>;
}
type Dtype = keyof TypedArrays;

/** An array as `records/encoding.py` packs it: little-endian bytes in base64. */
interface Packed<D extends Dtype = Dtype> {
  dtype: D;
  shape: number[];
  data: string;
}

interface Note {
  name: string;
  note: string;
}

interface Curve {
  name: string;
  values: (number | null)[];
  low: number | null;
  high: number | null;
}

interface Masking {
  ks: number[];
  n_train: number;
  n_test: number;
  left_out: string[];
  original: number;
  reconstruction: number;
  chance: number;
  curves: { name: string; accuracy: number[]; dashed: boolean }[];
}

/** `data/overview.js`, from `records/overview.py`. */
interface Overview {
  format: number;
  title: string;
  made: string;
  version: string;
  explore: boolean;
  can_upload: boolean;
  /** Whether the server can compute what a latent changes in an image; missing in reports of published data. */
  effects?: boolean;
  pseudonymous: boolean;
  messages: string[];
  palette: {
    kinds: string[];
    scale: Rgb[];
    point_end: number;
    heat_shade: [number, number];
    heat_alpha: [number, number];
    heat_opacity: number;
    outline_share: number;
  };
  limits: { significant_q: number; position: number; name_length: number; note_length: number; upload_bytes: number };
  store: {
    dataset: string;
    images: number;
    valid: number;
    tokens: number;
    grid: [number, number];
    prefix: number;
    facts: [string, string][];
  };
  sae: { latents: number; facts: [string, string][] };
  training: { x: number[]; curves: Curve[] } | null;
  counts: { active: number; dead: number };
  latents: {
    sparsity: Packed<"f4">;
    mean_acts: Packed<"f4">;
    entropy: Packed<"f4">;
    cluster: Packed<"i1">;
    position: Packed<"f4">;
    lift: Packed<"f4">;
    best: Packed<"i4">;
    source: Packed<"i4">;
    source_share: Packed<"f4">;
    one_source: Packed<"u1">;
  };
  /** Persons behind `source`; null if the images have no patients. */
  sources: { unit: "patient" | "subject"; names: string[] } | null;
  /** Nearest latents of other autoencoders, -1 for none. */
  partners: { name: string; latent: Packed<"i4">; cosine: Packed<"f4"> }[];
  featured: number[];
  featured_reason: string;
  cards: number[][];
  main_label: number[];
  labels: { name: string; images: number }[];
  images: { rows: number[]; labels: number[]; patients: number[] };
  has_map: boolean;
  has_patients: boolean;
  patients: string[];
  thumbnails: boolean;
  /** Whether images are known, so that they have pages. */
  image_pages: boolean;
  /** Files of all images; null if images are not known. */
  book: { rows_per_file: number; listed_per_file: number; label_starts: number[]; patient_starts: number[] } | null;
  notes: Record<string, Note>;
  masking: Masking | null;
}

interface TopImage {
  row: number;
  value: number;
  peak: number;
  label: number;
  patient: number;
  map: Packed<"u1">;
}

interface ActivationHistogram {
  lowest: number;
  per_octave: number;
  counts: number[];
  n_zero: number;
}

/** `data/latents/N.js`, from `records/latents.py`. */
interface LatentRecord {
  latent: number;
  n_images: number;
  top: TopImage[];
  /** These three are null if they are not known. */
  labels: { label: number; n_images: number; n_active: number; mean: number }[] | null;
  histogram: ActivationHistogram | null;
  patients: { patient: number; per_image: number; count: number; n_images: number }[];
  threshold: number | null;
  neighbours: [number, number][] | null;
  /** Images with a score above 0. */
  n_active: number;
  quantiles: { quantile: number; value: number; images: TopImage[] }[];
  rules: LabelRules | null;
  sources: { unit: string; total: number; largest: SourceShare[]; is_one: boolean } | null;
  sites: {
    column: string;
    threshold: number;
    total: number;
    largest: (SourceShare & { name: string })[];
    is_one: boolean;
  } | null;
  partners: { name: string; partner: number; cosine: number }[];
  values: ValueCorrelations | null;
  compartments: {
    n_images: number;
    n_without: number;
    compartments: {
      name: string;
      share: number | null;
      area: number | null;
      precision: number | null;
      inside: number | null;
    }[];
  } | null;
  /** Null without the store's tail; missing in reports of published feature data. */
  effect?: MeanEffect | null;
}

/** What zeroing a latent changes on average over its top images, from `records/effects.py`. */
interface MeanEffect {
  n_images: number;
  n_train: number;
  cosine: number;
  labels: [label: number, before: number, after: number][];
}

/** `data/effects/LATENT/ROW/PERCENT.js`, from `records/effects.py`. */
interface EffectRecord {
  latent: number;
  percent: number;
  n_train: number;
  cosine: number;
  labels: [label: number, before: number, after: number][];
}

/** Of `records/latents.py`, from `measures/`; pairs are of the half that chooses and of the held-out half. */
type Pair = [number | null, number | null];

interface LabelRules {
  unit: string;
  n_images: [number, number];
  best: number;
  rules: {
    label: number;
    n_images: [number, number];
    auroc: Pair;
    threshold: number | null;
    f1: Pair;
    precision: number | null;
    recall: number | null;
  }[];
}

interface SourceShare {
  source: number;
  share: number;
  of_images: number;
}

interface ValueCorrelations {
  unit: string;
  n_columns: number;
  n_tested: number;
  columns: { name: string; n: [number, number]; rho: Pair; q: number | null; selected: boolean }[];
}

/** `data/images/N.js`, from `records/latents.py`; an uploaded image has no row, but its picture. */
interface ImageRecord {
  row: number | null;
  label: number;
  patient: number;
  path: string | null;
  latents: { latent: number; score: number; peak: number; map: Packed<"u1"> }[];
  token_latents: Packed<"u2" | "i4">;
  no_latent: number;
  token_values: Packed<"u2">;
  value_step: number;
  picture?: string;
  /** The most similar cells of the store; null without a map of cells. */
  nearest?: (ListedImage & { similarity: number })[] | null;
}

/** `data/rows/N.js`, from `records/images.py`: consecutive numbers of images. */
interface RowsRecord {
  valid: Packed<"u1">;
  labels: Packed<"i4">;
  patients: Packed<"i4">;
  paths: string[] | null;
  tops: [latent: number, value: number][][];
}

/** `data/listings/KIND-N.js`, from `records/images.py`. */
interface ListingRecord {
  numbers: Packed<"i4">;
  labels: Packed<"i4">;
  patients: Packed<"i4">;
}

/** An image as a listing names it. */
interface ListedImage {
  row: number;
  label: number;
  patient: number;
}

/** `data/cards/N.js`, from `records/cards.py`: consecutive latents. */
interface CardsRecord {
  top_rows: Packed<"i4">;
  top_values: Packed<"f4">;
  /** These three are null if they are not known. */
  means: Packed<"u1"> | null;
  largest: Packed<"f4"> | null;
  rates: Packed<"u1"> | null;
}

/** `data/map.js`, from `records/cell_map.py`. */
interface MapRecord {
  method: string;
  axes: [string, string];
  numbers: Packed<"i4">;
  labels: Packed<"i4">;
  patients: Packed<"i4">;
  x: Packed<"f4">;
  y: Packed<"f4">;
  latents: Packed<"i4">;
  latents_per_file: number;
}

/** `data/mapped/N.js`, from `records/cell_map.py`: scores of latents on the images of the map. */
interface MappedRecord {
  levels: Packed<"u1">;
  peaks: Packed<"f4">;
}

interface GroupPair {
  first: string;
  second: string;
  /** Indices of the groups; null for all others together. */
  groups: [number, number | null];
  n_first: number;
  n_second: number;
}

interface Classification {
  names: string[];
  accuracy: number;
  balanced_accuracy: number;
  /** 95 % credible interval of it. */
  interval: [low: number, high: number];
  chance: number;
  /** What shuffled groups reach; null if there were no shuffles. */
  shuffled: { n: number; p: number; spread: [low: number, high: number] } | null;
  calibration: { predicted: number[]; right: number[]; n_subjects: number[]; brier: number };
  n_folds: number;
  confusion: number[][];
  latents: { latent: number; share: number; weights: number[] }[];
}

/** `data/patients.js`, from `records/patients.py`. */
interface PatientsRecord {
  names: string[];
  group_names: string[];
  groups: number[];
  n_images: number[];
  threshold: number;
  no_groups: string;
  /** The person behind each patient; null if every patient is one. */
  subjects: { names: string[]; of: number[] } | null;
  /** Images of every subject, where equal numbers of them are compared; else 0. */
  n_each: number;
  barcodes: { latents: number[]; values: Packed<"u1">; peaks: Packed<"f4">; means: Packed<"u1"> | null };
  correlation: Packed<"u1"> | null;
  comparisons: GroupPair[];
  /** Indices of the groups that are compared at once; null if they are fewer than three. */
  all_groups: number[] | null;
  classification: Classification | null;
}

/** `data/comparisons/N.js`, from `records/comparisons.py`. */
interface ComparisonRecord {
  method: string;
  about_effect: string;
  /** Why nothing could be compared; empty if it was. */
  why_not: string;
  /** How many do not count, and why; empty if all do. */
  left_out: string;
  n_varying: number;
  /** A warning if the two sides differ in their numbers of images; empty if they do not. */
  cells: string;
  /** What so few subjects can find at all; empty if that is no limit. */
  design: string;
  latents: Packed<"i4">;
  direction: Packed<"i1">;
  log2_fold_change: Packed<"f4">;
  effect: Packed<"f4">;
  minus_log10_p: Packed<"f4">;
  minus_log10_q: Packed<"f4">;
  /** Adjusted over the latents of all comparisons. */
  minus_log10_q_over_all: Packed<"f4">;
  more_in_first: number[];
  more_in_second: number[];
  /** For each latent of the two lists the properties that tell more of it than the group does. */
  told_by: [first: string[][], second: string[][]];
}

/** `data/comparisons/all.js`, from `records/comparisons.py`. */
interface AllGroupsRecord {
  groups: number[];
  method: string;
  /** Name of the statistic. */
  statistic: string;
  about_effect: string;
  why_not: string;
  left_out: string;
  n_varying: number;
  n_tested: number;
  n_significant: number;
  latents: { latent: number; statistic: number; effect: number; p: number; q: number }[];
}

/** A property of the patients; see `cytosae.analysis.association`. */
interface AuditedColumn {
  name: string;
  /** Names of at least two; 0 for numbers. */
  n_levels: number;
  n_subjects: number;
  n_tested: number;
  n_significant: number;
  /** Latents of which it tells significantly, and more than the group does, or at all without groups. */
  more_than_group: Packed<"i4">;
  with_groups: [effect: number, p: number] | null;
  latents: {
    latent: number;
    share: number;
    correlation: number | null;
    p: number;
    q: number;
    group_share: number | null;
  }[];
}

/** `data/audit.js`, from `records/audit.py`. */
interface AuditRecord {
  columns: AuditedColumn[];
  has_groups: boolean;
  strata: string | null;
  adjust: string[];
  /** Properties that are known, tested or not. */
  n_known: number;
}

type RecordOf<N extends string> = N extends "overview"
  ? Overview
  : N extends "patients"
    ? PatientsRecord
    : N extends `latents/${string}`
      ? LatentRecord
      : N extends `images/${string}`
        ? ImageRecord
        : N extends "comparisons/all"
          ? AllGroupsRecord
          : N extends "audit"
            ? AuditRecord
            : N extends `comparisons/${string}`
              ? ComparisonRecord
              : N extends `rows/${string}`
                ? RowsRecord
                : N extends `listings/${string}`
                  ? ListingRecord
                  : N extends `cards/${string}`
                    ? CardsRecord
                    : N extends "map"
                      ? MapRecord
                      : N extends `mapped/${string}`
                        ? MappedRecord
                        : N extends `effects/${string}`
                          ? EffectRecord
                          : unknown;

/** Colours of points: an index of each into a palette, and the palette in the current theme. */
type PointColors = [bins: Uint8Array, palette: () => string[]];
type ColorBy = "entropy" | "label" | "cluster";

/** Columns of the overview, one value per latent. */
interface Latents {
  n: number;
  sparsity: Float32Array;
  mean: Float32Array;
  entropy: Float32Array;
  cluster: Int8Array;
  /** Position share; -1 where it is not known. */
  position: Float32Array;
  /** Largest lift over the labels, 0 where it is not known, and the label of that. */
  lift: Float32Array;
  best: Int32Array;
  /** Person with the largest share of the active tokens, -1 where it is not known, the share, and whether it is of one. */
  source: Int32Array;
  sourceShare: Float32Array;
  oneSource: Uint8Array;
  /** Smallest cosine of its nearest latents in other autoencoders; NaN without any. */
  partner: Float32Array;
  isFeatured: Uint8Array;
  maxEntropy: number;
  /** log10 sparsity; NaN for a dead latent. */
  x: Float32Array;
  /** log10 mean activation; NaN for a dead latent. */
  y: Float32Array;
  bins: Uint8Array;
  palette: () => string[];
  colorsBy: (name: ColorBy) => PointColors;
}

type Bounds = [low: number | null, high: number | null];

interface Filters {
  sparsity: Bounds;
  mean: Bounds;
  entropy: Bounds;
  cluster: string;
  color: ColorBy;
  featured: boolean;
  oneSource: boolean;
  partner: Bounds;
}

interface View {
  x0: number;
  x1: number;
  y0: number;
  y1: number;
}

interface Box {
  left: number;
  top: number;
  right: number;
  bottom: number;
}

interface ScatterOptions {
  /** Positions; a point with a NaN is not drawn. */
  xs: Float32Array;
  ys: Float32Array;
  /** Colour of each point: an index into `palette`. */
  bins: Uint8Array;
  palette: () => string[];
  /** Points that are drawn larger, with a rim. */
  marked?: number[];
  /** Dashed lines. */
  lines?: { x?: number; y?: number }[];
  xLabel: string;
  yLabel: string;
  label: string;
  /** Text of a point's tooltip. */
  describe: (index: number) => string;
  /** Called with the index of a clicked point. */
  onpick: (index: number) => void;
}

/** A cell whose map can be replaced. */
type CellElement = HTMLElement & { show: (levels: Uint8Array) => void; repaint: () => void };
type CellMode = "heat" | "outline" | "mask" | "plain";

type Leaf = Node | string | null | undefined | false;
type Child = Leaf | Child[];
interface Attributes {
  style?: Record<string, string | number | undefined>;
  // biome-ignore lint/suspicious/noExplicitAny: each listener states the kind of its own event.
  [listener: `on${string}`]: ((event: any) => unknown) | undefined;
  [name: string]: unknown;
}
type TagOf<T extends string> = T extends keyof HTMLElementTagNameMap ? HTMLElementTagNameMap[T] : HTMLElement;
/** Element that `h("tag.class", …)` makes. */
type ElementOf<S extends string> = S extends `${infer T}.${string}` ? TagOf<T> : TagOf<S>;

interface HTMLElement {
  /** Canvases and ramps of colours do not follow the style sheet: this draws them in the theme of now. */
  repaint?: () => void;
}

/** Columns of the map of cells, one value per image; `latents` are those whose scores the map has. */
interface MapPoints {
  rows: Int32Array;
  labels: Int32Array;
  patients: Int32Array;
  x: Float32Array<ArrayBuffer>;
  y: Float32Array<ArrayBuffer>;
  latents: Int32Array;
}

interface MapColors {
  bins: Uint8Array;
  palette: () => string[];
  legend: () => Leaf[];
}

interface ComparedLatent {
  latent: number;
  here: number;
  rest: number;
  effect: number;
}
