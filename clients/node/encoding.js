// The bytes a key is hashed from: length framing, the canonical encoding of plain values, and BLAKE3-256 over both.
// docs/keys.md is the specification. Pure: values in, bytes out.

import { blake3 } from "@noble/hashes/blake3";

export const NONE = Buffer.alloc(32);
const MAX_DEPTH = 32;
const MAX_ENCODED_NBYTES = 4 << 20;
const INT_MIN = -(1n << 63n);
const INT_MAX = (1n << 64n) - 1n;

/** A key, digest, fact or span cannot be formed from these values; the message names the place. */
export class KeyInputError extends Error {}

/** A number that is a float even where it is whole: `1.0` in Python is `new Float(1)` here, and `1` is an integer. */
export class Float {
  constructor(value) {
    this.value = value;
  }
}

export function u32(number) {
  const out = Buffer.alloc(4);
  out.writeUInt32LE(number);
  return out;
}

export function u64(...numbers) {
  const out = Buffer.alloc(8 * numbers.length);
  numbers.forEach((number, place) => out.writeBigUInt64LE(BigInt(number), 8 * place));
  return out;
}

export function framed(bytes) {
  return Buffer.concat([u64(bytes.length), bytes]);
}

export function hash(...pieces) {
  const hasher = blake3.create({});
  for (const piece of pieces) hasher.update(piece);
  return Buffer.from(hasher.digest());
}

/** BLAKE3-256 over the framed domain and then each framed field. */
export function digest(domain, ...fields) {
  const pieces = [framed(Buffer.from(domain))];
  for (const field of fields) pieces.push(u64(field.length), field);
  return hash(...pieces);
}

export function textBytes(text, path) {
  if (/\p{Surrogate}/u.test(text)) throw new KeyInputError(`${path}: text holds a lone surrogate; repair it first`);
  return Buffer.from(text, "utf8");
}

export function checkDigest(value, path) {
  if (!(value instanceof Uint8Array) || value.length !== 32)
    throw new KeyInputError(`${path}: a digest is exactly 32 bytes; pass it whole`);
  return value;
}

/** An integer 0 .. 2^63-1 as a BigInt. */
export function checkCount(value, path, minimum = 0n) {
  if (typeof value !== "bigint" && !Number.isSafeInteger(value))
    throw new KeyInputError(`${path}: expected an integer, got ${String(value)}; pass large ones as BigInt`);
  const number = BigInt(value);
  if (number < minimum || number >= 1n << 63n) throw new KeyInputError(`${path}: ${number} is out of range`);
  return number;
}

/** A number as a Float; a BigInt that no float holds exactly is refused, as two would become one. */
export function exactFloat(value, path) {
  const number = value instanceof Float ? value.value : value;
  if (typeof number !== "number" && typeof number !== "bigint")
    throw new KeyInputError(`${path}: ${typeof number} is no number`);
  if (typeof number === "bigint" && BigInt(Number(number)) !== number)
    throw new KeyInputError(`${path}: ${number} does not fit a 64-bit float exactly; round it first`);
  return new Float(Number(number));
}

/** The one encoding of null, booleans, integers, floats, text, bytes, lists and maps with text keys. */
export function canonical(value, path = "value") {
  const room = { nbytes: MAX_ENCODED_NBYTES };
  const out = [];
  encode(value, path, 0, out, room);
  return Buffer.concat(out);
}

function emit(piece, path, out, room) {
  room.nbytes -= piece.length;
  if (room.nbytes < 0) throw new KeyInputError(`${path}: encodes to more than ${MAX_ENCODED_NBYTES} bytes; pass a digest`);
  out.push(piece);
}

function encode(value, path, depth, out, room) {
  if (depth > MAX_DEPTH) throw new KeyInputError(`${path}: nested more than ${MAX_DEPTH} levels deep`);
  if (Array.isArray(value)) {
    emit(Buffer.concat([Buffer.of(7), u64(value.length)]), path, out, room);
    for (let place = 0; place < value.length; place++) encode(value[place], `${path}[${place}]`, depth + 1, out, room);
  } else if (isMap(value)) {
    const entries = value instanceof Map ? [...value] : Object.entries(value);
    const sorted = entries.map(([name, item]) => {
      if (typeof name !== "string") throw new KeyInputError(`${path}: every key must be a string`);
      return [textBytes(name, path), name, item];
    });
    sorted.sort(([left], [right]) => Buffer.compare(left, right));
    emit(Buffer.concat([Buffer.of(8), u64(sorted.length)]), path, out, room);
    for (const [bytes, name, item] of sorted) {
      emit(framed(bytes), path, out, room);
      encode(item, `${path}.${name}`, depth + 1, out, room);
    }
  } else {
    emit(scalar(value, path), path, out, room);
  }
}

function isMap(value) {
  if (value instanceof Map) return true;
  if (typeof value !== "object" || value === null) return false;
  const prototype = Object.getPrototypeOf(value);
  return prototype === Object.prototype || prototype === null;
}

function scalar(value, path) {
  if (value === null) return Buffer.of(0);
  if (typeof value === "boolean") return Buffer.of(value ? 2 : 1);
  if (typeof value === "string") return Buffer.concat([Buffer.of(5), framed(textBytes(value, path))]);
  if (value instanceof Uint8Array) return Buffer.concat([Buffer.of(6), framed(value)]);
  if (typeof value === "bigint" || (Number.isInteger(value) && !Object.is(value, -0))) {
    if (typeof value === "number" && !Number.isSafeInteger(value))
      throw new KeyInputError(`${path}: ${value} is not exact as a number; pass a BigInt, or new Float(value)`);
    if (BigInt(value) < INT_MIN || BigInt(value) > INT_MAX)
      throw new KeyInputError(`${path}: integer outside -2^63 .. 2^64-1; pass it as text or bytes`);
    return Buffer.concat([Buffer.of(3), framed(Buffer.from(String(value)))]);
  }
  const number = value instanceof Float ? value.value : value;
  if (typeof number === "number") {
    if (!Number.isFinite(number)) throw new KeyInputError(`${path}: ${number} is not finite; pass null or text`);
    const out = Buffer.alloc(9, 4);
    out.writeDoubleLE(number, 1);
    return out;
  }
  throw new KeyInputError(`${path}: ${typeof value} cannot be part of a key; pass plain values`);
}
