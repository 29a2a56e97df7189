// Asks over HTTP/2 for a value, four times at once, and takes nothing of the answers: node silent.mjs HOST:PORT KEY
// Stays until it is killed.

import http2 from "node:http2";

const [, , address, key] = process.argv;
const body = Buffer.concat([Buffer.from([0, 0, 0, 0, 34, 0x0a, 32]), Buffer.from(key, "hex")]); // GetRequest{keys}
const session = http2.connect(`http://${address}`);
for (let number = 0; number < 4; number++) {
  const call = session.request({
    ":method": "POST",
    ":path": "/mmcache.v1.Cache/Get",
    "content-type": "application/grpc",
    te: "trailers",
  });
  call.pause();
  call.on("error", () => {});
  call.end(body);
}
setInterval(() => {}, 1000);
