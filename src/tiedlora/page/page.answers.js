// The answers browser. Everything that it shows is set as textContent, never as markup.
(() => {
  const get = (name) => document.getElementById(`answers-${name}`);
  if (!get("rows")) return;
  const PAGE = 20, LONG = 700, MOST_WORDS = 600, LEAST_COMMON = 0.4, BEGIN = 160;
  const make = (tag, css, text) => {
    const element = document.createElement(tag);
    if (css) element.className = css;
    if (text !== undefined) element.textContent = text;
    return element;
  };

  // --- The data: base64 of gzip of JSON in script elements that the browser does not run.
  const unpack = async (id) => {
    const raw = atob(document.getElementById(id).textContent);
    const bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  };
  const sheets = [];
  const open = (number) => (sheets[number] ??= (async () => {
    const head = JSON.parse(document.getElementById(`sheet-${number}`).textContent);
    const index = await unpack(`sheet-${number}-index`);
    return { number, head, ...index, blocks: [], hay: [], all: null };
  })());
  const block = (sheet, place) => (sheet.blocks[place] ??= unpack(`sheet-${sheet.number}-text-${place}`));
  const texts = async (sheet, row) => {
    const { prompts, references, answers } = await block(sheet, Math.floor(row / sheet.head.block));
    const place = row % sheet.head.block;
    return { prompt: prompts[place], references: references[place], answers: answers[place] };
  };
  // For the search: every text in lower case, made once.
  const readAll = (sheet) => (sheet.all ??= (async () => {
    for (let place = 0; place * sheet.head.block < sheet.head.rows; place++) {
      const { prompts, references, answers } = await block(sheet, place);
      prompts.forEach((prompt, i) => {
        const id = sheet.ids[place * sheet.head.block + i];
        sheet.hay.push({ asked: [id, prompt, ...references[i]].join("\n").toLowerCase(), answers: answers[i].map((a) => a.toLowerCase()) });
      });
    }
  })());

  // --- What is shown.
  let sheet, first, second, metric, filter, order, query, also = new Set(), page = 0, found = [], here = -1, drawing = 0;
  const name = (column) => sheet.head.runs[column].name;
  const gain = (row) => {
    const scores = sheet.scores[metric];
    const [a, b] = [scores?.[first]?.[row], scores?.[second]?.[row]];
    return a == null || b == null ? 0 : (b - a) * sheet.head.metrics[metric].sign;
  };
  const FILTERS = {
    all: { words: () => "all rows", holds: () => true },
    differ: { words: () => "answers differ", holds: (row) => sheet.which[first][row] !== sheet.which[second][row] },
    gained: { words: () => `${name(second)} gained`, holds: (row) => gain(row) > 0 },
    lost: { words: () => `${name(second)} lost`, holds: (row) => gain(row) < 0 },
  };
  const ORDERS = { row: null, gain, loss: (row) => -gain(row), most: (row) => Math.abs(gain(row)) };
  // The base model comes first (it is column 0), then the pair, then the others in their order.
  const columns = () => [...new Set([...(also.has(0) ? [0] : []), first, second, ...[...also].sort((a, b) => a - b)])];

  const select = async () => {
    const mine = ++drawing;
    if (query) {
      await readAll(sheet);
      if (mine !== drawing) return;
    }
    const shown = columns();
    const matches = (row) => !query || sheet.hay[row].asked.includes(query) ||
      shown.some((column) => sheet.which[column][row] >= 0 && sheet.hay[row].answers[sheet.which[column][row]].includes(query));
    const matching = [];
    for (let row = 0; row < sheet.head.rows; row++) if (matches(row)) matching.push(row);
    for (const [key, { holds }] of Object.entries(FILTERS)) {
      const own = matching.filter(holds);
      get("filter").querySelector(`[data-count="${key}"]`).textContent = own.length.toLocaleString("en");
      if (key === filter) found = own;
    }
    const by = ORDERS[order];
    if (by) found.sort((a, b) => by(b) - by(a) || a - b);
    await draw(mine);
  };

  const draw = async (mine = ++drawing) => {
    page = Math.max(0, Math.min(page, Math.ceil(found.length / PAGE) - 1));
    const rows = found.slice(page * PAGE, (page + 1) * PAGE);
    const shown = columns();
    const parts = await Promise.all(rows.map((row) => texts(sheet, row)));
    if (mine !== drawing) return;
    get("rows").replaceChildren(...rows.map((row, i) => card(row, parts[i], shown)));
    const count = found.length.toLocaleString("en");
    get("status").textContent = found.length ? `rows ${page * PAGE + 1} to ${page * PAGE + rows.length} of ${count}` : "no row";
    get("back").disabled = page === 0;
    get("next").disabled = (page + 1) * PAGE >= found.length;
  };

  // --- One row.
  const link = (row) => "#answers?" + new URLSearchParams({ sheet: sheet.head.key, row: sheet.ids[row], a: sheet.head.runs[first].id, b: sheet.head.runs[second].id });
  // A row is closed at first: its scores and the beginning of its prompt. What is not in the record has no box.
  const scoreOf = (column, row) => sheet.scores[metric]?.[column]?.[row];
  const card = (row, { prompt, references, answers }, shown) => {
    const card = make("article", row === here ? "answer here" : "answer");
    card.tabIndex = -1;
    const text = (column) => (sheet.which[column][row] < 0 ? null : answers[sheet.which[column][row]]);
    const hasTexts = prompt || references.some((each) => each) || shown.some((column) => text(column) !== null);
    const box = make(hasTexts ? "details" : "div"), title = make(hasTexts ? "summary" : "div", "title");
    title.append(make("b", "id", `row ${sheet.ids[row]}`));
    const change = gain(row);
    if (change) title.append(make("span", change > 0 ? "up" : "down", change > 0 ? "▲ gained" : "▼ lost"));
    for (const column of shown) {
      const score = scoreOf(column, row);
      if (score != null) title.append(make("span", "score", `${name(column)}: ${+score.toFixed(3)}`));
    }
    if (prompt) title.append(make("span", "begin", prompt.slice(0, BEGIN).replace(/\s+/g, " ")));
    box.append(title);
    if (hasTexts) {
      const fill = () => { if (box.open && box.children.length === 1) box.append(...body(row, prompt, references, shown, text)); };
      box.addEventListener("toggle", fill);
      box.open = row === here;
      fill();
    }
    card.append(box);
    return card;
  };
  const body = (row, prompt, references, shown, text) => {
    const asked = make("div", "asked"), given = make("div", "given");
    const reference = references.join("\n");
    if (prompt) asked.append(part("prompt", prompt));
    if (reference) asked.append(part(references.length > 1 ? `${references.length} references` : "reference", reference));
    const one = text(first);
    for (const column of shown) {
      const other = text(column);
      if (other === null) continue;
      const box = make("div", column === first ? "first" : column === second ? "second" : "");
      const head = make("h3");
      head.append(make("b", "", name(column)), ...sheet.head.runs[column].marks.map((mark) => make("span", "mark-word", mark)));
      const score = scoreOf(column, row);
      if (score != null) head.append(make("span", "", `${sheet.head.metrics[metric].name} ${+score.toFixed(3)}`));
      box.append(head);
      if (other === "") box.append(make("p", "none", "an empty answer"));
      else if (column === first) box.append(long(marked(other, shown.includes(second) ? text(second) : null), other));
      else box.append(long(marked(other, one), other), ...(one === null ? [] : [make("p", "none", divergence(one, other))]));
      given.append(box);
    }
    const anchor = make("a", "", "link to this row");
    anchor.href = link(row);
    return [asked, given, anchor];
  };
  const part = (label, text) => {
    const box = make("div");
    box.append(make("h3", "", label), long([text], text));
    return box;
  };
  // A long text shows its beginning, and the rest on demand.
  const long = (pieces, text) => {
    const pre = make("pre");
    if (text.length <= LONG) {
      pre.append(...pieces);
      return pre;
    }
    pre.textContent = `${text.slice(0, LONG)} …`;
    const box = make("div");
    const more = make("button", "", `all ${text.length.toLocaleString("en")} characters`);
    more.type = "button";
    more.addEventListener("click", () => { pre.replaceChildren(...pieces); more.remove(); });
    box.append(pre, more);
    return box;
  };

  // --- The difference of two answers, in words.
  const divergence = (one, other) => {
    if (one === other) return "the same answer";
    let i = 0;
    while (i < one.length && i < other.length && one[i] === other[i]) i++;
    return i ? `differs after ${i.toLocaleString("en")} character${i > 1 ? "s" : ""}` : "differs at the first character";
  };
  const marked = (text, other) => {
    if (other === null || text === other) return [text];
    const [mine, theirs] = [text.match(/\s+|\S+/g) ?? [], other.match(/\s+|\S+/g) ?? []];
    let start = 0, end = 0;
    while (start < mine.length && start < theirs.length && mine[start] === theirs[start]) start++;
    while (end < mine.length - start && end < theirs.length - start && mine.at(-1 - end) === theirs.at(-1 - end)) end++;
    const kept = common(mine.slice(start, mine.length - end), theirs.slice(start, theirs.length - end));
    // Marks in a wholly different text would say nothing.
    const words = mine.filter((word) => word.trim()).length;
    const changed = mine.slice(start, mine.length - end).filter((word, i) => word.trim() && !kept[i]).length;
    if (words - changed < LEAST_COMMON * words) return [text];
    const pieces = [mine.slice(0, start).join("")];
    let run = "", isRunKept = true;
    const close = () => { if (run) pieces.push(isRunKept ? run : make("mark", "", run)); run = ""; };
    mine.slice(start, mine.length - end).forEach((word, i) => {
      if (kept[i] !== isRunKept) { close(); isRunKept = kept[i]; }
      run += word;
    });
    close();
    pieces.push(mine.slice(mine.length - end).join(""));
    return pieces;
  };
  // Which of my words are in the longest common subsequence. Very long texts are marked as a whole.
  const common = (mine, theirs) => {
    const kept = mine.map(() => false);
    if (!mine.length || !theirs.length || mine.length > MOST_WORDS || theirs.length > MOST_WORDS) return kept;
    const width = theirs.length + 1, lengths = new Uint16Array((mine.length + 1) * width);
    for (let i = mine.length - 1; i >= 0; i--)
      for (let j = theirs.length - 1; j >= 0; j--)
        lengths[i * width + j] = mine[i] === theirs[j] ? lengths[(i + 1) * width + j + 1] + 1 : Math.max(lengths[(i + 1) * width + j], lengths[i * width + j + 1]);
    for (let i = 0, j = 0; i < mine.length && j < theirs.length;) {
      if (mine[i] === theirs[j]) { kept[i] = true; i++; j++; }
      else if (lengths[(i + 1) * width + j] >= lengths[i * width + j + 1]) i++;
      else j++;
    }
    return kept;
  };

  // --- The controls.
  const fill = (element, choices, chosen) => {
    element.replaceChildren(...choices.map(([value, text]) => {
      const option = make("option", "", text);
      option.value = value;
      return option;
    }));
    element.value = chosen;
  };
  const setPair = (a, b) => {
    [first, second] = [a, b];
    [get("first").value, get("second").value] = [a, b];
    const fields = sheet.head.runs.map((run, column) => {
      const label = make("label");
      const box = make("input");
      box.type = "checkbox";
      box.value = column;
      box.checked = also.has(column) || column === first || column === second;
      box.disabled = column === first || column === second;
      label.append(box, " ", run.name, ...run.marks.flatMap((mark) => [" ", make("span", "mark-word", mark)]));
      return label;
    });
    get("also").replaceChildren(get("also").firstElementChild, ...fields);
    for (const key of ["gained", "lost", "differ", "all"])
      get("filter").querySelector(`[data-words="${key}"]`).textContent = FILTERS[key].words();
    get("legend").textContent = `Gained and lost: ${name(second)} against ${name(first)}, by ${sheet.head.metrics[metric]?.name ?? "no score"}. ` +
      `${sheet.head.answers ? `Marked words are not in ${name(first)}'s answer (and in its own, not in the other's).` : "These runs have losses alone, no answers."}${sheet.head.leftOut.length ? ` Not shown: ${sheet.head.leftOut.join("; ")}.` : ""}`;
  };
  const use = async (number) => {
    sheet = await open(number);
    const runs = sheet.head.runs.map((run, column) => [column, run.name]);
    also = new Set(sheet.head.runs[0].id === "base" ? [0] : []);
    [page, here, metric] = [0, -1, 0];
    // Without answers, rows are worth a look where the losses differ most.
    order = get("order").value = sheet.head.answers ? "row" : "most";
    get("filter").querySelector('[value="differ"]').closest("label").hidden = !sheet.head.answers;
    fill(get("metric"), sheet.head.metrics.map((each, place) => [place, each.name]), 0);
    fill(get("first"), runs, sheet.head.pair[0]);
    fill(get("second"), runs, sheet.head.pair[1]);
    get("sheet").value = number;
    setPair(...sheet.head.pair);
  };
  for (const key of Object.keys(FILTERS)) {
    const label = make("label");
    const radio = make("input");
    [radio.type, radio.name, radio.value, radio.checked] = ["radio", "answers-rows", key, key === "all"];
    const [words, count] = [make("span"), make("b")];
    [words.dataset.words, count.dataset.count] = [key, key];
    label.append(radio, words, " ", count);
    get("filter").append(label);
  }
  [filter, query] = ["all", ""];
  const on = (element, event, change) => element.addEventListener(event, async (e) => {
    await change(e.target);
    [page, here] = [0, -1];
    await select();
  });
  on(get("sheet"), "change", (target) => use(+target.value));
  on(get("first"), "change", (target) => setPair(+target.value, second));
  on(get("second"), "change", (target) => setPair(first, +target.value));
  on(get("metric"), "change", (target) => { metric = +target.value; setPair(first, second); });
  on(get("order"), "change", (target) => { order = target.value; });
  on(get("query"), "input", (target) => { query = target.value.trim().toLowerCase(); });
  on(get("filter"), "change", (target) => { filter = target.value; });
  on(get("also"), "change", (target) => { also[target.checked ? "add" : "delete"](+target.value); });
  const turn = (by) => async () => { page += by; await draw(); get("filter").scrollIntoView({ block: "start" }); };
  get("back").addEventListener("click", turn(-1));
  get("next").addEventListener("click", turn(1));
  get("controls").addEventListener("submit", (event) => event.preventDefault());

  // --- Links to a row: #answers?sheet=...&row=...&a=...&b=...
  const follow = async () => {
    if (!location.hash.startsWith("#answers?")) return false;
    const wanted = new URLSearchParams(location.hash.slice("#answers?".length));
    const heads = [...get("sheet").options].map((_, number) => JSON.parse(document.getElementById(`sheet-${number}`).textContent));
    const number = heads.findIndex((head) => head.key === wanted.get("sheet"));
    if (number < 0) return false;
    await use(number);
    const column = (id, usual) => { const place = sheet.head.runs.findIndex((run) => run.id === id); return place < 0 ? usual : place; };
    setPair(column(wanted.get("a"), first), column(wanted.get("b"), second));
    [filter, order, query] = ["all", "row", ""];
    get("filter").querySelector('[value="all"]').checked = true;
    [get("order").value, get("query").value] = ["row", ""];
    const row = sheet.ids.indexOf(wanted.get("row"));
    [here, page] = [row, Math.max(0, Math.floor(row / PAGE))];
    await select();
    const target = row < 0 ? document.getElementById("answers") : get("rows").children[row % PAGE];
    target.scrollIntoView();
    target.focus({ preventScroll: true });
    return true;
  };
  addEventListener("hashchange", follow);

  // Nothing is unpacked before the section comes near the screen.
  const start = async () => { if (!sheet) { await use(0); await select(); } };
  if (typeof DecompressionStream === "undefined") {
    get("status").textContent = "This browser is too old to unpack the answers (it has no DecompressionStream).";
    return;
  }
  follow().then((followed) => {
    if (followed) return;
    const watcher = new IntersectionObserver((entries) => {
      if (entries.some((entry) => entry.isIntersecting)) { watcher.disconnect(); start(); }
    }, { rootMargin: "800px" });
    watcher.observe(document.getElementById("answers"));
  });
})();
