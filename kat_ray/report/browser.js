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

  let current = null;

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
    current = null;
    for (const id of ["head", "prompt", "info", "tokens", "chart"]) get(id).replaceChildren();
    get("head").textContent = "No rollout fits these filters.";
  }

  function mark(text, would) {
    return element("span", text, would ? "mark would" : "mark");
  }

  function show(r) {
    current = r;
    for (const b of get("list").children) b.setAttribute("aria-current", String(+b.dataset.id === r.id));
    const head = get("head");
    head.replaceChildren(element("b", `Rollout ${r.id} `), element("span", r.stop, `tag ${r.stop}`));
    const parts = [`step ${r.step}`, `${r.tokens.length} tokens`, verdict(r)];
    if (r.answer !== null) parts.push(`answer ${r.answer}`);
    if (r.gold !== null) parts.push(`should be ${r.gold}`);
    parts.push(r.threshold === null ? "no threshold yet" : `threshold ${number(r.threshold)} nats`);
    if (r.cut !== null) parts.push(`cut at ${r.cut}, confirmed after ${r.confirmed}`);
    if (r.probe) parts.push(r.would === null ? "probe" : `probe, would be cut at ${r.would}`);
    head.append(element("span", " " + parts.join(" · "), "soft"));
    get("prompt").textContent = r.prompt === null ? "(the prompt is not at hand)" : r.prompt;
    get("info").textContent = "point at a token";
    const box = get("tokens");
    box.replaceChildren();
    const cut = r.cut ?? Infinity;
    r.tokens.forEach((t, i) => {
      if (i === r.cut) box.append(mark(`cut at ${i}`, false));
      if (i === r.would) box.append(mark(`would cut at ${i}`, true));
      const text = data.texts[t];
      const span = element("span", text.includes("\n") ? text.replaceAll("\n", "⏎\n") : text, i >= cut ? "removed" : "");
      span.dataset.i = i;
      span.style.background = i < r.d.length ? colour(r.d[i]) : "transparent";
      box.append(span);
    });
    box.scrollTop = 0;
    draw(r);
  }

  function draw(r) {
    const svg = get("chart"), width = 780, height = 190, left = 46, bottom = 166, top = 8;
    svg.replaceChildren();
    const ns = "http://www.w3.org/2000/svg";
    const add = (name, attributes, text) => {
      const made = document.createElementNS(ns, name);
      for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
      if (text !== undefined) made.textContent = text;
      svg.append(made);
    };
    const n = Math.max(2, r.tokens.length);
    const x = (i) => left + (i / (n - 1)) * (width - left - 8);
    const y = (v) => bottom - share(v) * (bottom - top);
    for (let p = low; p <= high; p++) {
      add("line", { x1: left, x2: width, y1: y(10 ** p), y2: y(10 ** p), stroke: "#e5e7eb" });
      add("text", { x: left - 6, y: y(10 ** p) + 4, "text-anchor": "end" }, String(+(10 ** p).toPrecision(1)));
    }
    r.d.forEach((d, i) => {
      if (d !== null) add("line", { x1: x(i), x2: x(i), y1: bottom, y2: y(d), stroke: "#cbd5e1", "stroke-width": Math.max(1, 500 / n) });
    });
    let path = "", pen = "M";
    r.z.forEach((z, j) => {
      if (z === null) { pen = "M"; return; }
      path += `${pen}${x(j + data.window - 1).toFixed(1)} ${y(z).toFixed(1)}`;
      pen = "L";
    });
    if (path) add("path", { d: path, fill: "none", stroke: "#2563eb", "stroke-width": 1.8 });
    if (r.threshold !== null) {
      add("line", { x1: left, x2: width, y1: y(r.threshold), y2: y(r.threshold), stroke: "#111827", "stroke-dasharray": "5 4" });
      add("text", { x: width - 4, y: y(r.threshold) - 4, "text-anchor": "end" }, "threshold");
    }
    const at = r.cut ?? r.would;
    if (at !== null) add("line", { x1: x(at), x2: x(at), y1: top, y2: bottom, stroke: r.cut === null ? "#7c3aed" : "#dc2626", "stroke-width": 2 });
    add("text", { x: left, y: height - 6 }, "token 0");
    add("text", { x: width - 4, y: height - 6, "text-anchor": "end" }, `token ${r.tokens.length - 1}`);
  }

  get("tokens").addEventListener("mouseover", (event) => {
    const i = event.target.dataset?.i;
    if (i === undefined || current === null) return;
    for (const old of get("tokens").querySelectorAll(".at")) old.classList.remove("at");
    event.target.classList.add("at");
    const z = current.z[i - data.window + 1];
    get("info").textContent =
      `token ${i} ${JSON.stringify(data.texts[current.tokens[i]])}  KL ${number(current.d[i])}  ` +
      `window mean ${number(z)}  threshold ${number(current.threshold)}` + (current.cut !== null && i >= current.cut ? "  removed" : "");
  });
  for (const id of ["stop", "right", "probe", "order"]) get(id).addEventListener("change", fill);
  for (const id of ["from", "to"]) get(id).addEventListener("input", fill);
  fill();
})();
