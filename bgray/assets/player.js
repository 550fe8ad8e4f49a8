// The player: clips decoded at their own rate, started together, switched by gain on one clock.
// Knows nothing of the page; strip.js and blind.js do. The same graph runs on an
// OfflineAudioContext (`render`), so what is heard can be checked sample by sample.
(function () {
  "use strict";
  const bgray = (window.bgrayListening = window.bgrayListening || {});

  const FADE = 0.005; // seconds: too short to be heard as a fade, long enough not to click
  const AHEAD = 0.03; // seconds between pressing play and the first sample, for all lanes to be ready

  // --- decoding

  // Of a RIFF/WAVE file: integers of 16, 24 or 32 bits, or floats. Not by decodeAudioData, which
  // resamples to its context's rate without a word, and in Chromium divides what is above zero by
  // 32767 and what is below by 32768.
  function decode(bytes) {
    const view = new DataView(bytes);
    const text = (at) => (at + 4 <= view.byteLength ? view.getUint32(at) : 0);
    if (text(0) !== 0x52494646 || text(8) !== 0x57415645) throw new Error("not a WAV file");
    let form = null;
    for (let at = 12; at + 8 <= view.byteLength; ) {
      const size = Math.min(view.getUint32(at + 4, true), view.byteLength - at - 8);
      const start = at + 8;
      if (text(at) === 0x666d7420) {
        const tag = view.getUint16(start, true);
        form = {
          float: (tag === 0xfffe ? view.getUint16(start + 24, true) : tag) === 3,
          channels: view.getUint16(start + 2, true),
          sampleRate: view.getUint32(start + 4, true),
          bits: view.getUint16(start + 14, true),
        };
      } else if (text(at) === 0x64617461 && form) {
        return samples(view, start, size, form);
      }
      at = start + size + (size % 2);
    }
    throw new Error("a WAV file without samples");
  }
  function samples(view, start, size, { float, channels, sampleRate, bits }) {
    const read = float
      ? bits === 32 && ((at) => view.getFloat32(at, true))
      : {
          16: (at) => view.getInt16(at, true) / 2 ** 15,
          24: (at) => (view.getUint16(at, true) + view.getInt8(at + 2) * 65536) / 2 ** 23,
          32: (at) => view.getInt32(at, true) / 2 ** 31,
        }[bits];
    if (!read) throw new Error(`a WAV file of ${bits} bits`);
    const step = (bits / 8) * channels;
    const length = Math.floor(size / step);
    if (!length) throw new Error("a WAV file without samples");
    const buffer = new AudioBuffer({ length, numberOfChannels: channels, sampleRate });
    for (let c = 0; c < channels; c++) {
      const data = buffer.getChannelData(c);
      for (let i = 0, at = start + (c * bits) / 8; i < length; i++, at += step) data[i] = read(at);
    }
    return buffer;
  }

  async function load(url) {
    const answer = await fetch(url, { credentials: "same-origin" });
    if (!answer.ok) throw new Error(`${answer.status} ${answer.statusText}`);
    return decode(await answer.arrayBuffer());
  }

  // --- gains

  // An AudioParam that is moved in straight lines, also while it is moving.
  class Ramp {
    constructor(param, value) {
      Object.assign(this, { param, from: value, to: value, begin: 0, end: 0 });
      param.setValueAtTime(value, 0);
    }
    at(time) {
      if (time >= this.end) return this.to;
      if (time <= this.begin) return this.from;
      return this.from + ((this.to - this.from) * (time - this.begin)) / (this.end - this.begin);
    }
    move(value, time, seconds) {
      const now = this.at(time);
      if (time < this.end) {
        // Half way: end the old line here, where it would have been anyhow.
        this.param.cancelScheduledValues(time);
        this.param.linearRampToValueAtTime(now, time);
      } else {
        this.param.setValueAtTime(now, time);
      }
      this.param.linearRampToValueAtTime(value, time + seconds);
      Object.assign(this, { from: now, to: value, begin: time, end: time + seconds });
    }
  }

  // --- the graph: source -> gain (loudness) -> gain (0 or 1: is it heard) -> gain (all) -> out

  class Voices {
    constructor(context, buffers, gains, heard) {
      this.context = context;
      this.all = context.createGain();
      this.master = new Ramp(this.all.gain, 1);
      this.all.connect(context.destination);
      this.length = Math.min(...buffers.map((b) => b.duration));
      this.lanes = buffers.map((buffer, i) => {
        const source = context.createBufferSource();
        const loud = context.createGain();
        const open = context.createGain();
        source.buffer = buffer;
        source.connect(loud).connect(open).connect(this.all);
        return {
          source,
          loud: new Ramp(loud.gain, gains[i]),
          open: new Ramp(open.gain, i === heard ? 1 : 0),
        };
      });
      this.heard = heard;
    }
    // All lanes at one `when`, from `offset` seconds into the clip; loop: [from, to] or null: to
    // the end of the shortest.
    start(when, offset, loop) {
      this.when = when;
      this.loop = loop;
      this.offset = loop && (offset < loop[0] || offset >= loop[1]) ? loop[0] : offset;
      for (const { source } of this.lanes) {
        if (loop) {
          source.loop = true;
          source.loopStart = loop[0];
          source.loopEnd = loop[1];
        }
        // No end for those that have it anyhow: as a number of seconds it may be a sample short.
        const longer = !loop && source.buffer.duration > this.length;
        source.start(when, this.offset, ...(longer ? [Math.max(0, this.length - this.offset)] : []));
      }
    }
    // Equal-gain crossfade: both lanes carry much the same signal, so gains that add up to 1 keep
    // its level (equal power would swell by 3 dB).
    hear(lane, time) {
      if (lane === this.heard) return;
      this.heard = lane;
      this.lanes.forEach(({ open }, i) => {
        const goal = i === lane ? 1 : 0;
        // Those on their way anew as well: gains add up to 1 only if all lines have one end.
        if (open.to !== goal || time < open.end) open.move(goal, time, FADE);
      });
    }
    level(gains, time) {
      this.lanes.forEach(({ loud }, i) => {
        if (loud.to !== gains[i]) loud.move(gains[i], time, FADE);
      });
    }
    position(time) {
      const at = this.offset + Math.max(0, time - this.when);
      if (!this.loop || at < this.loop[1]) return at;
      const [from, to] = this.loop;
      return from + ((at - from) % (to - from));
    }
    stop(time) {
      this.master.move(0, time, FADE);
      for (const { source } of this.lanes) source.stop(time + FADE);
    }
  }

  // --- playing

  class Player {
    constructor(changed) {
      this.changed = changed || (() => {}); // called when it starts, stops or switches
      this.buffers = [];
      this.gains = [];
      this.heard = 0;
      this.loop = null;
      this.resting = 0; // seconds: where it starts next
      this.voices = null;
      this.context = null;
    }
    get playing() {
      return this.voices !== null;
    }
    get duration() {
      // Of the shortest, so that a loop has sound in every lane.
      return this.buffers.length ? Math.min(...this.buffers.map((b) => b.duration)) : 0;
    }
    get rate() {
      return this.buffers.length ? this.buffers[0].sampleRate : 0;
    }
    position() {
      if (!this.playing) return this.resting;
      const late = this.context.outputLatency || 0; // what is heard now was rendered then
      return Math.min(this.voices.position(this.context.currentTime - late), this.duration);
    }
    // Other clips, at the place where the ones before were.
    set(buffers, gains, heard) {
      const playing = this.playing;
      const at = this.position();
      this.halt();
      Object.assign(this, { buffers, gains, heard });
      this.resting = at < this.duration ? at : 0;
      if (this.loop && this.loop[1] > this.duration + 1e-9) this.loop = null;
      if (playing && buffers.length) this.play();
    }
    play(at) {
      if (!this.buffers.length) return;
      if (!this.context || this.context.sampleRate !== this.rate) {
        if (this.context) this.context.close();
        this.context = new AudioContext({ sampleRate: this.rate, latencyHint: "interactive" });
      }
      clearTimeout(this.sleep);
      this.context.resume();
      const now = this.context.currentTime;
      const when = now + AHEAD;
      const before = this.voices;
      const from = at !== undefined ? at : before ? before.position(when) : this.resting;
      const voices = new Voices(this.context, this.buffers, this.gains, this.heard);
      voices.start(when, Math.max(0, Math.min(from, this.duration)), this.loop);
      if (before || voices.offset > 0) {
        // The middle of a clip is rarely at zero. What played before goes as this one comes.
        voices.master.from = voices.master.to = 0;
        voices.all.gain.setValueAtTime(0, now);
        voices.master.move(1, when, FADE);
      }
      if (before) before.stop(when);
      voices.lanes[0].source.onended = () => {
        if (this.voices !== voices) return;
        this.voices = null;
        this.resting = 0;
        voices.stop(this.context.currentTime);
        this.rest();
        this.changed();
      };
      this.voices = voices;
      this.changed();
    }
    halt() {
      if (!this.playing) return;
      const voices = this.voices;
      this.resting = this.position();
      this.voices = null;
      voices.stop(this.context.currentTime);
      this.rest();
      this.changed();
    }
    // A context that runs keeps the sound card awake. Later, so that the fade is heard.
    rest() {
      clearTimeout(this.sleep);
      this.sleep = setTimeout(() => this.context && !this.playing && this.context.suspend(), 250);
    }
    toggle() {
      if (this.playing) this.halt();
      else this.play(this.resting >= this.duration - 0.01 ? 0 : this.resting);
    }
    seek(to) {
      const at = Math.max(0, Math.min(to, this.duration - 0.001));
      if (this.playing) this.play(at);
      else {
        this.resting = at;
        this.changed();
      }
    }
    hear(lane) {
      if (lane < 0 || lane >= this.buffers.length) return;
      this.heard = lane;
      if (this.playing) this.voices.hear(lane, this.context.currentTime);
      this.changed();
    }
    level(gains) {
      this.gains = gains;
      if (this.playing) this.voices.level(gains, this.context.currentTime);
    }
    // null: no loop. All sources start anew, because setting their loop points one by one could
    // let one lane turn round before another.
    repeat(loop) {
      this.loop = loop;
      if (this.playing) this.play();
      else this.changed();
    }
    close() {
      this.halt();
      if (this.context) this.context.close();
      this.context = null;
    }
  }

  // The very same graph into arrays, one per channel, at the clips' own rate.
  // {urls, gains, switches: [[seconds, lane]...], seconds, loop: [from, to], offset, lane}
  async function render(wanted) {
    const buffers = wanted.buffers || (await Promise.all(wanted.urls.map(load)));
    const { sampleRate } = buffers[0];
    const channels = Math.max(...buffers.map((b) => b.numberOfChannels));
    const frames = Math.round(wanted.seconds * sampleRate);
    const context = new OfflineAudioContext(channels, frames, sampleRate);
    const gains = wanted.gains || buffers.map(() => 1);
    const voices = new Voices(context, buffers, gains, wanted.lane || 0);
    voices.start(0, wanted.offset || 0, wanted.loop || null);
    for (const [seconds, lane] of wanted.switches || []) voices.hear(lane, seconds);
    const result = await context.startRendering();
    return Array.from({ length: channels }, (_, c) => result.getChannelData(c));
  }

  const fromDb = (db) => 10 ** (db / 20);
  Object.assign(bgray, { decode, load, render, Player, fromDb, FADE });
})();
