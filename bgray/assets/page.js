// The page's clock and state: asks for what has changed, keeps what the user has chosen, and tells
// table, listening strip, figures and details.
(function () {
  "use strict";
  const bgray = (window.bgrayPage = window.bgrayPage || {});
  const MOST_LANES = 9; // keys 1 to 9
  const FIRST_LANES = 4;
  const RETRY_SECONDS = 5;
  const TIMEOUT_SECONDS = 60; // the first look at a large folder on S3 takes its time

  const at = (id) => document.getElementById(id);
  const clock = (date) => date.toLocaleTimeString([], { hour12: false });

  function ago(seconds) {
    for (const [unit, length] of [["d", 86400], ["h", 3600], ["min", 60]])
      if (seconds >= length) return `${Math.floor(seconds / length)} ${unit} ago`;
    return `${Math.max(0, Math.round(seconds))} s ago`;
  }

  // What was chosen survives a reload, sweep by sweep; without storage it just does not.
  const kept = {
    get(key) {
      try {
        return JSON.parse(sessionStorage.getItem(`bgray ${key}`));
      } catch {
        return null;
      }
    },
    set(key, value) {
      try {
        sessionStorage.setItem(`bgray ${key}`, JSON.stringify(value));
      } catch {
        // A full or forbidden storage.
      }
    },
  };

  // After a zoom Dash gives Plotly the figure that it shows once more, with the zoom in it; the zoom
  // then counts as the server's, and the server's next figure takes it back.
  function keepZoom() {
    const { Plotly } = window;
    if (!Plotly || Plotly.react.once) return;
    const react = Plotly.react;
    Plotly.react = (root, figure, ...rest) => {
      if (figure.data && figure.data === root.drawn) return Promise.resolve(root);
      root.drawn = figure.data;
      return react(root, figure, ...rest);
    };
    Plotly.react.once = true;
  }

  class Page {
    constructor() {
      Object.assign(this, { state: null, chosen: [], touched: false, seen: "", drawn: {} });
      Object.assign(this, { timer: 0, turn: 0, heard: "", trial: null, answered: null });
      this.sweep = kept.get("sweep");
      this.table = this.newTable();
      this.strip = window.bgrayListening.mount(at("listening"), { api: "/api/listening" });
      at("filter").addEventListener("input", ({ target }) => {
        if (this.table.state) this.table.filter(target.value);
      });
      at("all-scores").addEventListener("click", () => {
        this.table.all = !this.table.all;
        at("all-scores").setAttribute("aria-pressed", String(this.table.all));
        this.table.draw(this.state);
        this.mark();
      });
      at("sweep-select").addEventListener("change", (event) => this.go(event.target.value));
      at("details-variant").addEventListener("change", (event) => this.open(event.target.value, false));
      at("details-seed").addEventListener("change", (event) => this.details(event.target.value));
      document.addEventListener("visibilitychange", () => (document.hidden ? this.rest() : this.look()));
      this.look();
    }

    newTable() {
      return new bgray.Table(at("table-scroll"), {
        choose: (id) => this.choose(id),
        open: (id) => this.open(id, true),
        arranged: (shown, all) => {
          at("shown-count").textContent = shown === all ? "" : `${shown} of ${all}`;
        },
      });
    }

    // --- what has changed

    rest() {
      clearTimeout(this.timer);
    }

    async look() {
      this.rest();
      const turn = ++this.turn;
      let wait = RETRY_SECONDS;
      try {
        const query = new URLSearchParams({ sweep: this.sweep || "", seen: this.seen });
        const signal = AbortSignal.timeout(1000 * TIMEOUT_SECONDS);
        const answer = await fetch(`/api/state?${query}`, { signal, credentials: "same-origin" });
        if (turn !== this.turn) return;
        if (answer.status !== 200 && answer.status !== 204) throw answer;
        const now = Date.parse(answer.headers.get("Date") || "") || Date.now();
        const found = answer.status === 200 ? await answer.json() : null;
        if (turn !== this.turn) return;
        this.answered = new Date();
        at("gone").hidden = true;
        if (found) this.take(found);
        wait = this.state ? this.state.seconds : wait;
        this.fresh(now);
      } catch (error) {
        if (turn !== this.turn) return;
        this.lost(error);
      }
      if (!document.hidden) this.timer = setTimeout(() => this.look(), 1000 * wait);
    }

    lost(error) {
      const gone = at("gone");
      const shown = this.answered ? ` What is shown is from ${clock(this.answered)}.` : "";
      let text = "The dashboard's server does not answer: is its command still running?";
      text += `${shown} Trying again.`;
      if (error.status === 401)
        text = "The dashboard was started anew: open the address that its command has printed.";
      else if (error.status) text = `The dashboard's server answers with ${error.status}.${shown} Trying again.`;
      else if (!(error instanceof TypeError || error.name === "TimeoutError")) {
        text = `This page has met an error of its own: ${error.message}.${shown}`;
        console.error(error);
      }
      if (gone.textContent !== text) gone.textContent = text;
      gone.hidden = false;
    }

    fresh(now) {
      const changed = this.state && this.state.changed;
      const last = changed ? `last change ${ago(now / 1000 - changed)} · ` : "";
      at("freshness").textContent = `${last}looked at ${clock(this.answered)}`;
    }

    take(found) {
      if (found.error && this.state && this.state.rows && found.sweep === this.sweep) {
        this.seen = ""; // what was read before stays, until it can be read again
        this.notes(found);
        return;
      }
      if (found.sweep !== this.sweep && this.state) this.forget();
      this.sweep = found.sweep;
      const before = this.state;
      Object.assign(this, { state: found, seen: found.version });
      this.sweeps(found);
      this.notes(found);
      document.body.classList.toggle("empty", !found.rows);
      if (!found.rows) return;
      this.top(found, before);
      at("all-scores").hidden = !found.columns.some(({ extra }) => extra);
      const way = found.mode === "min" ? "lower" : "higher";
      at("matched").textContent = found.why_not
        ? `not compared yet: ${found.why_not}`
        : found.metric
          ? `against the baseline, at the last step both reached; ${found.metric} decides (${way} is better)`
          : "";
      at("method").textContent = found.method;
      at("heard").replaceChildren(...found.heard.map((text) => bgray.element("li", { text })));
      this.table.draw(found);
      this.choices(found);
      this.pick(found);
      this.figures();
      this.listen();
      this.details();
    }

    forget() {
      Object.assign(this, { chosen: [], touched: false, heard: "", trial: null, seen: "", state: null });
      at("table-scroll").replaceChildren();
      at("filter").value = "";
      this.table = this.newTable();
    }

    go(sweep) {
      this.forget();
      this.sweep = sweep;
      kept.set("sweep", sweep);
      this.look();
    }

    // --- top

    sweeps({ sweeps, sweep }) {
      const select = at("sweep-select");
      at("sweep-choice").hidden = sweeps.length < 2;
      this.fill(select, sweeps.map((name) => [name, name]));
      select.value = sweep;
    }

    notes(found) {
      const { element } = bgray;
      const lines = [...(found.error ? [found.error] : []), ...(found.problems || [])];
      at("notes").replaceChildren(...lines.map((text) => element("p", { class: "note", text: `⚠ ${text}` })));
      if (found.rows || (this.state && this.state.rows)) return;
      const [what, where] = found.error
        ? ["This sweep cannot be read", "The reason is above; the page goes on looking."]
        : ["Waiting for a first run", `Nothing has begun in ${found.folder} yet. What begins is shown here at once.`];
      if (at("table-scroll").textContent === what + where) return; // to be read out once
      const waits = element("div", { class: "waits", role: "status" }, [element("b", { text: what }), where]);
      at("table-scroll").replaceChildren(waits);
      this.table = this.newTable();
    }

    top(found, before) {
      const { element } = bgray;
      at("sweep-title").textContent = found.name;
      const chip = ({ state, count }) =>
        element("li", { class: `chip ${state}`, text: `${bgray.marked(state)} ${count}` });
      at("chips").replaceChildren(...found.chips.map(chip));
      const { state, text, command } = found.driver;
      const parts = [element("span", { class: state, text: `${text} ` })];
      if (command) parts.push(element("code", { text: command }));
      if (found.ray) {
        const title = "It asks for a token: uv run ray get-auth-token prints it";
        const there = { href: found.ray, target: "_blank", rel: "noopener noreferrer", title };
        const link = element("a", { ...there, text: "Ray's own dashboard" });
        parts.push(link, " (token: ", element("code", { text: "uv run ray get-auth-token" }), ")");
      }
      at("driver").replaceChildren(...parts);
      const running = found.chips.find(({ state }) => state === "running");
      document.title = `${running ? `▶ ${running.count} ` : ""}${found.name} - bgray`;
      const words = found.chips.map(({ state, count }) => `${count} ${bgray.inWords(state)}`).join(", ");
      if (before && before.chips && JSON.stringify(before.chips) !== JSON.stringify(found.chips)) this.say(words);
    }

    say(text) {
      at("said").textContent = text;
    }

    // --- what is chosen: lines in the figures, lanes to listen to

    pick({ rows, sweep }) {
      const known = new Set(rows.map(({ id }) => id));
      const before = kept.get(`chosen ${sweep}`);
      if (!this.touched && before && before.some((id) => known.has(id))) {
        this.chosen = before;
        this.touched = true;
      }
      if (!this.touched && this.chosen.length < FIRST_LANES) {
        // The baseline and the best, those first that can be heard at the last step; once shown they
        // stay.
        const whole = ({ clips, bad, state }) => clips && !bad && state !== "stopped";
        const heard = rows.filter(({ trials }) => trials.length && trials.every(whole));
        const first = (heard.length ? [rows[0], ...heard] : rows).map(({ id }) => id);
        this.chosen = [...new Set([...this.chosen, ...first])].slice(0, FIRST_LANES);
      }
      this.chosen = this.chosen.filter((id) => known.has(id));
      this.mark();
    }

    choose(id) {
      const label = this.state.rows.find((row) => row.id === id).label;
      const there = this.chosen.includes(id);
      if (!there && this.chosen.length >= MOST_LANES) {
        this.say(`nine are chosen, which is the most; let one go first`);
        at("shown-count").textContent = "nine are the most; let one go first";
        return;
      }
      this.chosen = there ? this.chosen.filter((one) => one !== id) : [...this.chosen, id];
      this.touched = true;
      kept.set(`chosen ${this.sweep}`, this.chosen);
      this.say(`${label} ${there ? "let go" : "chosen"}`);
      this.mark();
      this.figures();
      this.listen();
    }

    // Which key plays which variant: what has no clips has no lane.
    mark() {
      const { data } = this.strip;
      const playing = data ? data.lanes.filter(({ kind }) => kind === "lane").map(({ variant }) => variant) : [];
      this.table.choose(this.chosen, new Map(playing.map((id, i) => [id, i + 1])));
    }

    async listen() {
      const rows = new Map(this.state.rows.map((row) => [row.id, row]));
      const lanes = this.chosen.map((id) => ({ variant: id, label: rows.get(id).label, colour: rows.get(id).colour }));
      const wanted = { sweep: this.sweep, lanes };
      const again = this.heard === JSON.stringify(wanted);
      this.heard = JSON.stringify(wanted);
      // A refresh leaves what plays alone.
      await (again ? window.bgrayListening.refresh() : window.bgrayListening.show(wanted));
      if (this.heard === JSON.stringify(wanted)) this.mark();
    }

    // --- figures: Dash draws one anew when what is in its store has changed, and only those that
    // are near the screen: drawing is what costs most, and the sound is above them

    figures() {
      if (!this.state || !this.state.rows) return;
      const dash = window.dash_clientside;
      keepZoom();
      if (!dash || !dash.set_props || !window.Plotly || !at("curves-scroll")) {
        clearTimeout(this.later);
        this.later = setTimeout(() => this.figures(), 50);
        return;
      }
      if (!this.near) {
        this.near = new Set();
        const watch = new IntersectionObserver((seen) => {
          for (const { target, isIntersecting } of seen) {
            const id = target.id.replace("-scroll", "");
            this.near[isIntersecting ? "add" : "delete"](id);
          }
          this.figures();
        }, { rootMargin: "200px" });
        // Not the graph itself, which Dash replaces.
        for (const id of ["curves", "quality", "parallel"]) watch.observe(at(`${id}-scroll`));
        return;
      }
      const scores = this.state.columns.filter(({ score }) => score).map(({ key }) => key);
      const same = (names) => names.map((name) => [name, name]);
      const name = this.control("curves", "y", same(this.state.curves));
      const axis = this.control("curves", "x", [["step", "step"], ["minutes", "minutes"]]);
      const metric = this.control("quality", "score", same(scores));
      const costs = [["minutes", "minutes to 10k steps"]];
      costs[this.state.rows.some(({ sort }) => sort.vram !== null) ? "unshift" : "push"](["vram", "VRAM"]);
      const cost = this.control("quality", "cost", costs);
      const { sweep, version } = this.state;
      const common = { sweep, version, chosen: this.chosen };
      const views = { curves: { name, axis }, quality: { metric, cost }, parallel: { metric } };
      for (const [id, own] of Object.entries(views)) {
        const data = { ...common, ...own };
        if (!this.near.has(id) || this.drawn[id] === JSON.stringify(data)) continue;
        this.drawn[id] = JSON.stringify(data);
        dash.set_props(`${id}-view`, { data });
      }
    }

    // The value of a select in a figure's head, which is made when it is first asked for.
    control(panel, label, options) {
      const id = `${panel}-${label}`;
      let select = at(id);
      if (!select) {
        select = bgray.element("select", { id, onchange: () => this.figures() });
        at(`${panel}-controls`).append(bgray.element("label", { text: `${label} ` }, [select]));
      }
      this.fill(select, options);
      return select.value;
    }

    // Options of a select as [value, text]; what was selected stays so where it can.
    fill(select, options) {
      const known = JSON.stringify(options);
      if (select.dataset.known === known) return;
      const was = select.value;
      select.dataset.known = known;
      select.replaceChildren(...options.map(([value, text]) => bgray.element("option", { value, text })));
      if (options.some(([value]) => value === was)) select.value = was;
    }

    // --- one trial

    choices({ rows }) {
      const select = at("details-variant");
      this.fill(select, rows.map(({ id, label }) => [id, label]));
      const bad = rows.find(({ trials }) => trials.some(({ bad }) => bad));
      if (!this.trial) select.value = (bad || rows[0]).id;
      this.seeds(select.value);
    }

    seeds(variant) {
      const { trials } = this.state.rows.find(({ id }) => id === variant);
      this.fill(at("details-seed"), trials.map(({ id, seed, state }) => [id, `${seed}: ${bgray.inWords(state)}`]));
      const there = trials.find(({ id }) => id === this.trial);
      this.trial = (there || trials.find(({ bad }) => bad) || trials[0] || { id: null }).id;
      at("details-seed").value = this.trial;
    }

    open(variant, go) {
      at("details-variant").value = variant;
      this.seeds(variant);
      this.details();
      if (!go) return;
      at("details").scrollIntoView();
      at("details-variant").focus({ preventScroll: true });
    }

    async details(run = this.trial) {
      this.trial = run;
      if (!run) return;
      const query = new URLSearchParams({ sweep: this.sweep, run });
      try {
        const answer = await fetch(`/api/trial?${query}`, { credentials: "same-origin" });
        const found = await answer.json();
        if (run === this.trial) bgray.drawTrial(at("details-body"), found);
      } catch {
        // The server is gone, which `look` says.
      }
    }
  }

  // All scripts are in the page before this, whatever their order.
  document.addEventListener("DOMContentLoaded", () => {
    bgray.page = new Page();
  });
})();
