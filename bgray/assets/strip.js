// The listening strip: one card per lane with its spectrogram, one clock for all of them.
(function () {
  "use strict";
  const bgray = (window.bgrayListening = window.bgrayListening || {});

  const SHORTEST = 0.02; // seconds that a zoom or a loop may come down to
  const KEYS =
    "1-9: a lane · t: target · i: input · space: play or stop · l: loop · [ and ]: loop from and " +
    "to here · arrows: seek · Home: start · + and −: zoom · 0: whole clip · Esc: end a drag";

  // element("button", {class: "x", onclick: f, text: "..."}, [children])
  bgray.element = function (tag, has = {}, children = []) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(has)) {
      if (value === null || value === undefined || value === false) continue;
      if (name === "text") made.textContent = value;
      else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else made.setAttribute(name, value === true ? "" : value);
    }
    made.append(...children.filter((child) => child !== null));
    return made;
  };
  const element = bgray.element;

  bgray.typing = function (target) {
    const field = target.closest(
      "input, textarea, select, [contenteditable=''], [contenteditable=true], [role=textbox], " +
        "[role=combobox], [role=listbox], [role=spinbutton]"
    );
    return field !== null && !/^(checkbox|radio|button|submit|range)$/.test(field.type || "");
  };
  bgray.decibels = (db) => `${db < -0.05 ? "−" : db > 0.05 ? "+" : "±"}${Math.abs(db).toFixed(1)} dB`;
  bgray.lufs = (value) => `${value < 0 ? "−" : ""}${Math.abs(value).toFixed(1)} LUFS`;
  bgray.ask = async function (url, body) {
    const options = body && {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    };
    const answer = await fetch(url, { credentials: "same-origin", ...options });
    const found = await answer.json().catch(() => ({}));
    if (!answer.ok) {
      const error = new Error(found.error || `${answer.status} ${answer.statusText}`);
      throw Object.assign(error, { status: answer.status });
    }
    return found;
  };

  class Strip {
    constructor(root, api) {
      Object.assign(this, { root, api, wanted: null, data: null, asked: {}, cards: [] });
      Object.assign(this, { view: [0, 1], region: null, drag: null, drawing: 0, loading: 0 });
      this.sounds = new Map(); // url -> promise of an AudioBuffer, of the latest clips
      this.player = new bgray.Player(() => this.update());
      this.build();
      this.listen = (event) => this.key(event);
      document.addEventListener("keydown", this.listen);
      this.watch = new ResizeObserver(() => this.draw());
      this.watch.observe(this.lanes);
    }

    close() {
      document.removeEventListener("keydown", this.listen);
      this.watch.disconnect();
      this.player.close();
      this.root.replaceChildren();
    }

    // --- controls

    build() {
      const button = (text, title, onclick, has = {}) =>
        element("button", { type: "button", text, title, onclick, ...has });
      this.play = button("▶ Play", "Play or stop (space)", () => this.player.toggle(), {
        class: "bl-play",
        "aria-keyshortcuts": "Space",
      });
      this.time = element("output", { class: "bl-time", text: "0.00 s", "aria-label": "Position" });
      const select = (name, label) => {
        const made = element("select", { onchange: () => this.choose(name, made.value) });
        let pointed = false; // after the mouse the keys are the strip's again
        made.addEventListener("pointerdown", () => (pointed = true));
        made.addEventListener("keydown", () => (pointed = false));
        made.addEventListener("change", () => pointed && made.blur());
        const field = element("label", { class: "bl-field" }, [element("span", { text: label }), made]);
        return { made, field };
      };
      this.selects = Object.fromEntries(
        [["item", "Clip"], ["source", "Source"], ["step", "Step"], ["seed", "Seed"]].map(
          ([name, label]) => [name, select(name, label)]
        )
      );
      const toggle = (text, title, pressed, change, keys) => {
        const made = button(text, title, () => change(made.getAttribute("aria-pressed") !== "true"), {
          "aria-pressed": String(pressed),
          "aria-keyshortcuts": keys,
        });
        return made;
      };
      this.loop = toggle("Loop", "Repeat the clip, or the part that you dragged over (l)", true,
        (on) => this.setLoop(on), "l");
      this.match = toggle("Match loudness", "Play all lanes equally loud (ITU-R BS.1770)", true,
        (on) => {
          this.match.setAttribute("aria-pressed", String(on));
          this.player.level(this.gains());
          this.update();
        });
      this.log = toggle("Log Hz", "Logarithmic frequencies, or linear", true, (on) => {
        this.log.setAttribute("aria-pressed", String(on));
        this.draw();
      });
      this.note = element("p", { class: "bl-note", role: "status" });
      this.lanes = element("div", { class: "bl-lanes" });
      const group = (...children) => element("div", { class: "bl-group" }, children);
      this.bar = element("div", { class: "bl-bar", role: "toolbar", "aria-label": "Listening" }, [
        group(this.play, this.time),
        group(...Object.values(this.selects).map(({ field }) => field)),
        group(this.loop, this.match, this.log),
        group(
          button("−", "Zoom out (-)", () => this.zoom(2), { "aria-label": "Zoom out" }),
          button("+", "Zoom in (+)", () => this.zoom(0.5), { "aria-label": "Zoom in" }),
          button("All", "Show the whole clip (0)", () => this.zoom(Infinity))
        ),
        group(
          button("ABX test…", "Can you tell two lanes apart?", () => this.test("abx")),
          button("Blind ranking…", "Which one is best, without names?", () => this.test("ranking"))
        ),
      ]);
      const keys = element("details", { class: "bl-keys" }, [
        element("summary", { text: "Keys" }),
        element("p", { text: `${KEYS}. Drag over a spectrogram to loop a part, double-click to end that. The wheel zooms once a lane was clicked, and with Ctrl always.` }),
      ]);
      this.root.classList.add("bl");
      this.root.setAttribute("role", "region");
      this.root.setAttribute("aria-label", "Listening");
      this.scale = element("p", { class: "bl-scale" }, [
        element("span", { text: `−${bgray.RANGE} dB` }),
        element("span", { class: "bl-ramp", "aria-hidden": "true" }),
        element("span", { text: "0 dB: the target's loudest" }),
      ]);
      const foot = element("div", { class: "bl-foot" }, [keys, this.scale]);
      this.root.replaceChildren(this.bar, this.note, this.lanes, foot);
      this.say("Choose variants to listen to.");
    }

    say(text, wrong = false) {
      this.note.textContent = text;
      this.note.classList.toggle("bl-wrong", wrong);
    }

    choose(name, value) {
      this.asked[name] = value;
      this.load();
    }

    fill() {
      const { data } = this;
      const choices = {
        item: [data.items, (n) => String(n).padStart(3, "0")],
        source: [data.sources, (s) => s],
        step: [data.steps, (n) => n.toLocaleString("en")],
        seed: [data.seeds, String],
      };
      for (const [name, [values, label]] of Object.entries(choices)) {
        const { made, field } = this.selects[name];
        const known = values.filter((value) => value !== null);
        // New options close a list that is open.
        if (made.dataset.known !== JSON.stringify(known)) {
          made.dataset.known = JSON.stringify(known);
          made.replaceChildren(...known.map((value) => element("option", { value, text: label(value) })));
        }
        const value = data[name] === null ? "" : String(data[name]);
        if (made.value !== value) made.value = value;
        field.hidden = known.length === 0 || (name === "source" && known.length < 2);
      }
    }

    // --- clips

    show(wanted) {
      const same = this.wanted && this.wanted.sweep === wanted.sweep;
      if (!same) this.asked = {};
      const seeds = new Set(wanted.lanes.map(({ seed }) => seed));
      const [seed] = seeds;
      if (seeds.size === 1 && seed !== undefined && seed !== null && !same) this.asked.seed = seed;
      this.wanted = wanted;
      return this.load();
    }

    // What is heard stays at its step while new ones come, unless another choice is on its way.
    refresh() {
      const { data, asked } = this;
      const settled = data && !this.pending && this.shown === this.wanted.sweep;
      if (settled && asked.step === undefined && data.step !== null) asked.step = data.step;
      return this.load();
    }

    async load() {
      const turn = ++this.loading;
      this.pending = true;
      const { sweep, lanes } = this.wanted;
      const query = new URLSearchParams({ sweep });
      for (const { variant } of lanes) query.append("variant", variant);
      for (const [name, value] of Object.entries(this.asked)) query.set(name, value);
      try {
        const data = await bgray.ask(`${this.api}/lanes?${query}`);
        if (turn !== this.loading) return;
        const shown = JSON.stringify(data.lanes); // before `sound` adds errors of its own
        const sounds = await Promise.all(data.lanes.map((lane) => this.sound(lane)));
        if (turn !== this.loading) return;
        const there = shown + sounds.map(Boolean).join();
        const again = this.there === there;
        Object.assign(this, { data, there, shown: sweep });
        this.fill();
        if (again) return this.update(); // what plays goes on
        this.take(sounds);
      } catch (error) {
        if (turn === this.loading) this.say(`The clips cannot be had: ${error.message}`, true);
      } finally {
        if (turn === this.loading) this.pending = false;
      }
    }

    async sound(lane) {
      if (lane.error) return null;
      if (!this.sounds.has(lane.url)) this.sounds.set(lane.url, bgray.load(lane.url));
      while (this.sounds.size > 60) this.sounds.delete(this.sounds.keys().next().value);
      try {
        const buffer = await this.sounds.get(lane.url);
        let image = null;
        if (lane.picture) {
          image = new Image();
          image.src = lane.picture;
          await image.decode().catch(() => (image = null));
        }
        return { buffer, image, samples: bgray.mid(buffer) };
      } catch (error) {
        this.sounds.delete(lane.url);
        lane.error = error.message;
        return null;
      }
    }

    take(sounds) {
      // What was heard stays heard: the same variant, or target or input.
      const before = this.cards[this.player.heard];
      this.drag = null; // its lane goes
      const colours = new Map(this.wanted.lanes.map((lane) => [lane.variant, lane.colour]));
      let number = 0;
      const whole = this.view[1] - this.view[0] >= (this.player.duration || 0) - 1e-6;
      this.cards = [];
      this.data.lanes.forEach((lane, i) => {
        const of = lane.kind === "lane" ? String(++number) : lane.kind[0];
        if (sounds[i]) {
          const key = number > 9 && lane.kind === "lane" ? "" : of;
          this.cards.push({ ...lane, ...sounds[i], key, colour: colours.get(lane.variant) });
        }
      });
      const same = (card) => before && card.kind === before.kind && card.variant === before.variant;
      const first = this.cards.findIndex(({ kind }) => kind === "lane");
      const heard = this.cards.findIndex(same);
      const buffers = this.cards.map(({ buffer }) => buffer);
      const length = buffers.length ? Math.min(...buffers.map((b) => b.duration)) : 0;
      if (this.region && this.region[1] > length) this.region = null;
      this.player.loop = this.looped(length);
      this.player.set(buffers, this.gains(), heard >= 0 ? heard : Math.max(0, first));
      if (whole || this.view[1] > length) this.view = [0, length || 1];
      const reference = this.cards.find(({ kind }) => kind === "target");
      const levels = (reference ? [reference] : this.cards).map(({ samples, buffer }) => bgray.loudest(samples, buffer.sampleRate));
      this.top = levels.length ? Math.max(...levels) : 0;
      this.scale.hidden = this.cards.every(({ image }) => image);
      this.scale.lastChild.textContent = `0 dB: the loudest of ${reference ? "the target" : "all"}`;
      this.lanes.replaceChildren(...this.cards.map((card, i) => this.card(card, i)));
      this.update();
      this.draw();
    }

    gains() {
      const on = this.match.getAttribute("aria-pressed") === "true";
      return this.cards.map((card) => (on ? bgray.fromDb(card.gain_db) : 1));
    }

    card(card, i) {
      const { label, key, kind } = card;
      card.button = element("button", {
        type: "button",
        class: "bl-name",
        title: key ? `Hear ${label} (${key})` : `Hear ${label}`,
        "aria-pressed": "false",
        "aria-keyshortcuts": key || null,
        onclick: () => this.player.hear(i),
      }, [
        key ? element("kbd", { text: key }) : null,
        element("span", { class: "bl-swatch", "aria-hidden": "true" }),
        element("span", { class: "bl-label", text: label }),
        kind === "lane" && this.data.seed === null ? element("span", { class: "bl-small", text: `seed ${card.seed}` }) : null,
        element("span", { class: "bl-on", text: "♪", title: "This one is heard" }),
      ]);
      card.loud = element("span", { class: "bl-loud" });
      card.canvas = element("canvas", { role: "img" });
      card.marked = element("div", { class: "bl-region" });
      card.head = element("div", { class: "bl-head" });
      card.window = element("div", { class: "bl-window" }, [card.marked, card.head]);
      card.plot = element("div", { class: "bl-plot" }, [card.canvas, card.window]);
      this.pointer(card.plot, i);
      const made = element("div", { class: `bl-lane bl-${kind}` }, [
        element("div", { class: "bl-top" }, [card.button, card.loud]),
        card.plot,
      ]);
      if (card.colour) made.style.setProperty("--lane", card.colour);
      card.root = made;
      return made;
    }

    test(kind) {
      this.player.halt();
      if (this.data) bgray.blindTest(kind, { api: this.api, sweep: this.wanted.sweep, data: this.data });
    }
  }

  let strip = null;
  bgray.SHORTEST = SHORTEST;
  bgray.mount = function (root, { api }) {
    if (strip) strip.close();
    Object.assign(Strip.prototype, bgray.stripMethods);
    strip = new Strip(root, api);
    return strip;
  };
  bgray.show = (wanted) => strip && strip.show(wanted);
  // New steps come into the list while a sweep runs; what plays stays.
  bgray.refresh = () => (strip && strip.wanted ? strip.refresh() : undefined);
})();
