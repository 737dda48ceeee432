/* Heat maps by row and layer: the large one that is read cell by cell, and small ones to choose by. */

const MANY_CELLS = 3000;  // above which cells are painted on a canvas
const MARKED = 0.02;  // of the scale: so far below its end the clean run has a mark of its own

/** As much of a text as has room. */
function fitted(text, room, size) {
  let most = 60, found = short(text, most);
  while (most > 4 && widthOf(found, size, 600) > room) found = short(text, --most);
  return found;
}

/** The large map with its axes, marks of marked rows, sites and scale. */
function drawGrid(own, surfaceOf, th, width) {
  const { grid, rows, layers, kind, scale, form, sites } = own;
  const size = width < 520 ? 11.5 : 12.5, room = Math.max(90, width * 0.36);
  const labels = rows.map((each) => fitted(each.label, room, size));
  const left = Math.ceil(Math.max(40, ...labels.map((each) => widthOf(each, size, 600))) + 20);
  const right = 64, top = 24, bottom = 46;
  const cw = Math.max(5, Math.min(58, (width - left - right) / layers.length));
  const ch = Math.max(13, Math.min(30, rows.length <= 24 ? 26 : 520 / rows.length));
  const w = cw * layers.length, h = ch * rows.length, whole = Math.ceil(Math.max(left + w + right, surfaceOf ? 320 : 0));
  const height = Math.ceil(top + h + bottom + (surfaceOf ? 24 : 0)), y0 = top + (surfaceOf ? 24 : 0);
  const surface = (surfaceOf || (rows.length * layers.length > MANY_CELLS ? canvasSurface : svgSurface))(whole, height);
  const colour = colourMap(own.map, th.dark), share = (value) => (value - scale.low) / (scale.high - scale.low || 1);
  if (surfaceOf) {
    surface.rect(0, 0, whole, height, th.paper);
    surface.text(8, 18, short(own.titleOf, Math.floor(whole / 7)), { size: 13, fill: th.ink, weight: 600 });
  }
  const numbers = cw >= 34 && ch >= 18 && own.numbers;
  for (let row = 0; row < rows.length; row++) {
    for (let column = 0; column < layers.length; column++) {
      const value = grid.at(row, column), known = isNumber(value), shade = known ? colour(share(value)) : { fill: th.none, ink: th.soft };
      surface.rect(left + column * cw, y0 + row * ch, cw - (cw > 9 ? 1 : 0), ch - 1, shade.fill);
      if (numbers && known) surface.text(left + (column + 0.5) * cw - 0.5, y0 + (row + 0.5) * ch + 3.5, form(value, false), { size: 10.5, fill: shade.ink, anchor: 'middle' });
    }
    surface.text(left - 10, y0 + (row + 0.5) * ch + 4, labels[row], { size: ch < 15 ? 10.5 : size, fill: rows[row].marked ? th.accent : th.ink, anchor: 'end', weight: rows[row].marked ? 600 : 400 });
    if (rows[row].marked) surface.rect(left - 5, y0 + row * ch, 2.5, ch - 1, th.accent);
  }
  const every = Math.max(1, Math.ceil(22 / cw));
  layers.forEach((layer, column) => { if (column % every === 0) surface.text(left + (column + 0.5) * cw, y0 + h + 15, String(layer), { size: 11.5, fill: th.soft, anchor: 'middle' }); });
  const wide = Math.min(widthOf(kind.axis, 11.5) / 2, whole / 2);
  surface.text(clamp(left + w / 2, wide, whole - wide), y0 + h + 36, fitted(kind.axis, whole - 8, 10.5), { size: 11.5, fill: th.soft, anchor: 'middle' });
  for (const site of sites) {
    const column = layers.indexOf(site.layer);
    if (site.kind === kind.name && column >= 0 && site.row !== null) surface.circle(left + (column + 0.5) * cw - 0.5, y0 + (site.row + 0.5) * ch - 0.5, clamp(Math.min(cw, ch) / 3.4, 2.2, 6), 'none', { stroke: colour(share(grid.at(site.row, column))).ink, 'stroke-width': 1.6 });
  }
  const isOver = scale.high - scale.clean > MARKED * (scale.high - scale.low);
  surface.text(whole - 6, y0 - 9, short(own.measure, 40) + (isOver ? '; line: clean' : ''), { size: 11, fill: th.soft, anchor: 'end' });
  const bar = Math.min(h, 150), xb = left + w + 16;
  for (let step = 0; step < 50; step++) surface.rect(xb, y0 + (bar * step) / 50, 9, bar / 50 + 0.6, colour(1 - (step + 0.5) / 50).fill);
  for (const value of bar < 60 ? [scale.low, scale.high] : ticks(scale.low, scale.high, bar / 38)) {
    const y = y0 + (1 - share(value)) * bar;
    surface.line(xb + 9, y, xb + 12, y, th.soft, 1);
    surface.text(xb + 15, y + 4, tick(form, value), { size: 11, fill: th.soft });
  }
  if (isOver) surface.line(xb - 3, y0 + (1 - share(scale.clean)) * bar, xb + 12, y0 + (1 - share(scale.clean)) * bar, th.ink, 2);
  return { surface, geometry: { left, top: y0, cw, ch, w, h } };
}

/** A map without words, for a button. */
function thumbnail(own, th, width = 132, height = 46) {
  const surface = canvasSurface(width, height, 2), colour = colourMap(own.map, th.dark), { grid, scale } = own;
  const cw = width / grid.columns, ch = height / grid.rows;
  for (let row = 0; row < grid.rows; row++) for (let column = 0; column < grid.columns; column++) {
    const value = grid.at(row, column);
    surface.rect(column * cw, row * ch, Math.ceil(cw), Math.ceil(ch), isNumber(value) ? colour((value - scale.low) / (scale.high - scale.low || 1)).fill : th.none);
  }
  return surface.root;
}

/** The map of one kind at a time, with a button for each, read by pointer and keys. `reading(place)` fills what stands beside it.
    A pointer that rests on a cell reads it; a click or a key keeps it, in the address too. */
function gridCard({ data, name, label, kinds, rows, layers, sites = [], reading, tools, first, onMove, numbers = false }) {
  const chosen = () => kinds.find((each) => each.name === state.get('kind')) || kinds.find((each) => each.name === first) || kinds[0];
  const fallback = () => { const found = sites.find((each) => each.kind === chosen().name && each.row !== null); return found ? [found.row, Math.max(0, layers.indexOf(found.layer))] : best(chosen()); };
  function best(kind) {
    let at = [0, 0], most = -Infinity;
    for (let row = 0; row < rows.length; row++) for (let column = 0; column < layers.length; column++) if (kind.grid.at(row, column) > most) { most = kind.grid.at(row, column); at = [row, column]; }
    return at;
  }
  const kept = () => {
    const [row, column] = /^\d+\.\d+$/.test(state.get('at')) ? state.get('at').split('.').map(Number) : fallback();
    return [clamp(row, 0, rows.length - 1), clamp(column, 0, layers.length - 1)];
  };
  let over = null;  // the cell under the pointer
  const now = () => over || kept();
  const beside = el('div.reading');
  const of = (kind) => ({ grid: kind.grid, rows, layers, kind, scale: kind.scale, form: kind.form, sites, map: data.maps[kind.map], titleOf: `${kind.title}: ${data.title}`, measure: data.label ? data.label + (data.share ? ', %' : '') : '', numbers });
  function mark() {
    const geometry = found.geometry, [row, column] = now();
    if (!geometry) return;
    Object.assign(found.cursor.style, { width: `${geometry.cw + 1}px`, height: `${geometry.ch + 1}px`, transform: `translate(${geometry.left + column * geometry.cw - 1.5}px, ${geometry.top + row * geometry.ch - 1.5}px)` });
    fill(beside, reading(chosen(), row, column));
    if (onMove) onMove(chosen(), row, column);
  }
  /** What a card of lines reads and moves: the layer of the cell. */
  const cursor = { get: () => now()[1], set: (column) => go(now()[0], column, false) };
  function go(row, column, follow = true) {
    over = null;
    state.set({ at: `${clamp(row, 0, rows.length - 1)}.${clamp(column, 0, layers.length - 1)}` });
    mark();
    if (!follow) return;
    const [r, c] = kept(), kind = chosen();
    tell(`${visible(rows[r].label).slice(0, 80)}, layer ${layers[c]}: ${kind.form(kind.grid.at(r, c))}`);
    const line = found.plot.getBoundingClientRect().top + found.geometry.top + r * found.geometry.ch;
    if (line < 60 || line > innerHeight - 60) scrollBy({ top: line - innerHeight / 2 });
  }
  const step = (rowwise, columnwise) => () => { const [row, column] = kept(); go(row + rowwise, column + columnwise); };
  const choose = (kind) => { state.set({ kind: kind.name }); over = null; draw(); };
  const buttons = kinds.map((kind) => el('button.choice', { type: 'button', onclick: () => choose(kind) }, el('span.thumb'), el('span', {}, kind.short)));
  const title = el('span');
  const found = plotCard({
    title, name, tools, label, key: 'view',
    body: [el('div.choices', { role: 'group', 'aria-label': 'what is shown' }, buttons)],
    draw: (surfaceOf, th, width) => drawGrid(of(chosen()), surfaceOf, th, width),
    tableOf: () => { const kind = chosen(); return table(kind.title, ['', ...layers.map((each) => `layer ${each}`)], rows.map((row, r) => [said(row.label.slice(0, 200)), ...layers.map((_, c) => num(kind.grid.at(r, c), kind.form))])); },
    keys: {
      ArrowLeft: step(0, -1), ArrowRight: step(0, 1), ArrowUp: step(-1, 0), ArrowDown: step(1, 0),
      Home: () => go(kept()[0], 0), End: () => go(kept()[0], layers.length - 1), PageUp: () => go(0, kept()[1]), PageDown: () => go(rows.length - 1, kept()[1]),
    },
    onCursor: mark,
  });
  const plain = found.redraw;
  found.redraw = draw;
  function draw() {
    title.textContent = chosen().title;
    kinds.forEach((kind, index) => {
      buttons[index].setAttribute('aria-pressed', String(kind === chosen()));
      fill(buttons[index].firstChild, thumbnail(of(kind), theme()));
    });
    plain();
  }
  const under = (event) => {
    const geometry = found.geometry, box = found.stage.getBoundingClientRect();
    if (!geometry) return null;
    const row = Math.floor((event.clientY - box.top - geometry.top) / geometry.ch), column = Math.floor((event.clientX - box.left - geometry.left) / geometry.cw);
    return row >= 0 && row < rows.length && column >= 0 && column < layers.length ? [row, column] : null;
  };
  found.plot.addEventListener('pointermove', oncePerFrame((event) => {
    const there = under(event);
    if (String(there) !== String(over)) { over = there; mark(); }
  }));
  found.plot.addEventListener('pointerleave', () => { over = null; mark(); });
  found.plot.addEventListener('click', (event) => { const there = under(event); if (there) go(...there); });
  found.layer = cursor;
  found.reading = beside;
  found.go = go;
  found.choose = (name, row, layer) => { const kind = kinds.find((each) => each.name === name); if (kind) { choose(kind); go(row, layers.indexOf(layer)); } };
  return found;
}
