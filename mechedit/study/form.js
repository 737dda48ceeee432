"use strict";
// One participant's form. Nothing leaves this page but the files that the participant saves.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const QUESTIONS = {
    consistency: ["Consistency", "Which text fits the new fact best?"],
    fluency: ["Fluency", "Which text reads best, whatever it says?"],
  };
  const ORDER = ["1st", "2nd", "3rd", "4th", "5th", "6th"];
  const letters = data.pages[0].texts.map((_, at) => "ABCDEF"[at]);
  const KEY = `mechedit-study-${data.study}-${data.form}`;
  const FIRST = 2; // screens before the pages: consent, instructions
  const LAST = FIRST + data.pages.length + data.long_form.length;
  const main = document.getElementById("main");

  // ---- small helpers

  const el = (tag, named = {}, ...inside) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(named)) {
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else if (value === true) made.setAttribute(name, "");
      else if (value !== false && value !== null) made.setAttribute(name, value);
    }
    made.append(...inside.filter((each) => each !== null)); // strings become text nodes
    return made;
  };
  const foreign = (text, named = {}) => el("p", { class: "foreign", dir: "auto", ...named }, text);
  const say = (text) => { document.getElementById("said").textContent = text; };

  // ---- SHA-256 and HMAC: a page opened from a file has no `crypto.subtle` in every browser

  const WORDS = [], START = [];
  for (let candidate = 2; WORDS.length < 64; candidate++) {
    let prime = true;
    for (let by = 2; by * by <= candidate; by++) if (candidate % by === 0) prime = false;
    if (!prime) continue;
    if (START.length < 8) START.push((Math.sqrt(candidate) * 2 ** 32) | 0);
    WORDS.push((Math.cbrt(candidate) * 2 ** 32) | 0);
  }
  const sha256 = (bytes) => {
    const length = ((bytes.length + 8) >> 6) * 64 + 64;
    const padded = new Uint8Array(length);
    padded.set(bytes);
    padded[bytes.length] = 0x80;
    const view = new DataView(padded.buffer);
    view.setUint32(length - 8, Math.floor(bytes.length / 2 ** 29));
    view.setUint32(length - 4, (bytes.length << 3) >>> 0);
    const turned = (word, by) => (word >>> by) | (word << (32 - by));
    const hash = START.slice(), w = new Int32Array(64);
    for (let begin = 0; begin < length; begin += 64) {
      for (let i = 0; i < 16; i++) w[i] = view.getInt32(begin + 4 * i);
      for (let i = 16; i < 64; i++) {
        const a = turned(w[i - 15], 7) ^ turned(w[i - 15], 18) ^ (w[i - 15] >>> 3);
        const b = turned(w[i - 2], 17) ^ turned(w[i - 2], 19) ^ (w[i - 2] >>> 10);
        w[i] = (w[i - 16] + a + w[i - 7] + b) | 0;
      }
      let [a, b, c, d, e, f, g, h] = hash;
      for (let i = 0; i < 64; i++) {
        const one = (h + (turned(e, 6) ^ turned(e, 11) ^ turned(e, 25)) + ((e & f) ^ (~e & g)) + WORDS[i] + w[i]) | 0;
        const two = ((turned(a, 2) ^ turned(a, 13) ^ turned(a, 22)) + ((a & b) ^ (a & c) ^ (b & c))) | 0;
        [h, g, f, e, d, c, b, a] = [g, f, e, (d + one) | 0, c, b, a, (one + two) | 0];
      }
      [a, b, c, d, e, f, g, h].forEach((word, i) => { hash[i] = (hash[i] + word) | 0; });
    }
    const out = new DataView(new ArrayBuffer(32));
    hash.forEach((word, i) => out.setInt32(4 * i, word));
    return new Uint8Array(out.buffer);
  };
  const hmac = (key, text) => {
    const encode = (each) => new TextEncoder().encode(each), long = encode(key);
    const block = new Uint8Array(64);
    block.set(long.length > 64 ? sha256(long) : long);
    const round = (mark, bytes) => sha256(Uint8Array.from([...block.map((each) => each ^ mark), ...bytes]));
    return [...round(0x5c, round(0x36, encode(text)))].map((each) => each.toString(16).padStart(2, "0")).join("");
  };

  // ---- what was answered

  const fresh = () => ({
    study: data.study, form: data.form, screen: 0, agreed: false, comment: "", finished: false,
    pages: data.pages.map(() => ({ consistency: [], fluency: [], seconds: 0 })),
    long_form: data.long_form.map(() => ({ items: {}, seconds: 0 })),
  });
  const isRanking = (each) => Array.isArray(each) && each.every((letter) => letters.includes(letter)) && new Set(each).size === each.length;
  const isSeconds = (each) => typeof each === "number" && each >= 0 && Number.isFinite(each);
  const fits = (found) => found !== null && typeof found === "object" && found.study === data.study && found.form === data.form
    && Number.isInteger(found.screen) && found.screen >= 0 && found.screen <= LAST && typeof found.agreed === "boolean"
    && typeof found.comment === "string" && typeof found.finished === "boolean"
    && Array.isArray(found.pages) && found.pages.length === data.pages.length
    && found.pages.every((page) => page && isSeconds(page.seconds) && Object.keys(QUESTIONS).every((name) => isRanking(page[name])))
    && Array.isArray(found.long_form) && found.long_form.length === data.long_form.length
    && found.long_form.every((page) => page && isSeconds(page.seconds) && page.items && typeof page.items === "object"
      && Object.entries(page.items).every(([name, mark]) => name in data.items && Number.isInteger(mark) && mark >= 1 && mark <= data.scale));
  const parsed = (text) => { try { return JSON.parse(text); } catch { return null; } };

  // The same form may be open in several tabs. Each writes what it changed itself, and reads what another wrote before it changes anything.
  let state = fresh(), kept = true, known = null, waits = false; // known: what the browser had last; waits: something is not written yet
  const answersOf = ({ agreed, comment, finished, pages, long_form }) => JSON.stringify([agreed, comment, finished, ...[...pages, ...long_form].map((each) => ({ ...each, seconds: 0 }))]);
  /** Take over what another tab wrote, but for the screen; whether there are other answers in it. */
  const catchUp = (screen = state.screen) => {
    let text = null;
    try { text = localStorage.getItem(KEY); } catch { kept = false; }
    if (text === null || text === known) return false;
    known = text;
    const found = parsed(text), before = answersOf(state);
    if (!fits(found)) return false;
    state = { ...found, screen: screen ?? found.screen };
    return answersOf(state) !== before;
  };
  catchUp(null);

  const save = () => {
    const now = JSON.stringify(state);
    try { localStorage.setItem(KEY, now); kept = true; known = now; waits = false; } catch { kept = false; }
    const line = document.getElementById("kept");
    const text = kept ? "Your answers are kept in this browser as you go. Nothing is sent." : "This browser does not keep your answers: save your progress as a file before you close the page.";
    if (line.textContent !== text) line.textContent = text;
    line.className = kept ? "" : "warn";
  };
  const isRanked = (page) => Object.keys(QUESTIONS).every((name) => page[name].length === letters.length);
  const isMarked = (page) => Object.keys(data.items).every((name) => name in page.items);
  const isDone = (at) => at < data.pages.length ? isRanked(state.pages[at]) : isMarked(state.long_form[at - data.pages.length]);
  const open = () => [...Array(LAST - FIRST).keys()].filter((at) => !isDone(at));
  const page = (at) => at < data.pages.length ? state.pages[at] : state.long_form[at - data.pages.length];

  // ---- time on a page, while it can be seen

  let since = null;
  const tick = () => {
    const now = performance.now(), at = state.screen - FIRST;
    if (since !== null && at >= 0 && at < LAST - FIRST) {
      page(at).seconds = Math.round(10 * (page(at).seconds + (now - since) / 1000)) / 10;
      waits = true;
    }
    since = document.visibilityState === "visible" ? now : null;
  };
  const keep = () => {
    const isOther = catchUp();
    tick();
    if (waits) save();
    if (isOther) again();
  };
  const change = (edit) => {
    const isOther = catchUp();
    tick();
    edit();
    save();
    if (isOther) again();
  };
  document.addEventListener("visibilitychange", keep);
  window.addEventListener("storage", keep);
  window.addEventListener("focus", keep);
  window.addEventListener("pagehide", keep);
  window.addEventListener("beforeunload", (event) => { if (!kept && state.agreed && !state.finished) event.preventDefault(); });
  setInterval(keep, 5000);

  // ---- files

  const file = (kind) => {
    const { study, form, pages, long_form, comment, finished } = state;
    const body = JSON.stringify(kind === "progress" ? state : { study, form, pages, long_form, comment, finished });
    return JSON.stringify({ kind: `mechedit study ${kind}`, body, check: hmac(data.token, body) });
  };
  const download = (kind) => {
    keep();
    const address = URL.createObjectURL(new Blob([file(kind)], { type: "application/json" }));
    const link = el("a", { href: address, download: `mechedit-${kind}-${data.study}-${data.form}.json`, hidden: true });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(address), 10000);
  };
  const load = async (chosen) => {
    const outer = parsed(await chosen.text()), body = outer && typeof outer.body === "string" ? outer.body : "";
    const found = parsed(body);
    if (!outer || outer.kind !== "mechedit study progress") say("This is no progress file. Its name begins with mechedit-progress.");
    else if (!found || found.study !== data.study || found.form !== data.form) say("This progress file is of another form. Open it in the form that it was saved from.");
    else if (outer.check !== hmac(data.token, body) || !fits(found)) say("This progress file was changed or is damaged. Nothing was loaded.");
    else { state = found; since = null; save(); show(state.screen); say("Your progress is loaded."); }
  };

  // ---- screens

  const heading = (text) => el("h1", { tabindex: "-1" }, text);
  const button = (text, onclick, named = {}) => el("button", { type: "button", onclick, ...named }, text);
  const list = (...lines) => el("ul", {}, ...lines.map((line) => el("li", {}, line)));
  const go = (...buttons) => el("div", { class: "row go" }, ...buttons);
  const fact = (statement) => el("div", { class: "fact" }, el("p", {}, "We taught several AIs the following as a fact:"), foreign(statement, { class: "foreign said" }));
  const text = (name, content, level = "h2") => el("section", { class: "card", "aria-label": name }, el(level, {}, name), foreign(content, { tabindex: "0", role: "group", "aria-label": `${name}, in full` }));

  const consent = () => {
    const box = el("input", { type: "checkbox", id: "agreed", onchange: () => change(() => { state.agreed = box.checked; }) });
    box.checked = state.agreed;
    const problem = el("p", { class: "problem", role: "alert" });
    const begin = () => {
      if (state.agreed) show(1);
      else { problem.textContent = "To take part, tick the box above first."; box.focus(); }
    };
    const further = data.long_form.length ? `, and ${data.long_form.length} with two passages and statements about them` : "";
    return el("div", { class: "narrow" }, heading("A study of what language models write"),
      el("p", {}, `You will see ${data.pages.length} pages with several texts${further}. All texts were written by computers about made-up facts, and you say which you find better. Allow up to ${3 * (data.pages.length + data.long_form.length)} minutes; you can stop and come back.`),
      list("Taking part is voluntary. You can stop at any time and need not say why.",
        "No name, address or other personal data is asked for. Your rankings, the time you spend on each page and your comment, if you write one, are all that is kept.",
        "This page works without a network and sends nothing. Your answers stay in this browser until you save them as a file and send that file yourself.",
        "The facts are made up on purpose, and the texts may be false, odd or unpleasant. Do not take anything from them as true.",
        "The answers will be analysed and may be published, without anything that says who gave them."),
      data.contact ? el("p", {}, "Questions, or to withdraw later: ", el("span", { class: "foreign" }, data.contact)) : null,
      el("label", { class: "check", for: "agreed" }, box, el("span", {}, "I have read this, I am 18 or older, and I agree to take part.")),
      problem, go(el("span"), button("Go on", begin, { class: "main" })));
  };

  const instructions = () => el("div", {}, el("div", { class: "narrow" }, heading("What to do"),
    el("p", {}, "Each page states a fact that several AIs were taught. It may be false in our world; judge as if it were true. Below it stand texts that these AIs wrote. Put the texts in order twice:"),
    el("ul", {},
      el("li", {}, el("strong", {}, "Consistency: "), "how well a text fits the new fact. Does it state it, or take it for granted throughout? A text that contradicts it, or does not touch it, comes last."),
      el("li", {}, el("strong", {}, "Fluency: "), "how well a text reads, whatever it says. Repetition, broken sentences and sudden changes of subject count against it.")),
    el("p", {}, "Choose the texts from best to worst. With a keyboard: Tab to a question, then press A, B, …; Backspace takes the last one back.")),
    el("h2", {}, "An example"),
    fact("Clara Schumann was born in Lisbon."),
    el("div", { class: "texts" },
      text("Text A", "Clara Schumann grew up by the Tagus. Her first piano teacher played for the Portuguese court, and she gave her first concert in Lisbon, the city of her birth, at the age of nine", "h3"),
      text("Text B", "Clara Schumann grew up in Leipzig, where her father ran a music shop. The city of her birth remained dear to her, and she returned to its concert hall every winter for many years.", "h3"),
      text("Text C", "Clara Schumann grew up in Lisbon in Lisbon. Lisbon is the city. She was born in the city of Lisbon, and the Lisbon of Lisbon was the city of the city", "h3")),
    el("div", { class: "narrow" },
      el("p", {}, el("strong", {}, "Consistency: A, C, B. "), "A says that she was born in Lisbon, and everything else in it agrees. C says so too, but hardly says more. B has her born in Leipzig."),
      el("p", {}, el("strong", {}, "Fluency: B, A, C. "), "B and A both read well. A is cut off at its end, which does not count against it; B is a little smoother. C repeats itself and falls apart."),
      el("h2", {}, "Good to know"),
      list("You may look things up.", "Take less than three minutes for a page. First impressions are fine.",
        "If two texts seem equal, decide all the same; even a guess says something.",
        "Texts are cut off after a fixed length. Do not count that against them.",
        "Other people see the same texts. You may disagree with them; there is no right answer.",
        "You can go back and change your mind until you save your response."),
      data.long_form.length ? el("p", {}, `The last ${data.long_form.length === 1 ? "page shows" : `${data.long_form.length} pages show`} two passages by one AI, with nine statements. Say how far you agree with each, from 1 (not at all) to ${data.scale} (completely).`) : null,
      go(button("Back", () => show(0)), button("Begin", () => show(FIRST), { class: "main" }))));

  const ranking = (at, name) => {
    const own = () => state.pages[at][name];
    const [title, ask] = QUESTIONS[name];
    const line = el("p", { class: "small faint", role: "status" });
    const buttons = letters.map((letter) => button("", () => choose(letter), {}));
    const draw = () => {
      buttons.forEach((each, index) => {
        const place = own().indexOf(letters[index]);
        each.setAttribute("aria-pressed", String(place >= 0));
        each.replaceChildren(el("span", {}, `Text ${letters[index]}`), el("span", { class: "rank" }, place >= 0 ? ORDER[place] : "rank"));
        each.setAttribute("aria-label", `Text ${letters[index]}, ${place >= 0 ? ORDER[place] : "not ranked"}, by ${name}`);
      });
      const n = own().length;
      line.textContent = n === letters.length ? `From best to worst: ${own().join(", ")}. Choose a text again to take it back.` : n ? `So far: ${own().join(", ")}. Now choose the next best.` : "Choose the best text first, then the next best.";
    };
    const rank = (edit) => {
      change(() => { edit(own()); state.finished = false; });
      draw();
      steps();
    };
    const choose = (letter) => rank((ranked) => {
      const place = ranked.indexOf(letter);
      if (place >= 0) ranked.splice(ranked.length === letters.length ? Math.min(place, letters.length - 2) : place); // and those behind it
      else {
        ranked.push(letter);
        if (ranked.length === letters.length - 1) ranked.push(letters.find((each) => !ranked.includes(each)));
      }
    });
    const pressed = (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const letter = event.key.toUpperCase();
      if (letters.includes(letter)) {
        if (!own().includes(letter)) choose(letter);
        buttons[letters.indexOf(letter)].focus();
      } else if (event.key === "Backspace" && own().length) rank((ranked) => ranked.splice(ranked.length === letters.length ? letters.length - 2 : ranked.length - 1));
      else return;
      event.preventDefault();
    };
    draw();
    return el("fieldset", { onkeydown: pressed }, el("legend", {}, `${title}: ${ask}`), line, el("div", { class: "choices" }, ...buttons));
  };

  const onward = (at, lacking) => {
    const problem = el("p", { class: "problem", role: "alert" });
    let warned = false;
    const next = () => {
      const missing = lacking();
      if (missing && !warned) {
        warned = true;
        problem.textContent = `${missing} Press Next again to leave it for later.`;
      } else show(state.screen + 1);
    };
    return [problem, go(button("Back", () => show(state.screen - 1)), button("Next", next, { class: "main" }))];
  };

  const rated = (at) => {
    const shown = data.pages[at];
    const lacking = () => {
      const names = Object.keys(QUESTIONS).filter((name) => state.pages[at][name].length < letters.length);
      return names.length ? `The texts are not ranked by ${names.join(" and ")} yet.` : "";
    };
    return el("div", {}, heading(`Page ${at + 1} of ${LAST - FIRST}`), fact(shown.statement),
      el("div", { class: "texts" }, ...shown.texts.map((each, i) => text(`Text ${letters[i]}`, each))),
      el("div", { class: "asks" }, ...Object.keys(QUESTIONS).map((name) => ranking(at, name))), ...onward(at, lacking));
  };

  const marked = (at) => {
    const shown = data.long_form[at - data.pages.length], own = () => state.long_form[at - data.pages.length].items;
    const item = ([name, ask]) => {
      const marks = [...Array(data.scale).keys()].map((each) => each + 1).map((mark) => {
        const input = el("input", { type: "radio", name, value: mark, onchange: () => { change(() => { own()[name] = mark; state.finished = false; }); steps(); } });
        input.checked = own()[name] === mark;
        return el("label", {}, input, String(mark));
      });
      return el("fieldset", {}, el("legend", {}, ask), el("div", { class: "marks" }, ...marks), el("div", { class: "ends small faint" }, el("span", {}, "not at all"), el("span", {}, "completely")));
    };
    const lacking = () => {
      const n = Object.keys(data.items).filter((name) => !(name in own())).length;
      return n ? `${n} of ${Object.keys(data.items).length} statements have no mark yet.` : "";
    };
    return el("div", {}, heading(`Page ${at + 1} of ${LAST - FIRST}`), fact(shown.statement),
      el("div", { class: "texts" }, ...shown.texts.map((each, i) => text(["First passage", "Second passage"][i], each))),
      el("h2", {}, `How far do you agree? 1: not at all, ${data.scale}: completely`),
      el("div", { class: "asks" }, ...Object.entries(data.items).map(item)), ...onward(at, lacking));
  };

  const end = () => {
    const missing = open();
    const comment = el("textarea", { id: "comment", maxlength: "4000", oninput: () => change(() => { state.comment = comment.value; }) });
    comment.value = state.comment;
    const copy = el("textarea", { readonly: true, id: "copy", "aria-label": "Your response as text", onfocus: () => copy.select() });
    const after = el("div", { role: "status" });
    const response = () => {
      change(() => { state.finished = open().length === 0; });
      download("response");
      copy.value = file("response");
      after.replaceChildren(el("p", {}, state.finished ? "Thank you! " : "Thank you. The response says that it is unfinished. ", `Your response is in the file mechedit-response-${data.study}-${data.form}.json, where your browser keeps downloads. Please send it to whoever gave you this form.`));
    };
    const to = (at) => button(`Page ${at + 1}`, () => show(FIRST + at));
    return el("div", { class: "narrow" }, heading(missing.length ? "Not quite done" : "All pages are done"),
      missing.length ? el("div", {}, el("p", {}, "Something is missing on:"), el("p", { class: "row" }, ...missing.map(to))) : null,
      el("label", { for: "comment" }, "Is there anything that you want to say? (optional; please nothing that says who you are)"), comment,
      go(button("Back", () => show(LAST - 1)), button(missing.length ? "Save an unfinished response" : "Save my response", response, { class: missing.length ? "" : "main" })), after,
      el("details", { ontoggle: () => { copy.value = file("response"); } }, el("summary", {}, "No file appeared? Copy the response as text"), el("p", { class: "small" }, "Paste all of it into a message."), copy));
  };

  const steps = () => {
    const nav = document.getElementById("steps");
    if (state.screen < FIRST) { nav.replaceChildren(); return; }
    const step = (at) => {
      const name = at < LAST - FIRST ? String(at + 1) : "End", done = at < LAST - FIRST && isDone(at);
      const label = at < LAST - FIRST ? `Page ${name}, ${done ? "done" : "not done"}` : "End";
      return el("li", {}, button(done ? `${name} ✓` : name, () => show(FIRST + at), { class: done ? "done" : "", "aria-label": label, "aria-current": state.screen === FIRST + at ? "step" : null }));
    };
    nav.replaceChildren(el("ol", {}, ...[...Array(LAST - FIRST + 1).keys()].map(step)));
  };

  const show = (screen) => {
    catchUp();
    tick();
    state.screen = state.agreed || screen === 0 ? screen : 0;
    draw();
    save();
    window.scrollTo(0, 0);
    main.querySelector("h1").focus({ preventScroll: true });
  };
  const draw = () => {
    const at = state.screen - FIRST;
    say("");
    main.replaceChildren(state.screen === 0 ? consent() : state.screen === 1 ? instructions() : state.screen === LAST ? end() : at < data.pages.length ? rated(at) : marked(at));
    steps();
  };
  /** Draw the screen with the answers of another tab. */
  const again = () => {
    if (!state.agreed) state.screen = 0;
    draw();
    say("This form is open in another tab too. Here are the answers from there.");
  };

  // ---- the frame

  const theme = document.getElementById("theme"), dark = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme || (dark.matches ? "dark" : "light")) === "dark";
  const name = () => { theme.textContent = isDark() ? "Light" : "Dark"; theme.setAttribute("aria-label", `${theme.textContent} colours`); };
  theme.addEventListener("click", () => { document.documentElement.dataset.theme = isDark() ? "light" : "dark"; name(); });
  dark.addEventListener("change", name);
  document.getElementById("save").addEventListener("click", () => download("progress"));
  document.getElementById("open").addEventListener("change", (event) => { if (event.target.files.length) load(event.target.files[0]); event.target.value = ""; });
  document.getElementById("clear").addEventListener("click", () => {
    if (!window.confirm("Delete all your answers from this browser?")) return;
    state = fresh();
    since = null;
    try { localStorage.removeItem(KEY); } catch { kept = false; }
    show(0);
  });
  name();
  show(state.screen);
})();
