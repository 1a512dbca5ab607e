"use strict";
// Shows the data of this file. All of it is set as text: what the data contains is never taken for HTML.
(() => {
  const TARGETS = 10, SUSPECTS = 25; // on a page
  const LONG = { characters: 280, lines: 7, tokens: 60, rows: 8 }; // what is longer can be unfolded
  const PICTURE = { target: 176, example: 84 }; // pixels of the longer side
  const SVG = "http://www.w3.org/2000/svg";

  const data = JSON.parse(document.getElementById("data").textContent);
  const { targets, train } = data;
  const byId = (id) => document.getElementById(id);
  const digits = (number) => String(number).replace(/\B(?=(\d{3})+$)/g, "\u202f"); // thin gaps between thousands
  const collator = new Intl.Collator(undefined, { numeric: true });
  const count = (number, noun) => `${digits(number)} ${noun}${number === 1 ? "" : "s"}`;

  // Elements

  function make(name, attributes = {}, ...children) {
    return filled(document.createElement(name), attributes, children);
  }

  function draw(name, attributes = {}, ...children) {
    return filled(document.createElementNS(SVG, name), attributes, children);
  }

  function filled(element, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== null && value !== undefined) element.setAttribute(name, value);
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }

  const isolated = (text) => make("bdi", {}, text); // its writing direction changes nothing around it

  // Drawings: parts of the file are parsed when they are needed

  const parsed = new Map();
  let waiting = false; // for drawings that the browser has not read yet

  function drawingsOf(place) {
    if (place === null) return [];
    let number = data.firsts.findIndex((first) => first > place) - 1;
    if (number < 0) number = data.firsts.length - 1;
    if (!parsed.has(number)) {
      const element = byId(`drawn-${number}`);
      if (element === null || (document.readyState === "loading" && element.nextElementSibling === null)) {
        waiting = true;
        return [];
      }
      parsed.set(number, JSON.parse(element.textContent));
    }
    return parsed.get(number)[place - data.firsts[number]];
  }

  function drawn(place, context) {
    const found = drawingsOf(place);
    const texts = found.slice(1).filter(({ kind }) => kind === "text" || kind === "tokens").length;
    const beside = found.length === 2 && found[0].width && texts && !context.isTarget; // an image and its caption
    return make("div", { class: beside ? "beside" : null }, ...found.map((drawing) => {
      const name = drawing.name ? make("p", { class: "part-name", dir: "auto" }, drawing.name) : null;
      return make("div", {}, name, ...DRAW[drawing.kind](drawing, context));
    }));
  }

  const DRAW = {
    image(drawing, { isTarget, what }) {
      const image = make("img", { src: drawing.source, alt: `Image of ${what}` });
      if (drawing.width) {
        const scale = PICTURE[isTarget ? "target" : "example"] / Math.max(drawing.width, drawing.height);
        image.width = Math.max(1, Math.round(drawing.width * scale));
        image.height = Math.max(1, Math.round(drawing.height * scale));
        if (scale > 1.5) image.classList.add("pixels");
      }
      const figure = make("div", { class: "picture" }, image);
      if (drawing.classes) figure.append(legend(drawing));
      return [figure];
    },
    text(drawing) {
      const limit = Math.min(LONG.characters, drawing.text.split("\n", LONG.lines).join("\n").length);
      return unfolding(drawing.text.length, limit, "characters", drawing.more, (length) =>
        make("p", { class: "text", dir: "auto" }, drawing.text.slice(0, length) + (length < drawing.text.length ? "…" : "")));
    },
    tokens(drawing) {
      return unfolding(drawing.tokens.length, LONG.tokens, "tokens", drawing.more, (length) => {
        const line = make("p", { class: "tokens", dir: "auto" });
        for (const token of drawing.tokens.slice(0, length)) line.append(make("span", { class: "token" }, token), " ");
        return line;
      });
    },
    table: (drawing, context) => table(drawing, context),
    series: (drawing, context) => [series(drawing, context)],
    unknown: (drawing) => [make("p", { class: "text soft" }, `${drawing.text}: pass render= to draw it`)],
  };

  function legend(drawing) {
    const list = make("ul", { class: "legend", "aria-label": "Classes of pixels" });
    for (const [name, colour] of drawing.classes) {
      const swatch = make("span", { class: "swatch", "aria-hidden": "true" });
      swatch.style.backgroundColor = data.palette[colour];
      list.append(make("li", {}, swatch, name));
    }
    if (drawing.more) list.append(make("li", {}, `and ${drawing.more} more`));
    return list;
  }

  // What is long is cut, with a button that shows all of it
  function unfolding(length, limit, what, more, show) {
    const rest = more ? make("p", { class: "soft part-name" }, `${digits(more)} more ${what} are not in this report`) : null;
    if (length <= limit * 1.25) return [show(length), rest];
    let shown = show(limit);
    const button = make("button", { type: "button", class: "more", "aria-expanded": "false" }, `Show all ${digits(length)} ${what}`);
    button.addEventListener("click", () => {
      const open = button.getAttribute("aria-expanded") === "false";
      const next = show(open ? length : limit);
      shown.replaceWith(next);
      shown = next;
      button.setAttribute("aria-expanded", String(open));
      button.textContent = open ? "Show less" : `Show all ${digits(length)} ${what}`;
    });
    return [shown, button, rest];
  }

  const MARKS = { 1: "higher than", "-1": "lower than", 0: "not" };

  function table(drawing, { isTarget, marks, compared }) {
    const names = data.tables[drawing.columns];
    const own = compared && compared.find((one) => one.columns === drawing.columns);
    const row = (column, mark) => {
      const word = mark === undefined ? null : make("span", {}, ` ${MARKS[mark]} `, isolated(own.values[column] || "missing"));
      return make("tr", word ? { class: "marked" } : {},
        make("th", { scope: "row" }, isolated(names[column])), make("td", {}, isolated(drawing.values[column]), word));
    };
    const all = () => {
      const marked = new Map(marks);
      return names.map((_, column) => row(column, marked.get(column)));
    };
    const first = isTarget || !marks.length ? all().slice(0, LONG.rows) : marks.map(([column, mark]) => row(column, mark));
    const body = make("tbody", {}, ...first);
    const caption = isTarget || !marks.length ? "Values" : "Values that differ most from the target";
    const parts = [make("table", { class: "values" }, make("caption", { class: "hidden" }, caption), body)];
    if (first.length < names.length) {
      const closed = `All ${names.length} columns`;
      const button = make("button", { type: "button", class: "more", "aria-expanded": "false" }, closed);
      button.addEventListener("click", () => {
        const open = button.getAttribute("aria-expanded") === "false";
        body.replaceChildren(...(open ? all() : first));
        button.setAttribute("aria-expanded", String(open));
        button.textContent = open ? "Fewer columns" : closed;
      });
      parts.push(button);
    }
    if (drawing.more) parts.push(make("p", { class: "soft part-name" }, `${drawing.more} more columns are not in this report`));
    return parts;
  }

  const DASHES = [null, "6 3", "2 2", "8 2 2 2", "1 3", "10 4", "4 1", "3 5"];

  function series(drawing, { what, range }) {
    const [width, height, left] = [240, 84, 36];
    const low = range ? range.low : drawing.low, high = range ? range.high : drawing.high;
    const unit = (drawing.high - drawing.low) / 1000, span = high - low || 1;
    const y = (value) => 4 + (height - 8) * (1 - (drawing.low + value * unit - low) / span);
    const svg = draw("svg", { class: "series", viewBox: `0 0 ${width} ${height}`, role: "img",
      "aria-label": `Curve of ${what}: ${count(drawing.length, "step")}, ${count(drawing.channels.length, "channel")}, from ${drawing.lowText} to ${drawing.highText}` });
    svg.append(draw("rect", { class: "frame", x: left, y: 2, width: width - left - 2, height: height - 4 }));
    svg.append(draw("text", { x: left - 4, y: 11, "text-anchor": "end" }, range ? range.highText : drawing.highText));
    svg.append(draw("text", { x: left - 4, y: height - 4, "text-anchor": "end" }, range ? range.lowText : drawing.lowText));
    drawing.channels.forEach((channel, number) => {
      const step = (width - left - 2) / Math.max(1, channel.length - 1);
      for (const run of runs(channel)) {
        const points = run.map(([place, value]) => `${(left + place * step).toFixed(1)},${y(value).toFixed(1)}`);
        svg.append(draw("polyline", { class: `line${number % DASHES.length}`, points: (points.length === 1 ? [points[0], points[0]] : points).join(" "),
          "stroke-dasharray": DASHES[number % DASHES.length] }));
      }
    });
    return svg;
  }

  // Parts of a curve between gaps
  function runs(channel) {
    const found = [[]];
    channel.forEach((value, place) => {
      if (value === null) found.push([]);
      else found[found.length - 1].push([place, value]);
    });
    return found.filter((run) => run.length);
  }

  // Curves beside each other share their range
  function rangeOf(places) {
    const found = places.flatMap(drawingsOf).filter((drawing) => drawing.kind === "series");
    if (!found.length) return null;
    const lowest = found.reduce((one, other) => (other.low < one.low ? other : one));
    const highest = found.reduce((one, other) => (other.high > one.high ? other : one));
    return { low: lowest.low, lowText: lowest.lowText, high: highest.high, highText: highest.highText };
  }

  // Names and columns of examples

  const nameOf = (set, place) => (set.numbered ? `#${set.ids[place]}` : set.ids[place]);

  function known(entries) {
    const list = make("dl", { class: "known" });
    for (const [name, value, verdict] of entries) {
      if (value !== null && value !== undefined && value !== "") {
        const judged = verdict ? make("span", { class: "verdict" }, ` ${verdict}`) : null;
        list.append(make("div", {}, make("dt", {}, isolated(name)), make("dd", {}, isolated(value), judged)));
      }
    }
    return list;
  }

  const columnsOf = (set, place) => set.columns.map(({ name, values }) => [name, values[place]]);

  // Targets

  const SIDES = {
    helpful: { title: "Most helpful", sign: "▲", of: data.helpful },
    harmful: { title: "Most harmful", sign: "▼", of: data.harmful },
  };

  function targetCard(target, place, total) {
    const name = nameOf(targets, target), id = `target-${targets.rows[target]}`, heading = `name-of-${id}`;
    const what = `target ${name}`;
    const shown = [targets.drawings[target], ...Object.values(SIDES).flatMap(({ of }) => of.places[target].map((row) => train.drawings[row]))];
    const range = rangeOf(shown);
    const pictures = shown.some((one) => one !== null) && shown.flatMap(drawingsOf).every((one) => one.width);
    const verdict = { 1: "✓ right", 0: "✗ wrong" }[targets.right[target]];
    const header = make("header", {},
      make("h3", { id: heading }, make("a", { href: `#${id}` }, "Target ", isolated(name))),
      drawn(targets.drawings[target], { isTarget: true, what, range, marks: [] }),
      known([
        ["row", targets.numbered ? null : String(targets.rows[target])],
        ["label", targets.labels[target]],
        ["prediction", targets.predictions[target], verdict],
        ["output", targets.outputTexts[target]],
        ...columnsOf(targets, target),
      ]));
    const largest = Math.max(...Object.values(SIDES).flatMap(({ of }) => of.scores[target].map(Math.abs)));
    const sides = make("div", { class: "sides" },
      ...Object.keys(SIDES).map((side) => sideOf(side, target, { largest, range, pictures })));
    return make("article", { id, class: pictures ? "target" : "target reading", "aria-labelledby": heading, "aria-posinset": place + 1, "aria-setsize": total, tabindex: -1 },
      header, sides);
  }

  function sideOf(side, target, { largest, range, pictures }) {
    const { title, sign, of } = SIDES[side];
    const compared = drawingsOf(targets.drawings[target]).filter((drawing) => drawing.kind === "table");
    const heading = make("h4", { class: side }, `${sign} ${title}`);
    const places = of.places[target];
    if (!places.length) return make("div", { class: "side" }, heading, make("p", { class: "none" }, "none"));
    const list = make("ol", {}, ...places.map((row, number) => {
      const bar = make("span");
      bar.style.width = `${100 * Math.abs(of.scores[target][number]) / largest}%`;
      const score = make("div", {},
        make("span", { class: `score ${side}` }, make("span", { class: "hidden" }, "score "), of.texts[target][number]),
        of.errors ? make("span", { class: "error" }, ` ± ${of.errors[target][number]}`) : null,
        make("span", { class: `bar-of ${side}`, "aria-hidden": "true" }, bar));
      const marks = of.marks ? of.marks[target][number] : [];
      const drawing = drawn(train.drawings[row], { isTarget: false, what: exampleName(row), range, marks, compared });
      return pictures ? make("li", {}, drawing, score, aboutExample(row)) : make("li", {}, score, aboutExample(row), drawing);
    }));
    return make("div", { class: "side" }, heading, list);
  }

  const exampleName = (row) => `training example ${nameOf(train, row)}`;

  function aboutExample(row) {
    const name = make("span", { class: "soft" }, make("span", { class: "hidden" }, "training example "), isolated(nameOf(train, row)),
      train.numbered ? null : ` (row ${train.rows[row]})`);
    const values = [["label", train.labels[row]], ["prediction", train.predictions[row]], ...columnsOf(train, row)];
    const about = make("div", { class: "about" }, name);
    for (const [title, value] of values) {
      if (value) about.append(" ", make("span", {}, make("span", { class: "soft" }, isolated(title)), " ", isolated(value)));
    }
    return about;
  }

  // Searching, filtering, sorting

  const textOf = (drawing) => [drawing.text, drawing.tokens && drawing.tokens.join(" "), drawing.values && drawing.values.join(" ")].filter(Boolean).join(" ");

  function haystack(set, place) {
    const words = [nameOf(set, place), set.rows[place], set.labels[place], set.predictions[place], ...columnsOf(set, place).map(([, value]) => value)];
    if (data.searchable) words.push(...drawingsOf(set.drawings[place]).map(textOf));
    return words.filter((word) => word !== null).join("\n").toLowerCase();
  }

  const haystacks = new Map();

  function contains(set, place, needle) {
    const key = `${set === train ? "train" : "target"} ${place}`;
    if (!haystacks.has(key) || waiting) haystacks.set(key, haystack(set, place));
    return haystacks.get(key).includes(needle);
  }

  const all = targets.rows.map((_, place) => place);
  const unknownLast = (values, sign) => (one, other) => {
    const [a, b] = [values[one], values[other]];
    if (a === null || b === null) return (a === null) - (b === null);
    return sign * (typeof a === "string" ? collator.compare(a, b) : a - b);
  };
  const firstOf = (scores) => scores.map((row) => (row.length ? row[0] : null));
  const ORDERS = [
    ["as in the data set", null, () => true],
    ["label", unknownLast(targets.labels, 1), () => targets.labels.some((label) => label !== null)],
    ["output, lowest first", unknownLast(targets.outputs, 1), () => targets.outputs.some((output) => output !== null)],
    ["output, highest first", unknownLast(targets.outputs, -1), () => targets.outputs.some((output) => output !== null)],
    ["most helpful score first", unknownLast(firstOf(data.helpful.scores), -1), () => true],
    ["most harmful score first", unknownLast(firstOf(data.harmful.scores), 1), () => true],
  ];
  const controls = { search: byId("search"), order: byId("order"), class: byId("class"), wrong: byId("wrong"), clear: byId("clear") };
  let found = all, first = 0;

  function select() {
    const needle = controls.search.value.trim().toLowerCase();
    const label = controls.class.value === "" ? null : data.targets.classes[Number(controls.class.value)][0];
    found = all.filter((place) => (label === null || targets.labels[place] === label)
      && (!controls.wrong.checked || targets.right[place] === 0)
      && (!needle || contains(targets, place, needle)));
    const compare = ORDERS[Number(controls.order.value)][1];
    if (compare) found.sort(compare);
    first = 0;
    showTargets();
  }

  function showTargets() {
    waiting = false;
    const shown = found.slice(first, first + TARGETS);
    const feed = byId("feed"), focused = cards().findIndex((card) => card.contains(document.activeElement));
    feed.replaceChildren(...shown.map((target, number) => targetCard(target, first + number, found.length)));
    if (feed.firstElementChild) feed.firstElementChild.tabIndex = 0;
    const of = found.length === all.length ? count(all.length, "target") : `${digits(found.length)} of ${count(all.length, "target")}`;
    byId("count").textContent = found.length > TARGETS ? `${of}, page ${first / TARGETS + 1} of ${Math.ceil(found.length / TARGETS)}` : of;
    targetPager.show(first / TARGETS, Math.ceil(found.length / TARGETS));
    if (focused >= 0) focusCard(Math.min(focused, shown.length - 1)); // it was in a card that is gone
  }

  // Pages

  function pager(nav, turn) {
    const button = (text, step, far) => {
      const made = make("button", { type: "button", class: far ? "far" : null }, text);
      made.addEventListener("click", () => {
        if (made.getAttribute("aria-disabled") !== "true") turn(step(state.page, state.pages));
      });
      return made;
    };
    const state = { page: 0, pages: 1 };
    const back = [button("First", () => 0, true), button("Previous", (page) => page - 1)];
    const on = [button("Next", (page) => page + 1), button("Last", (_, pages) => pages - 1, true)];
    const input = make("input", { type: "number", min: 1, inputmode: "numeric" });
    const of = make("span");
    const label = make("label", {}, "Page ", input, " ", of);
    input.addEventListener("change", () => {
      const page = Math.round(Number(input.value)) - 1;
      turn(Math.min(Math.max(input.value === "" ? state.page : page, 0), state.pages - 1));
    });
    nav.append(...back, label, ...on);
    return {
      show(page, pages) {
        Object.assign(state, { page, pages });
        nav.hidden = pages < 2;
        input.value = page + 1;
        input.max = pages;
        of.textContent = `of ${digits(pages)}`;
        for (const one of back) one.setAttribute("aria-disabled", String(page <= 0));
        for (const one of on) one.setAttribute("aria-disabled", String(page >= pages - 1));
      },
      turnBy(step) {
        const page = state.page + step;
        if (page < 0 || page >= state.pages) return false;
        turn(page);
        return true;
      },
    };
  }

  function turnTo(page) {
    first = page * TARGETS;
    showTargets();
    byId("count").scrollIntoView({ block: "start" });
  }

  const targetPager = pager(byId("pager"), turnTo);

  // Suspects

  const suspects = data.suspects && suspectsPage();

  function suspectsPage() {
    const { places, columns } = data.suspects;
    const has = (values) => places.some((place) => values[place] !== null);
    const named = new Set(columns.map(({ name }) => name));
    const drawings = places.some((place) => train.drawings[place] !== null);
    const ofTrain = [["label", train.labels], ["prediction", train.predictions], ...train.columns.map(({ name, values }) => [name, values])]
      .filter(([name, values]) => has(values) && !named.has(name))
      .map(([name, values]) => ({ name, texts: places.map((place) => values[place] ?? ""), numbers: null }));
    const fields = [
      { name: "rank", texts: places.map((_, number) => String(number + 1)), numbers: places.map((_, number) => number) },
      { name: "example", texts: places.map((place) => nameOf(train, place)), numbers: train.numbered ? places.map((place) => train.rows[place]) : null },
      ...ofTrain, ...columns,
    ];
    const state = { column: 0, sign: 1, first: 0, found: [] };
    const search = byId("suspect-search"), tableOf = byId("suspect-table");
    const own = pager(byId("suspect-pager"), (page) => { state.first = page * SUSPECTS; show(); });

    const heads = fields.map((field, number) => {
      const button = make("button", { type: "button" }, isolated(field.name));
      button.addEventListener("click", () => {
        // numbers are most interesting where they are high
        state.sign = state.column === number ? -state.sign : field.numbers && number > 1 ? -1 : 1;
        state.column = number;
        choose();
      });
      return make("th", { scope: "col" }, button);
    });
    const withDrawing = (cells, drawing) => (drawings ? [...cells.slice(0, 2), drawing(), ...cells.slice(2)] : cells);
    tableOf.tHead.append(make("tr", {}, ...withDrawing(heads, () => make("th", { scope: "col" }, "drawing"))));

    function choose() {
      const needle = search.value.trim().toLowerCase(), { texts, numbers } = fields[state.column];
      state.found = places.map((_, number) => number).filter((number) => !needle
        || contains(train, places[number], needle)
        || columns.some((column) => column.texts[number].toLowerCase().includes(needle)));
      state.found.sort(unknownLast(numbers || texts, state.sign));
      state.first = 0;
      show();
    }

    function show() {
      heads.forEach((head, number) => {
        if (number === state.column) head.setAttribute("aria-sort", state.sign > 0 ? "ascending" : "descending");
        else head.removeAttribute("aria-sort");
      });
      const shown = state.found.slice(state.first, state.first + SUSPECTS);
      tableOf.tBodies[0].replaceChildren(...shown.map((number) => make("tr", {},
        ...withDrawing(fields.map((field) => make("td", {}, isolated(field.texts[number]))), () => make("td", {},
          drawn(train.drawings[places[number]], { isTarget: false, what: exampleName(places[number]), range: null, marks: [] }))))));
      const total = data.suspects.count, most = places.length;
      const of = state.found.length === most ? count(most, "suspect") : `${digits(state.found.length)} of ${count(most, "suspect")}`;
      byId("suspect-count").textContent = most < total ? `${of}; the first ${digits(most)} of ${digits(total)} are in this report` : of;
      own.show(state.first / SUSPECTS, Math.ceil(state.found.length / SUSPECTS));
    }

    search.addEventListener("input", choose);
    return { show, choose, pager: own };
  }

  // One page is shown at a time; the part of the address behind # names it, or a target

  const pages = [...document.querySelectorAll("main > section")];
  let current = "targets";

  function open(name) {
    current = name;
    for (const page of pages) page.hidden = page.id !== `${name}-page`;
    for (const link of document.querySelectorAll(".top nav a")) {
      if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
  }

  function follow(moveFocus) {
    const name = location.hash.slice(1), row = /^target-(\d+)$/.exec(name);
    if (row && Number(row[1]) < all.length) {
      open("targets");
      const target = Number(row[1]);
      if (!found.includes(target)) clear();
      first = Math.floor(found.indexOf(target) / TARGETS) * TARGETS;
      showTargets();
      focusCard(found.indexOf(target) - first);
    } else if (pages.some((page) => page.id === `${name}-page`)) {
      open(name);
      if (moveFocus) byId(`${name}-title`).focus();
      window.scrollTo(0, 0);
    }
  }

  function clear() {
    controls.search.value = controls.class.value = "";
    controls.order.value = "0";
    controls.wrong.checked = false;
    select();
  }

  // The keyboard

  const cards = () => [...byId("feed").children];

  function focusCard(number) {
    const chosen = cards()[number];
    if (!chosen) return;
    for (const card of cards()) card.tabIndex = card === chosen ? 0 : -1;
    chosen.focus();
    chosen.scrollIntoView({ block: "start" });
  }

  function move(step) {
    const number = cards().findIndex((card) => card.contains(document.activeElement));
    if (number < 0) focusCard(step > 0 ? 0 : cards().length - 1);
    else if (cards()[number + step]) focusCard(number + step);
    else if (targetPager.turnBy(step)) focusCard(step > 0 ? 0 : cards().length - 1);
  }

  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest("input:not([type=checkbox]), select, textarea") !== null;
    if (event.key === "Escape" && event.target.type === "search") {
      event.target.value = "";
      event.target.dispatchEvent(new Event("input"));
      byId(`${current}-title`).focus();
    }
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    const inFeed = event.target.closest("#feed") !== null;
    const search = current === "targets" ? controls.search : current === "suspects" ? byId("suspect-search") : null;
    const letters = byId("letters").checked;
    const turn = { targets: targetPager, suspects: suspects && suspects.pager }[current];
    if (event.key === "/" && letters && search) search.focus();
    else if (current === "targets" && ((event.key === "j" && letters) || (event.key === "ArrowDown" && inFeed))) move(1);
    else if (current === "targets" && ((event.key === "k" && letters) || (event.key === "ArrowUp" && inFeed))) move(-1);
    else if (event.key === "ArrowRight" && turn && !event.target.closest(".scroll")) turn.turnBy(1);
    else if (event.key === "ArrowLeft" && turn && !event.target.closest(".scroll")) turn.turnBy(-1);
    else return;
    event.preventDefault();
  });

  // Beginning

  ORDERS.forEach(([name, , offered], number) => {
    if (offered()) controls.order.append(make("option", { value: number }, name));
  });
  controls.class.append(make("option", { value: "" }, "all"));
  targets.classes.forEach(([name, number], place) => {
    controls.class.append(make("option", { value: place }, `${name} (${digits(number)})`));
  });
  controls.class.closest(".field").hidden = targets.classes.length < 2;
  controls.wrong.closest(".field").hidden = !targets.right.some((right) => right === 0);
  controls.search.addEventListener("input", select);
  for (const name of ["order", "class", "wrong"]) controls[name].addEventListener("change", select);
  controls.clear.addEventListener("click", () => { clear(); controls.search.focus(); });
  window.addEventListener("hashchange", () => follow(true));

  select();
  if (suspects) suspects.choose();
  follow(false);
  document.addEventListener("DOMContentLoaded", () => { // now all drawings are there
    if (waiting) {
      showTargets();
      if (suspects) suspects.show();
      if (location.hash.startsWith("#target-")) follow(false);
    }
  });
})();
