"use strict";
// The map of saliencies: one row for each layer, one cell for each expert. What the cells look like
// is one picture of a pixel each, which is drawn enlarged; a move of the pointer draws nothing.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const canvas = document.getElementById("canvas");
  const cursor = document.getElementById("cursor");
  const detail = document.getElementById("detail");
  const controls = document.getElementById("controls");
  const hint = detail.textContent;
  const LABELS = 40; // pixels at the left, for the numbers of the layers
  const VIRIDIS = [[68, 1, 84], [65, 68, 135], [42, 120, 142], [34, 168, 132], [122, 209, 81], [253, 231, 37]];

  const layers = data.layers.map(read);
  const columns = Math.max(...layers.map((layer) => layer.count));
  const has = (test) => layers.some(test);
  const everywhere = range(layers.flatMap((layer) => layer.known));
  let order = "sorted", scale = "layer", at = null, printing = false;
  let geometry = { cell: 1, row: 1, width: 0 };

  function read(said) {
    const count = said.retained.length + said.pruned.length;
    const state = new Uint8Array(count), fresh = new Int32Array(count).fill(-1);
    said.retained.forEach((id, position) => { state[id] = 1; fresh[id] = position; });
    said.preserved.forEach((id) => { state[id] = 2; });
    const saliency = said.saliency || new Array(count).fill(null);
    // Of an expert without a number, what is preserved stands first and the rest last.
    const key = (id) => (saliency[id] !== null ? saliency[id] : state[id] === 2 ? Infinity : -Infinity);
    const sorted = Array.from({ length: count }, (_, id) => id);
    sorted.sort((a, b) => (key(b) > key(a)) - (key(b) < key(a)) || state[b] - state[a] || a - b);
    const place = new Int32Array(count);
    sorted.forEach((id, position) => { place[id] = position; });
    const known = saliency.filter((value) => value !== null);
    const tokens = said.frequency ? said.frequency.reduce((sum, value) => sum + (value || 0), 0) : 0;
    return { ...said, count, state, fresh, saliency, sorted, place, known, tokens, range: range(known) };
  }

  function range(values) {
    // Without the outermost values: one extreme expert would make all others look alike.
    const sorted = Float64Array.from(values).sort();
    if (!sorted.length) return null;
    const of = (share) => sorted[Math.round(share * (sorted.length - 1))];
    return { low: of(0.005), high: of(0.995) };
  }

  function expert(layer, column) {
    return order === "sorted" ? layer.sorted[column] : column;
  }

  function theme() {
    // Before paper is laid out, the style sheet still is that of the screen.
    if (printing) return { text: "#57606a", cut: "#d55e00", gone: ["#ececec", "#8c8c8c"].map(rgb) };
    const style = getComputedStyle(document.documentElement);
    const [text, cut, low, high] = ["--faint", "--cut", "--gone-low", "--gone-high"]
      .map((name) => style.getPropertyValue(name).trim());
    return { text, cut, gone: [low, high].map(rgb) };
  }

  function rgb(hex) {
    const number = parseInt(hex.trim().slice(1), 16);
    return [number >> 16, (number >> 8) & 255, number & 255];
  }

  function mixed(stops, share) {
    const place = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
    const left = Math.min(Math.floor(place), stops.length - 2), more = place - left;
    return stops[left].map((one, channel) => one + (stops[left + 1][channel] - one) * more);
  }

  function share(layer, value) {
    const found = scale === "layer" ? layer.range : everywhere;
    if (value === null || !found) return 0;
    return found.high > found.low ? (value - found.low) / (found.high - found.low) : 1;
  }

  function cells(colours) {
    const picture = document.createElement("canvas");
    picture.width = columns; picture.height = layers.length;
    const context = picture.getContext("2d");
    const image = context.createImageData(columns, layers.length);
    layers.forEach((layer, row) => {
      for (let column = 0; column < layer.count; column += 1) {
        const id = expert(layer, column), value = layer.saliency[id];
        const stops = layer.state[id] ? VIRIDIS : colours.gone;
        // Its root: most saliencies of a layer are far below its highest.
        let part = Math.sqrt(Math.max(share(layer, value), 0));
        if (value === null && layer.state[id]) part = layer.state[id] === 2 ? 1 : 0.5;
        const [red, green, blue] = mixed(stops, part);
        image.data.set([red, green, blue, 255], 4 * (row * columns + column));
      }
    });
    context.putImageData(image, 0, 0);
    return picture;
  }

  function draw() {
    const wide = canvas.parentElement.clientWidth, ratio = window.devicePixelRatio || 1;
    const width = wide - LABELS;
    const row = Math.max(3, Math.min(24, Math.round(640 / layers.length)));
    const high = row * layers.length;
    geometry = { cell: width / columns, row, width };
    canvas.width = Math.round(wide * ratio); canvas.height = Math.round(high * ratio);
    canvas.style.height = `${high}px`;
    const colours = theme(), context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.imageSmoothingEnabled = false;
    context.drawImage(cells(colours), LABELS, 0, width, high);
    // Paper shows the whole at half its size.
    const letters = printing ? 18 : 11;
    context.font = `${letters}px system-ui, sans-serif`;
    context.textAlign = "right"; context.textBaseline = "middle";
    const every = Math.ceil((letters + 2) / row);
    layers.forEach((layer, number) => {
      const y = number * row;
      if (number % every === 0) {
        context.fillStyle = colours.text;
        const name = `${layer.layer}${layer.mtp ? "*" : ""}`;
        context.fillText(name, LABELS - 6, Math.min(Math.max(y + row / 2, letters / 2), high - letters / 2));
      }
      marks(context, colours, layer, y);
    });
    document.getElementById("key-cut").hidden = order !== "sorted";
    document.getElementById("key-preserved").hidden = !has((layer) => layer.preserved.length);
    point();
  }

  function marks(context, colours, layer, y) {
    const { cell, row } = geometry;
    if (order === "sorted") {
      context.fillStyle = colours.cut;
      for (let column = 1; column < layer.count; column += 1) {
        const here = layer.state[layer.sorted[column]] > 0;
        if (here !== layer.state[layer.sorted[column - 1]] > 0) {
          context.fillRect(LABELS + column * cell - 1, y, 2, row);
        }
      }
    }
    const size = Math.max(2, Math.min(5, row / 3, Math.max(cell, 5) / 2));
    for (const id of layer.preserved) {
      const column = order === "sorted" ? layer.place[id] : id;
      context.beginPath();
      context.arc(LABELS + (column + 0.5) * cell, y + row / 2, size, 0, 2 * Math.PI);
      context.fillStyle = "#fff"; context.fill();
      context.strokeStyle = colours.cut; context.lineWidth = 1.5; context.stroke();
    }
  }

  function why(layer, id) {
    const rank = layer.place[id], kept = layer.retained.length, state = layer.state[id];
    const decided = {
      plan: "by the keep-list", last: "as in the last scored layer",
      "router-norm": "by the length of its router row", keep: "the layer stays whole",
    }[layer.policy];
    if (state === 2) return "kept: preserved whatever its saliency";
    const word = state ? "kept" : "pruned";
    if (layer.saliency[id] === null) {
      const never = !state && layer.frequency && layer.frequency[id] === 0;
      return `${word}${decided ? `: ${decided}` : never ? ": no token reached it" : ""}`;
    }
    if (state && rank < kept) return `kept: among the ${kept} of highest saliency`;
    if (!state && rank >= kept) return `pruned: below the ${kept} of highest saliency`;
    if (decided) return `${word}: ${decided}`;
    if (data.n_group > 1) return `${word}: the router's groups lose as many each`;
    return `${word}: preserved experts take the place of others`;
  }

  function number(value) {
    return value === null || value === undefined ? "unknown" : `${Number(value.toPrecision(4))}`;
  }

  function say(parts) {
    detail.replaceChildren(...parts.flatMap(([tag, text], number) => {
      const element = document.createElement(tag);
      element.textContent = text;
      return number ? [" · ", element] : [element];
    }));
  }

  // Shows the expert that is pointed at; null points at none.
  function point() {
    cursor.hidden = !at;
    if (!at) { detail.textContent = hint; return; }
    const layer = layers[at.row], id = expert(layer, at.column), { cell, row } = geometry;
    const now = layer.fresh[id] >= 0 ? `, now ${layer.fresh[id]}` : "";
    const parts = [
      ["b", `layer ${layer.layer}, expert ${id}${now}`],
      ["span", `saliency ${number(layer.saliency[id])}, rank ${layer.place[id] + 1} of ${layer.count}`],
    ];
    if (layer.frequency) {
      const times = layer.frequency[id];
      const part = layer.tokens ? ` (${(100 * (times || 0) / layer.tokens).toPrecision(3)} %)` : "";
      parts.push(["span", `frequency ${times === null ? "unknown" : times.toLocaleString("en")}${part}`]);
    }
    parts.push(["span", why(layer, id)]);
    say(parts);
    const width = Math.max(cell, 5);
    cursor.style.left = `${LABELS + (at.column + 0.5) * cell - width / 2 - 2}px`;
    cursor.style.top = `${at.row * row - 2}px`;
    cursor.style.width = `${width + 4}px`;
    cursor.style.height = `${row + 4}px`;
  }

  function follow(event) {
    const box = canvas.getBoundingClientRect();
    const row = Math.floor((event.clientY - box.top) / geometry.row);
    const column = Math.floor((event.clientX - box.left - LABELS) / geometry.cell);
    const layer = layers[row];
    at = layer && column >= 0 && column < layer.count ? { row, column } : null;
    point();
  }

  canvas.addEventListener("pointermove", follow);
  canvas.addEventListener("pointerdown", follow);
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!move) return;
    event.preventDefault();
    const from = at || { row: 0, column: 0 };
    const row = Math.min(Math.max(from.row + move[0], 0), layers.length - 1);
    const column = Math.min(Math.max(from.column + move[1], 0), layers[row].count - 1);
    at = { row, column };
    point();
  });
  controls.addEventListener("change", () => {
    // The same expert stays pointed at where it goes.
    const layer = at && layers[at.row], id = at && expert(layer, at.column);
    order = controls.elements.order.value; scale = controls.elements.scale.value;
    if (at) at.column = order === "sorted" ? layer.place[id] : id;
    draw();
  });
  controls.reset(); // what a browser remembers of an earlier visit
  for (const [name, now] of [["beforeprint", true], ["afterprint", false]]) {
    window.addEventListener(name, () => { printing = now; draw(); });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  new ResizeObserver(draw).observe(canvas.parentElement);
  draw();
})();
