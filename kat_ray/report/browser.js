"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const get = (id) => document.getElementById(id);
  const low = -4, high = 1; // log10 of the KL at both ends of the colour scale
  const share = (d) => Math.min(1, Math.max(0, (Math.log10(Math.max(d, 1e-9)) - low) / (high - low)));
  const colour = (d) => {
    if (d === null) return "#e5e7eb";
    const s = share(d); // from blue (agreement) over white to orange (disagreement)
    return s < 0.5 ? `hsl(214 90% ${70 + 56 * s}%)` : `hsl(24 95% ${98 - 76 * (s - 0.5)}%)`;
  };
  const number = (x) => (x === null || x === undefined ? "-" : x.toPrecision(3));
  const verdict = (r) => (r.right === null ? "not graded" : r.right ? "right" : "wrong");
  const element = (name, text, classes) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (classes) made.className = classes;
    return made;
  };
  get("legend").style.background =
    `linear-gradient(to right, ${[...Array(11).keys()].map((i) => colour(10 ** (low + (i * (high - low)) / 10))).join(",")})`;

  let current = null, at = null; // the rollout that is shown, and the token that is pointed at

  function chosen() {
    const stop = get("stop").value, right = get("right").value, probe = get("probe").checked;
    const from = get("from").value === "" ? -Infinity : +get("from").value;
    const to = get("to").value === "" ? Infinity : +get("to").value;
    const rows = data.rollouts.filter(
      (r) => (!stop || r.stop === stop) && (!right || String(r.right) === right) && (!probe || r.probe) && r.step >= from && r.step <= to);
    const order = get("order").value;
    if (order === "mean") rows.sort((a, b) => (a.mean ?? Infinity) - (b.mean ?? Infinity));
    if (order === "long") rows.sort((a, b) => b.tokens.length - a.tokens.length);
    return rows;
  }

  function fill() {
    const rows = chosen();
    get("count").textContent = `${rows.length} of ${data.rollouts.length}`;
    const list = get("list");
    list.replaceChildren();
    for (const r of rows) {
      const button = element("button");
      button.dataset.id = r.id;
      button.append(element("b", `#${r.id} `), element("span", r.stop, `tag ${r.stop}`),
        ` step ${r.step} · ${verdict(r)}${r.probe ? " · probe" : ""}`, element("br"),
        element("span", `${r.tokens.length} tokens · mean KL ${number(r.mean)}`, "soft"));
      button.addEventListener("click", () => show(r));
      list.append(button);
    }
    if (rows.length) show(rows.includes(current) ? current : rows[0]);
    else clear();
  }

  function clear() {
    current = at = null;
    for (const id of ["head", "prompt", "info", "tokens", "chart"]) get(id).replaceChildren();
    get("head").textContent = "No rollout matches these filters.";
  }

  // Where a rollout is marked: by the run's rule, by what it says of a probe, by settings applied afterwards.
  function marks(r) {
    const found = [];
    if (r.cut !== null) found.push({ at: r.cut, kind: "", words: "cut" });
    if (r.would !== null) found.push({ at: r.would, kind: "would", words: "would cut" });
    if (r.seen_cut !== null && !(data.own && found.length)) found.push({ at: r.seen_cut, kind: "applied", words: data.own ? "KAT" : "applied" });
    return found;
  }

  function facts(r) {
    const parts = [`step ${r.step}`, `${r.tokens.length} tokens`, verdict(r)];
    if (r.answer !== null) parts.push(r.cut === null ? `answer ${r.answer}` : `answer in what was kept: ${r.answer}`);
    if (r.gold !== null) parts.push(`gold answer ${r.gold}`);
    if (r.rewarded) {
      parts.push(r.reward !== null ? `reward ${number(r.reward)}` : `no reward${r.reward_error === null ? "" : ` (${r.reward_error})`}`);
      parts.push(r.advantage === null ? "counts nothing in its group" : `advantage ${number(r.advantage)}`);
    }
    if (data.own || r.threshold !== null) parts.push(r.threshold === null ? "no threshold yet" : `threshold ${number(r.threshold)} nats`);
    if (r.cut !== null) parts.push(`cut at ${r.cut}, confirmed after ${r.confirmed}`);
    if (r.probe) parts.push(r.would === null ? "probe" : `probe, would be cut at ${r.would}`);
    if (!data.own) {
      const cut = r.seen_cut === null ? "no cut" : `cut at ${r.seen_cut}`;
      parts.push("applied afterwards: " + (r.seen_threshold === null ? "no threshold yet" : `threshold ${number(r.seen_threshold)} nats, ${cut}`));
    } else if (r.seen_cut !== null && r.cut === null && r.would === null) {
      parts.push(`KAT would cut at ${r.seen_cut}: the tokens after it are weighted`);
    }
    return parts;
  }

  function show(r) {
    current = r;
    at = null;
    for (const b of get("list").children) b.setAttribute("aria-current", String(+b.dataset.id === r.id));
    const head = get("head");
    head.replaceChildren(element("b", `Rollout ${r.id} `), element("span", r.stop, `tag ${r.stop}`));
    head.append(element("span", " " + facts(r).join(" · "), "soft"));
    get("prompt").textContent = r.prompt === null ? "(the prompt is not available)" : r.prompt;
    get("info").textContent = "Point at a token, click it, or move with the arrow keys.";
    const box = get("tokens");
    box.replaceChildren();
    const found = marks(r);
    r.tokens.forEach((t, i) => {
      for (const m of found) if (m.at === i) box.append(element("span", `${m.words} at ${i}`, `mark ${m.kind}`));
      const text = data.texts[t];
      const span = element("span", text.includes("\n") ? text.replaceAll("\n", "⏎\n") : text, removed(r, i) ? "removed" : "");
      span.dataset.i = i;
      span.style.background = i < r.d.length ? colour(r.d[i]) : "transparent";
      box.append(span);
    });
    box.scrollTop = 0;
    draw(r, found);
  }

  function removed(r, i) {
    return i >= (r.cut ?? Infinity) || r.weights?.[i] === 0;
  }

  // Show the figures of token i, and where it stands in the chart.
  function point(i, scroll) {
    if (current === null || !current.tokens.length) return;
    at = Math.min(current.tokens.length - 1, Math.max(0, i));
    const box = get("tokens");
    for (const old of box.querySelectorAll(".at")) old.classList.remove("at");
    const span = box.querySelector(`[data-i="${at}"]`);
    span.classList.add("at");
    if (scroll) span.scrollIntoView({ block: "nearest" });
    const weight = current.weights?.[at];
    get("info").textContent =
      `token ${at} ${JSON.stringify(data.texts[current.tokens[at]])}  KL ${number(current.d[at])}  ` +
      `window mean ${number(current.z[at - data.window + 1])}  threshold ${number(current.seen_threshold)}` +
      (data.own ? "" : " (applied)") + (weight === undefined ? "" : `  weight ${number(weight)}`) +
      (removed(current, at) ? "  removed" : "");
    const cursor = get("cursor");
    for (const name of ["x1", "x2"]) cursor.setAttribute(name, across(current, at));
    cursor.setAttribute("visibility", "visible");
  }

  const width = 780, height = 190, left = 46, bottom = 166, above = 8;
  const across = (r, i) => left + (i / (Math.max(2, r.tokens.length) - 1)) * (width - left - 8);

  function draw(r, found) {
    const svg = get("chart");
    svg.replaceChildren();
    const ns = "http://www.w3.org/2000/svg";
    const add = (name, attributes, text) => {
      const made = document.createElementNS(ns, name);
      for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
      if (text !== undefined) made.textContent = text;
      svg.append(made);
    };
    const x = (i) => across(r, i);
    const y = (v) => bottom - share(v) * (bottom - above);
    for (let p = low; p <= high; p++) {
      add("line", { x1: left, x2: width, y1: y(10 ** p), y2: y(10 ** p), stroke: "#e5e7eb" });
      add("text", { x: left - 6, y: y(10 ** p) + 4, "text-anchor": "end" }, String(+(10 ** p).toPrecision(1)));
    }
    r.d.forEach((d, i) => {
      if (d !== null) add("line", { x1: x(i), x2: x(i), y1: bottom, y2: y(d), stroke: "#cbd5e1", "stroke-width": Math.max(1, 500 / Math.max(2, r.tokens.length)) });
    });
    let path = "", pen = "M";
    r.z.forEach((z, j) => {
      if (z === null) { pen = "M"; return; }
      path += `${pen}${x(j + data.window - 1).toFixed(1)} ${y(z).toFixed(1)}`;
      pen = "L";
    });
    if (path) add("path", { d: path, fill: "none", stroke: "#2563eb", "stroke-width": 1.8 });
    if (r.seen_threshold !== null) {
      const level = y(r.seen_threshold);
      add("line", { x1: left, x2: width, y1: level, y2: level, stroke: "#111827", "stroke-dasharray": "5 4" });
      add("text", { x: width - 4, y: level - 4, "text-anchor": "end" }, data.own ? "threshold" : "threshold (applied)");
    }
    for (const m of found) {
      add("line", { x1: x(m.at), x2: x(m.at), y1: above, y2: bottom, "stroke-width": 2,
        stroke: { "": "#dc2626", would: "#7c3aed", applied: "#0891b2" }[m.kind] });
    }
    add("line", { id: "cursor", x1: left, x2: left, y1: above, y2: bottom, stroke: "#111827", visibility: "hidden" });
    add("text", { x: left, y: height - 6 }, "token 0");
    add("text", { x: width - 4, y: height - 6, "text-anchor": "end" }, `token ${r.tokens.length - 1}`);
  }

  for (const kind of ["mouseover", "click"]) {
    get("tokens").addEventListener(kind, (event) => {
      const i = event.target.dataset?.i;
      if (i !== undefined) point(+i, false);
    });
  }
  get("tokens").addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity }[event.key];
    if (by === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    point(at === null && Number.isFinite(by) ? 0 : (at ?? 0) + by, true);
  });
  for (const id of ["stop", "right", "probe", "order"]) get(id).addEventListener("change", fill);
  for (const id of ["from", "to"]) get(id).addEventListener("input", fill);
  fill();
})();
