// The listening strip while it is used: keys, pointer, loop, zoom, playhead, and what is drawn.
// Methods of strip.js's Strip, which takes them when it is first mounted.
(function () {
  "use strict";
  const bgray = (window.bgrayListening = window.bgrayListening || {});
  const CLICK = 4; // pixels that a click may wander

  const methods = {
    // --- time

    looped(length) {
      if (this.loop.getAttribute("aria-pressed") !== "true" || !length) return null;
      return this.region || [0, length];
    },
    setLoop(on) {
      this.loop.setAttribute("aria-pressed", String(on));
      this.player.repeat(this.looped(this.player.duration));
      this.update();
    },
    setRegion(region) {
      const length = this.player.duration;
      if (region) {
        const [from, to] = [Math.max(0, region[0]), Math.min(length, region[1])];
        region = to - from >= bgray.SHORTEST ? [from, to] : null;
        if (!region) return;
      }
      this.region = region;
      this.setLoop(region !== null || this.loop.getAttribute("aria-pressed") === "true");
    },
    // Around what is under the pointer, or the playhead where that is in view, or the middle.
    zoom(factor, around) {
      const length = this.player.duration;
      if (!length) return;
      const [from, to] = this.view;
      const here = this.player.position();
      const centre = around ?? (here >= from && here <= to ? here : (from + to) / 2);
      const span = Math.min(length, Math.max(bgray.SHORTEST, (to - from) * factor));
      const start = factor === Infinity ? 0 : centre - ((centre - from) / (to - from)) * span;
      this.look(start, span);
    },
    look(start, span) {
      const length = this.player.duration;
      const from = Math.max(0, Math.min(start, length - span));
      if (Math.abs(from - this.view[0]) + Math.abs(from + span - this.view[1]) < 1e-9) return;
      this.view = [from, from + span];
      this.update();
      this.draw();
    },
    seek(to) {
      this.player.seek(to);
      const [from, end] = this.view;
      const at = this.player.position();
      if (at < from || at > end) this.look(at - (end - from) / 2, end - from);
    },

    // --- pointer

    pointer(plot, lane) {
      const timeOf = (event) => {
        const box = plot.getBoundingClientRect();
        const share = (event.clientX - box.left - bgray.GUTTER.left) / (box.width - bgray.GUTTER.left);
        const [from, to] = this.view;
        return from + Math.max(0, Math.min(1, share)) * (to - from);
      };
      plot.addEventListener("pointerdown", (event) => {
        if (event.button !== 0) return;
        this.drag = { lane, x: event.clientX, from: timeOf(event), to: null };
        plot.setPointerCapture(event.pointerId);
      });
      plot.addEventListener("pointermove", (event) => {
        const { drag } = this;
        if (!drag || drag.lane !== lane) return;
        if (drag.to !== null || Math.abs(event.clientX - drag.x) > CLICK) {
          drag.to = timeOf(event);
          this.mark();
        }
      });
      plot.addEventListener("pointerup", () => {
        const { drag } = this;
        this.drag = null;
        if (!drag) return; // ended by Esc
        if (drag.to === null) {
          this.player.hear(lane);
          this.cards[lane].button.focus({ preventScroll: true });
        } else {
          this.setRegion([Math.min(drag.from, drag.to), Math.max(drag.from, drag.to)]);
        }
        this.mark();
      });
      plot.addEventListener("pointercancel", () => this.endDrag());
      plot.addEventListener("dblclick", () => this.setRegion(null));
      plot.addEventListener("wheel", (event) => {
        // A page that cannot be scrolled past its spectrograms is a nuisance.
        if (!event.ctrlKey && !this.root.contains(document.activeElement)) return;
        event.preventDefault();
        const [from, to] = this.view;
        if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
          this.look(from + (event.deltaX / 600) * (to - from), to - from);
        } else {
          this.zoom(2 ** (event.deltaY / 240), timeOf(event));
        }
      }, { passive: false });
    },
    endDrag() {
      this.drag = null;
      this.mark();
    },

    // --- keys

    key(event) {
      const { target, key } = event;
      if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
      if (!this.root.isConnected || !this.cards.length || document.querySelector("dialog[open]")) return;
      if (key === "Escape") {
        if (this.drag) this.endDrag();
        return;
      }
      if (!(target instanceof Element) || bgray.typing(target)) return;
      const inside = this.root.contains(target) || target === document.body;
      const button = target.closest("button, a[href], summary, input, [role=button], [role=tab]");
      // Space presses a button that has the focus; a lane's name and Play are left to the player.
      const ours = !button || button === this.play || button.classList.contains("bl-name");
      const player = this.player;
      const here = () => player.position();
      const step = Math.max(0.02, (this.view[1] - this.view[0]) / 20);
      const lane = this.cards.findIndex((card) => card.key !== "" && card.key === key.toLowerCase());
      const does =
        lane >= 0 ? () => player.hear(lane)
        : key === " " ? ours && inside && (() => player.toggle())
        : key === "l" || key === "L" ? () => this.setLoop(!player.loop)
        : key === "ArrowLeft" ? inside && (() => this.seek(here() - step))
        : key === "ArrowRight" ? inside && (() => this.seek(here() + step))
        : key === "Home" ? inside && (() => this.seek(player.loop ? player.loop[0] : 0))
        : key === "[" ? () => this.setRegion([here(), this.region ? this.region[1] : player.duration])
        : key === "]" ? () => this.setRegion([this.region ? this.region[0] : 0, here()])
        : key === "+" || key === "=" ? () => this.zoom(0.5)
        : key === "-" ? () => this.zoom(2)
        : key === "0" ? () => this.zoom(Infinity)
        : null;
      if (!does) return;
      event.preventDefault();
      if (event.repeat && !key.startsWith("Arrow")) return;
      does();
    },

    // --- what is seen

    update() {
      const { player, cards, data } = this;
      if (!data) return;
      this.play.textContent = player.playing ? "■ Stop" : "▶ Play";
      this.play.disabled = !cards.length;
      const on = this.match.getAttribute("aria-pressed") === "true";
      cards.forEach((card, i) => {
        if (!card.root) return;
        const heard = i === player.heard;
        card.button.setAttribute("aria-pressed", String(heard));
        card.root.classList.toggle("bl-heard", heard);
        const gain = on ? bgray.decibels(card.gain_db) : "as it is";
        card.loud.textContent = card.silent
          ? "silent, left alone"
          : `${bgray.lufs(card.lufs)} · ${gain}`;
        const [from, to] = this.view;
        card.canvas.setAttribute(
          "aria-label",
          `${card.picture ? "Piano roll" : "Spectrogram"} of ${card.label}, ${from.toFixed(2)} to ${to.toFixed(2)} s`
        );
      });
      this.mark();
      this.tell(on);
      this.follow();
    },
    tell(on) {
      const { data, cards } = this;
      const parts = [];
      if (!cards.length) parts.push("There is nothing to hear yet.");
      else if (data.goal_lufs === null) parts.push("All clips are silent.");
      else if (on) {
        const of = data.reference === "target" ? "the target" : "the quietest lane";
        const trim = data.trim_db < -0.05 ? ` (${-data.trim_db.toFixed(1)} dB below it, so that ${data.trim_of} does not clip)` : "";
        parts.push(`Every lane plays at ${bgray.lufs(data.goal_lufs)}, the loudness of ${of}${trim}.`);
      } else parts.push("Every lane plays as loud as its file; louder often seems better.");
      if (data.seed === null && cards.some(({ kind }) => kind === "lane")) {
        parts.push("The variants have no seed in common: each plays its own lowest.");
      }
      const wrong = data.lanes.filter((lane) => lane.error).map((lane) => `${lane.label} (${lane.error})`);
      const missing = [...data.missing.map(({ label, why }) => `${label} (${why})`), ...wrong];
      if (missing.length) parts.push(`Not here: ${missing.join(", ")}.`);
      this.say(parts.join(" "));
    },
    place(seconds) {
      const [from, to] = this.view;
      return ((seconds - from) / (to - from)) * 100;
    },
    mark() {
      const { drag } = this;
      const region = drag && drag.to !== null
        ? [Math.min(drag.from, drag.to), Math.max(drag.from, drag.to)]
        : this.region;
      for (const { marked } of this.cards) {
        if (!marked) continue;
        marked.hidden = !region;
        if (!region) continue;
        marked.style.left = `${this.place(region[0])}%`;
        marked.style.width = `${this.place(region[1]) - this.place(region[0])}%`;
        marked.classList.toggle("bl-off", !this.player.loop && !drag);
      }
    },
    follow() {
      cancelAnimationFrame(this.frame);
      const at = this.player.position();
      const place = this.place(at);
      for (const { head } of this.cards) {
        if (!head) continue;
        head.hidden = place < 0 || place > 100;
        head.style.left = `${place}%`;
      }
      this.time.textContent = `${at.toFixed(2)} / ${this.player.duration.toFixed(2)} s`;
      if (this.player.playing) this.frame = requestAnimationFrame(() => this.follow());
    },
    // One lane at a time, so that keys and sound go on in between; a newer call ends an older.
    draw() {
      // As many columns as fill their rows: six lanes are two rows of three, not of four and two.
      const most = Math.max(1, Math.floor(this.lanes.clientWidth / 310));
      const rows = Math.ceil(this.cards.length / most);
      this.lanes.style.setProperty("--columns", Math.ceil(this.cards.length / rows) || 1);
      const turn = ++this.drawing;
      const scale = this.log.getAttribute("aria-pressed") === "true" ? "log" : "linear";
      let spent = 0;
      const next = (i) => {
        if (turn !== this.drawing) return;
        if (i >= this.cards.length) {
          this.drawn = spent; // milliseconds
          return;
        }
        const { canvas, samples, buffer, image } = this.cards[i];
        const [from, to] = this.view;
        const shown = { samples, rate: buffer.sampleRate, image, duration: buffer.duration };
        spent += bgray.draw(canvas, { ...shown, from, to, scale, top: this.top });
        setTimeout(next, 0, i + 1);
      };
      requestAnimationFrame(() => next(0));
    },
  };

  bgray.stripMethods = methods;
})();
