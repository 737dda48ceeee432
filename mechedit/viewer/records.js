/* An evaluation, or two side by side: means with intervals, the records with sort and filter, and what is behind a record's numbers. */

const PAGE_SIZE = 50;
const WANTED_NEW = new Set(['prompt', 'paraphrase']);  // of other kinds of prompt the model should keep its own answer

/** Columns, with one for the unedited model where two results have the same numbers of it. */
function shownOnce(columns, numbers, size) {
  const all = columns.map((each, at) => ({ ...each, at })), [first, second] = all.filter((each) => each.stage === 'before');
  if (!second) return all;
  for (let index = 0; index < size; index++) {
    const [a, b] = [numbers[first.at * size + index], numbers[second.at * size + index]];
    if (isNumber(a) && isNumber(b) && Math.abs(a - b) > 1e-6 * (1 + Math.abs(a))) return all;
  }
  first.shared = true;
  return all.filter((each) => each !== second);
}

makers.evaluation = async () => {
  const { metrics, results, records } = data, several = results.length > 1;
  const numbers = new Float32Array(await unpacked(data.numbers));
  const columns = shownOnce(data.columns, numbers, metrics.length * records.length);
  const place = Object.fromEntries(metrics.map((each, index) => [each.name, index]));
  const valueOf = (column, name, record) => numbers[(columns[column].at * metrics.length + place[name]) * records.length + record];
  const nameOf = (column) => (several && !column.shared ? `${results[column.result].label} ` : '') + column.stage;
  const colourAt = (index, th) => {
    const { result, stage } = columns[index];
    return stage === 'before' ? th.soft : th.many[result === 0 ? (stage === 'after' ? 0 : 3) : (stage === 'after' ? 1 : 2)];
  };
  const metric = (name) => metrics[place[name]];
  function form(name, value, unit = true) {
    if (!isNumber(value)) return '–';
    const own = metric(name), scaled = own.scale * value;
    if (own.unit === '%') return percent(value, unit).replace(/^0(?=\u202f|$)/, '0.0');
    if (own.scale > 1) return minus(scaled.toFixed(1));
    return figure(scaled);
  }
  const counted = (n) => `${n} record${n === 1 ? '' : 's'}`;
  const mean = (index, name) => { const { result, stage } = columns[index]; return results[result].tables[stage][name]; };

  // --- means

  const shares = metrics.filter((each) => each.unit === '%' && each.better === 'higher' && (each.support || [])[0] === 0 && !['edited', 'next_token_same'].includes(each.name) && columns.some((_, index) => isNumber((mean(index, each.name) || [])[0])));
  function drawMeans(surfaceOf, th, width) {
    const left = 108, right = 20, names = legendRows(columns.map((column) => ({ title: short(nameOf(column), 30) })), width - left);
    const first = 34 + (surfaceOf ? 22 : 0), top = first + 19 * (names.length - 1), line = Math.max(22, 11 * columns.length + 6), height = top + line * shares.length + 34;
    const all = shares.flatMap((each) => columns.flatMap((_, index) => (mean(index, each.name) || []).slice(0, 3))).filter(isNumber);
    const low = Math.min(0, ...all), x = (value) => left + ((value - low) / (1 - low)) * (width - left - right);
    const surface = (surfaceOf || svgSurface)(width, height);
    if (surfaceOf) { surface.rect(0, 0, width, height, th.paper); surface.text(8, 17, short(data.title, Math.floor(width / 7)), { size: 13, fill: th.ink, weight: 600 }); }
    names.forEach((row, at) => row.forEach(({ each, index, x: begin }) => {
      surface.circle(left + begin + 4, first + 19 * at - 20, 4, colourAt(index, th));
      surface.text(left + begin + 14, first + 19 * at - 16, each.title, { size: 12, fill: th.ink });
    }));
    for (const value of ticks(low, 1, 5)) {
      surface.line(x(value), top, x(value), top + line * shares.length, th.line, value === 0 ? 1.4 : 0.7);
      surface.text(x(value), top + line * shares.length + 17, percent(value).replace('.0', ''), { size: 11.5, fill: th.soft, anchor: 'middle' });
    }
    shares.forEach((each, row) => {
      const middle = top + (row + 0.5) * line;
      surface.text(left - 14, middle + 4, each.name, { size: 12.5, fill: th.ink, anchor: 'end' });
      columns.forEach((_, index) => {
        const [value, from, to] = mean(index, each.name) || [], y = middle + (index - (columns.length - 1) / 2) * 10, colour = colourAt(index, th);
        if (!isNumber(value)) return;
        if (isNumber(from) && isNumber(to)) {
          surface.line(x(from), y, x(to), y, colour, 1.8);
          for (const edge of [from, to]) surface.line(x(edge), y - 3, x(edge), y + 3, colour, 1.3);
        }
        surface.circle(x(value), y, 3.6, colour);
      });
    });
    return { surface, geometry: null };
  }
  function meansTable() {
    const differs = Object.fromEntries(data.differences.map((each) => [each.name, each]));
    const headings = ['Number', ...columns.map(nameOf), ...(several ? [`${results[1].label} less ${results[0].label}`, 'p, corrected'] : [])];
    return table('Means over records with 95 % intervals', headings, metrics.map((each) => [
      el('span', { title: each.meaning }, each.label),
      ...columns.map((_, index) => { const [value, low, high, n] = mean(index, each.name) || []; return isNumber(value) ? [form(each.name, value), ' ', el('span.interval', {}, between(low, high, (v) => form(each.name, v, false)) + (n !== records.length ? ` n = ${n}` : ''))] : '–'; }),
      ...(several ? (differs[each.name] ? [[form(each.name, differs[each.name].mean), ' ', el('span.interval', {}, between(differs[each.name].low, differs[each.name].high, (v) => form(each.name, v, false)))], isNumber(differs[each.name].p) ? (differs[each.name].p < 0.001 ? '< .001' : differs[each.name].p.toFixed(3)) : ''] : ['', '']) : []),
    ]));
  }
  const means = plotCard({ title: 'Means, with 95 % intervals over records', name: fileName, draw: drawMeans, tableOf: meansTable, key: 'mview', label: `Means of ${shares.length} shares with their intervals; the button Table has all ${metrics.length} numbers.` });

  // --- records

  const stages = [...new Set(columns.map((each) => each.stage))];
  const stage = () => (stages.includes(state.get('stage')) ? state.get('stage') : stages.includes('after') ? 'after' : stages[0]);
  const usual = ['ES', 'PS', 'NS', 'p_new', 'answer', 'efficacy', 'paraphrase', 'specificity'].filter((name) => name in place && name !== 'S');
  const perRecord = metrics.filter((each) => each.name !== 'S').map((each) => each.name);
  const shownNames = () => { const own = state.get('numbers').split(',').filter((name) => perRecord.includes(name)); return own.length ? own : usual.length ? usual : perRecord.slice(0, 5); };
  const shownColumns = () => columns.map((each, index) => ({ ...each, index })).filter((each) => each.stage === stage());
  const [ID, SUBJECT, PROMPT, NEW, TRUE, RELATION, NOTE] = [0, 1, 2, 3, 4, 5, 6];
  const words = records.map((each) => each.filter(Boolean).join('\n').toLowerCase());
  const notes = (record) => record.slice(NOTE).map((note, index) => (note ? (several ? `${results[index].label}: ${note}` : note) : note === null ? `${results[index].label} does not have this record` : '')).filter(Boolean);

  function matches(index, terms) {
    return terms.every((term) => {
      const found = /^(?:([ab])\.)?([a-z_+]+)(<=|>=|<|>|=)(-?[\d.]+)$/i.exec(term);
      const name = found && perRecord.find((each) => each.toLowerCase() === found[2].toLowerCase());
      if (!name) return words[index].includes(term.toLowerCase());
      const own = shownColumns(), column = own[found[1] && found[1].toLowerCase() === 'b' ? 1 : 0];
      if (!column) return false;
      const value = valueOf(column.index, name, index) * metric(name).scale, edge = Number(found[4]);
      const slack = 1e-6 * (1 + Math.abs(edge));  // seven of ten are 69.9999988 % in single precision
      return { '<': value < edge - slack, '<=': value <= edge + slack, '>': value > edge + slack, '>=': value >= edge - slack, '=': Math.abs(value - edge) < 0.05 }[found[3]];
    });
  }
  function chosen() {
    const terms = state.get('q').split(/\s+/).filter(Boolean), relation = state.get('relation');
    const found = records.map((_, index) => index).filter((index) => (!relation || records[index][RELATION] === relation) && (!state.get('noted') || notes(records[index]).length) && matches(index, terms));
    const [name, column, way] = state.get('sort').split('.');
    if (name === 'fact') found.sort((a, b) => records[a][PROMPT].localeCompare(records[b][PROMPT]));
    else if (name in place && columns[column]) {
      const worth = (index) => { const value = valueOf(Number(column), name, index); return isNumber(value) ? value : Infinity; };
      found.sort((a, b) => { const [x, y] = [worth(a), worth(b)]; return x === y ? a - b : x === Infinity ? 1 : y === Infinity ? -1 : way === 'down' ? y - x : x - y; });
      return found;
    }
    if (way === 'down') found.reverse();
    return found;
  }
  function sorter(key, label, tip) {
    const [name, column, way] = state.get('sort').split('.'), mine = key === `${name}.${column}`;
    return el('th', { scope: 'col', role: 'columnheader', 'aria-sort': mine ? (way === 'down' ? 'descending' : 'ascending') : null },
      el('button.sort', { type: 'button', title: tip, onclick: () => { state.set({ sort: `${key}.${mine && way !== 'down' ? 'down' : 'up'}`, page: null }); list(); const again = holder.querySelector(`[data-key="${key}"]`); if (again) again.focus(); }, 'data-key': key }, label, mine ? (way === 'down' ? ' ↓' : ' ↑') : ''));
  }

  const keys = el('dl.keys'), keysOf = ['S', 'ES', 'PS', 'NS', 'efficacy', 'paraphrase', 'specificity'].filter((name) => name in place).slice(0, 4);
  /** The means of the stage that is shown. */
  function drawKeys() {
    const own = shownColumns().map((each) => each.index);
    fill(keys, keysOf.map((name) => key(`${name}, ${stage()}`, own.map((index) => form(name, (mean(index, name) || [])[0])).join(' | '), own.map((index) => { const [, low, high] = mean(index, name) || []; return between(low, high, (v) => form(name, v, false)); }).filter(Boolean).join(' | '))));
  }

  const holder = el('div.scroll.records', { tabindex: 0, role: 'region', 'aria-label': 'records' });
  const pager = el('div.pager'), count = el('span.soft', { role: 'status' }), colours = el('p.soft');
  const isPoor = (column, name, value) => column.stage !== 'before' && metric(name).unit === '%' && metric(name).better === 'higher' && isNumber(value) && value < 0.5;
  let rows = [];
  function list() {
    const found = chosen(), own = shownColumns(), names = shownNames(), selected = state.number('record', -1);
    const pages = Math.max(1, Math.ceil(found.length / PAGE_SIZE)), page = clamp(state.number('page', 1), 1, pages);
    rows = found;
    const body = found.slice((page - 1) * PAGE_SIZE, page * PAGE_SIZE).map((index) => {
      const record = records[index];
      return el('tr', { role: 'row', 'aria-current': index === selected ? 'true' : null, 'data-record': index, onclick: () => select(index) },
        el('th', { scope: 'row', role: 'rowheader' }, el('button.link', { type: 'button' }, said(short(record[PROMPT], 90)), ' ', el('span.arrow', {}, '→ '), el('span.answer', {}, said(short(record[NEW], 30)))), record[TRUE] ? el('span.soft', {}, ' not ', said(short(record[TRUE], 30))) : null, notes(record).length ? el('span.tag', {}, 'note') : null),
        names.flatMap((name) => own.map((column) => { const value = valueOf(column.index, name, index); return el('td', { role: 'cell', class: isPoor(column, name, value) ? 'poor' : null }, form(name, value, false)); })));
    });
    fill(holder, el('table', { role: 'table' }, el('caption.unseen', {}, 'Records with their numbers'),
      el('thead', { role: 'rowgroup' }, el('tr', { role: 'row' }, sorter('fact.', 'Record', 'Sort by prompt'), names.flatMap((name) => own.map((column) => sorter(`${name}.${column.index}`, several ? `${metric(name).label} · ${short(results[column.result].label, 16)}` : metric(name).label, metric(name).meaning))))),
      el('tbody', { role: 'rowgroup' }, body)));
    fill(colours, own.some((each) => each.stage !== 'before') ? [el('b.poor', {}, 'Below 50 %'), ' is in this colour where more is better.'] : null);
    drawKeys();
    fill(count, `${found.length} of ${counted(records.length)}`);
    fill(pager, pages > 1 ? [
      el('button', { type: 'button', disabled: page === 1, onclick: () => { state.set({ page: page - 1 }); list(); } }, 'Previous'),
      el('span.soft', {}, `${page} of ${pages}`),
      el('button', { type: 'button', disabled: page === pages, onclick: () => { state.set({ page: page + 1 }); list(); } }, 'Next')] : null);
  }
  holder.addEventListener('keydown', (event) => {
    const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!by || !rows.length) return;
    event.preventDefault();
    const at = clamp(rows.indexOf(state.number('record', -1)) + by, 0, rows.length - 1);
    state.set({ page: Math.floor(at / PAGE_SIZE) + 1 });
    list();
    select(rows[at]);
    const row = holder.querySelector(`[data-record="${rows[at]}"]`);
    row.scrollIntoView({ block: 'nearest' });
    row.querySelector('button').focus({ preventScroll: true });
  });

  const search = el('input', { type: 'search', placeholder: 'Search, or PS<50', 'aria-label': `Search in records; a number such as PS<50 filters by it${several ? ', B.PS<50 by the second' : ''}`, oninput: oncePerFrame(() => { state.set({ q: search.value, page: null }); list(); }) });
  readers.push(() => { search.value = state.get('q'); });
  const picker = (name, label, options, current = () => state.get(name)) => {
    const found = el('select', { 'aria-label': label, onchange: () => { state.set({ [name]: found.value, page: null, ...(name === 'stage' ? { sort: null } : {}) }); list(); } }, options.map(([value, text]) => el('option', { value }, short(text, 40))));
    readers.push(() => { found.value = current(); });
    return found;
  };
  const relations = [...new Set(records.map((each) => each[RELATION]))].filter(Boolean).sort();
  const anyNote = records.some((each) => notes(each).length);
  const which = el('details.which', {}, el('summary', {}, 'Numbers'), el('div.menu', {}, perRecord.map((name) => {
    const box = el('input', { type: 'checkbox', onchange: () => { const own = new Set(shownNames()); if (box.checked) own.add(name); else own.delete(name); state.set({ numbers: perRecord.filter((each) => own.has(each)).join(',') }); list(); } });
    readers.push(() => { box.checked = shownNames().includes(name); });
    return el('label', { title: metric(name).meaning }, box, metric(name).label);
  })));
  const finder = el('div.finder', {}, search,
    relations.length > 1 ? picker('relation', 'Relation', [['', 'All relations'], ...relations.map((each) => [each, each])]) : null,
    stages.length > 1 ? picker('stage', 'Stage', stages.map((each) => [each, each]), stage) : null,
    anyNote ? picker('noted', 'Notes', [['', 'With and without note'], ['yes', 'With a note']]) : null, which, count);

  // --- one record

  const detail = el('div.details');
  const blocks = new Map();
  let vocabulary = null;
  /** A line with every column's value, where a number stands for that of the column before it which is the same. */
  const everyColumn = (line) => { const values = line.at(-1); return [...line.slice(0, -1), values.map((each) => (typeof each === 'number' ? values[each] : each))]; };
  function block(record) {
    const at = Math.floor(record / data.block);
    if (at >= data.details.length) return Promise.resolve(null);
    vocabulary = vocabulary || unpacked(data.words).then((raw) => JSON.parse(new TextDecoder().decode(raw)));
    if (!blocks.has(at)) blocks.set(at, vocabulary.then((all) => textOf(data.details[at], all)).then((text) => JSON.parse(text).map((own) => own.map((each) => each.map(everyColumn)))));
    return blocks.get(at).then((all) => all[record % data.block]);
  }
  const both = (record) => columns.map((each, index) => ({ ...each, index })).filter((each) => each.shared || records[record][NOTE + each.result] !== null);

  /** Whether a prompt ends as it should: with the new target, or with its own answer; null where that cannot be said. */
  function isWanted([kind, , targets, values], at) {
    const [first, second] = values[at] || [];
    if (targets.length < 2 || !isNumber(first) || !isNumber(second)) return null;
    return WANTED_NEW.has(kind) ? first > second : second > first;
  }
  function prompts(own, record) {
    const cols = both(record), kinds = [...new Set(own.map((each) => each[0]))], th = theme();
    return kinds.map((kind) => {
      const lines = own.filter((each) => each[0] === kind);
      const counts = cols.map((column) => [column, lines.map((each) => isWanted(each, column.at)).filter((each) => each !== null)]).filter(([, all]) => all.length);
      const outcome = counts.map(([column, all]) => `${nameOf(column)} ${all.filter(Boolean).length}`).join(' · ');
      const every = new Set(lines.map(([, , targets]) => JSON.stringify(targets)));
      /** Which bar is whose, for where there is no room beside each. */
      const names = (targets) => el('p.names.soft', { 'aria-hidden': 'true' }, targets.map((target, which) => el('span', {}, bar(1, 10, which ? th.soft : th.accent, th), said(short(target, 40)))));
      return el('details.kind', { open: kind === 'prompt' || kind === 'paraphrase' || lines.length <= 3 }, el('summary', {}, el('h3', {}, kind === 'prompt' ? 'The prompt' : `${kind[0].toUpperCase()}${kind.slice(1)} (${lines.length})`), outcome ? el('span.soft', {}, `as wanted: ${outcome}`) : null), every.size === 1 ? names(lines[0][2]) : null, el('div.scroll', { tabindex: 0, role: 'region', 'aria-label': `prompts of record ${record + 1}: ${kind}` }, table(`Prompts of kind ${kind}, with the probability of each target`, ['Prompt', ...cols.map(nameOf)], lines.map(([, text, targets, values], line) => [
        [said(text), every.size > 1 ? names(targets) : null], ...cols.map(({ at }) => {
          const p = (values[at] || []).map((each) => (isNumber(each) ? Math.exp(each) : NaN)), right = isWanted(lines[line], at);
          return el('div.pair', {}, targets.map((target, which) => el('div', { title: visible(target).slice(0, 200) }, bar(p[which], 56, which ? th.soft : th.accent, th), num(p[which], percent), el('span.target', {}, said(short(target, 24))))), right === null ? null : el('span', { class: right ? 'mark' : 'mark wrong', title: right ? 'as wanted' : 'not as wanted' }, right ? '✓' : '✗', el('span.unseen', {}, right ? ' as wanted' : ' not as wanted')));
        })]), { class: 'quiet prompts' })));
    });
  }
  function texts(own, record) {
    const cols = both(record).filter(({ at }) => own.some((each) => each[1][at] !== null));
    return own.length ? el('div.kind', {}, el('h3', {}, `What it writes (${own.length})`), own.map(([prompt, all]) => el('div.texts', {}, cols.map((column) => {
      const text = all[column.at];
      return el('figure', {}, el('figcaption', {}, nameOf(column)), text === null ? el('p.soft', {}, 'nothing kept') : el('p.written', {}, el('span.soft', {}, said(prompt, true)), said(text.startsWith(prompt) ? text.slice(prompt.length) : text, true)));
    })))) : null;
  }
  async function about(index, pinned) {
    const record = records[index], cols = both(index), own = await block(index);
    const pin = el('button', { type: 'button', 'aria-pressed': String(pinned), onclick: () => { state.set({ pin: pinned ? null : index }); show(); } }, pinned ? 'Pinned' : 'Pin');
    return el('section.card', { 'aria-label': pinned ? 'pinned record' : 'chosen record' },
      el('header.bar', {}, el('h2.fact', {}, promptOf({ prompt: cut(record[PROMPT], record[SUBJECT]) }), el('span.arrow', {}, ' → '), el('span.answer', {}, said(short(record[NEW], 200))), record[TRUE] ? el('span.soft', {}, ' not ', said(short(record[TRUE], 200))) : null), el('div.tools', {}, pin)),
      el('p.soft', {}, [record[ID] && `record ${record[ID]}`, record[RELATION] && `relation ${record[RELATION]}`].filter(Boolean).map((each, at) => [at ? ' · ' : '', said(each)])),
      notes(record).map((note) => el('p.noted', {}, said(note))),
      el('div.scroll', { tabindex: 0, role: 'region', 'aria-label': `numbers of record ${index + 1}` }, table('Numbers of this record', ['', ...cols.map(nameOf)], shownNames().map((name) => [el('span', { title: metric(name).meaning }, metric(name).label), ...cols.map(({ index: column }) => form(name, valueOf(column, name, index)))]))),
      own ? [prompts(own[0], index), texts(own[1], index)] : el('p.soft', {}, data.details.length ? 'The page holds prompts and texts of the first records only.' : 'Prompts and texts were not kept.'));
  }
  const cut = (prompt, subject) => { const at = subject ? prompt.indexOf(subject) : -1; return at < 0 ? [prompt, '', ''] : [prompt.slice(0, at), subject, prompt.slice(at + subject.length)]; };
  let asked = 0;
  async function show() {
    const mine = ++asked, selected = state.number('record', -1), pinned = state.number('pin', -1);
    const wanted = [...new Set([pinned, selected])].filter((each) => each >= 0 && each < records.length);
    const found = await Promise.all(wanted.map((each) => about(each, each === pinned)));
    if (mine !== asked) return;
    fill(detail, found.length ? found : el('p.soft.hint', {}, 'Choose a record to see its prompts, answers and texts. Pin one to compare another with it.'));
    detail.classList.toggle('two', found.length > 1);
  }
  function select(index) {
    state.set({ record: index });
    for (const row of holder.querySelectorAll('tr[data-record]')) {
      if (Number(row.dataset.record) === index) row.setAttribute('aria-current', 'true');
      else row.removeAttribute('aria-current');
    }
    tell(`record ${visible(records[index][PROMPT]).slice(0, 100)}`);
    return show();
  }
  cards.push({ redraw: show });
  readers.push(list);
  readers.forEach((each) => each());
  return [
    header(keys,
      results.filter((each) => each.nothing).map((each) => el('p.noted', {}, said(each.nothing))),
      several ? el('p.soft', {}, `${counted(data.compared.records)} ${data.compared.records === 1 ? 'is' : 'are'} in both; left is `, said(results[0].label), ', right ', said(results[1].label)) : null),
    means.element,
    el('section.card', {}, el('header.bar', {}, el('h2', {}, 'Records'), pager), finder, holder, colours),
    detail,
  ];
};
