/* The expert atlas: colours and marks the grid, and tells of one expert in the panel.
   Texts of the run reach the page through textContent only. */
(() => {
  "use strict";
  const grid = document.getElementById("atlas-grid");
  if (!grid) return;
  const data = JSON.parse(document.getElementById("atlas-data").textContent);
  const section = document.getElementById("atlas-section");
  const panel = document.getElementById("atlas-panel");
  const measure = document.getElementById("atlas-measure");
  const fate = document.getElementById("atlas-fate");
  const cells = [...grid.tBodies[0].rows].map((row) => [...row.cells].filter((c) => c.tagName === "TD"));
  const STEPS = Number(section.dataset.steps), SIDES = Number(section.dataset.sides);
  const WORDS = { k: "kept", w: "kept, weights masked", n: "replaced by a novice", m: "merged", d: "dropped", "-": "not in the plan" };
  const MARKS = { k: "", w: " w", n: " n", m: " m", d: " d", "-": "" };
  const at = { layer: 0, expert: 0 };
  let pinned = false;

  const digits = (value, n = 3) => {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-4 || size >= 1e6)) return value.toExponential(n - 1).replace("-", "−");
    return Number(value.toPrecision(n)).toString().replace("-", "−");
  };
  const percent = (value) => (value === null || value === undefined ? "–" : (100 * value).toFixed(1) + " %");
  const times = (value) => "×" + (value < 9.995 ? value.toFixed(2) : digits(value));
  const sum = (values) => (values || []).reduce((a, b) => a + b, 0);
  const known = (values) => values.filter((v) => v !== null && v !== undefined);

  /* shares of the domains among all slots of a layer */
  const ofText = data.served.map((experts) =>
    data.domains.map((_, d) => sum(experts.map((e) => e[d])) / Math.max(1, sum(experts.map(sum)))));
  const lift = (l, e, d) => {
    const own = data.served[l][e];
    return own && sum(own) && ofText[l][d] ? own[d] / sum(own) / ofText[l][d] : null;
  };
  /* KL(domains of the expert || domains of the layer), bits */
  const special = (l, e) => {
    const own = data.served[l][e];
    if (!own || !sum(own)) return null;
    return sum(own.map((n, d) => (n ? (n / sum(own)) * Math.log2(n / sum(own) / ofText[l][d]) : 0)));
  };

  const measures = {
    usage: { unit: percent, low: "never selected", value: (l, e) => data.usage[l][e] },
    gate: { unit: (v) => digits(v), low: "0", value: (l, e) => (data.count[l][e] ? data.gate[l][e] : null) },
    special: { unit: (v) => digits(v, 2) + " bit", low: "serves all domains alike", value: special },
  };
  const chosen = () => {
    const [kind, ...rest] = JSON.parse(measure.value);
    if (kind === "domain") return { signed: true, unit: times, value: (l, e) => lift(l, e, rest[0]) };
    if (kind === "score") {
      const scores = data.rows[rest[0]].scores[rest[1]];
      return { byLayer: true, unit: (v) => digits(v), low: "lowest in its layer", high: "highest", value: (l, e) => (scores[l] || [])[e] ?? null };
    }
    return measures[kind];
  };
  const fateOf = (row, l, e) => (data.rows[row].fates[l] || "")[e] || "-";

  function paint() {
    const m = chosen();
    const values = cells.map((row, l) => row.map((_, e) => m.value(l, e) ?? null));
    const top = Math.max(...known(values.flat()), 0);
    const row = fate.value === "" ? null : Number(fate.value);
    const short = measure.selectedOptions[0].textContent;
    cells.forEach((line, l) => {
      const own = known(values[l]);
      const [low, high] = m.byLayer ? [Math.min(...own), Math.max(...own)] : [0, top];
      line.forEach((cell, e) => {
        const value = values[l][e];
        let style = "c";
        if (value !== null && m.signed) {
          const step = value > 0 ? Math.round(Math.log2(value) * SIDES / 2) : -SIDES;
          style = "v" + (SIDES + Math.max(-SIDES, Math.min(SIDES, step)));
        } else if (value !== null) {
          const t = high > low ? (value - low) / (high - low) : 0.5;
          style = "c" + Math.min(STEPS - 1, Math.floor(t * STEPS));
        }
        const mark = row === null ? "-" : fateOf(row, l, e);
        cell.className = style + MARKS[mark];
        let said = `layer ${data.layers[l]}, expert ${e}: ${short} ${value === null ? "unknown" : m.unit(value)}`;
        if (row !== null) said += `, ${WORDS[mark]}`;
        cell.setAttribute("aria-label", said);
      });
    });
    const signed = document.getElementById("ramp-signed"), plain = document.getElementById("ramp-plain");
    signed.hidden = !m.signed;
    plain.hidden = Boolean(m.signed);
    document.getElementById("key-unknown").hidden = !values.flat().includes(null);
    document.getElementById("ramp-low").textContent = m.low || "";
    document.getElementById("ramp-high").textContent = m.high || m.unit(top);
    const used = new Set(row === null ? [] : data.rows[row].fates.join(""));
    for (const key of document.querySelectorAll("#atlas-legend [data-fate]")) key.hidden = !used.has(key.dataset.fate);
    tell();
  }

  const make = (tag, text, className) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (className) node.className = className;
    return node;
  };
  const table = (caption, heads, rows) => {
    const node = make("table", undefined, "served"), head = make("tr");
    node.append(make("caption", caption));
    for (const text of heads) { const th = make("th", text); th.scope = "col"; head.append(th); }
    node.append(make("thead"), make("tbody"));
    node.tHead.append(head);
    for (const row of rows) {
      const tr = make("tr");
      row.forEach((part, i) => {
        const cell = make(i ? "td" : "th");
        if (!i) cell.scope = "row";
        cell.append(part);
        tr.append(cell);
      });
      node.tBodies[0].append(tr);
    }
    return node;
  };
  const bar = (share, text) => {
    const box = make("span", undefined, "bar"), fill = make("span");
    fill.style.width = (100 * share).toFixed(1) + "%";
    box.append(fill);
    if (text !== undefined) { const tick = make("b"); tick.style.left = (100 * text).toFixed(1) + "%"; box.append(tick); }
    box.setAttribute("aria-hidden", "true");
    return box;
  };
  const both = (...parts) => { const node = document.createDocumentFragment(); node.append(...parts); return node; };

  function facts(l, e) {
    const list = make("dl"), add = (name, value) => list.append(make("dt", name), make("dd", value));
    const share = data.usage[l][e];
    if (share !== undefined && share !== null) add("usage", `${percent(share)} of the layer’s slots, ${times(share * data.experts)} an even share`);
    const count = data.count[l][e];
    if (count !== undefined) add("tokens", count.toLocaleString("en").replaceAll(",", "\u202f"));
    if (count) add("mean gate weight", digits(data.gate[l][e]));
    const own = special(l, e);
    if (own !== null) add("specialisation", digits(own, 2) + " bit");
    return list;
  }
  function domains(l, e) {
    const own = data.served[l][e], total = sum(own);
    const order = own.map((_, d) => d).sort((a, b) => (lift(l, e, b) ?? 0) - (lift(l, e, a) ?? 0));
    return table("Domains of its tokens; the tick is the share among all tokens, the ratio compares", ["domain", "share", "ratio"],
      order.map((d) => [data.domains[d], both(bar(own[d] / total, ofText[l][d]), percent(own[d] / total)), times(lift(l, e, d))]));
  }
  function tokens(l, e) {
    const list = make("ul", undefined, "tokens");
    for (const [place, count, ratio] of data.typical[l][e]) {
      const item = make("li");
      item.append(make("code", data.tokens[place]), make("span", ` ${times(ratio)} · ${count}`));
      list.append(item);
    }
    return list;
  }
  function outcomes(l, e) {
    return table("What became of it, and its scores with their rank in the layer", ["result", "fate", "score"],
      data.rows.map((row, r) => {
        let what = WORDS[fateOf(r, l, e)];
        const into = (row.into[l] || {})[e];
        if (into) what = "merged into " + into.join(", ");
        const scores = make("span");
        for (const [name, values] of Object.entries(row.scores)) {
          const line = values[l] || [], value = line[e];
          if (value === null || value === undefined) continue;
          const rank = 1 + known(line).filter((other) => other > value).length;
          const part = make("span", `${name} ${digits(value)} `, "score");
          part.append(make("small", `${rank} of ${known(line).length}`));
          scores.append(part);
        }
        if (!scores.childNodes.length) scores.textContent = "–";
        return [row.name, what, scores];
      }));
  }
  function tell() {
    const { layer: l, expert: e } = at;
    const about = make("div"), domain = make("div"), result = make("div");
    about.append(facts(l, e));
    if (data.served[l].length && sum(data.served[l][e])) {
      domain.append(domains(l, e));
      const typical = data.typical[l][e]; // undefined where tokens were left out of the page
      if (typical?.length) {
        about.append(make("h4", "Most typical tokens, how much more often than in the whole layer, and how many"), tokens(l, e));
      } else if (typical) about.append(make("p", "No token stands out.", "aside"));
    } else about.append(make("p", data.served[l].length ? "No token of the calibration text reached it." : "Domains and tokens were not counted in this run, or left out of this page.", "aside"));
    if (data.rows.length) result.append(outcomes(l, e));
    panel.replaceChildren(make("h3", `Layer ${data.layers[l]}, expert ${e}`), ...[about, domain, result].filter((part) => part.childNodes.length));
    grid.querySelector(".shown")?.classList.remove("shown");
    cells[l][e].classList.add("shown");
  }

  function focus(l, e, move = true) {
    cells[at.layer][at.expert].tabIndex = -1;
    at.layer = Math.max(0, Math.min(cells.length - 1, l));
    at.expert = Math.max(0, Math.min(data.experts - 1, e));
    const cell = cells[at.layer][at.expert];
    cell.tabIndex = 0;
    if (move) cell.focus();
    panel.setAttribute("aria-live", "off");
    if (!pinned) tell();
  }
  function pin(on) {
    grid.querySelector("[aria-selected=true]")?.setAttribute("aria-selected", "false");
    pinned = on;
    if (on) cells[at.layer][at.expert].setAttribute("aria-selected", "true");
    panel.setAttribute("aria-live", on ? "polite" : "off");
    tell();
  }
  const place = (target) => {
    const cell = target.closest("td[role=gridcell]");
    return cell && [cells.indexOf(cells.find((row) => row.includes(cell))), cell.cellIndex - 1];
  };
  grid.addEventListener("keydown", (event) => {
    if (event.altKey || event.metaKey) return;
    const { layer: l, expert: e } = at, last = data.experts - 1;
    const moves = {
      ArrowRight: [l, e + 1], ArrowLeft: [l, e - 1], ArrowDown: [l + 1, e], ArrowUp: [l - 1, e],
      Home: [event.ctrlKey ? 0 : l, 0], End: [event.ctrlKey ? cells.length - 1 : l, last],
      PageDown: [l + 8, e], PageUp: [l - 8, e],
    };
    if (moves[event.key]) { pinned = false; pin(false); focus(...moves[event.key]); }
    else if (event.key === "Enter" || event.key === " ") pin(true);
    else if (event.key === "Escape") pin(false);
    else return;
    event.preventDefault();
  });
  grid.addEventListener("click", (event) => {
    const found = place(event.target);
    if (!found) return;
    pinned = false;
    focus(...found);
    pin(true);
  });
  grid.addEventListener("mouseover", (event) => {
    const found = pinned ? null : place(event.target);
    if (found && !grid.contains(document.activeElement)) focus(...found, false);
  });
  measure.addEventListener("change", paint);
  fate.addEventListener("change", paint);
  for (const link of document.querySelectorAll("[data-atlas-row]")) {
    link.addEventListener("click", () => {
      fate.value = link.dataset.atlasRow;
      const own = [...measure.options].find((o) => o.value.startsWith(`["score",${link.dataset.atlasRow},`));
      if (own) measure.value = own.value;
      paint();
    });
  }

  for (const row of grid.rows) row.setAttribute("role", "row");
  cells.flat().forEach((cell) => { cell.setAttribute("role", "gridcell"); cell.tabIndex = -1; });
  grid.setAttribute("role", "grid");
  for (const node of document.querySelectorAll("[data-needs-script]")) node.hidden = false;
  /* to begin with, the expert that serves its domains most one-sidedly, of those in regular use */
  let best = -1;
  data.usage.forEach((line, l) => line.forEach((v, e) => {
    const worth = v * data.experts < 0.5 ? v / 1e6 : special(l, e) ?? v / 1e3;
    if (worth > best) { best = worth; at.layer = l; at.expert = e; }
  }));
  cells[at.layer][at.expert].tabIndex = 0;
  paint();
})();
