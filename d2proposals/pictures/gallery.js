// The page: its state, its controls, its counts.

import {
  ObjectTable, Pairs, averageRecall, decode, mean, percentText, recall, threshold,
} from "./gallery_counts.js";
import { Picture, RANK_COLOURS, element, range, rimmed, svgElement } from "./gallery_pictures.js";

/** Numbers of proposals that the slider stops at: each of the first, then in steps of some percent. */
function stopsOf(data, most) {
  const stops = new Set([most, ...data.curve.filter((k) => k <= most)]);
  for (let k = 1; k < most; k = Math.max(k + 1, Math.round(1.06 * k))) stops.add(k);
  return [...stops].sort((a, b) => a - b);
}

class Gallery {
  constructor(data) {
    this.data = data;
    for (const image of data.images) {
      for (const run of image.runs) {
        run.logits = decode(run.logits, Float32Array);
        run.number = run.logits.length;
      }
    }
    this.hasObjects = data.images[0].objects !== null;
    this.table = new ObjectTable(data);
    this.pairs = data.runs.map((_, run) => {
      const kinds = this.hasObjects ? ["box"] : [];
      if (data.images.some((image) => image.runs[run].mask)) kinds.push("mask");
      return Object.fromEntries(
        kinds.map((kind) => [kind, new Pairs(data.images, this.table, run, kind)]),
      );
    });
    const numbers = data.images.flatMap((image) => image.runs.map((run) => run.number));
    this.most = Math.max(1, ...numbers);
    this.stops = stopsOf(data, this.most);
    this.curves = new Map();
    this.state = {
      top: Math.min(data.top, this.most), iou: data.iou, size: "0",
      // By masks where all have them.
      kind: this.pairs.every((pairs) => pairs.mask) ? "mask" : "box", category: "", seen: "",
      filter: "", order: "", others: false, shown: new Set(range(data.runs.length)),
    };
    this.pictures = data.images.map((_, index) => new Picture(this, index));
    this.order = this.pictures;
    this.grid = document.getElementById("grid");
    this.grid.append(...this.pictures.map((picture) => picture.figure));
    this.buildControls();
    this.watch();
    this.count();
  }

  isShown(run) {
    return this.state.shown.has(run);
  }

  shownRuns() {
    return [...this.state.shown].sort((a, b) => a - b);
  }

  reaches(iou) {
    return iou >= threshold(this.state.iou);
  }

  isCovered(run, object) {
    return this.reaches(this.results[run].matches.iou[object]);
  }

  categoryName(id) {
    return this.data.categories.find((category) => category.id === id).name;
  }

  /** Objects of an image that count, and how many of them a run covers. */
  countOf(run, index) {
    return this.results[run].perImage[index];
  }

  /** Whether an object is one that counts, and that one run finds and another one misses. */
  isFoundMissed(object, found, missed) {
    if (!this.results[found] || !this.results[missed] || !this.chosen[object]) return false;
    return this.isCovered(found, object) && !this.isCovered(missed, object);
  }

  /** Whether the filter of the images asks for this object. */
  isWanted(object) {
    const pair = this.state.filter.match(/^pair (\d+) (\d+)$/);
    return pair !== null && this.isFoundMissed(object, Number(pair[1]), Number(pair[2]));
  }

  /** Count again what the state asks for, and show it. */
  count() {
    if (this.hasObjects) {
      const { kind, size, category, seen } = this.state;
      this.chosen = this.table.choose({
        range: this.data.areaRanges[size],
        category: category === "" ? null : Number(category),
        unseen: seen === "" ? null : seen === "unseen",
        kind,
      });
      this.numChosen = this.chosen.reduce((a, b) => a + b, 0);
      this.results = this.pairs.map((pairs) => pairs[kind] && this.resultOf(pairs[kind]));
      this.showNumbers();
    }
    this.showState();
    this.arrange();
    for (const picture of this.pictures) picture.update();
  }

  resultOf(pairs) {
    const { top } = this.state;
    const matches = pairs.match(top, this.chosen);
    const best = pairs.best(top);
    const everything = pairs.best(Infinity);
    const perImage = this.data.images.map(() => ({ covered: 0, total: 0 }));
    this.data.images.forEach((_, i) => {
      for (let g = this.table.starts[i]; g < this.table.starts[i + 1]; g++) {
        perImage[i].total += this.chosen[g];
        perImage[i].covered += this.chosen[g] && this.reaches(matches.iou[g]) ? 1 : 0;
      }
    });
    const covered = perImage.reduce((sum, image) => sum + image.covered, 0);
    return { matches, best, everything, perImage, covered };
  }

  /** Sorted IoUs of the matched objects that count. */
  sorted(iou) {
    return iou.filter((_, g) => this.chosen[g]).sort();
  }

  /** Per run and number of proposals of the curve the sorted IoUs, of this choice of objects. */
  curveOf(run) {
    const { kind, size, category, seen } = this.state;
    const key = JSON.stringify([run, kind, size, category, seen]);
    if (!this.curves.has(key)) {
      if (this.curves.size > 50) this.curves.clear();
      const numbers = this.data.curve.filter((k) => k < this.most).concat(this.most);
      const pairs = this.pairs[run][kind];
      this.curves.set(key, numbers.map((k) => [k, this.sorted(pairs.match(k, this.chosen).iou)]));
    }
    return this.curves.get(key);
  }

  showNumbers() {
    const { top, iou } = this.state;
    document.getElementById("caption").textContent =
      `${this.numChosen} objects, the best ${top} proposals; recall at IoU ${percentOf(iou)}, AR and ABO ` +
      "in percent";
    const rows = this.data.runs.map((run, index) => {
      const row = element("tr", { "data-run": index });
      row.append(element("th", { scope: "row" }, this.sample(run), run.name));
      for (const [name, text] of Object.entries(this.measures(index))) {
        row.append(element("td", { "data-measure": name }, text));
      }
      return row;
    });
    document.getElementById("rows").replaceChildren(...rows);
    this.drawCurve();
  }

  measures(run) {
    const result = this.results[run];
    if (!result) return { covered: "-", missed: "-", recall: "-", AR: "-", ABO: "-" };
    const sorted = this.sorted(result.matches.iou);
    return {
      covered: String(result.covered),
      missed: String(this.numChosen - result.covered),
      recall: percentText(recall(sorted, this.state.iou)),
      AR: percentText(averageRecall(sorted, this.data.thresholds)),
      ABO: percentText(mean(result.best.iou.filter((_, g) => this.chosen[g]))),
    };
  }

  /** A piece of a run's line. */
  sample(run) {
    const path = svgElement("path", { d: "M0 5H30" });
    path.style.stroke = run.colour;
    path.style.strokeWidth = 3;
    path.style.strokeDasharray = run.dash;
    return svgElement("svg", { viewBox: "0 0 30 10", "aria-hidden": "true" }, path);
  }

  drawCurve() {
    const [left, right, above, below] = [30, 300, 8, 120];
    const { top, iou } = this.state;
    const x = (k) => left + ((right - left) * Math.log(k)) / (Math.log(this.most) || 1);
    const y = (share) => below - (below - above) * share;
    const svg = svgElement("svg", { viewBox: "0 0 320 150", role: "img" });
    for (const share of [0, 0.5, 1]) {
      svg.append(
        svgElement("path", { class: "axis", d: `M${left} ${y(share)}H${right}` }),
        svgElement("text", { x: left - 4, y: y(share) + 4, "text-anchor": "end" }, String(100 * share)),
      );
    }
    // The slider's end as well, where it has room.
    const decades = [1, 10, 100, 1000].filter((k) => k === 1 || 1.6 * k < this.most);
    for (const k of new Set([...decades, this.most])) {
      svg.append(svgElement("text", { x: x(k), y: below + 14, "text-anchor": "middle" }, String(k)));
    }
    const words = [];
    this.data.runs.forEach((run, index) => {
      if (!this.results[index] || !this.numChosen) return;
      const points = new Map(this.curveOf(index).map(([k, sorted]) => [k, recall(sorted, iou)]));
      const here = recall(this.sorted(this.results[index].matches.iou), iou);
      const places = [...points.set(top, here)].sort((a, b) => a[0] - b[0]);
      const path = svgElement("path", {
        d: places.map(([k, share], i) => `${i ? "L" : "M"}${x(k).toFixed(1)} ${y(share).toFixed(1)}`).join(""),
      });
      path.style.stroke = run.colour;
      path.style.strokeWidth = 2;
      path.style.strokeDasharray = run.dash;
      const dot = svgElement("circle", { cx: x(top).toFixed(1), cy: y(here).toFixed(1), r: 4 });
      dot.style.fill = run.colour;
      svg.append(path, dot);
      words.push(`${run.name} ${percentText(here)}`);
    });
    const label = svgElement("text", { x: (left + right) / 2, y: 147, "text-anchor": "middle" });
    label.append("proposals of an image");
    svg.append(svgElement("path", { class: "place", d: `M${x(top).toFixed(1)} ${above}V${below}` }), label);
    const caption = `Recall at IoU ${percentOf(iou)}, percent, over the number of proposals`;
    svg.setAttribute("aria-label", `${caption}; with ${top}: ${words.join(", ") || "no objects"}`);
    document.getElementById("curve").replaceChildren(svg, element("figcaption", {}, caption));
  }

  /** Put the images into the order, and hide those that the filter leaves out. */
  arrange() {
    const { filter, order, size, category, seen } = this.state;
    const value = (name, index) => {
      const [what, found, missed] = name.split(" ");
      if (what === "pair") {
        const start = this.table.starts[index];
        const objects = range(this.table.starts[index + 1] - start).map((g) => start + g);
        return objects.filter((g) => this.isFoundMissed(g, Number(found), Number(missed))).length;
      }
      const runs = this.shownRuns().filter((run) => this.results[run]);
      const counts = runs.map((run) => this.countOf(run, index));
      if (what === "covered") return counts.reduce((sum, count) => sum + count.covered, 0);
      return counts.reduce((sum, count) => sum + count.total - count.covered, 0);
    };
    const isNarrowed = Number(size) > 0 || category !== "" || seen !== "";
    let numShown = 0;
    this.pictures.forEach((picture, index) => {
      let isHidden = false;
      if (isNarrowed) isHidden = picture.objects().length === 0;
      if (filter !== "") isHidden ||= value(filter, index) === 0;
      picture.figure.hidden = isHidden;
      numShown += isHidden ? 0 : 1;
    });
    const indices = range(this.pictures.length);
    if (order !== "") {
      const values = indices.map((index) => value(order, index));
      indices.sort((a, b) => values[b] - values[a] || a - b);
    }
    const ordered = indices.map((index) => this.pictures[index]);
    if (ordered.some((picture, place) => picture !== this.order[place])) {
      this.order = ordered;
      this.grid.append(...ordered.map((picture) => picture.figure));
    }
    this.grid.classList.toggle("two", this.state.shown.size > 1);
    this.say(numShown);
  }

  /** A line for screen readers too, once the sliders rest. */
  say(numShown) {
    clearTimeout(this.saying);
    this.saying = setTimeout(() => {
      const parts = [`${numShown} of ${this.pictures.length} images`];
      for (const run of this.hasObjects ? this.shownRuns() : []) {
        const result = this.results[run];
        if (result) parts.push(`${this.data.runs[run].name}: ${result.covered} of ${this.numChosen} objects covered`);
      }
      document.getElementById("status").textContent = parts.join("; ");
    }, 200);
  }

  /** Bring the controls to what the state says. */
  showState() {
    const { top, iou, shown } = this.state;
    const slider = document.getElementById("top-slider");
    const place = this.stops.findLastIndex((k) => k <= top);
    slider.value = place;
    slider.setAttribute("aria-valuetext", `${top} proposals`);
    document.getElementById("top").value = top;
    document.getElementById("iou").value = iou;
    document.getElementById("iou").setAttribute("aria-valuetext", percentOf(iou));
    document.getElementById("iou-value").textContent = percentOf(iou);
    document.querySelectorAll("#runs input").forEach((box, run) => {
      box.checked = shown.has(run);
    });
  }

  set(changes) {
    Object.assign(this.state, changes);
    // Several events before the next picture of the screen are one.
    this.frame ??= requestAnimationFrame(() => {
      this.frame = undefined;
      this.count();
    });
  }

  setTop(number) {
    if (Number.isFinite(number)) this.set({ top: Math.min(this.most, Math.max(1, Math.round(number))) });
  }

  setIou(percent) {
    if (this.hasObjects) this.set({ iou: Math.min(100, Math.max(50, percent)) });
  }

  show(runs) {
    if (runs.length) this.set({ shown: new Set(runs) });
    else this.showState();
  }

  buildControls() {
    const { data } = this;
    const get = (id) => document.getElementById(id);
    get("about").textContent = data.about;
    get("holds").textContent = `This file holds up to ${this.most} proposals of an image.`;
    const slider = get("top-slider");
    slider.max = this.stops.length - 1;
    slider.addEventListener("input", () => this.setTop(this.stops[slider.value]));
    get("top").max = this.most;
    get("top").addEventListener("change", (event) => this.setTop(event.target.valueAsNumber || 1));
    get("controls").addEventListener("submit", (event) => event.preventDefault());
    if (data.runs.length > 1) this.buildRuns(get("runs"));
    document.addEventListener("keydown", (event) => this.press(event));
    this.buildKey(get("key"));
    if (!this.hasObjects) return;
    for (const id of ["iou-row", "choices", "numbers"]) get(id).hidden = false;
    get("iou").addEventListener("input", (event) => this.setIou(event.target.valueAsNumber));
    get("others").addEventListener("change", (event) => this.set({ others: event.target.checked }));
    const hasMasks = this.pairs.some((pairs) => pairs.mask);
    this.addOptions("kind", [["box", "boxes"], ...(hasMasks ? [["mask", "masks"]] : [])]);
    this.addOptions("size", data.areaRanges.map((item, index) => [index, item.name]));
    this.addOptions("category", [["", "all"], ...data.categories.map((item) => [item.id, item.name])]);
    const isSplit = data.categories.some((item) => item.unseen !== null);
    const split = [["seen", "seen categories"], ["unseen", "unseen categories"]];
    this.addOptions("seen", [["", "all"], ...(isSplit ? split : [])]);
    const numbers = range(data.runs.length);
    const pairs = numbers.flatMap((a) => numbers.filter((b) => b !== a).map((b) => [a, b]));
    const named = pairs.map(([a, b]) => [
      `pair ${a} ${b}`, `found by ${data.runs[a].name}, missed by ${data.runs[b].name}`,
    ]);
    this.addOptions("filter", [["", "all"], ["missed", "with missed objects"], ...named]);
    const orders = [["missed", "most missed objects first"], ["covered", "most covered objects first"]];
    const most = named.map(([value, text]) => [value, `most ${text}`]);
    this.addOptions("order", [["", "as in the dataset"], ...orders, ...most]);
  }

  buildRuns(fieldset) {
    fieldset.hidden = false;
    this.data.runs.forEach((run, index) => {
      const box = element("input", { type: "checkbox" });
      box.addEventListener("change", () => {
        this.show(range(this.data.runs.length).filter((r) => (r === index ? box.checked : this.isShown(r))));
      });
      fieldset.append(element("label", {}, box, ` ${run.name}`));
    });
  }

  /** A list whose choice goes into the state; hidden where there is nothing to choose. */
  addOptions(id, options) {
    const select = document.getElementById(id);
    select.append(...options.map(([value, text]) => element("option", { value }, text)));
    select.value = this.state[id];
    select.addEventListener("change", () => this.set({ [id]: select.value }));
    select.parentElement.hidden = options.length < 2;
  }

  buildKey(list) {
    const add = (text, box, ...paths) => {
      const svg = svgElement("svg", { viewBox: box, "aria-hidden": "true" }, ...paths);
      list.append(element("li", {}, svg, text));
    };
    if (this.hasObjects) {
      const kinds = { covered: "covered object", proposal: "the proposal that covers it" };
      for (const [kind, text] of Object.entries({ ...kinds, missed: "missed object" })) {
        add(text, "0 0 32 12", ...rimmed(kind, "M0 6H32"));
      }
      if (this.data.runs.length > 1) {
        const area = svgElement("path", { class: "wanted", d: "M0 0H32V12H0Z" });
        add("found by the one, missed by the other (where Images asks for it)", "0 0 32 12", area);
      }
      return;
    }
    const ramp = RANK_COLOURS.map((colour, index) => {
      const path = svgElement("path", { d: `M${8 * index} 5h8` });
      path.style.stroke = colour;
      path.style.strokeWidth = 8;
      return path;
    });
    add("from the best proposal to the last that is shown", "0 0 64 10", ...ramp);
  }

  press(event) {
    const isTyping = event.target.matches("input[type=number], select");
    if (isTyping || event.ctrlKey || event.altKey || event.metaKey) return;
    const place = this.stops.findLastIndex((k) => k <= this.state.top);
    if (event.key === "[") {
      this.setTop(this.stops[this.stops[place] < this.state.top ? place : Math.max(place - 1, 0)]);
    } else if (event.key === "]") this.setTop(this.stops[Math.min(place + 1, this.stops.length - 1)]);
    else if (event.key === ",") this.setIou(this.state.iou - 1);
    else if (event.key === ".") this.setIou(this.state.iou + 1);
    else if (event.key === "0") this.show(range(this.data.runs.length));
    else if (this.data.runs[Number(event.key) - 1]) this.show([Number(event.key) - 1]);
    else if (event.key === "j" || event.key === "k") this.step(event.key === "j" ? 1 : -1);
    else return;
    event.preventDefault();
  }

  /** Go to the next or previous image that is shown. */
  step(direction) {
    const shown = this.order.filter((picture) => !picture.figure.hidden);
    const place = shown.findIndex((picture) => picture.figure.contains(document.activeElement));
    const next = shown[place < 0 ? 0 : place + direction];
    next?.figure.focus();
  }

  /** Draw images when they come near the window. */
  watch() {
    const observer = new IntersectionObserver(
      (entries) => {
        for (const entry of entries) {
          const picture = this.pictures[entry.target.dataset.index];
          picture.isNear = entry.isIntersecting;
          picture.paint();
        }
      },
      { rootMargin: "400px" },
    );
    for (const picture of this.pictures) observer.observe(picture.figure);
  }
}

function percentOf(percent) {
  return (percent / 100).toFixed(2);
}

new Gallery(JSON.parse(document.getElementById("data").textContent));
