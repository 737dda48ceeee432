/* One drawing, three surfaces: SVG on the screen and in files, canvas for many cells and for PNG. */

const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "Noto Sans", "DejaVu Sans", sans-serif';
const LIGHT = {
  paper: '#ffffff', ink: '#1c1f24', soft: '#5a606b', line: '#dddcd6', none: '#f0efeb', accent: '#0b6375', dark: false,
  series: { resid: '#5e4fa2', resid_pre: '#5e4fa2', resid_mid: '#5e4fa2', ordinary: '#5e4fa2', mlp: '#1f7a3d', attn: '#c2341d' },
  many: ['#0b6375', '#b8540a', '#5e4fa2', '#1f7a3d', '#a02c6b', '#6b5b1e'],
};
const DARK = {
  paper: '#17191d', ink: '#ececE6', soft: '#a7adb8', line: '#353940', none: '#22252a', accent: '#67c7d8', dark: true,
  series: { resid: '#a79fe0', resid_pre: '#a79fe0', resid_mid: '#a79fe0', ordinary: '#a79fe0', mlp: '#6cc487', attn: '#ff8b70' },
  many: ['#67c7d8', '#f0a35e', '#a79fe0', '#6cc487', '#e58abb', '#cdbb6a'],
};
const DASHES = { attn: '5 3', mlp: '' };

const scheme = matchMedia('(prefers-color-scheme: dark)');
let printing = false;
function theme() {
  if (printing) return LIGHT;
  const wanted = state.get('theme');
  return (wanted ? wanted === 'dark' : scheme.matches) ? DARK : LIGHT;
}

const ruler = document.createElement('canvas').getContext('2d');
function widthOf(text, size = 12, weight = 400) {
  ruler.font = `${weight} ${size}px ${FONT}`;
  return ruler.measureText(text).width;
}

const SPACE = 'http://www.w3.org/2000/svg';
function node(name, attributes, text) {
  const found = document.createElementNS(SPACE, name);
  for (const [key, value] of Object.entries(attributes)) if (value !== undefined && value !== '') found.setAttribute(key, value);
  if (text !== undefined) found.textContent = text;
  return found;
}

const round = (value) => Math.round(value * 100) / 100;

function svgSurface(width, height) {
  const root = node('svg', { width, height, viewBox: `0 0 ${width} ${height}`, 'aria-hidden': 'true', focusable: 'false' });
  const add = (name, attributes, text) => root.appendChild(node(name, attributes, text));
  return {
    root,
    rect: (x, y, w, h, fill, more = {}) => add('rect', { x: round(x), y: round(y), width: round(w), height: round(h), fill, ...more }),
    line: (x1, y1, x2, y2, stroke, width = 1, dash = '') => add('line', { x1: round(x1), y1: round(y1), x2: round(x2), y2: round(y2), stroke, 'stroke-width': width, 'stroke-dasharray': dash }),
    path: (points, stroke, width = 1.6, dash = '') => add('polyline', { points: points.map((p) => p.map(round).join(',')).join(' '), fill: 'none', stroke, 'stroke-width': width, 'stroke-dasharray': dash, 'stroke-linejoin': 'round' }),
    area: (points, fill, alpha = 0.16) => add('polygon', { points: points.map((p) => p.map(round).join(',')).join(' '), fill, 'fill-opacity': alpha }),
    circle: (x, y, r, fill, more = {}) => add('circle', { cx: round(x), cy: round(y), r, fill, ...more }),
    text: (x, y, text, { size = 12, fill, anchor = 'start', weight = 400, turn = 0 } = {}) =>
      add('text', { x: round(x), y: round(y), 'font-size': size, 'font-family': FONT, fill, 'text-anchor': anchor, 'font-weight': weight, transform: turn ? `rotate(${turn} ${round(x)} ${round(y)})` : undefined }, text),
  };
}

function canvasSurface(width, height, scale = devicePixelRatio || 1) {
  const root = el('canvas', { 'aria-hidden': 'true' });
  root.width = Math.round(width * scale);
  root.height = Math.round(height * scale);
  root.style.width = `${width}px`;
  root.style.height = `${height}px`;
  const pen = root.getContext('2d');
  pen.scale(scale, scale);
  const stroked = (stroke, width, dash) => {
    pen.strokeStyle = stroke;
    pen.lineWidth = width;
    pen.setLineDash(dash ? dash.split(' ').map(Number) : []);
    pen.stroke();
  };
  const along = (points) => {
    pen.beginPath();
    points.forEach(([x, y], index) => (index ? pen.lineTo(x, y) : pen.moveTo(x, y)));
  };
  return {
    root,
    rect(x, y, w, h, fill, more = {}) {
      if (fill && fill !== 'none') { pen.fillStyle = fill; pen.fillRect(x, y, w, h); }
      if (more.stroke) { pen.beginPath(); pen.rect(x, y, w, h); stroked(more.stroke, more['stroke-width'] || 1, ''); }
    },
    line(x1, y1, x2, y2, stroke, width = 1, dash = '') { along([[x1, y1], [x2, y2]]); stroked(stroke, width, dash); },
    path(points, stroke, width = 1.6, dash = '') { along(points); pen.lineJoin = 'round'; stroked(stroke, width, dash); },
    area(points, fill, alpha = 0.16) { along(points); pen.closePath(); pen.globalAlpha = alpha; pen.fillStyle = fill; pen.fill(); pen.globalAlpha = 1; },
    circle(x, y, r, fill, more = {}) {
      pen.beginPath();
      pen.arc(x, y, r, 0, 7);
      pen.globalAlpha = more['fill-opacity'] ?? 1;
      if (fill !== 'none') { pen.fillStyle = fill; pen.fill(); }
      pen.globalAlpha = 1;
      if (more.stroke) stroked(more.stroke, more['stroke-width'] || 1, '');
    },
    text(x, y, text, { size = 12, fill, anchor = 'start', weight = 400, turn = 0 } = {}) {
      pen.save();
      pen.translate(x, y);
      pen.rotate((turn * Math.PI) / 180);
      pen.font = `${weight} ${size}px ${FONT}`;
      pen.fillStyle = fill;
      pen.textAlign = { start: 'left', middle: 'center', end: 'right' }[anchor];
      pen.fillText(text, 0, 0);
      pen.restore();
    },
  };
}

const rgbOf = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

/** A colour between the steps of a map. On dark paper a map that begins at white runs the other way, and begins at the paper. */
function colourMap(steps, dark) {
  const all = steps.map(rgbOf);
  const light = (rgb) => 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2];
  if (dark && light(all[0]) > light(all[all.length - 1])) {
    all.reverse();
    const paper = rgbOf(DARK.none);
    for (let at = 0; at < 6; at++) all[at] = all[at].map((each, index) => each + (1 - at / 6) * (paper[index] - each));
  }
  return (share) => {
    const at = clamp(share, 0, 1) * (all.length - 1), below = Math.min(Math.floor(at), all.length - 2);
    const mixed = all[below].map((each, index) => Math.round(each + (at - below) * (all[below + 1][index] - each)));
    return { fill: `rgb(${mixed.join(',')})`, ink: light(mixed) > 140 ? '#1c1f24' : '#ffffff' };
  };
}

/** Round numbers that a scale can be marked with. */
function ticks(low, high, about = 4) {
  const span = high - low || 1, rough = span / about, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((each) => each * power).find((each) => each >= rough * 0.999);
  const found = [];
  for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + 1e-9 * span; value += step) found.push(Math.abs(value) < step * 1e-6 ? 0 : value);
  return found;
}

// --- pictures to take along

/** Buttons that copy a drawing as SVG or PNG, in light colours, or save it where copying is not allowed. `draw(surfaceOf, theme)` draws
    onto a surface that it makes with `surfaceOf(width, height)`, and returns that. */
function takeAlong(name, draw) {
  const note = el('span.note', { role: 'status' });
  const say = (text) => { note.textContent = text; setTimeout(() => { note.textContent = ''; }, 4000); };
  const save = (blob, ending) => {
    const link = el('a', { href: URL.createObjectURL(blob), download: `${name}.${ending}` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    say(`saved ${name}.${ending}`);
  };
  const asSvg = () => {
    const { root } = draw((w, h) => svgSurface(w, h), LIGHT);
    root.removeAttribute('aria-hidden');
    return new XMLSerializer().serializeToString(root);
  };
  const asPng = () => new Promise((done) => draw((w, h) => canvasSurface(w, h, 3), LIGHT).root.toBlob(done, 'image/png'));
  const svg = async (event) => {
    const text = asSvg();
    try {
      if (event.shiftKey) throw new Error('wanted as a file');
      await navigator.clipboard.writeText(text);
      say('SVG copied');
    } catch { save(new Blob([text], { type: 'image/svg+xml' }), 'svg'); }
  };
  const png = async (event) => {
    const blob = await asPng();
    try {
      if (event.shiftKey) throw new Error('wanted as a file');
      await navigator.clipboard.write([new ClipboardItem({ 'image/png': blob })]);
      say('PNG copied');
    } catch { save(blob, 'png'); }
  };
  const hint = 'Copies the picture; with Shift it is saved as a file';
  return [note, el('button', { type: 'button', title: hint, onclick: svg }, 'Copy SVG'), el('button', { type: 'button', title: hint, onclick: png }, 'Copy PNG')];
}
