// What is covered, as d2proposals/evaluation/recall.py counts it. Of M objects of all images; ranks
// count from 0.

/** Numbers in base64, little-endian, as all machines that run browsers are. */
export function decode(text, Type) {
  const letters = atob(text);
  const bytes = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i);
  return new Type(bytes.buffer);
}

/** The objects of all images, one behind the other. */
export class ObjectTable {
  constructor(data) {
    this.starts = [0];
    for (const image of data.images) {
      this.starts.push(this.starts.at(-1) + (image.objects?.categories.length ?? 0));
    }
    this.length = this.starts.at(-1);
    this.areas = new Float32Array(this.length);
    this.hasMask = new Uint8Array(this.length);
    this.categories = [];
    data.images.forEach(({ objects }, i) => {
      if (!objects) return;
      this.areas.set(decode(objects.areas, Float32Array), this.starts[i]);
      this.categories.push(...objects.categories);
      objects.masks?.forEach((mask, g) => {
        this.hasMask[this.starts[i] + g] = Number(mask !== null);
      });
    });
    const isUnseen = new Map(data.categories.map((category) => [category.id, category.unseen]));
    this.isUnseen = this.categories.map((category) => isUnseen.get(category));
  }

  /** (M,) 1 for the objects that count: of an area range, a category (null: all), and so on. */
  choose({ range, category, unseen, kind }) {
    const high = range.high ?? Infinity;
    return Uint8Array.from(
      this.areas,
      (area, g) =>
        area >= range.low &&
        area <= high &&
        (category === null || this.categories[g] === category) &&
        (unseen === null || this.isUnseen[g] === unseen) &&
        (kind !== "mask" || this.hasMask[g]),
    );
  }
}

/** Arrays one behind the other, to the values of each of which its offset is added. */
function concatenate(arrays, offsets) {
  const whole = new Float64Array(arrays.reduce((sum, array) => sum + array.length, 0));
  let place = 0;
  arrays.forEach((array, i) => {
    const offset = offsets?.[i] ?? 0;
    for (const value of array) whole[place++] = value + offset;
  });
  return whole;
}

/** The pairs of objects and proposals of one run, of boxes or masks; see pictures/pairs.py. */
export class Pairs {
  constructor(images, table, run, kind) {
    this.numObjects = table.length;
    const starts = [];
    this.numProposals = 0;
    for (const image of images) {
      starts.push(this.numProposals);
      this.numProposals += image.runs[run].number;
    }
    const read = (name, Type, offsets) => concatenate(
      images.map((image) => decode(image.runs[run][kind]?.[name] ?? "", Type)), offsets,
    );
    this.gt = read("gt", Uint16Array, table.starts);
    this.rank = read("rank", Uint16Array);
    this.proposal = read("rank", Uint16Array, starts);
    this.iou = read("iou", Float32Array);
    this.bestGt = read("best_gt", Uint16Array, table.starts);
    this.bestRank = read("best_rank", Uint16Array);
    this.bestIou = read("best_iou", Float32Array);
  }

  /** Greedy one-to-one matching of the chosen objects to the k best proposals of their images. */
  match(k, chosen) {
    const iou = new Float32Array(this.numObjects);
    const rank = new Int32Array(this.numObjects).fill(-1);
    const used = new Uint8Array(this.numProposals);
    for (let e = 0; e < this.gt.length; e++) {
      const g = this.gt[e];
      if (this.rank[e] >= k || !chosen[g] || rank[g] >= 0 || used[this.proposal[e]]) continue;
      used[this.proposal[e]] = 1;
      iou[g] = this.iou[e];
      rank[g] = this.rank[e];
    }
    return { iou, rank };
  }

  /** The best of the k best proposals for each object, whatever other objects take; rank -1: none. */
  best(k) {
    const iou = new Float32Array(this.numObjects);
    const rank = new Int32Array(this.numObjects).fill(-1);
    for (let b = 0; b < this.bestGt.length; b++) {
      if (this.bestRank[b] >= k) continue;
      iou[this.bestGt[b]] = this.bestIou[b];
      rank[this.bestGt[b]] = this.bestRank[b];
    }
    return { iou, rank };
  }
}

/** A threshold in percent as float32, as which IoUs are compared with it. */
export function threshold(percent) {
  return Math.fround(percent / 100);
}

/** Share of objects, whose sorted IoUs are given, that reach a threshold. */
export function recall(sortedIou, percent) {
  let low = 0;
  let high = sortedIou.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sortedIou[middle] < threshold(percent)) low = middle + 1;
    else high = middle;
  }
  return 1 - low / sortedIou.length;
}

/** Average recall over thresholds in percent. */
export function averageRecall(sortedIou, percents) {
  const numReached = percents.map(
    (percent) => sortedIou.filter((iou) => iou >= threshold(percent)).length,
  );
  return numReached.reduce((a, b) => a + b, 0) / sortedIou.length / percents.length;
}

export function mean(values) {
  return values.reduce((a, b) => a + b, 0) / values.length;
}

/** A share in percent with two digits, ties to even as Python's formatting has them. */
export function percentText(share) {
  if (Number.isNaN(share)) return "-";
  const value = 100 * share;
  if (Number.isInteger(8 * value) && (1000 * value) % 10 === 5) {
    const below = Math.floor(100 * value);
    return ((below + (below % 2)) / 100).toFixed(2);
  }
  return value.toFixed(2);
}
