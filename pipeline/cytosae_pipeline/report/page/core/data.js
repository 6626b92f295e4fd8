// Data files are scripts that call `cytosae.receive`: a page opened from disk may run scripts beside it, but not fetch.
"use strict";

const NO_ANSWER = "No answer: has cytosae-cache explore ended? See the terminal in which it was started.";

/**
 * Send a request to the explore server; if there is no server any more, the response says so.
 *
 * @param {string} address
 * @param {RequestInit} [options]
 */
const ask = (address, options) => fetch(address, options).catch(() => new Response(NO_ANSWER, { status: 503 }));

const cytosae = (() => {
  /** @type {Map<string, any>} */
  const received = new Map();
  /** @type {Map<string, Promise<any>>} */
  const waiting = new Map();

  /**
   * Called by each data file.
   *
   * @param {string} name
   * @param {unknown} value
   */
  function receive(name, value) {
    received.set(name, value);
  }

  /**
   * Load the data file of a name such as `latents/12`; rejects if there is no such file.
   *
   * @template {string} N
   * @param {N} name
   * @returns {Promise<RecordOf<N>>}
   */
  function load(name) {
    if (received.has(name)) return Promise.resolve(received.get(name));
    const begun = waiting.get(name);
    if (begun) return begun;
    const promise = new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = `data/${name}.js`;
      script.onload = () => {
        script.remove();
        if (received.has(name)) resolve(received.get(name));
        else reject(new Error(`data/${name}.js does not contain ${name}`));
      };
      script.onerror = () => {
        script.remove();
        reject(new Error(`data/${name}.js is missing`));
      };
      document.head.append(script);
    }).finally(() => waiting.delete(name));
    waiting.set(name, promise);
    return promise;
  }

  const TYPES = { f4: Float32Array, u1: Uint8Array, u2: Uint16Array, i4: Int32Array, i1: Int8Array };

  /**
   * Decode a packed array; little-endian, as every machine with a browser is.
   *
   * @template {Dtype} D
   * @param {Packed<D>} packed
   * @returns {TypedArrays[D]}
   */
  function decode({ dtype, data }) {
    const text = atob(data);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    return /** @type {any} */ (new TYPES[dtype](bytes.buffer));
  }

  return { receive, load, decode };
})();
