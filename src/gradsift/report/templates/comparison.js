"use strict";
(() => {
  const { data, show, hide, line, go } = gradsift;
  const one = (query, within = document) => within.querySelector(query);
  const all = (query, within = document) => [...within.querySelectorAll(query)];
  const methods = all('input[name="method"]');
  const budgets = all('input[name="budget"]');
  const names = methods.map((radio) => one("bdi", radio.parentElement).textContent);
  const colours = methods.map((radio) => one(".key-line", radio.parentElement).classList[1]);
  const map = one("#map-drawing");
  const items = all(".point");
  const state = { method: data.picked, budget: data.first };
  const at = (method) => data.chosen[method]?.[data.budgets.indexOf(state.budget)] ?? "";
  const seeds = (method) => data.seeds[method]?.[data.budgets.indexOf(state.budget)] ?? 0;

  const count = (number) => number.toLocaleString("en");
  const path = (numbers) => numbers.map((n) => `M${data.xs[n]} ${data.ys[n]}h0`).join("");
  const draw = () => {
    if (!map) return;
    const digits = at(state.method);
    const having = (digit) => [...digits].flatMap((found, n) => (found === digit ? [n] : []));
    const [some, every] = [having("1"), having("2")];
    one(".some-seeds", map).setAttribute("d", path(some));
    one(".some-within", map).setAttribute("d", path(some));
    one(".all-seeds", map).setAttribute("d", path(every));
    one(".here", map).setAttribute("d", "");
    one("#map-part").className = `split ${colours[state.method]}`;
    one("#map-method").textContent = names[state.method];
    one("#map-count").textContent = digits
      ? `${count(some.length + every.length)} of the ${count(data.xs.length)} examples on the map chosen`
      : data.fixed[state.method] ? "chooses no part of the pool" : "nothing is known of this choice";
    one("#map-some").hidden = some.length === 0;
    one("#map-every").lastChild.textContent = seeds(state.method) > 1 ? `chosen with each of ${seeds(state.method)} seeds` : "chosen";
    items.forEach((item, n) => {
      item.hidden = !digits || digits[n] === "0";
      item.classList.remove("found");
    });
    one("#points-count").textContent = `The ${count(some.length + every.length)} chosen examples, to read`;
  };

  const reveal = () => {
    const [label, bar] = [methods[state.method]?.parentElement, one(".methods")];
    if (!label) return;
    const left = label.offsetLeft - bar.offsetLeft;
    if (left < bar.scrollLeft || left + label.offsetWidth > bar.scrollLeft + bar.clientWidth) bar.scrollLeft = left - 24;
  };

  const pick = () => {
    for (const part of all(".by-budget")) part.hidden = Number(part.dataset.budget) !== state.budget;
    for (const part of all(".by-method")) part.hidden = Number(part.dataset.method) !== state.method;
    for (const part of all("[data-method]:not(.by-method)")) {
      const active = Number(part.dataset.method) === state.method;
      part.classList.toggle("active", active);
      if (active && part.matches(".series")) part.parentElement.append(part);
    }
    reveal();
    for (const empty of all(".no-extremes")) empty.hidden = all(".by-method:not([hidden])").length > 0;
    draw();
  };

  const nearest = (event) => {
    const box = map.getBoundingClientRect();
    const { x: left, y: top, width } = map.viewBox.baseVal;
    const scale = width / box.width;
    const [x, y] = [(event.clientX - box.left - 1) * scale + left, (event.clientY - box.top - 1) * scale + top];
    const digits = at(state.method);
    let found = -1;
    let best = (14 * scale) ** 2;
    data.xs.forEach((px, n) => {
      // A chosen point is met from further away than one of the pool.
      const distance = ((px - x) ** 2 + (data.ys[n] - y) ** 2) * (digits[n] > "0" ? 0.4 : 1);
      if (distance < best) [found, best] = [n, distance];
    });
    return found;
  };
  const summary = (n) => {
    const by = names.flatMap((name, method) => {
      const digit = at(method)[n];
      if (!digit || digit === "0") return [];
      return [digit === "2" || seeds(method) < 2 ? name : `${name} (some seeds)`];
    });
    const [facts, excerpt] = all("p", items[n]);
    return [
      line(facts.textContent, "key"),
      line(excerpt.textContent, "said"),
      line(by.length ? `chosen by ${by.join(", ")}` : "chosen by no method", "key"),
    ];
  };
  if (map) {
    let last = -1;
    const leave = () => { last = -1; map.classList.remove("aimed"); hide(); };
    map.addEventListener("pointermove", (event) => {
      const n = nearest(event);
      if (n === last) return;
      if (n < 0) return leave();
      last = n;
      map.classList.add("aimed");
      show(summary(n));
    });
    map.addEventListener("pointerleave", leave);
    map.addEventListener("click", (event) => {
      const n = nearest(event);
      if (n < 0) return;
      leave();
      one(".here", map).setAttribute("d", `M${data.xs[n] - 16} ${data.ys[n]}a16 16 0 1 0 32 0a16 16 0 1 0 -32 0`);
      items[n].hidden = false;
      go(items[n]);
    });
  }

  for (const radio of methods) radio.addEventListener("change", () => {
    state.method = Number(radio.value);
    pick();
  });
  for (const radio of budgets) radio.addEventListener("change", () => { state.budget = Number(radio.value); pick(); });
  if (methods.length) {
    one(".controls").hidden = false;
    document.body.classList.add("picked");
  }
  const checked = methods.find((radio) => radio.checked);
  if (checked) state.method = Number(checked.value);
  const budget = budgets.find((radio) => radio.checked);
  if (budget) state.budget = Number(budget.value);
  pick();
  document.documentElement.dataset.ready = "yes";
})();
