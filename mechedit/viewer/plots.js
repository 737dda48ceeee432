/* Cards, tables, lines with their intervals, strips of draws, whiskers. */

const cards = [];  // what is drawn again when the width, the colours or the medium change

/** A part of the page: a heading, tools at its right, and a body. */
function card(title, tools, ...body) {
  return el('section.card', {}, el('header.bar', {}, el('h2', {}, title), el('div.tools', {}, tools)), body);
}

/** A table: headings, rows of texts or elements, the first cell of each a heading of its row. */
function table(caption, headings, rows, more = {}) {
  return el('table', more,
    el('caption.unseen', {}, caption),
    el('thead', {}, el('tr', {}, headings.map((each) => (each === '' ? el('td') : el('th', { scope: 'col' }, each))))),
    el('tbody', {}, rows.map((row) => el('tr', {}, row.map((each, index) => (index ? el('td', {}, each) : el('th', { scope: 'row' }, each)))))));
}

/** A plot that is drawn to the width there is, has a table behind a button, and can be copied. */
function plotCard({ title, name, draw, tableOf, tools = [], label, body = [], key = 'view', keys, onCursor, footer = [] }) {
  const stage = el('div.stage');
  const cursor = el('div.cursor', { 'aria-hidden': 'true' });
  const plot = el('div.plot', { tabindex: 0, role: 'application', 'aria-roledescription': 'chart', 'aria-label': label }, stage, cursor);
  const beside = el('div.scroll', { tabindex: 0, role: 'region', 'aria-label': `${title}, as a table`, hidden: true });
  const button = el('button', { type: 'button', 'aria-pressed': 'false', onclick: () => { state.set({ [key]: state.get(key) === 'table' ? '' : 'table' }); found.redraw(); } }, 'Table');
  const taken = takeAlong(name, (surfaceOf, th) => draw(surfaceOf, th, Math.max(640, Math.min(stage.clientWidth || 0, 1000))).surface);
  const found = {
    plot, stage, cursor, geometry: null,
    redraw() {
      const asTable = state.get(key) === 'table';
      button.setAttribute('aria-pressed', String(asTable));
      plot.hidden = asTable;
      beside.hidden = !asTable;
      if (asTable) { fill(beside, tableOf()); return; }
      const width = Math.floor(stage.clientWidth);
      if (!width) return;
      const { surface, geometry } = draw(null, theme(), width);
      fill(stage, surface.root);
      found.geometry = geometry;
      if (onCursor) onCursor();
    },
    element: null,
  };
  if (keys) plot.addEventListener('keydown', (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const call = keys[event.key];
    if (call) { event.preventDefault(); call(); }
  });
  found.element = card(title, [tools, button, taken].flat(), body, plot, beside, footer);
  let width = 0;
  new ResizeObserver(() => { if (Math.floor(plot.clientWidth) !== width) { width = Math.floor(plot.clientWidth); found.redraw(); } }).observe(plot);
  cards.push(found);
  return found;
}

function redrawAll() {
  for (const each of cards) each.redraw();
}
scheme.addEventListener('change', redrawAll);
/** On paper plots are in light colours, and as wide as a page: they are drawn before the browser lays it out. */
function onPaper(now) {
  printing = now;
  document.documentElement.classList.toggle('printing', now);
  redrawAll();
}
addEventListener('beforeprint', () => onPaper(true));
addEventListener('afterprint', () => onPaper(false));

// --- lines

/** A number at an axis, without zeros behind the point; a share in percent, however small, so that marks differ. */
const tick = (form, value) => (form === figure ? form(value).replace(/\.0+$/, '') : minus(Number((100 * value).toPrecision(3))));

const colourOf = (each, th, index) => th.series[each.name] || th.many[index % th.many.length];

/** Where names stand in a picture, each behind a mark `beside` wide with what is left free: rows of as many as fit. */
function legendRows(series, width, beside = 34) {
  const rows = [[]];
  let x = 0;
  series.forEach((each, index) => {
    const own = beside + widthOf(short(each.title, 40), 12);
    if (x && x + own > width) { rows.push([]); x = 0; }
    rows[rows.length - 1].push({ each, index, x });
    x += own;
  });
  return rows;
}

/** Lines over layers, each with its interval as a band, or where it is `edged` as two dotted lines: of overlapping bands no colour is left. */
function drawLines({ series, layers, xTitle, yTitle, form, marks = [], at = null, zero = false, title = '' }, surfaceOf, th, width) {
  const names = surfaceOf ? legendRows(series, width - 24, 58) : [], extra = names.length ? 30 + 19 * names.length : 0, height = 300 + extra;
  const surface = (surfaceOf || svgSurface)(width, height);
  const left = 58, right = 14, top = 26 + extra, bottom = 44, w = width - left - right, h = height - top - bottom;
  const all = series.flatMap((each) => [...each.mean, ...(each.low || []), ...(each.high || [])]).concat(marks.map((each) => each.value)).filter(isNumber);
  if (zero) all.push(0);
  let [low, high] = extent(all);
  if (low === high) { low -= 0.5; high += 0.5; }
  const pad = 0.05 * (high - low);
  if (low !== 0 || all.some((v) => v < 0)) low -= pad;
  high += pad;
  const x = (index) => left + (layers.length > 1 ? (index / (layers.length - 1)) * w : w / 2);
  const y = (value) => top + (1 - (value - low) / (high - low)) * h;
  if (surfaceOf) {
    surface.rect(0, 0, width, height, th.paper);
    surface.text(12, 20, short(title, Math.floor(width / 7)), { size: 13, fill: th.ink, weight: 600 });
    names.forEach((row, line) => row.forEach(({ each, index, x: begin }) => {
      surface.line(12 + begin, 38 + 19 * line, 34 + begin, 38 + 19 * line, colourOf(each, th, index), 2.4, DASHES[each.name] || '');
      surface.text(40 + begin, 42 + 19 * line, short(each.title, 40), { size: 12, fill: th.ink });
    }));
  }
  for (const value of ticks(low, high)) {
    surface.line(left, y(value), left + w, y(value), th.line, value === 0 ? 1.2 : 0.7);
    surface.text(left - 8, y(value) + 4, tick(form, value), { size: 11.5, fill: th.soft, anchor: 'end' });
  }
  surface.text(left - 46, top - 13, short(form === percent && !yTitle.endsWith('%') ? `${yTitle}, %` : yTitle, Math.floor(width / 7)), { size: 11.5, fill: th.soft });
  const every = Math.max(1, Math.ceil((layers.length * 24) / w));
  layers.forEach((layer, index) => { if (index % every === 0) surface.text(x(index), top + h + 17, String(layer), { size: 11.5, fill: th.soft, anchor: 'middle' }); });
  surface.text(left + w / 2, height - 8, xTitle, { size: 11.5, fill: th.soft, anchor: 'middle' });
  for (const mark of marks) {
    surface.line(left, y(mark.value), left + w, y(mark.value), th.soft, 1, '2 3');
    surface.text(left + w, y(mark.value) - 4, mark.label, { size: 11, fill: th.soft, anchor: 'end' });
  }
  if (at !== null) surface.line(x(at), top, x(at), top + h, th.accent, 1);
  series.forEach((each, index) => {
    const colour = colourOf(each, th, index);
    const known = each.mean.map((value, place) => place).filter((place) => isNumber(each.mean[place]));
    const banded = known.filter((place) => each.low && isNumber(each.low[place]) && isNumber(each.high[place]));
    const [upper, lower] = [each.high, each.low].map((edge) => banded.map((p) => [x(p), y(edge[p])]));
    if (banded.length > 1 && each.edged) [upper, lower].forEach((edge) => surface.path(edge, colour, 1, '1 3'));
    else if (banded.length > 1) surface.area([...upper, ...lower.reverse()], colour);
    surface.path(known.map((p) => [x(p), y(each.mean[p])]), colour, 1.8, DASHES[each.name] || '');
    if (known.length === 1 || layers.length <= 12) known.forEach((p) => surface.circle(x(p), y(each.mean[p]), 2.4, colour));
    if (at !== null && isNumber(each.mean[at])) surface.circle(x(at), y(each.mean[at]), 4, th.paper, { stroke: colour, 'stroke-width': 2 });
  });
  return { surface, geometry: { left, w, indexAt: (px) => clamp(Math.round(((px - left) / w) * (layers.length - 1)), 0, layers.length - 1) } };
}

/** A card of lines that is read at a layer, by pointer or by arrow keys; the reading is the legend. */
function linesCard({ title, name, data, key, cursor, tools = [], intro = [], band = '' }) {
  const place = `${key}at`;
  const reading = el('dl.legend');
  const now = () => { const own = data(); return cursor ? cursor.get() : clamp(state.number(place, own.best ?? 0), 0, own.layers.length - 1); };
  function read(speak = false) {
    const own = data(), at = now();
    const lines = own.series.map((each, index) => {
      const interval = each.low ? between(each.low[at], each.high[at], own.form) : '';
      const swatch = svgSurface(22, 12);
      swatch.root.classList.add('swatch');
      swatch.line(1, 6, 21, 6, colourOf(each, theme(), index), 2.6, DASHES[each.name] || '');
      return { said: `${each.title} ${own.form(each.mean[at])}`, parts: [el('dt', {}, swatch.root, each.title), el('dd', {}, own.form(each.mean[at]), interval ? el('span.interval', {}, ' ' + interval) : null)] };
    });
    fill(reading, el('dt.at', {}, `Layer ${own.layers[at]}`), el('dd.at', {}, band), lines.flatMap((each) => each.parts));
    if (speak) tell(`Layer ${own.layers[at]}: ${lines.map((each) => each.said).join(', ')}`);
  }
  function go(index, speak) {
    const own = data();
    const there = clamp(index, 0, own.layers.length - 1);
    if (cursor) cursor.set(there);
    else { state.set({ [place]: there }); found.redraw(); }
    if (speak) read(true);
  }
  const found = plotCard({
    title, name, tools, key: `${key}view`, body: intro,
    label: `${title}: lines over layers. Left and right arrow keys read a layer.`,
    draw: (surfaceOf, th, width) => drawLines({ ...data(), title: `${title}: ${document.title}`, at: surfaceOf ? null : now() }, surfaceOf, th, width),
    tableOf: () => { const d = data(); return table(title, ['Layer', ...d.series.map((each) => each.title)], d.layers.map((layer, at) => [String(layer), ...d.series.map((each) => `${d.form(each.mean[at])} ${each.low ? between(each.low[at], each.high[at], d.form) : ''}`)])); },
    keys: { ArrowLeft: () => go(now() - 1, true), ArrowRight: () => go(now() + 1, true), Home: () => go(0, true), End: () => go(1e6, true) },
    onCursor: () => read(),
    footer: [reading],
  });
  found.plot.addEventListener('pointermove', oncePerFrame((event) => {
    if (!found.geometry || found.plot.hidden) return;
    const index = found.geometry.indexAt(event.clientX - found.stage.getBoundingClientRect().left);
    if (index !== now()) go(index, false);
  }));
  return found;
}

// --- small marks

/** Draws as points on a line, their mean as a stroke, and two dotted marks. */
function strip(draws, mean, low, high, marks, width, th) {
  const surface = svgSurface(width, 34), pad = 6;
  const x = (value) => pad + ((value - low) / (high - low || 1)) * (width - 2 * pad);
  surface.line(pad, 17, width - pad, 17, th.line, 1);
  for (const mark of marks) surface.line(x(mark), 4, x(mark), 30, th.soft, 1, '2 2');
  draws.forEach((each) => surface.circle(x(each), 17, 3.6, th.accent, { 'fill-opacity': 0.35 }));
  surface.line(x(mean), 8, x(mean), 26, th.accent, 2.4);
  return surface.root;
}

/** A value with its interval on a scale, as a point with a whisker. */
function whisker(value, low, high, from, to, width, th, colour) {
  const surface = svgSurface(width, 18), pad = 5;
  const x = (each) => pad + clamp((each - from) / (to - from || 1), 0, 1) * (width - 2 * pad);
  surface.line(pad, 9, width - pad, 9, th.line, 1);
  if (from < 0 && to > 0) surface.line(x(0), 3, x(0), 15, th.soft, 1);
  if (isNumber(low) && isNumber(high)) {
    surface.line(x(low), 9, x(high), 9, colour || th.accent, 2);
    for (const each of [low, high]) surface.line(x(each), 5.5, x(each), 12.5, colour || th.accent, 1.4);
  }
  if (isNumber(value)) surface.circle(x(value), 9, 3.4, colour || th.accent);
  return surface.root;
}

/** A share as a bar. */
function bar(share, width, colour, th, height = 8) {
  const surface = svgSurface(width, height);
  surface.rect(0, 0, width, height, th.none, { rx: 2 });
  if (isNumber(share)) surface.rect(0, 0, Math.max(share > 0 ? 1 : 0, clamp(share, 0, 1) * width), height, colour, { rx: 2 });
  return surface.root;
}
