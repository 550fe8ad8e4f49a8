// The variants' table: rows by variant, sorted, filtered, chosen by click or key. A row is drawn
// again only when what it shows has changed, so that 500 of them stay fluent.
(function () {
  "use strict";
  const bgray = (window.bgrayPage = window.bgrayPage || {});

  // Of strip.js: text is never read as HTML.
  const element = (bgray.element = window.bgrayListening.element);

  const SYMBOLS = {
    finished: "●", running: "▶", waiting: "○", stopped: "■", interrupted: "‖",
    failed: "✗", damaged: "✗", diverged: "✗", out_of_memory: "✗",
  };
  bgray.inWords = (state) => state.replaceAll("_", " ");
  bgray.marked = (state) => `${SYMBOLS[state] || "•"} ${bgray.inWords(state)}`;

  // Black or white, whichever is easier to read on a colour such as #0072B2.
  function readable(colour) {
    const parts = /^#(..)(..)(..)$/.exec(colour);
    if (!parts) return "#fff";
    const [r, g, b] = parts.slice(1).map((part) => {
      const c = parseInt(part, 16) / 255;
      return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.18 ? "#000" : "#fff";
  }

  class Table {
    // on.choose(id): a row was chosen or let go; on.open(id): its details are asked for.
    constructor(root, on) {
      Object.assign(this, { root, on, state: null, bodies: new Map(), words: [], all: false });
      Object.assign(this, { sorted: null, active: null, digits: new Map(), chosen: new Set() });
    }

    draw(state) {
      const first = !this.state;
      this.state = state;
      const head = JSON.stringify([state.columns, state.unprocessed, this.all]);
      if (head !== this.head) this.frame(head);
      const known = new Set(state.rows.map(({ id }) => id));
      for (const [id, body] of this.bodies) {
        if (!known.has(id)) {
          body.remove();
          this.bodies.delete(id);
        }
      }
      for (const row of state.rows) this.row(row, first);
      this.arrange();
    }

    columns() {
      return this.state.columns.filter((column) => this.all || !column.extra);
    }

    frame(head) {
      this.head = head;
      this.bodies.clear();
      const cells = this.columns().map((column) => {
        const { key, title, tip, number } = column;
        const onclick = () => this.sort(key);
        const button = element("button", { type: "button", title: `${tip}. Click to sort.`, onclick }, [
          element("span", { text: title }),
          element("span", { class: "arrow", "aria-hidden": "true" }),
        ]);
        return element("th", { scope: "col", class: number ? "number" : null, "data-key": key }, [button]);
      });
      const foot = this.columns().map(({ key, score }, i) => {
        if (i === 0) return element("th", { scope: "row", text: "unprocessed input" });
        return element("td", { class: "number", text: score ? this.state.unprocessed[key] || "-" : "" });
      });
      const some = Object.keys(this.state.unprocessed).length > 0;
      const named = { "aria-multiselectable": "true", "aria-labelledby": "variants-title" };
      this.table = element("table", { class: "variants", role: "grid", ...named }, [
        element("thead", {}, [element("tr", {}, cells)]),
        element("tfoot", {}, some ? [element("tr", {}, foot)] : []),
      ]);
      this.table.addEventListener("keydown", (event) => this.key(event));
      this.root.replaceChildren(this.table);
    }

    row(row, first) {
      const shown = JSON.stringify(row);
      let body = this.bodies.get(row.id);
      if (body && body.shown === shown) return;
      if (!body) {
        const line = element("tr", { class: "row", tabindex: "-1", "data-id": row.id });
        line.addEventListener("click", (event) => {
          if (event.target.closest("button, a") || String(getSelection())) return;
          this.focus(row.id, false);
          this.on.choose(row.id);
        });
        line.addEventListener("focus", () => this.focus(row.id, false));
        body = element("tbody", { class: first ? null : "new" }, [line]);
        body.line = line;
        this.bodies.set(row.id, body);
        this.table.tFoot.before(body);
      }
      body.shown = shown;
      body.row = row;
      const words = row.trials.map(({ state, reason }) => `${bgray.inWords(state)} ${reason || ""}`);
      body.words = [row.label, row.cells.changes, row.cells.verdict, ...words].join(" ").toLowerCase();
      body.line.style.setProperty("--own", row.colour);
      body.line.style.setProperty("--on-own", readable(row.colour));
      body.line.replaceChildren(...this.columns().map((column) => this.cell(row, column)));
      const why = row.trials.filter(({ bad, reason }) => bad && reason);
      body.replaceChildren(body.line, ...why.map((trial) => this.why(row, trial)));
      body.classList.toggle("with-why", why.length > 0);
      this.mark(body);
    }

    cell(row, { key, number, score }) {
      const text = row.cells[key] || "-";
      if (key === "variant") {
        const open = element("button", {
          type: "button",
          class: "open",
          tabindex: row.id === this.active ? "0" : "-1",
          text: "i",
          title: "Details of its trials",
          "aria-label": `Details of ${row.label}`,
          onclick: () => this.on.open(row.id),
        });
        const name = element("div", { class: "name" }, [
          element("span", { class: "lane" }),
          element("span", { class: "label", text: row.label, title: row.label }),
          open,
        ]);
        const badges = this.badges(row);
        const below = badges.length ? element("div", { class: "badges" }, badges) : null;
        return element("th", { scope: "row" }, [name, below]);
      }
      if (score) {
        if (row.baseline || row.cells[`${key} difference`] === "-")
          return element("td", { class: "number score" }, [element("span", { text })]);
        return element("td", { class: "number score" }, [
          element("b", { text: row.cells[`${key} difference`] }),
          element("small", { text: `${text}, baseline ${row.cells[`${key} baseline`]}` }),
        ]);
      }
      if (key === "verdict") return element("td", { class: `verdict ${row.kind || ""}`, text });
      if (key === "changes") return element("td", {}, [element("span", { class: "clamp", text, title: text })]);
      return element("td", { class: number ? `number ${key}` : null, text });
    }

    // What is not simply finished, seeds of one state together.
    badges(row) {
      const by = new Map();
      for (const trial of row.trials) by.set(trial.state, [...(by.get(trial.state) || []), trial]);
      const made = row.control ? [element("span", { text: "control" })] : [];
      for (const [state, trials] of by) {
        if (state === "finished") continue;
        const several = trials.length > 1 ? ` ×${trials.length}` : "";
        const one = trials.length === 1 && row.trials.length > 1 ? ` seed ${trials[0].seed}` : "";
        const steps = trials
          .filter(({ step }) => step)
          .map((trial) => (state === "running" ? `${trial.step}/${trial.steps}` : `${trial.step}`));
        const where = `${one}${steps.length ? ` @${steps.join(", ")}` : ""}`;
        // Of the bad ones a line of their own says which and where.
        const said = trials.every(({ bad, reason }) => bad && reason);
        const text = `${bgray.marked(state)}${several}${said ? "" : where}`;
        const reasons = [...new Set(trials.map(({ reason }) => reason).filter(Boolean))].join("; ");
        made.push(element("span", { class: trials[0].bad ? "bad" : state, text, title: reasons || null }));
      }
      const warned = row.trials.reduce((sum, { warnings }) => sum + (warnings || 0), 0);
      if (warned) made.push(element("span", { text: `⚠ ${warned} warning${warned > 1 ? "s" : ""}` }));
      return made;
    }

    why(row, { seed, state, step, reason }) {
      const who = row.trials.length > 1 ? `seed ${seed} ` : "";
      const text = `${who}${bgray.inWords(state)}${step ? ` at step ${step}` : ""}: ${reason}`;
      const span = element("span", { text: text.split("\n")[0], title: text });
      return element("tr", { class: "why" }, [element("td", { colspan: String(this.columns().length) }, [span])]);
    }

    // --- order, filter, marks

    sort(key) {
      const [was, down] = this.sorted || [];
      this.sorted = was !== key ? [key, false] : down ? null : [key, true];
      this.arrange();
    }

    filter(text) {
      this.words = text.toLowerCase().split(/\s+/).filter(Boolean);
      this.arrange();
    }

    arrange() {
      const rows = [...this.state.rows];
      if (this.sorted) {
        const [key, down] = this.sorted;
        const sign = down ? -1 : 1;
        rows.sort((a, b) => {
          const [x, y] = [a.sort[key], b.sort[key]];
          if (x === null || x === undefined) return y === null || y === undefined ? 0 : 1;
          if (y === null || y === undefined) return -1;
          return sign * (x < y ? -1 : x > y ? 1 : 0);
        });
      }
      for (const th of this.table.tHead.rows[0].cells) {
        const [key, down] = this.sorted || [];
        const here = th.dataset.key === key;
        if (here) th.setAttribute("aria-sort", down ? "descending" : "ascending");
        else th.removeAttribute("aria-sort");
        th.querySelector(".arrow").textContent = here ? (down ? " ▼" : " ▲") : "";
      }
      this.order = [];
      let place = this.table.tHead;
      for (const { id } of rows) {
        const body = this.bodies.get(id);
        body.hidden = !this.words.every((word) => body.words.includes(word));
        if (!body.hidden) this.order.push(id);
        // A row that stays where it is keeps its focus.
        if (place.nextSibling !== body) place.after(body);
        place = body;
      }
      if (!this.order.includes(this.active)) this.active = this.order[0] || null;
      this.reach();
      this.on.arranged(this.order.length, rows.length);
    }

    choose(chosen, digits) {
      Object.assign(this, { chosen: new Set(chosen), digits });
      for (const body of this.bodies.values()) this.mark(body);
    }

    mark(body) {
      const { id, label } = body.row;
      const digit = this.digits.get(id);
      body.line.setAttribute("aria-selected", String(this.chosen.has(id)));
      const lane = body.line.querySelector(".lane");
      lane.textContent = digit ? String(digit) : this.chosen.has(id) ? "·" : "";
      lane.title = digit ? `Key ${digit} plays ${label}` : "";
    }

    // --- keyboard: one row is in the tab order, arrows go from row to row

    focus(id, move = true) {
      this.active = id;
      this.reach();
      if (move) this.bodies.get(id).line.focus();
    }

    reach() {
      for (const [id, { line }] of this.bodies) {
        const index = id === this.active ? "0" : "-1";
        if (line.getAttribute("tabindex") === index) continue;
        line.setAttribute("tabindex", index);
        line.querySelector(".open").setAttribute("tabindex", index);
      }
    }

    key(event) {
      const line = event.target.closest("tr.row");
      if (!line || event.target !== line || event.ctrlKey || event.altKey || event.metaKey) return;
      const at = this.order.indexOf(line.dataset.id);
      const last = this.order.length - 1;
      const by = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity };
      const to = by[event.key] && at + by[event.key];
      if (to !== undefined) this.focus(this.order[Math.max(0, Math.min(last, to))]);
      else if (event.key === "Enter" || event.key === " ") this.on.choose(line.dataset.id);
      else return;
      // The listening strip has other uses for these keys.
      event.preventDefault();
      event.stopPropagation();
    }
  }
  bgray.Table = Table;
})();
