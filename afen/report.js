"use strict";
// The queries of a run: choose one, see its list, and what the network made of both images.
// Everything from files reaches the page as text, never as markup.
const run = JSON.parse(document.getElementById("data").textContent);
const at = id => document.getElementById(id);

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties))
    name in element ? (element[name] = value) : element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
const named = row => `person ${run.images[row].who}, camera ${run.images[row].camera}`;

function heat({ h, w, low, high, data }, label) {
  const canvas = make("canvas", { width: w, height: h, role: "img", "aria-label": label });
  const image = new ImageData(w, h);
  bytes(data).forEach((value, i) => image.data.set([226, 96, 0, 0.78 * value], 4 * i));
  canvas.getContext("2d").putImageData(image, 0, 0);
  return [canvas, `${low} to ${high}`];
}

function picture(row, map, label = "") {
  const { picture, who } = run.images[row], frame = make("span", { className: "picture" });
  frame.style.aspectRatio = run.aspect;
  frame.append(picture ? make("img", { src: picture, alt: map ? "" : label })
    : make("span", { className: "blank" }, `${who}`));
  if (map) frame.append(heat(map, label)[0]);
  return frame;
}

// --- a list to walk through by keyboard ----------------------------------------------

class Choice {
  constructor(box, draw, chosen) {
    Object.assign(this, { box, draw, chosen, items: [], index: -1 });
    box.addEventListener("keydown", event => this.key(event));
    box.addEventListener("click", event => {
      const option = event.target.closest("[role=option]");
      if (option) this.choose([...box.children].indexOf(option));
    });
  }
  fill(items) {
    this.items = items;
    this.index = -1;
    this.box.replaceChildren(...items.map((item, i) => this.option(item, i)));
    this.box.removeAttribute("aria-activedescendant");
    if (items.length) this.choose(0); else this.chosen(null);
  }
  option(item, i) {
    const option = this.draw(item);
    option.id = `${this.box.id}-${i}`;
    option.setAttribute("role", "option");
    option.setAttribute("aria-selected", "false");
    return option;
  }
  choose(i) {
    const last = this.items.length - 1, next = Math.max(0, Math.min(last, i));
    if (last < 0 || next === this.index) return;
    this.box.children[this.index]?.setAttribute("aria-selected", "false");
    const option = this.box.children[(this.index = next)];
    option.setAttribute("aria-selected", "true");
    this.box.setAttribute("aria-activedescendant", option.id);
    const top = option.offsetTop, height = option.offsetHeight, box = this.box;
    if (top < box.scrollTop) box.scrollTop = top;
    else if (top + height > box.scrollTop + box.clientHeight)
      box.scrollTop = top + height - box.clientHeight;
    this.chosen(this.items[next]);
  }
  columns() {
    const tops = [...this.box.children].map(option => option.offsetTop);
    return Math.max(1, tops.filter(top => top === tops[0]).length);
  }
  key(event) {
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns(),
      ArrowDown: this.columns(), PageUp: -10, PageDown: 10, Home: -1e9, End: 1e9 };
    const step = steps[event.key];
    if (step === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    this.choose(this.index + step);
  }
}

// --- one query -----------------------------------------------------------------------

const words = query => query.rank === null ? "no match that it may see"
  : query.rank === 1 ? "right at once" : `first match at rank ${query.rank}`;

const queries = new Choice(at("query-list"), query => {
  const label = `${named(query.row)}, ${words(query)}`;
  const found = query.rank === 1 ? "right" : "wrong";
  const mark = make("span", { className: `mark ${found}` }, query.rank ?? "–");
  const option = make("div", { title: label, className: found }, frame(query.row), mark);
  option.setAttribute("aria-label", label);
  return option;
}, query => {
  at("one").hidden = !query;
  if (!query) return;
  at("asked").textContent = `${named(query.row)}, ${run.images[query.row].modality}: ` +
    `${words(query)}` + (query.rank === null ? "." : `; average precision ${query.ap}.`);
  at("asked-path").textContent = run.images[query.row].path;
  highlight(query.row);
  ranked.query = query;
  ranked.fill(query.list);
});

const ranked = new Choice(at("ranked"), item => {
  const sign = item.right ? "✓" : "✗", found = item.right ? "right" : "wrong";
  const label = `${item.place}, ${found}: ${named(item.row)}, distance ${item.distance}`;
  const mark = make("span", { className: `mark ${found}` }, `${item.place} ${sign}`);
  const option = make("div", { title: label, className: found }, frame(item.row), mark);
  option.setAttribute("aria-label", label);
  return option;
}, item => {
  at("pair").replaceChildren();
  at("gates").replaceChildren();
  if (item) compare(ranked.query.row, item);
});

function frame(row) {
  return make("span", { className: "frame" }, picture(row));
}

// --- two images beside each other ----------------------------------------------------

function compare(query, item) {
  const sides = [["The query", query, 0], [`Place ${item.place} of its list`, item.row, 1]];
  for (const [title, row, side] of sides) {
    const figures = [figure(picture(row, null, named(row)), named(row))];
    if (run.images[row].picture) {
      const maps = run.images[row].maps.map(map => [map.title, map]);
      if (item.agree) maps.unshift(["agrees with the other image", item.agree[side]]);
      for (const [name, map] of maps)
        figures.push(figure(picture(row, map, `${name}: ${where(map)}`), name,
          `${map.low} to ${map.high}`));
    }
    at("pair").append(make("section", {}, make("h4", {}, title),
      make("div", { className: "maps" }, ...figures)));
  }
  for (const title of Object.keys(run.gates)) gates(title, query, item.row);
}

function figure(content, caption, range = "") {
  const text = make("figcaption", {}, caption);
  if (range) text.append(make("br"), make("span", { className: "soft" }, range));
  return make("figure", {}, content, text);
}

function where({ h, w, data }) {
  const values = bytes(data), top = values.indexOf(Math.max(...values));
  return `strongest in row ${1 + Math.floor(top / w)} of ${h}, column ${1 + top % w} of ${w}`;
}

// The gates of two images, channels in the order of their mean over the images shown.
function gates(title, query, other) {
  const { mean, order, low, high } = run.gates[title], width = 640, height = 150;
  const lines = [["mean of all shown", mean, "var(--soft)", "2 3"]];
  for (const [name, row, colour, dash] of [["query", query, "var(--right)", ""],
    ["other image", other, "var(--wrong)", "6 3"]])
    if (run.images[row].gates[title])
      lines.push([name, bytes(run.images[row].gates[title]), colour, dash]);
  if (lines.length === 1) return;
  const x = i => 34 + (width - 40) * i / Math.max(1, order.length - 1);
  const y = v => height - 20 - (height - 30) * v / 255;
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, class: "chart", width, role: "img",
    "aria-label": `${title}: a gate for each of ${order.length} channels` });
  for (const [value, text] of [[0, low], [255, high]])
    svg.append(shape("line", { x1: 34, x2: width - 6, y1: y(value), y2: y(value), class: "grid" }),
      shape("text", { x: 30, y: y(value) + 4, "text-anchor": "end" }, text));
  for (const [, values, colour, dash] of lines)
    svg.append(shape("polyline", { points: order.map((c, i) => `${x(i)},${y(values[c])}`).join(" "),
      fill: "none", stroke: colour, "stroke-dasharray": dash, "stroke-width": 1.5 }));
  const key = make("p", { className: "soft" }, "Channels, by their mean gate. ");
  lines.forEach(([name, , colour, dash]) => {
    const sample = shape("svg", { width: 30, height: 10, "aria-hidden": "true" });
    sample.append(shape("line", { x1: 0, x2: 30, y1: 5, y2: 5, stroke: colour,
      "stroke-dasharray": dash, "stroke-width": 2 }));
    key.append(sample, ` ${name}  `);
  });
  at("gates").append(make("h4", {}, title), make("div", { className: "wide" }, svg), key);
}

function shape(tag, attributes, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(`${text}`);
  return element;
}

function highlight(row) {
  const { who } = run.images[row];
  for (const point of document.querySelectorAll("#plane [data-who]"))
    point.classList.toggle("faint", point.dataset.who !== `${who}`);
}

// --- filters -------------------------------------------------------------------------

const ranges = { any: () => true, first: r => r === 1, late: r => r > 1,
  far: r => r > 5, none: r => r === null };

function cameras() {
  const rows = run.settings[at("setting").value].queries.map(query => query.row);
  const names = [...new Set(rows.map(row => `${run.images[row].camera}`))].sort();
  at("camera").replaceChildren(make("option", { value: "" }, "all"),
    ...names.map(name => make("option", { value: name }, name)));
}

function filter() {
  const { queries: every } = run.settings[at("setting").value];
  const camera = at("camera").value, wanted = at("search").value.trim().toLowerCase();
  const fits = query => ranges[at("rank").value](query.rank)
    && (!camera || `${run.images[query.row].camera}` === camera)
    && (!wanted || `${run.images[query.row].who}`.toLowerCase() === wanted
      || wanted.length > 2 && run.images[query.row].path.toLowerCase().includes(wanted));
  const kept = every.filter(fits);
  if (at("order").value === "rank")
    kept.sort((a, b) => (b.rank ?? 1e9) - (a.rank ?? 1e9) || a.ap - b.ap);
  queries.fill(kept);
  at("count").textContent = `${kept.length} of ${every.length} queries`;
}

function open(setting, row) {
  at("filters").reset();
  at("setting").value = setting;
  cameras();
  filter();
  queries.choose(queries.items.findIndex(query => query.row === row));
  at("query-list").focus();
  at("queries").scrollIntoView();
}

at("filters").addEventListener("submit", event => event.preventDefault());
at("setting").addEventListener("change", () => { cameras(); filter(); });
for (const id of ["camera", "rank", "order"]) at(id).addEventListener("change", filter);
at("search").addEventListener("input", filter);
document.addEventListener("click", event => {
  const link = event.target.closest("a[data-row]");
  if (!link) return;
  event.preventDefault();
  open(link.dataset.setting, Number(link.dataset.row));
});
document.addEventListener("keydown", event => {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
  if (event.key === "/" && !typing) {
    event.preventDefault();
    at("search").focus();
  } else if (event.key === "Escape" && event.target === at("search")) {
    at("search").value = "";
    filter();
    at("query-list").focus();
  } else if (/^Arrow(Left|Right)$/.test(event.key) && event.target === document.body)
    queries.key(event);
});
cameras();
filter();
