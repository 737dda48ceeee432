/* What is on the page of each kind of result. */

const data = JSON.parse(document.getElementById('data').textContent);
const fileName = (data.name + '-' + (data.head ? data.head.prompt[1] : data.model || '')).replace(/[^\p{L}\p{N}]+/gu, '-').replace(/^-|-$/g, '').slice(0, 60).toLowerCase() || 'mechedit';

/** Number, name, and a line under it. */
const key = (name, value, under) => el('div.key', {}, el('dt', {}, name), el('dd', {}, el('b', {}, value), under ? el('span', {}, under) : null));

function header(...more) {
  const choices = [['', 'Auto'], ['light', 'Light'], ['dark', 'Dark']];
  const select = el('select', { 'aria-label': 'Colours', onchange: () => { state.set({ theme: select.value }); dress(); redrawAll(); } }, choices.map(([value, name]) => el('option', { value }, name)));
  const set = () => { select.value = state.get('theme'); };
  set();
  readers.push(set);
  const title = data.head
    ? el('h1', {}, promptOf(data.head), data.head.answer !== null ? [el('span.arrow', { 'aria-label': 'is continued by' }, ' → '), el('span.answer', {}, said(short(data.head.answer, 200)))] : null)
    : el('h1', {}, said(short(data.title, 300)));
  return el('header.top', {}, el('div.eyebrow', {}, el('span', {}, data.name, data.model ? [' · ', said(data.model)] : null), el('label.theme', {}, select)), title, more);
}

function made() {
  return el('details.made', {}, el('summary', {}, 'How it was made'),
    el('dl', {}, data.made.map(([name, value]) => [el('dt', {}, said(name)), el('dd', {}, said(value))]).flat()));
}

/** Buttons that lead to the sites. */
function siteList(sites, card) {
  if (!sites.length) return null;
  return el('div.sites', {}, sites.map((site, index) => el('button.site', { type: 'button', onclick: () => { card().choose(site.kind, site.row, site.layer); card().plot.focus({ preventScroll: true }); } },
    el('b', {}, index && sites[index - 1].title === site.title ? 'but another token decides' : site.title), el('span', {}, said(site.said)))));
}

/** Kinds with their grids unpacked and a scale for each. */
function unpackKinds(scaleOf) {
  return data.kinds.map((kind) => {
    const grid = gridOf(kind.values, data.rows.length, data.layers.length), [lowest, highest] = extent(grid.all);
    const form = shown(data.share);
    const own = { ...kind, grid, form, lowest, highest };
    for (const name of ['low', 'high', 'restored']) if (kind[name]) own[name] = gridOf(kind[name], data.rows.length, data.layers.length);
    if (kind.draws) own.draws = drawsOf(kind.draws, data.layers.length);
    return { ...own, scale: scaleOf(own) };
  });
}

const column = (grid, row) => data.layers.map((_, layer) => { const value = grid.at(row, layer); return isNumber(value) ? value : null; });

/** Which layers' outputs a cell of a window restores; nothing of a state's. */
function windowAt(kind, layer) {
  if (!kind.blocks) return null;
  const [first, last] = kind.blocks[layer], end = data.layers.length - 1;
  const cut = last - first + 1 < kind.window ? [first === 0 && 'foot', last === end && 'top'].filter(Boolean).join(' and ') : '';
  return el('p.soft', {}, `window: ${first === last ? `layer ${first}` : `layers ${first} to ${last}`}${cut ? `, cut at the model's ${cut}` : ''}`);
}

makers.trace = () => {
  const form = shown(data.share);
  const scale = { clean: data.clean }, kinds = unpackKinds(() => scale);  // one for all kinds
  const low = Math.min(data.corrupted, ...kinds.map((kind) => kind.lowest)), high = Math.max(data.clean, ...kinds.map((kind) => kind.highest));
  Object.assign(scale, { low, high });
  let row = 0, kindNow = null;
  const total = data.clean - data.corrupted;
  function reading(kind, r, layer) {
    const token = data.rows[r], value = kind.grid.at(r, layer), draws = kind.draws(r, layer), th = theme();
    const gain = (value - data.corrupted) / total;
    return [
      el('p.place', {}, el('code.token', {}, said(token.label.slice(0, 400))), el('span', {}, `${token.role}, layer ${data.layers[layer]}`)),
      windowAt(kind, layer),
      el('p.value', {}, el('b', {}, num(value, form)), el('span', {}, said(data.label))),
      el('p.soft', {}, !isNumber(value) ? 'not traced' : isNumber(gain) ? `${percent(gain)} of the way from corrupted to clean` : 'clean and corrupted are the same'),
      draws.length > 1 ? el('div.draws', {}, strip(draws, value, low, high, [data.corrupted, data.clean], 236, th), el('p.soft', {}, `${draws.length} draws: ${form(Math.min(...draws))} to ${form(Math.max(...draws))}; dotted: corrupted, clean`)) : null,
      el('p.soft.also', {}, 'Here, by kind'),
      el('ul.bars', {}, kinds.map((each) => el('li', {}, el('span', {}, each.short), bar((each.grid.at(r, layer) - low) / (high - low || 1), 84, th.series[each.name] || th.accent, th), num(each.grid.at(r, layer), form)))),
    ];
  }
  const grid = gridCard({
    data, name: fileName, kinds, rows: data.rows, layers: data.layers, sites: data.sites, reading,
    label: `Heat map of ${data.rows.length} tokens by ${data.layers.length} layers. Arrow keys move from cell to cell; Home and End go to the first and last layer.`,
    first: (data.sites[0] || {}).kind, onMove: (kind, r) => { row = r; kindNow = kind; profile.redraw(); heading(); },
  });
  const names = el('span.which');
  const heading = () => fill(names, el('code.token', {}, said(short(data.rows[row].label, 40))), `, ${data.rows[row].role}`);
  const spread = (kind, r) => { const all = data.layers.map((_, layer) => kind.draws(r, layer)); return { low: all.map((each) => (each.length > 1 ? Math.min(...each) : null)), high: all.map((each) => (each.length > 1 ? Math.max(...each) : null)) }; };
  const profile = linesCard({
    title: 'By layer, at this token', name: `${fileName}-layers`, key: 'p', cursor: grid.layer, intro: [el('p.soft', {}, names)], band: data.n_draws > 1 ? `range of ${data.n_draws} draws, filled for the kind of the map` : '',
    data: () => ({
      series: kinds.map((kind) => ({ name: kind.name, title: kind.short, mean: column(kind.grid, row), ...spread(kind, row), edged: kind !== kindNow })),
      layers: data.layers, xTitle: 'layer', yTitle: data.label, form, marks: [{ value: data.clean, label: 'clean' }, { value: data.corrupted, label: 'corrupted' }],
    }),
  });
  heading();
  return [
    header(el('dl.keys', {}, key('Clean', num(data.clean, form), data.label), key('Corrupted', num(data.corrupted, form), 'with the subject corrupted'), key('Difference', num(total, shownDifference(data.share)), 'what restoring can bring back')), siteList(data.sites, () => grid)),
    el('div.split', {}, grid.element, el('aside.side', { 'aria-label': 'the cell' }, grid.reading)),
    profile.element,
  ];
};

makers.average = () => {
  const form = shown(data.share);
  const kinds = unpackKinds((kind) => ({ low: Math.min(0, kind.lowest), high: kind.highest }));
  let kindNow = kinds[0];
  const from = Math.min(0, ...kinds.map((kind) => Math.min(extent(kind.low.all)[0], kind.lowest)));
  const to = Math.max(...kinds.map((kind) => Math.max(extent(kind.high.all)[1], kind.highest)));
  const interval = (kind, r, layer) => between(kind.low.at(r, layer), kind.high.at(r, layer), form);
  function reading(kind, r, layer) {
    const th = theme(), value = kind.grid.at(r, layer);
    return [
      el('p.place', {}, el('b', {}, data.rows[r].label), el('span', {}, `${data.rows[r].role}, layer ${data.layers[layer]}`)),
      windowAt(kind, layer),
      el('p.value', {}, el('b', {}, num(value, form)), el('span', {}, 'average indirect effect')),
      el('p.soft', {}, interval(kind, r, layer) ? `95 % interval over facts ${interval(kind, r, layer)}` : `${data.rows[r].n} facts are too few for an interval`),
      el('div.draws', {}, whisker(value, kind.low.at(r, layer), kind.high.at(r, layer), from, to, 236, th)),
      el('p.soft.also', {}, 'Here, by kind'),
      el('ul.bars', {}, kinds.map((each) => el('li', {}, el('span', {}, each.short), whisker(each.grid.at(r, layer), each.low.at(r, layer), each.high.at(r, layer), from, to, 84, th, th.series[each.name]), num(each.grid.at(r, layer), form)))),
    ];
  }
  const grid = gridCard({
    data, name: fileName, kinds, rows: data.rows, layers: data.layers, sites: data.sites, reading, first: (data.sites[0] || {}).kind,
    label: `Heat map of ${data.rows.length} token roles by ${data.layers.length} layers. Arrow keys move from cell to cell.`,
    onMove: (kind) => { kindNow = kind; lines.redraw(); fill(which, kind.title); },
  });
  const which = el('span', {}, kindNow.title);
  const lines = linesCard({
    title: 'By token role', name: `${fileName}-roles`, key: 'p', cursor: grid.layer, band: data.few ? `${data.n} facts are too few for intervals` : '95 % intervals over facts', intro: [el('p.soft', {}, which)],
    data: () => ({
      series: data.rows.map((each, r) => ({ name: '', title: each.label, mean: column(kindNow.grid, r), low: column(kindNow.low, r), high: column(kindNow.high, r) })).filter((each) => each.mean.some(isNumber) && !/before|further/.test(each.title)),
      layers: data.layers, xTitle: kindNow.axis, yTitle: 'average indirect effect', form, zero: true,
    }),
  });
  const run = (name, own = form) => { const each = data.runs[name]; return key(name[0].toUpperCase() + name.slice(1), num(each.mean, own), between(each.low, each.high, own)); };
  return [
    header(el('dl.keys', {}, run('clean'), run('corrupted'), run('total effect', shownDifference(data.share))), siteList(data.sites, () => grid)),
    el('div.split', {}, grid.element, el('aside.side', { 'aria-label': 'the cell' }, grid.reading)),
    lines.element,
    data.exceptions.length ? el('details.made', {}, el('summary', {}, `${data.exceptions.length} of ${data.n} facts are decided at another token than the subject's last`), el('ul.plain', {}, data.exceptions.map(([subject, role]) => el('li', {}, said(subject), el('span.soft', {}, ` ${role}`))))) : null,
  ];
};

makers.severed = () => {
  const form = shown(data.share), one = data.n === 1;
  const best = data.lines[0].mean.reduce((top, value, at, all) => (value > all[top] ? at : top), 0);
  const lines = linesCard({
    title: one ? `${data.role}: one state restored` : `${data.role}: indirect effect over ${data.n} facts`, name: fileName, key: 'v', band: data.few ? `${data.n} facts are too few for intervals` : data.band,
    data: () => ({ series: data.lines, layers: data.layers, best, xTitle: 'layer of the restored state', yTitle: one ? 'measured after restoring' : 'indirect effect', form, zero: !one, marks: one ? [{ value: data.clean, label: 'clean' }, { value: data.corrupted, label: 'corrupted' }] : [] }),
  });
  const lost = data.lines.slice(1).map((line) => line.mean.map((value, at) => data.lines[0].mean[at] - value));
  const most = lost.map((all) => all.reduce((top, value, at) => (value > all[top] ? at : top), 0));
  return [
    header(el('dl.keys', {}, one ? [key('Clean', num(data.clean, form)), key('Corrupted', num(data.corrupted, form))] : null,
      ['MLPs', 'attention'].map((name, index) => key(`Most lost without ${name}`, num(lost[index][most[index]], shownDifference(data.share)), `layer ${data.layers[most[index]]}`)))),
    lines.element,
  ];
};

makers.sweep = () => {
  const kinds = unpackKinds((kind) => ({ low: kind.from ?? Math.min(0, kind.lowest), high: kind.to ?? kind.highest }));
  const strengths = data.strengths ? gridOf(data.strengths, data.rows.length, data.layers.length) : null;
  let kindNow = kinds[0];
  function reading(kind, r, layer) {
    const th = theme();
    return [
      el('p.place', {}, el('b', {}, data.rows[r].label), el('span', {}, `edited at layer ${data.layers[layer]}`)),
      el('p.value', {}, el('b', {}, num(kind.grid.at(r, layer), percent)), el('span', {}, kind.short)),
      el('ul.bars', {}, kinds.map((each) => el('li', {}, el('span', {}, each.short), bar((each.grid.at(r, layer) - Math.min(0, each.scale.low)) / (each.scale.high - Math.min(0, each.scale.low) || 1), 84, each.name === 'effect' ? th.series.mlp : th.accent, th), num(each.grid.at(r, layer), percent)))),
      strengths ? el('p.soft', {}, `strength there: ${figure(strengths.at(r, layer))}`) : null,
    ];
  }
  const grid = gridCard({
    data, name: fileName, kinds, rows: data.rows, layers: data.layers, reading, first: 'S', numbers: true,
    label: `Heat map of ${data.rows.length} tokens by ${data.layers.length} layers. Arrow keys move from cell to cell.`,
    onMove: (kind) => { kindNow = kind; lines.redraw(); fill(which, kind.title); },
  });
  kindNow = kinds.find((each) => each.name === 'S');
  const which = el('span');
  const lines = linesCard({ title: 'By layer', name: `${fileName}-layers`, key: 'p', cursor: grid.layer, intro: [el('p.soft', {}, which)], band: `means over ${data.n} facts`, data: () => ({ series: data.rows.map((each, r) => ({ name: '', title: each.label, mean: column(kindNow.grid, r) })), layers: data.layers, xTitle: 'edited layer', yTitle: kindNow.title, form: percent }) });
  const names = { ES: 'efficacy', PS: 'paraphrase', S: 'S' };
  const foretold = el('dl.whiskers');
  const draw = () => fill(foretold, data.correlations.flatMap((each) => [el('dt', {}, names[each.name] || each.name), el('dd', {}, whisker(each.mean, each.low, each.high, -1, 1, 220, theme()), el('span.num', {}, figure(each.mean, 2)), el('span.interval', {}, between(each.low, each.high, (v) => minus(v.toFixed(2))) || 'too few facts for an interval'))]));
  cards.push({ redraw: draw });
  draw();
  return [
    header(),
    el('div.split', {}, grid.element, el('aside.side', { 'aria-label': 'the cell' }, grid.reading)),
    lines.element,
    card('Does the trace foretell where an edit works?', [], el('p.soft', {}, 'Rank correlation, over layers and tokens, of a score with the indirect effect of the trace: −1 to 1.'), foretold),
  ];
};

const BANDS = 'A band is where a number of a sound edit lies: as this edit\'s settings have it, or else as its editor has it for every model.';

makers.edit = () => {
  const places = [];
  const fact = (each) => el('section.card', {},
    data.facts.length > 1 ? el('h2', {}, promptOf(each.head)) : el('h2', {}, 'What the model says'),
    el('div.scroll', { tabindex: 0, role: 'region', 'aria-label': 'probabilities before and after' }, table('Probability of each target before and after the edit', ['Target', 'Before', 'After'], [['new', 'target_new', 'p_new'], ['true', 'target_true', 'p_true']].filter(([, name]) => each[name]).map(([which, name, p]) => [
      el('span', {}, said(short(each[name], 2000)), el('span.tag', {}, which)), ...['before', 'after'].map((when) => { const place = el('span.barred'); places.push(() => fill(place, bar(each[when][p], 150, p === 'p_new' ? theme().accent : theme().soft, theme(), 10), num(each[when][p], percent))); return place; }),
    ]), { class: 'quiet' })));
  const isEdge = (value) => isNumber(value) && Math.abs(value) < 1e200;  // beyond that a band is open
  const inside = (each) => each.from === undefined ? null : isNumber(each.value) && !(isEdge(each.from) && each.value < each.from) && !(isEdge(each.to) && each.value > each.to);
  const edge = (value) => (Math.abs(value) >= 1e6 ? figure(value) : minus(Number(value.toPrecision(4))));
  const band = ({ from, to }) => [isEdge(from) && (isEdge(to) ? edge(from) : `from ${edge(from)}`), isEdge(to) && `to ${edge(to)}`].filter(Boolean).join(' ') || 'open';
  const banded = data.numbers.some((each) => each.from !== undefined);
  const verdict = (each) => inside(each) === null ? ['', ''] : [[band(each), ' ', el('span.tag', {}, each.own ? 'settings' : 'editor')], inside(each) ? 'within' : el('b', {}, `outside${each.advice && ': '}${each.advice}`)];
  const numbers = table('What the edit measured of itself', ['Number', 'Value', ...(banded ? ['Band', 'Verdict'] : [])], data.numbers.map((each) => [each.name.replaceAll('_', ' '), figure(each.value, 4), ...(banded ? verdict(each) : [])]), { class: 'quiet' });
  const changes = table('The weights that change', ['Weight', 'Layer', 'Kind', 'Norm of the change'], data.changes.map((each) => [el('code', {}, said(each.weight)), String(each.layer), each.kind.replaceAll('_', ' '), figure(each.norm, 4)]), { class: 'quiet' });
  cards.push({ redraw: () => places.forEach((each) => each()) });
  const first = data.facts[0];
  if (data.facts.length === 1) data.head = { ...first.head, answer: first.target_new };
  return [
    header(el('dl.keys', {}, key('Editor', said(data.editor)), data.facts.length === 1 ? [key('P(new)', num(first.after.p_new, percent), ['before ', num(first.before.p_new, percent)]), key('P(true)', num(first.after.p_true, percent), ['before ', num(first.before.p_true, percent)])] : key('Facts', String(data.facts.length)))),
    data.reasons.length || data.notes.length ? el('section.card.warned', {}, el('h2', {}, 'Notes'), el('ul', {}, [...data.reasons, ...data.notes].map((each) => el('li', {}, said(each))))) : null,
    data.told ? card('What the model is told', [], el('blockquote', {}, said(data.told, true))) : null,
    data.facts.map(fact),
    card('Numbers', [], banded ? el('p.soft', {}, BANDS) : null, el('div.scroll', { tabindex: 0, role: 'region', 'aria-label': 'numbers of the edit' }, numbers)),
    data.changes.length ? card('Changed weights', [], el('div.scroll', { tabindex: 0, role: 'region', 'aria-label': 'changed weights' }, changes)) : null,
  ];
};

function dress() {
  const wanted = state.get('theme');
  if (wanted) document.documentElement.dataset.theme = wanted;
  else delete document.documentElement.dataset.theme;
}

async function open() {
  dress();
  const parts = await makers[data.kind]();
  const main = el('main', {}, parts.flat(2));
  main.append(made(), el('footer.foot', {}, 'Made by mechedit. This file needs no connection and sends nothing.'));
  document.body.append(main, live);
  redrawAll();
  document.documentElement.dataset.ready = 'yes';
}
addEventListener('hashchange', () => { state.values = new URLSearchParams(location.hash.slice(1)); dress(); readers.forEach((each) => each()); redrawAll(); });
open().catch((error) => { document.body.append(el('main', {}, el('h1', {}, 'This page could not be drawn'), el('p', {}, String(error.message)))); throw error; });
