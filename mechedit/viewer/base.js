/* Elements, text, numbers, and the state that stands in the address. Text is only ever written as text. */

const ESCAPES = /[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu;
const makers = {};  // what draws the page of each kind of result
const JOINERS = '\u200c\u200d';

/** Text with what cannot be seen written out: controls, marks that turn the order of letters round, halves of pairs. */
function visible(text, lines = false) {
  return String(text).replace(ESCAPES, (c) => {
    if (JOINERS.includes(c) || (lines && c === '\n')) return c;
    if (c === '\n') return '⏎';
    if (c === '\t') return '⇥';
    return '\\u' + c.codePointAt(0).toString(16).padStart(4, '0');
  });
}

/** At most so many characters, cut where no pair is torn. */
function short(text, most = 28) {
  const all = [...visible(text).slice(0, 4 * most)];
  return all.length > most ? all.slice(0, most - 1).join('') + '…' : all.join('');
}

/** An element: attributes, `on…` listeners, and children that are elements or text. */
function el(name, attributes = {}, ...children) {
  const [tag, ...classes] = name.split('.');
  const found = document.createElement(tag);
  if (classes.length) found.className = classes.join(' ');
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith('on')) found.addEventListener(key.slice(2), value);
    else if (key === 'text') found.textContent = value;
    else found.setAttribute(key, value === true ? '' : value);
  }
  found.append(...children.flat(9).filter((each) => each !== null && each !== undefined && each !== false));
  return found;
}

/** Text of others: isolated, so that its direction changes nothing around it. */
const said = (text, lines = false) => el('bdi', {}, visible(text, lines));

function fill(element, ...children) {
  element.replaceChildren(...children.flat(9).filter((each) => each !== null && each !== undefined && each !== false));
  return element;
}

/** A prompt of a fact: subject underlined, its answer behind it. */
function promptOf(head) {
  const [before, subject, after] = head.prompt;
  return [before && said(short(before, 300)), subject && el('span.subject', { title: 'subject' }, said(short(subject, 200))), after && said(short(after, 300))];
}

// --- numbers

const isNumber = (value) => typeof value === 'number' && Number.isFinite(value);

/** The least and the greatest number of any list, however long; what is no number is left out. */
function extent(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) if (isNumber(value)) { low = Math.min(low, value); high = Math.max(high, value); }
  return [low, high];
}

/** A number in few figures: 47.2, 0.00231, 1.2e-7. */
function figure(value, wanted = 3) {
  const digits = typeof wanted === 'number' ? wanted : 3;
  if (!isNumber(value)) return '–';
  if (value === 0) return '0';
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-4) return value.toExponential(1).replace('-', '−').replace('e−', 'e−').replace('e-', 'e−').replace('e+', 'e');
  return minus(value.toPrecision(size >= 1 ? Math.max(digits, Math.ceil(Math.log10(size + 1))) : digits));
}

const minus = (text) => String(text).replace(/^-/, '−').replace('e-', 'e−');

const LEAST = 0.0001;  // of a share; what is smaller is said to be that

/** A share in percent: 47.2 %, 0.17 %, < 0.01 %. */
function percent(value, unit = true) {
  if (!isNumber(value)) return '–';
  const scaled = 100 * value, size = Math.abs(value);
  const text = size === 0 ? '0' : size < LEAST ? (value > 0 ? '< 0.01' : '> −0.01') : size >= 0.00095 ? scaled.toFixed(1) : scaled.toPrecision(2);
  return minus(text) + (unit ? '\u202f%' : '');
}

/** A difference of shares, in percentage points. */
const points = (value, unit = true) => percent(value, false) + (unit && isNumber(value) ? ' points' : '');

const shown = (share) => (share ? percent : figure);
const shownDifference = (share) => (share ? points : figure);

/** What a number that is only said to be small is, for its title. */
const exactly = (value, form) => (form !== figure && isNumber(value) && value !== 0 && Math.abs(value) < LEAST ? `${figure(value)} as a share of 1` : null);

/** A number as text that has its title. */
const num = (value, form) => el('span.num', { title: exactly(value, form) }, form(value));

/** [low, high], or nothing where there is no interval. */
function between(low, high, form, unit = '') {
  return isNumber(low) && isNumber(high) ? `[${form(low, false)}, ${form(high, false)}]${unit}` : '';
}

function bytes(text) {
  const raw = atob(text), found = new Uint8Array(raw.length);
  for (let at = 0; at < raw.length; at++) found[at] = raw.charCodeAt(at);
  return found;
}

/** Numbers in base64, [row, column]. */
function gridOf(text, rows, columns) {
  const found = new Float32Array(bytes(text).buffer);
  return { rows, columns, at: (row, column) => found[row * columns + column], all: found };
}

/** Draws in 16 bits: what they are at a row and a column. */
function drawsOf(levels, columns) {
  const found = new Uint16Array(bytes(levels.data).buffer);
  return (row, column) => {
    const begin = (row * columns + column) * levels.n;
    return Array.from(found.subarray(begin, begin + levels.n)).filter((each) => each < 65535).map((each) => levels.low + each * levels.step);
  };
}

/** What was compressed; browsers before 2023 cannot. Five of 85 letters are four bytes; the last group may be short. */
const LETTERS = '0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%:()*+-;.=/?@^_`{|}~';
async function unpacked(text) {
  if (typeof DecompressionStream === 'undefined') throw new Error('this browser cannot unpack the data; a newer one can');
  const value = new Uint8Array(128), groups = Math.ceil(text.length / 5), found = new DataView(new ArrayBuffer(4 * groups));
  for (let index = 0; index < 85; index++) value[LETTERS.charCodeAt(index)] = index;
  for (let group = 0; group < groups; group++) {
    let number = 0;
    for (let at = 5 * group; at < 5 * group + 5; at++) number = 85 * number + (at < text.length ? value[text.charCodeAt(at)] : 84);
    found.setUint32(4 * group, number);
  }
  const whole = new Uint8Array(found.buffer, 0, text.length - groups);
  return new Response(new Blob([whole]).stream().pipeThrough(new DecompressionStream('gzip'))).arrayBuffer();
}

/** Text that was coded word by word (viewer/packing.py). */
async function textOf(packed, words) {
  const codes = new Uint8Array(await unpacked(packed)), decoder = new TextDecoder(), found = [];
  for (let at = 0; at < codes.length; at++) {
    const code = codes[at];
    if (code < 192) found.push(words[code]);
    else if (code < 255) found.push(words[192 + 256 * (code - 192) + codes[++at]]);
    else { found.push(decoder.decode(codes.subarray(at + 2, at + 2 + codes[at + 1]))); at += 1 + codes[at + 1]; }
  }
  return found.join('');
}

// --- state, in the address

const state = {
  values: new URLSearchParams(location.hash.slice(1)),
  get: (name, otherwise = '') => state.values.get(name) ?? otherwise,
  number: (name, otherwise) => (/^-?\d+$/.test(state.get(name)) ? Number(state.get(name)) : otherwise),
  set(changes) {
    for (const [name, value] of Object.entries(changes)) {
      if (value === null || value === '' || value === undefined) state.values.delete(name);
      else state.values.set(name, value);
    }
    try {
      history.replaceState(null, '', '#' + state.values);
    } catch { /* a frame without an address of its own */ }
  },
};

/** An element that a screen reader reads out when its text changes. */
const live = el('div.unseen', { 'aria-live': 'polite', role: 'status' });
let later = 0;
function tell(text) {
  clearTimeout(later);
  later = setTimeout(() => { live.textContent = text; }, 60);
}

/** What is set again when somebody goes to another address on the open page. */
const readers = [];

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

/** Call at most once a frame. */
function oncePerFrame(call) {
  let waits = false, last = [];
  return (...given) => {
    last = given;
    if (waits) return;
    waits = true;
    requestAnimationFrame(() => { waits = false; call(...last); });
  };
}
