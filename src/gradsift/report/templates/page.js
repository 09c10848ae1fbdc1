"use strict";
const one = (query, within = document) => within.querySelector(query);
const all = (query, within = document) => [...within.querySelectorAll(query)];

// --- what appears at the pointer, and going to an example ---

const tip = document.createElement("div");
tip.className = "tip";
tip.hidden = true;
document.body.append(tip);
const hide = () => { tip.hidden = true; };
addEventListener("scroll", hide, { passive: true, capture: true });
const line = (text, kind) => {
  const made = document.createElement("p");
  made.className = kind;
  made.dir = "auto";
  made.textContent = text;
  return made;
};
const show = (event, parts) => {
  tip.replaceChildren(...parts);
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(event.clientX + 14, innerWidth - width - 8))}px`;
  tip.style.top = `${event.clientY + 18 + height > innerHeight ? Math.max(8, event.clientY - height - 14) : event.clientY + 18}px`;
};
const go = (target) => {
  for (let fold = target.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
  for (const found of all(".found")) found.classList.remove("found");
  target.classList.add("found");
  target.focus({ preventScroll: true });
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  target.scrollIntoView({ block: target.offsetHeight < innerHeight / 2 ? "center" : "start", behavior: calm ? "instant" : "smooth" });
};
addEventListener("click", (event) => {
  const target = event.target.closest("a[href^='#']")?.getAttribute("href");
  const item = target && document.getElementById(target.slice(1));
  if (!item?.matches(".example")) return;
  event.preventDefault();
  const field = one(".tools input", item.closest(".listing") ?? document);
  if (field?.value) { field.value = ""; field.dispatchEvent(new Event("input")); }
  go(item);
});

// --- searching and ordering examples ---

for (const tools of all(".tools")) {
  const listing = tools.closest(".listing");
  const within = listing.closest("section") ?? listing;
  const examples = all(".example", within).map((item) => [item, item.textContent.toLowerCase()]);
  const folds = all("details.rest", within).map((fold) => [fold, fold.open]);
  const [field, matches, unfold, order] = ["input", ".matches", "button", "select"].map((query) => one(query, tools));
  field.addEventListener("input", () => {
    const wanted = field.value.trim().toLowerCase();
    let found = 0;
    for (const [item, text] of examples) {
      item.hidden = !text.includes(wanted);
      found += !item.hidden;
    }
    for (const [fold, open] of folds) {
      const inside = fold.closest(".example") ?? one(".example:not([hidden])", fold);
      fold.open = wanted ? inside !== null && !inside.hidden : open;
    }
    matches.textContent = wanted ? `${found} of ${examples.length} listed ${tools.dataset.things}` : "";
  });
  unfold?.addEventListener("click", () => {
    const open = unfold.getAttribute("aria-pressed") !== "true";
    unfold.setAttribute("aria-pressed", String(open));
    unfold.textContent = open ? "Close all texts" : "Open all texts";
    for (const fold of all("details", within)) fold.open = open;
  });
  order?.addEventListener("change", () => {
    const sign = [0, -1, 1][order.value];
    const value = ([item]) => (item.dataset.order === undefined ? Infinity : sign * Number(item.dataset.order));
    const sorted = sign ? [...examples].sort((a, b) => value(a) - value(b)) : examples;
    one(".examples", listing).append(...sorted.map(([item]) => item));
  });
  tools.hidden = false;
}

// --- tables that are filtered and sorted ---

const amount = (cell) => Number.parseFloat(cell.textContent.trim().replace("−", "-").replaceAll(",", ""));
for (const tools of all(".sifting")) {
  const [field, matches, body] = [one("input", tools), one(".matches", tools), one("tbody", tools.parentElement)];
  const picking = all("tr", body).filter((row) => one("[data-picks]", row));
  const rows = picking.length ? picking : all("tr", body);  // what is only there to compare with stays below
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
    matches.textContent = words.length ? `${rows.filter((row) => !row.hidden).length} of ${rows.length}` : "";
  });
  const heads = all("thead th", tools.parentElement);
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "sorter";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const known = (row) => { const value = amount(row.cells[column]); return Number.isNaN(value) ? -Infinity : value; };
      const order = rows.some((row) => !Number.isNaN(amount(row.cells[column])))
        ? (a, b) => known(b) - known(a)
        : (a, b) => a.cells[column].textContent.localeCompare(b.cells[column].textContent);
      body.prepend(...[...rows].sort((a, b) => (down ? order(a, b) : order(b, a))));
    });
  });
  tools.hidden = false;
}

// --- switches: what is seen where they stand, and the series that one of them picks out ---

const switches = all(".switch");
const state = Object.fromEntries(switches.map((own) => [own.dataset.name, one("input:checked", own)?.value]));
const marking = switches.find((own) => own.hasAttribute("data-series"));
const labels = marking ? all("label bdi", marking).map((label) => label.textContent) : [];
const stands = (when) => Object.entries(when).every(([name, value]) => !(name in state) || state[name] === value);
const choices = all(".choice").map((part) => [part, Object.fromEntries(new URLSearchParams(part.dataset.when))]);
const maps = all(".map-part").map((part) => new ExampleMap(part));

function pick(wanted) {
  Object.assign(state, wanted);
  // What one option leaves no view of cannot be picked beside it.
  const views = maps.flatMap((map) => map.views);
  for (const own of switches.filter((one) => one !== marking && views.some(({ when }) => one.dataset.name in when))) {
    const series = marking?.dataset.name;
    const known = new Set(views.filter(({ when }) => when[series] === state[series]).map(({ when }) => when[own.dataset.name]));
    if (!known.size) continue;
    for (const input of all("input", own)) input.disabled = !known.has(input.value);
    if (!known.has(state[own.dataset.name])) state[own.dataset.name] = [...known].at(-1);
  }
  for (const own of switches) for (const input of all("input", own)) input.checked = input.value === state[own.dataset.name];
  for (const [part, when] of choices) part.hidden = !stands(when);
  const picked = marking && state[marking.dataset.name];
  for (const part of all("[data-series]:not(fieldset)")) {
    const active = part.dataset.series === picked && part.dataset.series !== "";
    part.classList.toggle("active", active);
    if (active && part.matches(".series")) part.parentElement.append(part);
  }
  for (const spot of all("[data-picks]")) {
    const now = stands(Object.fromEntries(new URLSearchParams(spot.dataset.picks)));
    spot.classList.toggle("now", now);
    if (spot.matches("button")) spot.setAttribute("aria-pressed", String(now));
  }
  const label = marking && one("input:checked", marking)?.parentElement;
  if (label) {
    const left = label.offsetLeft - marking.offsetLeft;
    if (left < marking.scrollLeft || left + label.offsetWidth > marking.scrollLeft + marking.clientWidth) marking.scrollLeft = left - 24;
  }
  for (const map of maps) map.turn();
}

// --- maps: the examples of a view, its marks, and what is at the pointer ---

function ExampleMap(part) {
  const data = JSON.parse(one(".views", part).textContent);
  const drawings = all(".map-drawing", part);
  const items = all("[data-number]", part).sort((a, b) => a.dataset.number - b.dataset.number);
  const [picks, rest] = [one(".picks", part), one(".remaining", part)];
  const restOrder = [...items].sort((a, b) => rank(a) - rank(b));
  function rank(item) { return Number(one(".meta", item).textContent.match(/rank\s*([\d,]+)/)?.[1].replaceAll(",", "") ?? item.dataset.number); }
  this.views = data.views;
  const view = () => data.views.find(({ when }) => stands(when));
  const path = (places, numbers, shape = "h0") => numbers.map((n) => (places[n] ? `M${places[n][0]} ${places[n][1]}${shape}` : "")).join("");
  const ring = (size) => `m${-size} 0a${size} ${size} 0 1 0 ${2 * size} 0a${size} ${size} 0 1 0 ${-2 * size} 0`;

  const weigh = (item, weight, figure, low, high) => {
    one(".figure", item).textContent = figure;
    const scale = high > low ? 100 / (high - low) : 0;
    const [zero, end] = [-low * scale, (weight - low) * scale];
    const box = all(".weight rect", item)[1];
    box.setAttribute("class", weight < 0 ? "negative" : "chosen");
    box.setAttribute("x", Math.min(zero, end).toFixed(2));
    box.setAttribute("width", Math.abs(end - zero).toFixed(2));
  };

  this.turn = () => {
    const now = view() ?? { picks: [], some: [], weights: [], figures: [], among: [], notes: [], tones: "", covers: "", words: "There is nothing to show." };
    const [low, high] = [Math.min(0, ...now.weights), Math.max(0, ...now.weights)];
    const chosen = new Set(now.picks);
    now.picks.forEach((number, order) => {
      const item = items[number];
      if (one(".order", item)) one(".order", item).textContent = order + 1;
      if (now.weights.length) weigh(item, now.weights[order], now.figures[order], low, high);
    });
    const among = now.among.length ? now.among : items.map((_, n) => n);
    const own = new Map(among.map((number, at) => [number, now.notes[at] ?? ""]));
    items.forEach((item, number) => {
      item.classList.toggle("is-chosen", chosen.has(number));
      const [noted, foreign] = [one(".noted", item), one(".foreign", item)];
      if (noted) noted.textContent = own.get(number) ?? "–";
      if (foreign) {
        foreign.hidden = own.has(number);
        const of = new Set(data.views.filter(({ among: some }) => some.includes(number)).map(({ when }) => labels[when[marking?.dataset.name]]));
        foreign.textContent = foreign.hidden ? "" : `candidate of ${[...of].join(", ")} only`;
      }
    });
    picks.replaceChildren(...now.picks.map((number) => items[number]));
    rest.replaceChildren(...restOrder.filter((item) => !chosen.has(Number(item.dataset.number))));
    one(".no-picks", part).hidden = now.picks.length > 0;
    one(".count-of", part).textContent = (items.length - now.picks.length).toLocaleString("en");
    for (const words of all(".words", part)) words.textContent = now.words;
    const some = new Set(now.some);
    drawings.forEach((drawing, space) => {
      const places = data.places[space];
      const set = (kind, numbers, shape) => one(`.${kind}`, drawing).setAttribute("d", path(places, numbers, shape));
      const series = marking ? one(`[value="${state[marking.dataset.name]}"] + span .key-line`, marking) : null;
      const colour = [...series?.classList ?? []].slice(1).join(" ");
      drawing.setAttribute("class", `map-drawing ${colour}`);
      if (!now.tones) part.className = `split map-part ${colour}`;
      const having = (digits, digit) => among.filter((n) => digits[n] === String(digit));
      for (let digit = 0; digit < 10; digit += 1) {
        set(`t${digit}`, having(now.tones, digit));
        if (digit) set(`c${digit}`, having(now.covers, digit));
      }
      set("all-points", items.map((_, n) => n).filter((n) => !now.tones || !own.has(n)));
      set("some-seeds", now.picks.filter((n) => some.has(n)));
      set("some-within", now.picks.filter((n) => some.has(n)));
      set("all-seeds", now.tones ? [] : now.picks.filter((n) => !some.has(n)));
      set("rings", now.tones ? now.picks : [], ring(17));
      set("here", []);
      one(".numbers", drawing).replaceChildren(...(now.tones ? now.picks.filter((n) => places[n]) : []).map((n) => {
        const made = document.createElementNS("http://www.w3.org/2000/svg", "text");
        made.setAttribute("x", places[n][0] + 18);
        made.setAttribute("y", places[n][1] - 14);
        made.textContent = now.picks.indexOf(n) + 1;
        return made;
      }));
    });
  };

  const nearest = (drawing, space, event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(drawing.getScreenCTM().inverse());
    const reach = 16 / drawing.getScreenCTM().a;
    const chosen = new Set(view()?.picks);
    let [found, best] = [-1, reach ** 2];
    data.places[space].forEach((place, n) => {
      if (!place) return;
      // A chosen point is met from further away than others.
      const distance = ((place[0] - at.x) ** 2 + (place[1] - at.y) ** 2) * (chosen.has(n) ? 0.4 : 1);
      if (distance < best) [found, best] = [n, distance];
    });
    return found;
  };
  const summary = (number) => {
    const item = items[number];
    const now = view();
    const order = now?.picks.indexOf(number) ?? -1;
    const facts = all(".meta > span:not([hidden], .weight, .order)", item).map((fact) => fact.textContent.trim()).filter(Boolean);
    if (one(".order", item) && order >= 0) facts.unshift(`chosen as ${order + 1}`);
    if (now?.covers) facts.push(`covered ${now.covers[number] === "9" ? "≥ " : ""}${(data.covered * Number(now.covers[number]) / 9).toFixed(2)}`);
    const said = all("dd, .excerpt", item).map((turn) => line((one(".start, pre", turn)?.textContent ?? turn.textContent).trim().slice(0, 400), "said"));
    const parts = [line(facts.join(", "), "key"), ...said];
    if (!one(".order", item)) {
      const others = Object.keys(state).filter((name) => name !== marking?.dataset.name);
      const by = data.views.filter(({ when, picks: own }) => own.includes(number) && others.every((name) => !(name in when) || when[name] === state[name]));
      const names = by.map(({ when, some }) => labels[when[marking?.dataset.name]] + (some.includes(number) ? " (some seeds)" : ""));
      parts.push(line(names.length ? `chosen by ${names.join(", ")}` : "chosen by no method", "key"));
    }
    return parts;
  };
  const mark = (number) => drawings.forEach((drawing, space) => one(".here", drawing).setAttribute("d", path(data.places[space], [number], ring(28))));
  drawings.forEach((drawing, space) => {
    let last = -1;
    const leave = () => { last = -1; drawing.classList.remove("aimed"); hide(); };
    drawing.addEventListener("pointermove", (event) => {
      const number = nearest(drawing, space, event);
      if (number === last) return;
      if (number < 0) { leave(); return; }
      last = number;
      drawing.classList.add("aimed");
      show(event, summary(number));
    });
    drawing.addEventListener("pointerleave", leave);
    drawing.addEventListener("click", (event) => {
      const number = nearest(drawing, space, event);
      if (number < 0) return;
      leave();
      mark(number);
      go(items[number]);
    });
  });
  for (const button of all(".locate", part)) {
    button.hidden = false;
    button.addEventListener("click", () => {
      mark(Number(button.closest(".example").dataset.number));
      drawings[0].scrollIntoView({ block: "nearest" });
    });
  }
}

for (const spot of all("[data-picks]")) spot.addEventListener("click", () => pick(Object.fromEntries(new URLSearchParams(spot.dataset.picks))));
for (const own of switches) own.addEventListener("change", (event) => pick({ [own.dataset.name]: event.target.value }));
for (const controls of all(".controls")) controls.hidden = false;
if (marking) document.body.classList.add("picked");
pick({});
document.documentElement.dataset.ready = "yes";
