// A client of `service Cache`, made from proto/mmcache/pb/cache.proto when it starts: nothing is generated.

import { fileURLToPath } from "node:url";

import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";
import { createXXHash128 } from "hash-wasm";

const PROTO = fileURLToPath(new URL("../../proto/mmcache/pb/cache.proto", import.meta.url));
const PUT_STATUS = ["wanted", "stored", "present", "busy", "full", "too_large", "no_entries", "bad_frame"].concat([
  "lost",
  "overloaded",
  "expired",
  "quota",
  "stopped",
]);
const DTYPES = new Map([
  [Uint8Array, "uint8"],
  [Buffer, "uint8"],
  [Int8Array, "int8"],
  [Int16Array, "int16"],
  [Int32Array, "int32"],
  [BigInt64Array, "int64"],
  [Float32Array, "float32"],
  [Float64Array, "float64"],
]);

/** A typed array as a tensor; `dtype` where its words are another type: bfloat16 in a Uint16Array, bool, float8. */
export function tensor(array, shape = [array.length], dtype = DTYPES.get(array.constructor)) {
  if (!dtype) throw new TypeError(`say the dtype of a ${array.constructor.name}`);
  return { dtype, shape, data: Buffer.from(array.buffer, array.byteOffset, array.byteLength) };
}

/**
 * Reads and writes tensors by content key. `address` is HOST:PORT. `token` is the bearer token; `ca`, `cert` and `key`
 * are PEM: with `ca` the connection is TLS, with `cert` and `key` mutual TLS. Calls reject with the gRPC error, whose
 * `code` and `details` say why; what is not stored is null, not an error.
 */
export class Cache {
  constructor(address, { token, ca, cert, key, serverName, deadlineMs = 5000, maxNbytes = 64 << 20, proto = PROTO } = {}) {
    const loaded = protoLoader.loadSync(proto, { keepCase: true, longs: Number, enums: String, defaults: true });
    const { Cache: Stub } = grpc.loadPackageDefinition(loaded).mmcache.v1;
    const credentials = ca ? grpc.credentials.createSsl(ca, key, cert) : grpc.credentials.createInsecure();
    this.deadlineMs = deadlineMs;
    this.maxNbytes = maxNbytes;
    this.metadata = new grpc.Metadata();
    if (token) this.metadata.set("authorization", `Bearer ${token}`);
    this.stub = new Stub(address, credentials, {
      "grpc.max_receive_message_length": maxNbytes,
      "grpc.max_send_message_length": -1,
      ...(serverName ? { "grpc.ssl_target_name_override": serverName } : {}),
    });
    this.sums = createXXHash128();
  }

  /** Any method of the service by its name in the schema; resolves to the reply. */
  call(method, request = {}) {
    return new Promise((resolve, reject) => {
      const options = { deadline: Date.now() + this.deadlineMs };
      this.stub[method](request, this.metadata, options, (error, reply) => (error ? reject(error) : resolve(reply)));
    });
  }

  /**
   * Store values: `entries` are {key, tensors: {name: tensor}, ttlMs}, `key` as keys.js makes it. Resolves to one word
   * an entry: "stored" and "present" are good, any other says why it was not stored.
   */
  async put(namespace, entries) {
    const sums = await this.sums;
    const reply = await this.call("Put", {
      kind: namespace.kind,
      facts: namespace.facts,
      entries: entries.map(({ key, tensors, ttlMs = 0 }) => ({
        key: key.digest,
        parent: key.parent.some((byte) => byte) ? key.parent : undefined,
        home: key.home,
        chain_index: key.index,
        ttl_ms: ttlMs,
        tensors: Object.entries(tensors).map(([name, value]) => ({ name, ...value, xxh3_128: sumOf(sums, value.data) })),
      })),
    });
    return [...reply.status].map((status) => PUT_STATUS[status] ?? `status ${status}`);
  }

  /**
   * Read values, verified: one object {tensors: {name: {dtype, shape, data}}, ...} a key, null where there is none.
   * Asks again for what did not fit in one reply.
   */
  async get(keys) {
    const sums = await this.sums;
    const found = [];
    while (found.length < keys.length) {
      const left = keys.slice(found.length).map((key) => key.digest);
      const reply = await this.call("Get", { keys: Buffer.concat(left), max_nbytes: this.maxNbytes });
      const cut = reply.entries.findIndex((entry) => entry.status === "LATER");
      const whole = cut < 0 ? reply.entries : reply.entries.slice(0, Math.max(cut, 1));
      if (!whole.length) throw new Error("the server answered nothing");
      for (const entry of whole) found.push(verified(sums, entry));
    }
    return found;
  }

  /** One boolean a key. */
  async contains(keys) {
    const reply = await this.call("Contains", { keys: Buffer.concat(keys.map((key) => key.digest)) });
    return [...reply.present].map((byte) => byte === 1);
  }

  /** Forget keys; one boolean a key, true where something was there. */
  async delete(keys) {
    const reply = await this.call("Delete", { keys: Buffer.concat(keys.map((key) => key.digest)) });
    return [...reply.deleted].map((byte) => byte === 1);
  }

  close() {
    this.stub.close();
  }
}

function sumOf(sums, data) {
  return Buffer.from(sums.init().update(data).digest("binary"));
}

function verified(sums, entry) {
  if (entry.status !== "FOUND") return null; // so is a status this client does not know
  const tensors = {};
  for (const { name, dtype, shape, data, xxh3_128: sum } of entry.tensors) {
    if (!sumOf(sums, data).equals(sum)) return null;
    tensors[name] = { dtype, shape, data };
  }
  return { ...entry, tensors };
}
