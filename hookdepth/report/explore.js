// The interactive page: one map at a time as a table, and beside it what the cell says that is pointed at.
// Everything comes from the JSON in the page, and becomes text, never markup.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const by = (id) => document.getElementById(id);
const make = (tag, parent, text = "", kind = "") => {
  const one = document.createElement(tag);
  one.textContent = text;
  one.className = kind;
  parent.append(one);
  return one;
};
const visible = (text) => text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/ /g, "_") || "∅";
const said = (number) => (number === null ? "—" : String(number));
let map, cells, here, pinned;

function place(value) { // where a value lies among the colours, from 0 to 1
  const along = map.log ? (x) => Math.log(Math.max(x, map.low)) : (x) => x;
  return Math.min(1, Math.max(0, (along(value) - along(map.low)) / (along(map.high) - along(map.low))));
}

function colour(share) {
  const list = data.colours[map.signed ? "signed" : "plain"];
  const at = share * (list.length - 1), low = Math.floor(at), next = list[Math.min(low + 1, list.length - 1)];
  return list[low].map((channel, n) => Math.round(channel + (at - low) * (next[n] - channel)));
}

function draw(number) {
  map = data.maps[number];
  here = pinned = null;
  by("maps").value = number;
  by("reading").textContent = map.reading;
  by("said").textContent = map.said && `${map.said}.`;
  by("low").textContent = said(map.low);
  by("high").textContent = `${said(map.high)}${map.label ? `  ${map.label}` : ""}${map.log ? ", logarithmic" : ""}`;
  const stops = [...Array(9).keys()].map((n) => `rgb(${colour(n / 8)})`);
  by("bar").style.background = `linear-gradient(to right, ${stops})`;
  const table = by("map");
  table.replaceChildren();
  table.className = map.words.length ? "words" : "";
  const head = make("tr", make("thead", table));
  make("th", head, map.corner);
  map.columns.forEach((name) => { make("span", make("th", head), visible(name)).title = name; });
  const body = make("tbody", table), order = [...map.rows.keys()];
  cells = [];
  for (const r of map.upward ? order.reverse() : order) {
    const row = make("tr", body);
    make("th", row, map.rows[r]);
    cells[r] = map.values[r].map((value, c) => {
      const cell = make("td", row, map.words.length ? visible(map.words[r][c][0][0]) : "");
      cell.dataset.at = `${r} ${c}`;
      if (c < map.first[r]) cell.className = "blank"; // nothing reaches an earlier layer
      if (value === null || cell.className) return cell; // grey where it is not finite
      const paint = colour(place(value));
      cell.style.background = `rgb(${paint})`;
      cell.style.color = 0.3 * paint[0] + 0.59 * paint[1] + 0.11 * paint[2] > 140 ? "#000" : "#fff";
      return cell;
    });
  }
  make("p", clear(), "Point at a cell, or go there with the arrow keys; a click holds it.", "small");
}

function clear() {
  by("cell").replaceChildren();
  return by("cell");
}

function line(parent, title, values, at) {
  const known = values.filter((value) => value !== null);
  const low = Math.min(0, ...known), high = Math.max(...known, low + 1e-30);
  const x = (n) => (values.length > 1 ? (200 * n) / (values.length - 1) : 100), y = (v) => 46 - (42 * (v - low)) / (high - low);
  make("p", parent, `${title}: from ${said(low)} to ${said(known.length ? high : null)}`, "small");
  const svg = by("line").content.firstElementChild.cloneNode(true), [curve, dot] = svg.children;
  const points = values.flatMap((value, n) => (value === null ? [] : [`${x(n)},${y(value)}`]));
  curve.setAttribute("points", points.join(" "));
  dot.setAttribute("cx", x(at));
  dot.setAttribute("cy", values[at] === null ? -9 : y(values[at]));
  parent.append(svg);
}

function show(r, c) {
  if (here) cells[here[0]][here[1]].classList.remove("here");
  here = [r, c];
  cells[r][c].classList.add("here");
  const panel = clear();
  make("h2", panel, `${map.corner} ${map.rows[r]}, ${visible(map.columns[c])}`);
  make("p", panel, `${map.label || "Value"}: ${said(map.values[r][c])}`);
  if (map.words.length) {
    const list = make("ol", panel);
    map.words[r][c].forEach(([word, share]) => {
      const item = make("li", list);
      make("code", item, visible(word));
      make("span", item, ` ${said(share)}`, "small");
      make("i", item).style.width = `${100 * share}%`;
    });
  }
  line(panel, "This column", map.values.map((row) => row[c]), r);
  line(panel, "This row", map.values[r], c);
  if (map.upward) { // the columns are the tokens of a text
    const text = make("p", panel, "", "text");
    map.columns.forEach((token, n) => make(n === c ? "mark" : "span", text, token));
  }
}

const at = (event) => event.target.closest("td")?.dataset.at.split(" ").map(Number);
by("map").addEventListener("pointerover", (event) => { if (!pinned && at(event)) show(...at(event)); });
by("map").addEventListener("click", (event) => {
  if (!at(event)) return;
  const same = pinned && String(pinned) === String(at(event));
  show(...at(event));
  pinned = same ? null : here;
  cells.flat().forEach((cell) => cell.classList.toggle("held", cell === (pinned && cells[here[0]][here[1]])));
});
by("scroll").addEventListener("keydown", (event) => {
  const up = map.upward ? 1 : -1;
  const step = { ArrowUp: [up, 0], ArrowDown: [-up, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (!step) return;
  event.preventDefault();
  const [r, c] = here ? [here[0] + step[0], here[1] + step[1]] : [0, 0];
  if (!cells[r]?.[c]) return;
  show(r, c);
  cells[r][c].scrollIntoView({ block: "nearest", inline: "nearest" });
});

let group;
data.maps.forEach((one, n) => {
  if (group?.label !== one.section) {
    group = make("optgroup", by("maps"));
    group.label = one.section;
  }
  make("option", group, one.caption + (one.title && `: ${one.title}`)).value = String(n);
});
by("maps").addEventListener("change", () => { location.hash = by("maps").value; });
const first = Math.max(0, data.maps.findIndex((one) => one.words.length)); // the map that says most
const wanted = () => { draw(data.maps[location.hash.slice(1)] ? location.hash.slice(1) : first); };
addEventListener("hashchange", wanted);
wanted();
