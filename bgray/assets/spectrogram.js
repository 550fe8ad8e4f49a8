// Spectrograms: a small FFT, levels in dB on a linear or logarithmic frequency axis, drawn on a
// canvas with its axes.
(function () {
  "use strict";
  const bgray = (window.bgrayListening = window.bgrayListening || {});

  const RANGE = 90; // dB below the target's maximum that are shown
  const LOWEST = 40; // Hz, where a logarithmic axis begins
  const GUTTER = { left: 34, bottom: 15 }; // CSS pixels for the axes

  // matplotlib's magma at 33 points: equal steps look equally large, also without colour.
  const MAGMA =
    "000004 030312 0a0822 130d34 1d1147 29115a 36106b 440f76 51127c 5d177f 6a1c81 762181 832681 " +
    "902a81 9c2e7f aa337d b73779 c43c75 d0416f dc4869 e75263 ef5d5e f56b5c f9795d fc8961 fd9869 " +
    "fea772 feb67c fec488 fed395 fde2a3 fcf0b2 fcfdbf";
  const PALETTE = (function () {
    const stops = MAGMA.split(" ").map((hex) => parseInt(hex, 16));
    const byte = (colour, shift) => (colour >> shift) & 255;
    return Uint32Array.from({ length: 256 }, (_, i) => {
      const at = (i / 255) * (stops.length - 1);
      const low = Math.min(Math.floor(at), stops.length - 2);
      const mix = (shift) =>
        Math.round(byte(stops[low], shift) * (low + 1 - at) + byte(stops[low + 1], shift) * (at - low));
      return (255 << 24) | (mix(0) << 16) | (mix(8) << 8) | mix(16); // little endian RGBA
    });
  })();

  // --- FFT

  const plans = new Map();
  function plan(size) {
    if (!plans.has(size)) {
      const half = size / 2;
      const bits = Math.log2(half);
      const reversed = new Uint16Array(half);
      for (let i = 0; i < half; i++) {
        let r = 0;
        for (let b = 0; b < bits; b++) r |= ((i >> b) & 1) << (bits - 1 - b);
        reversed[i] = r;
      }
      const cos = new Float32Array(size);
      const sin = new Float32Array(size);
      const hann = new Float32Array(size);
      for (let i = 0; i < size; i++) {
        cos[i] = Math.cos((2 * Math.PI * i) / size);
        sin[i] = -Math.sin((2 * Math.PI * i) / size);
        hann[i] = 0.5 - 0.5 * Math.cos((2 * Math.PI * i) / size);
      }
      plans.set(size, {
        size, half, reversed, cos, sin, hann,
        re: new Float32Array(half),
        im: new Float32Array(half),
        power: new Float32Array(half + 1),
      });
    }
    return plans.get(size);
  }

  // Power of the bins 0..size/2 of a Hann window that begins at `start`; outside the clip is
  // silence. A full-scale sine has power 1. Even and odd samples go through one complex FFT of
  // half the size.
  function powers(samples, start, size) {
    const p = plan(size);
    const { half, reversed, cos, sin, hann, re, im, power } = p;
    const count = samples.length;
    for (let i = 0; i < half; i++) {
      const at = start + 2 * i;
      const to = reversed[i];
      re[to] = at >= 0 && at < count ? samples[at] * hann[2 * i] : 0;
      im[to] = at + 1 >= 0 && at + 1 < count ? samples[at + 1] * hann[2 * i + 1] : 0;
    }
    for (let width = 1, step = half; width < half; width *= 2, step /= 2) {
      for (let j = 0; j < width; j++) {
        const c = cos[j * step];
        const s = sin[j * step];
        for (let k = j; k < half; k += 2 * width) {
          const m = k + width;
          const a = re[m] * c - im[m] * s;
          const b = re[m] * s + im[m] * c;
          re[m] = re[k] - a;
          im[m] = im[k] - b;
          re[k] += a;
          im[k] += b;
        }
      }
    }
    const scale = (4 / size) ** 2; // Hann's mean is 1/2, and half of a sine is at -f
    for (let k = 0; k <= half; k++) {
      const i = k % half;
      const j = (half - k) % half;
      const er = (re[i] + re[j]) / 2, ei = (im[i] - im[j]) / 2;
      const or = (im[i] + im[j]) / 2, oi = (re[j] - re[i]) / 2;
      const c = k === half ? -1 : cos[k];
      const s = k === half ? 0 : sin[k];
      const real = er + or * c - oi * s;
      const imag = ei + or * s + oi * c;
      power[k] = (real * real + imag * imag) * scale;
    }
    return power;
  }

  // --- picture

  function frequencies(rate, scale) {
    const top = rate / 2;
    return scale === "log" ? [Math.min(LOWEST, top / 8), top] : [0, top];
  }
  function frequency(share, rate, scale) {
    const [low, high] = frequencies(rate, scale);
    return scale === "log" ? low * (high / low) ** share : low + (high - low) * share;
  }
  function share(hz, rate, scale) {
    const [low, high] = frequencies(rate, scale);
    return scale === "log" ? Math.log(hz / low) / Math.log(high / low) : (hz - low) / (high - low);
  }

  // Long enough to tell low tones apart, short enough not to smear what a zoom shows apart.
  function windowSize(rate, hop) {
    const longest = 2 ** Math.round(Math.log2(rate * 0.06));
    const wanted = 2 ** Math.ceil(Math.log2(Math.max(1, hop * 12)));
    return Math.max(256, Math.min(longest, wanted));
  }

  // Levels in dB (10 log10 of power, full-scale sine 0), row 0 on top, columns * rows.
  // {from, to} in seconds, {columns, rows}, scale "log" or "linear"; size: FFT's, or chosen.
  function spectrogram(samples, rate, wanted) {
    const { from, to, columns, rows, scale } = wanted;
    const hop = ((to - from) * rate) / columns;
    const size = wanted.size || windowSize(rate, hop);
    const frames = Math.min(4, Math.max(1, Math.ceil(hop / size))); // none skipped by a wide view
    const bins = size / 2;
    const low = new Int32Array(rows);
    const high = new Int32Array(rows);
    const mix = new Float32Array(rows);
    for (let row = 0; row < rows; row++) {
      // A row shows the strongest bin in its band; where bins are wider than rows, a line between
      // two of them.
      const a = (frequency(1 - (row + 1) / rows, rate, scale) / rate) * size;
      const b = (frequency(1 - row / rows, rate, scale) / rate) * size;
      const middle = (a + b) / 2;
      const wide = Math.floor(b) - Math.ceil(a) >= 1;
      low[row] = Math.min(bins, wide ? Math.ceil(a) : Math.floor(middle));
      high[row] = Math.min(bins, wide ? Math.floor(b) : low[row] + 1);
      mix[row] = wide ? -1 : middle - low[row];
    }
    const levels = new Float32Array(rows * columns);
    const sum = new Float32Array(bins + 1);
    for (let column = 0; column < columns; column++) {
      let power = null;
      for (let f = 0; f < frames; f++) {
        const centre = from * rate + (column + (f + 0.5) / frames) * hop;
        power = powers(samples, Math.round(centre - size / 2), size);
        if (frames > 1) for (let k = 0; k <= bins; k++) sum[k] = (f ? sum[k] : 0) + power[k] / frames;
      }
      if (frames > 1) power = sum;
      for (let row = 0; row < rows; row++) {
        let value = 0;
        if (mix[row] >= 0) value = power[low[row]] * (1 - mix[row]) + power[high[row]] * mix[row];
        else for (let k = low[row]; k <= high[row]; k++) value = Math.max(value, power[k]);
        levels[row * columns + column] = 4.342944819 * Math.log(value + 1e-14);
      }
    }
    return levels;
  }

  // The loudest bin of a whole clip in dB: what all lanes' colours are relative to.
  function loudest(samples, rate) {
    const size = windowSize(rate, Infinity);
    let most = 1e-14;
    for (let start = -size / 2; start < samples.length; start += size / 2) {
      const power = powers(samples, start, size);
      for (let k = 0; k < power.length; k++) if (power[k] > most) most = power[k];
    }
    return 10 * Math.log10(most);
  }

  function mid(buffer) {
    const first = buffer.getChannelData(0);
    if (buffer.numberOfChannels === 1) return first;
    const sum = new Float32Array(first.length);
    for (let c = 0; c < buffer.numberOfChannels; c++) {
      const data = buffer.getChannelData(c);
      for (let i = 0; i < sum.length; i++) sum[i] += data[i] / buffer.numberOfChannels;
    }
    return sum;
  }

  function nice(span, most) {
    const raw = span / Math.max(1, most);
    const unit = 10 ** Math.floor(Math.log10(raw));
    return [1, 2, 5, 10].map((f) => f * unit).find((step) => step >= raw * 0.999);
  }
  const hertz = (hz) => (hz >= 1000 ? `${+(hz / 1000).toFixed(1)} kHz` : `${hz} Hz`);

  function frequencyTicks(rate, scale, height) {
    const wanted = scale === "log" ? [100, 1000, 10000, 300, 3000] : [];
    if (scale !== "log") {
      const step = nice(rate / 2, height / 26);
      for (let hz = step; hz < rate / 2; hz += step) wanted.push(hz);
    }
    const taken = [];
    for (const hz of wanted) {
      const at = share(hz, rate, scale) * height;
      if (at > 6 && at < height - 6 && taken.every(([, other]) => Math.abs(other - at) > 15)) {
        taken.push([hz, at]);
      }
    }
    return taken.map(([hz, at]) => [hertz(hz), height - at]);
  }

  // What a lane's canvas shows; gives the milliseconds it took.
  // {samples, rate} or {image, duration}; {from, to, scale, top} with top in dB.
  function draw(canvas, shown) {
    const began = performance.now();
    const box = canvas.getBoundingClientRect();
    const ratio = window.devicePixelRatio || 1;
    const width = Math.max(1, Math.round(box.width * ratio));
    const height = Math.max(1, Math.round(box.height * ratio));
    if (canvas.width !== width) canvas.width = width;
    if (canvas.height !== height) canvas.height = height;
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, box.width, box.height);
    const plot = { x: GUTTER.left, w: box.width - GUTTER.left, h: box.height - GUTTER.bottom };
    if (plot.w < 8 || plot.h < 8) return 0;
    const { from, to } = shown;
    if (shown.image) {
      const { naturalWidth: w, naturalHeight: h } = shown.image;
      pen.imageSmoothingEnabled = false;
      const a = (from / shown.duration) * w;
      pen.drawImage(shown.image, a, 0, (to / shown.duration) * w - a, h, plot.x, 0, plot.w, plot.h);
    } else {
      const columns = Math.max(1, Math.min(Math.round(plot.w * Math.min(ratio, 1.5)), 900));
      const rows = Math.max(1, Math.min(Math.round(plot.h * ratio), 256));
      const levels = spectrogram(shown.samples, shown.rate, { ...shown, columns, rows });
      const picture = new ImageData(columns, rows);
      const pixels = new Uint32Array(picture.data.buffer);
      const factor = 255 / RANGE;
      for (let i = 0; i < pixels.length; i++) {
        const index = (levels[i] - shown.top + RANGE) * factor;
        pixels[i] = PALETTE[index < 0 ? 0 : index > 255 ? 255 : index | 0];
      }
      const small = document.createElement("canvas");
      small.width = columns;
      small.height = rows;
      small.getContext("2d").putImageData(picture, 0, 0);
      pen.imageSmoothingEnabled = true;
      pen.drawImage(small, plot.x, 0, plot.w, plot.h);
    }
    axes(pen, canvas, plot, shown);
    return performance.now() - began;
  }

  function axes(pen, canvas, plot, shown) {
    const ink = getComputedStyle(canvas).color;
    pen.fillStyle = pen.strokeStyle = ink;
    pen.font = "10px system-ui, sans-serif";
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    if (!shown.image) {
      for (const [text, y] of frequencyTicks(shown.rate, shown.scale, plot.h)) {
        const [number, unit] = text.split(" ");
        pen.fillText(unit === "kHz" ? `${number}k` : number, plot.x - 7, y);
        pen.fillRect(plot.x - 4, Math.round(y), 4, 1);
      }
      pen.textBaseline = "bottom";
      pen.fillText("Hz", plot.x - 7, plot.h + GUTTER.bottom - 1);
    }
    const step = nice(shown.to - shown.from, plot.w / 64);
    const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    pen.textBaseline = "bottom";
    for (let i = Math.ceil(shown.from / step - 1e-9); i * step <= shown.to + 1e-9; i++) {
      const x = plot.x + ((i * step - shown.from) / (shown.to - shown.from)) * plot.w;
      const last = x > plot.x + plot.w - 26;
      pen.textAlign = i * step - shown.from < 1e-9 ? "left" : last ? "right" : "center";
      pen.fillRect(Math.min(Math.round(x), plot.x + plot.w - 1), plot.h, 1, 3);
      pen.fillText(`${(i * step).toFixed(digits)} s`, x, plot.h + GUTTER.bottom - 1);
    }
  }

  Object.assign(bgray, { spectrogram, loudest, mid, draw, GUTTER, RANGE });
})();
