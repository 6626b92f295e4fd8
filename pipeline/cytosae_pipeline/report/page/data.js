// Data files are scripts that call `cytosae.receive`: a page opened from disk may run scripts beside it, but not fetch.
"use strict";

const UNANSWERED = "No answer: has cytosae-cache explore ended? The terminal in which it runs says more.";

/** The live page's server asked for something; where there is no server any more, an answer that says so. */
const ask = (address, options) => fetch(address, options).catch(() => new Response(UNANSWERED, { status: 503 }));

const cytosae = (() => {
  const received = new Map();
  const waiting = new Map();

  /** Called by each data file. */
  function receive(name, value) {
    received.set(name, value);
  }

  /** The data of a name such as `latents/12`; rejects if there is no such file. */
  function load(name) {
    if (received.has(name)) return Promise.resolve(received.get(name));
    if (waiting.has(name)) return waiting.get(name);
    const promise = new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = `data/${name}.js`;
      script.onload = () => {
        script.remove();
        if (received.has(name)) resolve(received.get(name));
        else reject(new Error(`data/${name}.js does not hold ${name}`));
      };
      script.onerror = () => {
        script.remove();
        reject(new Error(`there is no data/${name}.js`));
      };
      document.head.append(script);
    }).finally(() => waiting.delete(name));
    waiting.set(name, promise);
    return promise;
  }

  const TYPES = { f4: Float32Array, u1: Uint8Array, u2: Uint16Array, i4: Int32Array, i1: Int8Array };

  /** A typed array from `{dtype, shape, data}`; little-endian, as every browser's machine is. */
  function decode({ dtype, data }) {
    const text = atob(data);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    return new TYPES[dtype](bytes.buffer);
  }

  return { receive, load, decode };
})();
