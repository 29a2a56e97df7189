// One errand of the Node client: JSON on stdin says where and what, JSON on stdout what came of it.
//   {"address", "options", "act": "put" | "get" | "delete" | "read", "label"}
// Keys are made here from content; nothing but the schema and the network is shared with the server.

import { readFileSync } from "node:fs";

import { Cache, Namespace, embeddingKey, itemDigest, mediaDigest, tensor } from "../../clients/node/index.js";

const errand = JSON.parse(readFileSync(0, "utf8"));
const options = { ...errand.options };
for (const name of ["ca", "cert", "key"]) if (options[name]) options[name] = readFileSync(options[name]);

const namespace = new Namespace({
  kind: "embedding",
  facts: { model: "test/vision", revision: "abc123", dtype: "float32", processor: { max_pixels: 200704, rescale: 0.5 } },
});
const content = mediaDigest(Buffer.from(`picture of ${errand.label}`), "image");
const key = embeddingKey(namespace, itemDigest(content, { grid: [1, 16, 16], processor_kwargs: { max_pixels: 200704 } }));

// What an encoder would give: sevenths have no end in binary, so rounding and byte order would show.
const embedding = Float32Array.from({ length: 3 * 64 }, (_, place) => (place - 40) / 7);
const deepstack = Uint16Array.from({ length: 64 }, (_, place) => 0x3f80 + place); // bfloat16 words

const ACTS = {
  put: (cache) =>
    cache.put(namespace, [
      {
        key,
        tensors: {
          embedding: tensor(embedding, [3, 64]),
          deepstack: tensor(deepstack, [2, 32], "bfloat16"),
          nothing: tensor(new Int8Array(0), [0, 5]),
          scale: tensor(Float64Array.of(0.1), []),
        },
      },
    ]),
  get: async (cache) => {
    const [found] = await cache.get([key]);
    if (!found) return null;
    const shown = Object.entries(found.tensors).map(([name, { dtype, shape, data }]) => [
      name,
      { dtype, shape, hex: data.toString("hex") },
    ]);
    return { kind: found.kind, tensors: Object.fromEntries(shown) };
  },
  many: async (cache) => {
    const keys = errand.digests.map((digest) => ({ digest: Buffer.from(digest, "hex") }));
    return (await cache.get(keys)).map((found) => found && Object.values(found.tensors).map(({ data }) => data.length));
  },
  delete: (cache) => cache.delete([key]),
};

const cache = new Cache(errand.address, options);
let answer;
try {
  answer = { key: key.digest.toString("hex"), came: await ACTS[errand.act](cache) };
} catch (error) {
  if (error.code === undefined) throw error;
  answer = { code: error.code, details: error.details };
}
cache.close();
process.stdout.write(JSON.stringify(answer));
