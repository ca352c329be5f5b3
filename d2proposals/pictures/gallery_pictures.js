// The photographs with what is drawn over them.

import { decode } from "./gallery_counts.js";

const SVG = "http://www.w3.org/2000/svg";
// From the best rank to the worst: viridis, monotone in lightness, so that it reads in grey, too.
export const RANK_COLOURS = [
  "#fde725", "#a0da39", "#4ac16d", "#1fa187", "#277f8e", "#365c8d", "#46327e", "#440154",
];

/** An element with attributes and children; strings among these are text, never markup. */
export function element(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

export function svgElement(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

/** Boxes of an image: (number, 4) in its steps, drawn and hit in pixels. */
class BoxList {
  constructor(text, unit) {
    this.values = decode(text, Uint16Array);
    this.unit = unit;
    this.length = this.values.length / 4;
  }

  /** x1, y1, x2, y2 in pixels. */
  corners(index) {
    return Array.from(this.values.subarray(4 * index, 4 * index + 4), (value) => value * this.unit);
  }

  path(indices) {
    return indices
      .map((index) => {
        const [x1, y1, x2, y2] = this.corners(index).map((value) => Math.round(10 * value) / 10);
        return x2 > x1 || y2 > y1 ? `M${x1} ${y1}H${x2}V${y2}H${x1}Z` : "";
      })
      .join("");
  }

  size(index) {
    const [x1, y1, x2, y2] = this.corners(index);
    return [x2 - x1, y2 - y1];
  }

  /** The smallest of some boxes that has a point in it; -1 for none. */
  at(x, y, indices) {
    let found = -1;
    let smallest = Infinity;
    for (const index of indices) {
      const [x1, y1, x2, y2] = this.corners(index);
      const area = (x2 - x1) * (y2 - y1);
      if (area > 0 && area < smallest && x1 <= x && x <= x2 && y1 <= y && y <= y2) {
        found = index;
        smallest = area;
      }
    }
    return found;
  }
}

export function range(number) {
  return Array.from({ length: number }, (_, index) => index);
}

function scoreText(logit) {
  return (1 / (1 + Math.exp(-logit))).toFixed(3);
}

/** An image of the page. What is chosen in it is an object or, where none are known, a rank. */
export class Picture {
  constructor(gallery, index) {
    this.gallery = gallery;
    this.index = index;
    this.image = gallery.data.images[index];
    this.chosen = -1;
    this.isNear = false;
    this.isPainted = false;
    this.panels = element("div", { class: "panels" });
    this.caption = element("span");
    this.button = element("button", { type: "button", "aria-pressed": "false" }, "Large");
    this.detail = element("p", { class: "detail", "aria-live": "polite" });
    this.detail.hidden = true;
    this.figure = element(
      "figure",
      { tabindex: "0", "data-index": index },
      this.panels,
      element("figcaption", {}, this.caption, this.button),
      this.detail,
    );
    this.button.addEventListener("click", () => this.enlarge());
    this.figure.addEventListener("keydown", (event) => this.press(event));
    this.panels.addEventListener("click", (event) => this.click(event));
    // Room for the photographs before they are there.
    this.pictures = gallery.data.runs.map((run) => this.addPanel(run));
  }

  addPanel(run) {
    const { width, height } = this.image;
    const picture = element("div", { class: "picture" });
    picture.style.aspectRatio = `${width} / ${height}`;
    const name = element("p", { class: "name" }, run.name);
    name.hidden = this.gallery.data.runs.length < 2;
    this.panels.append(element("div", { class: "panel" }, name, picture));
    return picture;
  }

  /** Read what is drawn, at the first time that the image comes near the window. */
  load() {
    if (this.svgs) return;
    const { image } = this;
    const boxes = (item) => new BoxList(item.boxes, image.unit);
    this.objectBoxes = image.objects && boxes(image.objects);
    this.runBoxes = image.runs.map(boxes);
    this.svgs = this.pictures.map((picture) => {
      const photograph = element("img", { alt: `image ${image.name}` });
      photograph.src = `data:image/webp;base64,${image.photograph}`;
      const svg = svgElement("svg", {
        viewBox: `0 0 ${image.width} ${image.height}`, preserveAspectRatio: "none", "aria-hidden": "true",
      });
      picture.append(photograph, svg);
      return svg;
    });
  }

  /** The image's objects that count, as indices into its own. */
  objects() {
    const { table, chosen } = this.gallery;
    const start = table.starts[this.index];
    return range(table.starts[this.index + 1] - start).filter((g) => chosen[start + g]);
  }

  update() {
    this.caption.textContent = this.captionText();
    this.isPainted = false;
    this.paint();
  }

  /** Draw, if the image is near the window and not drawn as it should be. */
  paint() {
    if (!this.isNear || this.isPainted || this.figure.hidden) return;
    this.isPainted = true;
    this.load();
    if (!this.items().includes(this.chosen)) this.chosen = -1;
    this.svgs.forEach((svg, run) => {
      const isShown = this.gallery.isShown(run);
      this.pictures[run].parentElement.hidden = !isShown;
      if (isShown) svg.replaceChildren(...(this.image.objects ? this.coverage(run) : this.ranking(run)));
    });
    this.describe();
  }

  coverage(run) {
    const { gallery, image } = this;
    const { kind, top, others } = gallery.state;
    const start = gallery.table.starts[this.index];
    const result = gallery.results[run];
    if (!result) return [];
    const objects = this.objects();
    const isCovered = (g) => gallery.isCovered(run, start + g);
    const covered = objects.filter(isCovered);
    const missed = objects.filter((g) => !isCovered(g));
    const used = covered.map((g) => result.matches.rank[start + g]);
    const boxes = this.runBoxes[run];
    const drawn = [];
    if (kind === "mask") {
      const masks = image.runs[run].masks ?? {};
      drawn.push(tint("proposal", used.map((rank) => masks[rank])));
      drawn.push(tint("missed", missed.map((g) => image.objects.masks?.[g])));
    }
    const wanted = objects.filter((g) => gallery.isWanted(start + g));
    drawn.push(line("wanted", this.objectBoxes.path(wanted)));
    if (others) drawn.push(line("others", boxes.path(range(Math.min(top, boxes.length)))));
    drawn.push(...rimmed("covered", this.objectBoxes.path(covered)));
    drawn.push(...rimmed("proposal", boxes.path(used)));
    drawn.push(...rimmed("missed", this.objectBoxes.path(missed)));
    if (this.chosen >= 0) {
      const best = isCovered(this.chosen) ? result.matches.rank : result.best.rank;
      drawn.push(...rimmed("chosen", this.objectBoxes.path([this.chosen])));
      const rank = best[start + this.chosen];
      if (rank >= 0) drawn.push(...rimmed("chosen-proposal", boxes.path([rank])));
    }
    return drawn;
  }

  ranking(run) {
    const boxes = this.runBoxes[run];
    const number = Math.min(this.gallery.state.top, boxes.length);
    const masks = this.image.runs[run].masks;
    const drawn = [];
    // The best above the others.
    for (let place = RANK_COLOURS.length - 1; place >= 0; place--) {
      const ranks = range(number).filter(
        (rank) => Math.floor((rank * RANK_COLOURS.length) / number) === place,
      );
      if (masks) {
        const area = tint("ranked", ranks.map((rank) => masks[rank]));
        area.style.fill = RANK_COLOURS[place];
        drawn.push(area);
      }
      const [rim, colour] = rimmed("ranked", boxes.path(ranks));
      colour.style.stroke = RANK_COLOURS[place];
      drawn.push(rim, colour);
    }
    const isHere = this.chosen >= 0 && this.chosen < number;
    if (isHere) drawn.push(...rimmed("chosen", boxes.path([this.chosen])));
    return drawn;
  }

  captionText() {
    const { gallery } = this;
    const name = `image ${this.image.name}`;
    const texts = gallery.shownRuns().map((run) => {
      const label = gallery.data.runs.length > 1 ? `${gallery.data.runs[run].name}: ` : "";
      if (!this.image.objects) {
        const { logits } = this.image.runs[run];
        const number = Math.min(gallery.state.top, logits.length);
        if (number === 0) return `${label}no proposals`;
        const scores = `scores ${scoreText(logits[0])} to ${scoreText(logits[number - 1])}`;
        return `${label}${number} of ${logits.length} proposals, ${scores}`;
      }
      if (!gallery.results[run]) return `${label}no masks`;
      const { covered, total } = gallery.countOf(run, this.index);
      return total ? `${label}${covered} of ${total} objects covered` : `${label}no objects`;
    });
    return [name, ...texts].join("; ");
  }

  /** Say in words what is known of the chosen object or proposal. */
  describe() {
    const text = this.chosen < 0 ? "" : this.image.objects ? this.objectText() : this.proposalText();
    this.detail.hidden = text === "";
    if (this.detail.textContent !== text) this.detail.textContent = text;
  }

  objectText() {
    const { gallery, chosen: g } = this;
    const at = gallery.table.starts[this.index] + g;
    const [width, height] = this.objectBoxes.size(g).map((side) => side.toFixed(1));
    const area = gallery.table.areas[at];
    const size = gallery.data.areaRanges.slice(1).find((r) => area <= (r.high ?? Infinity));
    const number = `object ${g + 1} of ${this.objectBoxes.length}`;
    const category = gallery.categoryName(gallery.table.categories[at]);
    const lines = [`${number}: ${category}, ${width} x ${height} pixels, ${size?.name}`];
    for (const run of gallery.shownRuns()) lines.push(this.outcome(run, at));
    return lines.join("\n");
  }

  outcome(run, at) {
    const { gallery } = this;
    const name = gallery.data.runs[run].name;
    const result = gallery.results[run];
    if (!result) return `${name}: no masks`;
    const { matches, best, everything } = result;
    const named = ({ rank, iou }) => `proposal ${rank[at] + 1}, IoU ${iou[at].toFixed(3)}`;
    if (gallery.isCovered(run, at)) return `${name}: covered by ${named(matches)}`;
    if (everything.rank[at] < 0) return `${name}: missed; no proposal meets it`;
    const parts = [];
    if (best.rank[at] < 0) parts.push(`none of the best ${gallery.state.top} meets it`);
    else parts.push(`best of ${gallery.state.top}: ${named(best)}`);
    if (gallery.reaches(best.iou[at])) parts.push("which another object takes");
    if (everything.rank[at] !== best.rank[at]) parts.push(`best of all: ${named(everything)}`);
    return `${name}: missed; ${parts.join("; ")}`;
  }

  proposalText() {
    const lines = this.gallery.shownRuns().flatMap((run) => {
      const boxes = this.runBoxes[run];
      if (this.chosen >= boxes.length) return [];
      const [width, height] = boxes.size(this.chosen).map((side) => side.toFixed(1));
      const score = scoreText(this.image.runs[run].logits[this.chosen]);
      const rank = `proposal ${this.chosen + 1} of ${boxes.length}`;
      return [`${rank}: score ${score}, ${width} x ${height} pixels`];
    });
    return lines.join("\n");
  }

  choose(item) {
    this.chosen = item;
    this.update();
  }

  /** What can be chosen. */
  items() {
    if (this.image.objects) return this.objects();
    const numbers = this.gallery.shownRuns().map((run) => this.image.runs[run].logits.length);
    return range(Math.min(this.gallery.state.top, Math.max(...numbers)));
  }

  click(event) {
    const picture = event.target.closest(".picture");
    if (!picture) return;
    this.load();
    const { left, top, width, height } = picture.getBoundingClientRect();
    const x = ((event.clientX - left) / width) * this.image.width;
    const y = ((event.clientY - top) / height) * this.image.height;
    const run = this.pictures.indexOf(picture);
    const boxes = this.image.objects ? this.objectBoxes : this.runBoxes[run];
    this.choose(boxes.at(x, y, this.items().filter((item) => item < boxes.length)));
  }

  press(event) {
    if (event.target !== this.figure || event.ctrlKey || event.altKey || event.metaKey) return;
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) {
      const items = this.items();
      const place = items.indexOf(this.chosen);
      const next = place < 0 ? (step > 0 ? 0 : items.length - 1) : place + step;
      if (items.length) this.choose(items[(next + items.length) % items.length]);
    } else if (event.key === "Enter") this.enlarge();
    else if (event.key === "Escape") this.choose(-1);
    else return;
    event.preventDefault();
  }

  enlarge() {
    const isLarge = this.figure.classList.toggle("large");
    this.button.setAttribute("aria-pressed", String(isLarge));
    this.figure.scrollIntoView({ block: "nearest" });
  }
}

function line(kind, path) {
  return svgElement("path", { class: kind, d: path });
}

/** A line over a dark one, which keeps it apart from a photograph of the same colour. */
export function rimmed(kind, path) {
  return [line(`rim ${kind}`, path), line(kind, path)];
}

function tint(kind, outlines) {
  return line(`tint ${kind}`, outlines.filter(Boolean).join(""));
}
