"use strict";
(() => {
  const run = JSON.parse(document.getElementById("data").textContent);
  const config = { responsive: true, displayModeBar: false };
  const find = (id) => document.getElementById(id);
  const bySite = new Map(run.layers.map((layer) => [layer.site, layer]));

  function draw(id, chart) {
    const target = find(id);
    if (!chart) { target.hidden = true; return; }
    target.hidden = false;
    Plotly.react(target, chart.data, chart.layout, config);
  }

  function element(tag, text, className) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  }

  function badge(rule) {
    return element("span", rule, rule === "fine" ? "rule fine" : "rule");
  }

  function link(site) {
    const made = element("a", bySite.get(site).label, "layer");
    made.addEventListener("click", () => choose(site, true));
    return made;
  }

  const percent = (x, digits) => (x === null ? "" : (100 * x).toFixed(digits) + " %");
  const decibel = (x) => (x === null ? "" : x.toFixed(1));
  const columns = [
    { title: "#", key: "order", show: (x) => String(x + 1), number: true },
    { title: "layer", key: "label", show: (x) => x },
    { title: "bits", key: "bits", show: (x) => x },
    { title: "noise", key: "noise", show: (x) => percent(x, 1), number: true },
    { title: "of its own", key: "own_noise", show: (x) => percent(x, 1), number: true },
    { title: "SQNR dB", key: "sqnr", show: decibel, number: true },
    { title: "isolated", key: "isolated_sqnr", show: decibel, number: true },
    { title: "saturated", key: "saturation", show: (x) => percent(x, 2), number: true },
    { title: "step", key: "exponent", show: (x) => (x === null ? "" : "2^" + +x.toFixed(2)), number: true },
    { title: "differ", key: "mismatch_rate", show: (x) => percent(x, 3), number: true },
    { title: "advice", key: "rule", show: (x) => x },
  ];
  const order = { key: "order", descending: false };
  let chosen = null;

  function compare(a, b) {
    const x = a[order.key], y = b[order.key];
    // What was not measured stands last, whichever way the rest is sorted.
    if (x === null || y === null) return (x === null) - (y === null);
    const sign = typeof x === "string" ? x.localeCompare(y) : x - y;
    return (order.descending ? -sign : sign) || a.order - b.order;
  }

  function showTable() {
    const words = find("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const shown = run.layers
      .filter((layer) => {
        const text = [layer.site, layer.label, layer.bits, layer.rule, layer.advice].join(" ").toLowerCase();
        return words.every((word) => text.includes(word));
      })
      .sort(compare);
    const body = document.querySelector("#layers tbody");
    body.replaceChildren(...shown.map((layer) => {
      const row = element("tr");
      row.dataset.site = layer.site;
      row.classList.toggle("chosen", layer.site === chosen);
      for (const column of columns) {
        const cell = element("td", undefined, column.number ? "number" : "");
        if (column.key === "rule" && layer.rule) cell.append(badge(layer.rule));
        else cell.textContent = column.show(layer[column.key]);
        row.append(cell);
      }
      row.addEventListener("click", () => choose(layer.site, false));
      return row;
    }));
    find("count").textContent = shown.length + " of " + run.layers.length + " layers";
    document.querySelectorAll("#layers th").forEach((head) => {
      const here = head.dataset.key === order.key;
      head.setAttribute("aria-sort", here ? (order.descending ? "descending" : "ascending") : "none");
    });
  }

  function showHead() {
    const row = element("tr");
    for (const column of columns) {
      const head = element("th", column.title, column.number ? "number" : "");
      head.dataset.key = column.key;
      head.addEventListener("click", () => {
        order.descending = order.key === column.key ? !order.descending : false;
        order.key = column.key;
        showTable();
      });
      row.append(head);
    }
    document.querySelector("#layers thead").append(row);
  }

  function historyChart(layer) {
    const saturated = 1.1 * Math.max(0.01, ...layer.history.map((values) => values.saturation || 0));
    const line = (name, key, axis, dash) => ({
      type: "scatter", mode: "lines+markers", name, yaxis: axis, line: { dash },
      x: layer.epochs, y: layer.history.map((values) => values[key]),
    });
    return {
      data: [line("SQNR", "sqnr", "y", "solid"), line("isolated", "isolated_sqnr", "y", "dot"),
        line("saturated", "saturation", "y2", "dash")],
      layout: {
        height: 290, margin: { l: 50, r: 65, t: 10, b: 40 },
        xaxis: { title: { text: "epoch" }, tick0: layer.epochs[0], dtick: Math.ceil(layer.epochs.length / 8) },
        yaxis: { title: { text: "dB" }, rangemode: "tozero" },
        yaxis2: { title: { text: "saturated" }, overlaying: "y", side: "right", tickformat: ".2~%", range: [0, saturated], tickmode: "auto", nticks: 6, showgrid: false },
        legend: { orientation: "h", y: 1.2 },
      },
    };
  }

  function choose(site, scroll) {
    chosen = site;
    const layer = bySite.get(site);
    find("detail").hidden = false;
    find("detail-title").textContent = layer.site;
    find("detail-advice").replaceChildren(badge(layer.rule), " " + layer.advice);
    const links = find("detail-links");
    links.replaceChildren();
    for (const [title, sites] of [["fed by: ", layer.inputs], ["feeds: ", layer.outputs]]) {
      if (!sites.length) continue;
      const line = element("span", title);
      sites.forEach((other, i) => line.append(i ? ", " : "", link(other)));
      links.append(line, element("br"));
    }
    if (layer.widths.length > 1) {
      const steps = layer.widths.map(([step, bits]) => (bits || "float") + " from step " + step);
      links.append(element("span", "bits (weight/input/output): " + steps.join(", ")), element("br"));
    }
    showTable();
    draw("detail-history", historyChart(layer));
    draw("detail-histogram", layer.histogram);
    if (scroll) find("layers-section").scrollIntoView({ behavior: "instant" });
  }

  function listTable(titles, rows) {
    const table = element("table", undefined, "plain");
    const head = element("tr");
    titles.forEach((title) => head.append(element("th", title)));
    table.append(head);
    for (const cells of rows) {
      const row = element("tr");
      cells.forEach((cell, i) => row.append(element(i ? "td" : "th", cell)));
      table.append(row);
    }
    return table;
  }

  function showMetrics() {
    const stages = Object.keys(run.metrics);
    const names = [...new Set(stages.flatMap((stage) => Object.keys(run.metrics[stage])))].sort();
    find("metrics").append(listTable(["", ...stages], names.map((name) =>
      [name, ...stages.map((stage) => run.metrics[stage][name] ?? "")])));
  }

  function showWorst() {
    for (const site of run.worst) {
      const layer = bySite.get(site);
      const item = element("li");
      item.append(link(site), " ", badge(layer.rule), " " + layer.advice);
      find("worst").append(item);
    }
  }

  function showGroups() {
    const select = find("group");
    Object.keys(run.groups).forEach((title) => select.append(element("option", title)));
    select.addEventListener("change", () => draw("group-lines", run.groups[select.value]));
    draw("group-lines", run.groups[select.value]);
  }

  function showSensitivity() {
    if (!run.figures.sensitivity) return;
    find("sensitivity-section").hidden = false;
    find("tolerance").textContent = run.reason;
    const shown = (drop) => drop === null ? "" :
      drop !== 0 && Math.abs(drop) < 1e-3 ? drop.toExponential(2) : drop.toPrecision(3);
    find("suggestion").append(listTable(
      ["layer", ...run.widths.map((bits) => bits + " bits"), "suggested"],
      Object.entries(run.suggestion).map(([site, bits]) => [site, ...run.drops[site].map(shown), String(bits)])));
    draw("sensitivity", run.figures.sensitivity);
  }

  draw("timeline", run.figures.timeline);
  for (const id of ["accumulated", "isolated", "mismatch"]) {
    draw(id, run.figures[id]);
    if (run.figures[id]) find(id).on("plotly_click", (event) => choose(event.points[0].customdata, true));
  }
  showMetrics();
  showWorst();
  showHead();
  showTable();
  find("search").addEventListener("input", showTable);
  showGroups();
  showSensitivity();
  find("settings").append(listTable(["setting", "value"], Object.entries(run.settings)));
  document.body.dataset.ready = "true";
})();
